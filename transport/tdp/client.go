package tdp

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/record"
	"github.com/coreos/torus/transport"
)

// ClientConfig is what Dial needs to know. Zero durations mean the default given with each.
type ClientConfig struct {
	// Addr is the peer's address: "tdp://host:port", or any address that the network itself takes.
	Addr string
	// Hello is how we introduce ourselves.
	Hello Hello
	// Peer is who must answer there; anybody may if it is zero.
	Peer torus.PeerID

	// Up is called when the connection is ready, with the peer's hello.
	Up func(Hello)
	// Down is called when a connection is lost, before the requests under way on it fail, and when
	// an attempt to connect fails. It may come several times in a row, and not after Close.
	Down func(error)

	Direct prometheus.Counter // reads that the peer has not been asked for; may be nil

	Rand *rand.Rand   // for jitter; nil: seeded from Hello
	Log  *slog.Logger // nil: discard

	PingEvery      time.Duration // 200 ms: silence after which the peer is asked for a sign of life
	DeadAfter      time.Duration // 700 ms: silence after which the connection is given up
	RequestTimeout time.Duration // 5 s: for any single reply; then the connection is given up
	DialTimeout    time.Duration // 2 s: for the connection and the hello
	MinBackoff     time.Duration // 50 ms: between attempts, doubling
	MaxBackoff     time.Duration // 1 s
}

func (cfg *ClientConfig) setDefaults() {
	for _, d := range []struct {
		at *time.Duration
		to time.Duration
	}{
		{&cfg.PingEvery, 200 * time.Millisecond},
		{&cfg.DeadAfter, 700 * time.Millisecond},
		{&cfg.RequestTimeout, 5 * time.Second},
		{&cfg.DialTimeout, 2 * time.Second},
		{&cfg.MinBackoff, 50 * time.Millisecond},
		{&cfg.MaxBackoff, time.Second},
	} {
		if *d.at <= 0 {
			*d.at = d.to
		}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Rand == nil {
		h := uint64(0)
		for _, b := range cfg.Hello.ID {
			h = h*131 + uint64(b)
		}
		cfg.Rand = rand.New(rand.NewPCG(h, cfg.Hello.Incarnation))
	}
	cfg.Hello.Role, cfg.Hello.MinVersion, cfg.Hello.MaxVersion = RoleClient, MinVersion, MaxVersion
}

// Client is a BlockStore at the other end of a connection, which it keeps up by itself until Close.
//
// While there is no connection Submit fails at once with an error wrapping torus.ErrNoPeer: nothing was sent.
// A connection that is lost fails what was under way with an error wrapping torus.ErrBlockUnavailable: whether it took
// effect at the peer is unknown. Errors of the peer's own wrap their sentinel, see torus.ErrorCode.
//
// The Data of an Append must stay as it is until Done, as everywhere; that of a Read is written to
// directly from the socket, or read from the peer's own file if that is on this machine (direct.go), in memory that
// may be exchanged for the request's Buf.
type Client struct {
	l    loop.Loop
	n    transport.Network
	cfg  ClientConfig
	dial string // cfg.Addr as the network takes it

	link    *link // nil between attempts
	up      bool
	down    error // what Submit answers while not up
	slots   slots
	backoff time.Duration
	retry   *loop.Timer
	closed  bool
	said    string // the last reason logged, to say it once

	// Time is counted in ticks, and a tick in which this process itself did not run counts as one: a client
	// that was suspended does not take its own absence for the peer's.
	ticks  uint64
	every  time.Duration
	ticker *loop.Timer
	tickFn func()

	head [HeaderSize]byte // scratch

	lookups []*lookup        // to be used again
	read    []*torus.Request // what has been read already, and is finished at the end of the turn
	readFn  func()
}

var _ torus.BlockStore = (*Client)(nil)

// DialAddr turns "tdp://host:port" into the form a transport.Network takes; other addresses stay.
func DialAddr(addr string) string {
	if rest, ok := strings.CutPrefix(addr, "tdp://"); ok {
		return "tcp://" + rest
	}
	return addr
}

// Dial starts a client on l. Whatever goes wrong is reported by Down, and by every Submit.
func Dial(l loop.Loop, n transport.Network, cfg ClientConfig) *Client {
	cfg.setDefaults()
	c := &Client{l: l, n: n, cfg: cfg, dial: DialAddr(cfg.Addr), slots: newSlots(), backoff: cfg.MinBackoff}
	c.every = max(min(cfg.PingEvery, cfg.DeadAfter/2)/2, time.Millisecond)
	c.tickFn, c.readFn = c.tick, c.finishRead
	c.down = c.unavailable(errors.New("not connected yet"))
	l.Defer(c.connect)
	return c
}

// Up reports whether requests can be sent just now.
func (c *Client) Up() bool { return c.up }

// Near reports whether the peer is on this machine and lets us read its files.
func (c *Client) Near() bool { return c.up && c.link.looks }

// Addr is the address the client was made for.
func (c *Client) Addr() string { return c.cfg.Addr }

// Outstanding is the number of requests under way.
func (c *Client) Outstanding() int { return c.slots.n }

// Close ends the connection for good. What is under way fails at the end of the turn.
func (c *Client) Close() {
	if c.closed {
		return
	}
	c.closed = true
	c.down = c.unavailable(torus.ErrClosed)
	c.retry.Stop()
	if c.link != nil {
		c.link.fail(torus.ErrClosed)
	}
}

func (c *Client) unavailable(why error) error {
	return &linkError{c.cfg.Addr, "no connection", why, torus.ErrNoPeer}
}

// linkError is what a request gets that was not answered by the peer.
type linkError struct {
	addr  string
	what  string
	cause error
	kind  error
}

func (e *linkError) Error() string {
	return "peer at " + e.addr + ": " + e.what + ": " + e.cause.Error()
}
func (e *linkError) Unwrap() []error { return []error{e.kind, e.cause} }

var (
	errSize    = fmt.Errorf("data of an append must be 1 to %d whole pages: %w", MaxPayload/torus.PageSize, torus.ErrInvalid)
	errLong    = fmt.Errorf("more than %d bytes or %d tails asked for at once: %w", MaxPayload, MaxTails, torus.ErrInvalid)
	errOp      = fmt.Errorf("unknown operation: %w", torus.ErrNotSupported)
	errTooMany = fmt.Errorf("%d requests under way on one connection: %w", maxSlots, torus.ErrAgain)
)

// sendable refuses what a frame cannot carry.
func sendable(r *torus.Request) error {
	switch r.Op {
	case torus.OpAppend:
		if len(r.Data) == 0 || len(r.Data) > MaxPayload || len(r.Data)%torus.PageSize != 0 {
			return errSize
		}
	case torus.OpRead:
		if len(r.Data) > MaxPayload {
			return errLong
		}
	case torus.OpScan:
		if r.Len > MaxPayload {
			return errLong
		}
	case torus.OpList:
		if r.Len > MaxTails {
			return errLong
		}
	case torus.OpPing, torus.OpSync, torus.OpFence, torus.OpSeal, torus.OpDelete, torus.OpVerify:
	default:
		return errOp
	}
	return nil
}

// Submit implements torus.BlockStore.
func (c *Client) Submit(r *torus.Request) {
	r.Length, r.Fence, r.Tails, r.Committed = 0, 0, nil, 0
	if !c.up {
		r.Finish(c.down)
		return
	}
	if err := sendable(r); err != nil {
		r.Finish(err)
		return
	}
	if r.Op == torus.OpRead && c.link.looks && r.Epoch == 0 && c.link.look(r) {
		return
	}
	id, ok := c.slots.take(r, c.ticks)
	if !ok {
		r.Finish(errTooMany)
		return
	}
	c.send(id, r)
}

// send sends the request that is in a slot.
func (c *Client) send(id uint32, r *torus.Request) {
	f := frame{op: uint8(r.Op), id: id, ref: r.Ref, epoch: r.Epoch, off: r.Off, len: r.Len}
	switch r.Op {
	case torus.OpAppend:
		f.len = uint32(len(r.Data))
		if r.Reserve {
			f.flags = flagReserve
		}
		if r.Durable {
			f.flags |= flagDurable
		}
		if !c.link.lend(&f, r) {
			f.payload = f.len
		}
	case torus.OpRead:
		f.len = uint32(len(r.Data))
		if c.link.borrows && len(r.Data) >= lendReadsAtLeast {
			f.flags = flagLent
		}
	}
	f.put(&c.head)
	c.link.s.Write(c.head[:])
	if f.payload > 0 {
		c.link.s.WriteShared(r.Data)
	}
}

// Replace puts with in the place of old, which is under way and of which nothing has arrived: what the peer answers to old is
// answered to with instead, and old is the caller's again, along with its Data. with must be the same request but for Data and Done.
// False, and nothing has changed, if the answer is arriving already or old is not under way. It costs a look at all that is.
func (c *Client) Replace(old, with *torus.Request) bool {
	if c.link == nil || c.link.req == old {
		return false
	}
	return c.slots.replace(old, with)
}

// connect starts an attempt.
func (c *Client) connect() {
	if c.closed {
		return
	}
	k := &link{c: c}
	k.filled = k.onFilled
	c.link = k
	if err := c.cfg.Hello.check(); err != nil {
		k.gone(err)
		return
	}
	k.dial = c.l.After(c.cfg.DialTimeout, func() {
		k.fail(fmt.Errorf("no connection and hello within %v", c.cfg.DialTimeout))
	})
	k.s = c.n.Dial(c.l, c.dial, k)
}

// nextTick: all clients of a loop that tick as often do so in the same turn, so that an idle process sleeps for longer.
func (c *Client) nextTick() {
	c.ticker = c.l.After(c.every-c.l.Now()%c.every, c.tickFn)
}

// tick looks after the connection that is up.
func (c *Client) tick() {
	c.ticks++
	k := c.link
	if k == nil || !c.up {
		return
	}
	c.nextTick()

	k.quiet++
	quiet := time.Duration(k.quiet) * c.every
	if quiet >= c.cfg.DeadAfter {
		k.fail(fmt.Errorf("silent for %v", c.cfg.DeadAfter))
		return
	}
	if quiet >= c.cfg.PingEvery && !k.pinged {
		k.pinged = true
		f := frame{op: uint8(torus.OpPing)}
		k.send(&f)
	}
	if r, _, sent := c.slots.oldest(); r != nil && time.Duration(c.ticks-sent)*c.every > c.cfg.RequestTimeout {
		k.fail(fmt.Errorf("no reply to %v %v within %v", r.Op, r.Ref, c.cfg.RequestTimeout))
	}
}

// link is one connection of a Client, from dialling to its end.
type link struct {
	c    *Client
	s    transport.Stream
	why  error       // set when it has been given up
	dial *loop.Timer // bounds dialling, up to the hello, and saying goodbye

	lender  transport.Lender // nil: s is none
	lends   bool             // the peer can borrow from us
	borrows bool             // we can borrow from it
	looks   bool             // we can read its blocks ourselves
	places  places

	quiet  int  // ticks since the last sign of life
	pinged bool // since then

	// The reply whose payload is on its way past Data.
	reply  frame
	req    *torus.Request
	into   []byte // all of it
	have   int    // bytes of it that are there
	part   int    // bytes asked for by ReadInto
	filled func()
}

// maxPart bounds one ReadInto, so that a large reply on a slow line is not silence.
const maxPart = 256 << 10

// fail gives the connection up. Closed follows, and only then do the requests under way fail: until then
// the transport may still touch their data.
func (k *link) fail(why error) {
	if k.why != nil {
		return
	}
	k.why = why
	k.c.up = false
	if k.s != nil {
		k.s.Close()
	}
}

// refuse tells the other side why before the connection is given up.
func (k *link) refuse(why error) {
	if k.why != nil {
		return
	}
	k.why = why
	k.c.up = false
	k.s.Write(goodbye(why))
	k.s.CloseAfterWrite()
	k.dial.Stop()
	k.dial = k.c.l.After(k.c.cfg.DialTimeout, k.s.Close) // if that cannot be sent
}

func (k *link) send(f *frame) {
	f.put(&k.c.head)
	k.s.Write(k.c.head[:])
}

// Opened implements transport.Handler.
func (k *link) Opened(s transport.Stream) {
	k.s = s
	k.lender, _ = s.(transport.Lender)
	if k.why != nil {
		return
	}
	s.Write(k.c.cfg.Hello.encode())
}

// Closed implements transport.Handler.
func (k *link) Closed(_ transport.Stream, err error) {
	if k.why != nil {
		err = k.why
	} else if err == nil {
		err = errors.New("closed by the peer")
	}
	k.gone(err)
}

// gone ends the link's life: everything that waited for it fails, and the next attempt is planned.
func (k *link) gone(err error) {
	c := k.c
	if c.link != k {
		return
	}
	k.dial.Stop()
	c.ticker.Stop()
	c.link, c.up = nil, false
	k.forgetPlaces()
	if !c.closed {
		c.down = c.unavailable(err)
		if text := err.Error(); text != c.said {
			c.said = text
			c.cfg.Log.Warn("no connection to peer", "peer", c.cfg.Addr, "err", text)
		}
		if c.cfg.Down != nil {
			c.cfg.Down(c.down)
		}
	}
	lost := error(&linkError{c.cfg.Addr, "connection lost", err, torus.ErrBlockUnavailable})
	for {
		r, id, _ := c.slots.oldest()
		if r == nil {
			break
		}
		c.slots.drop(id)
		r.Finish(lost)
	}
	if c.closed {
		return
	}
	// Half of the wait is chance, so that clients do not come back in step.
	wait := c.backoff/2 + time.Duration(c.cfg.Rand.Int64N(int64(c.backoff/2)+1))
	c.backoff = min(2*c.backoff, c.cfg.MaxBackoff)
	c.retry = c.l.After(wait, c.connect)
}

// Data implements transport.Handler.
func (k *link) Data(_ transport.Stream, b []byte) (consumed, need int) {
	k.quiet, k.pinged = 0, false
	for k.why == nil {
		rest := b[consumed:]
		if len(rest) < HeaderSize {
			return consumed, HeaderSize
		}
		var f frame
		if err := f.parse(rest); err != nil {
			k.refuse(err)
			break
		}
		size := HeaderSize + int(f.payload)
		if f.op == opHello || f.op == opGoodbye {
			if f.payload > maxHello {
				k.refuse(fmt.Errorf("hello or goodbye of %d bytes: %w", f.payload, torus.ErrInvalid))
				break
			}
			if len(rest) < size {
				return consumed, size
			}
			if f.op == opGoodbye {
				k.fail(newRemoteError("the peer says", &f, rest[HeaderSize:size]))
			} else {
				k.onHello(&f, rest[HeaderSize:size])
			}
			consumed += size
			continue
		}
		if !k.c.up {
			k.refuse(fmt.Errorf("op %#x before the hello: %w", f.op, torus.ErrInvalid))
			break
		}
		if f.op == uint8(torus.OpPing)|opReply && f.id == 0 && f.payload == 0 {
			consumed += HeaderSize // a sign of life, no more
			continue
		}
		r := k.c.slots.asked(f.id)
		if err := expected(&f, r); err != nil {
			k.refuse(err)
			break
		}
		if f.flags&flagLent != 0 {
			consumed += HeaderSize
			k.borrow(&f, r)
			continue
		}
		if f.payload == 0 {
			consumed += HeaderSize
			k.finish(&f, r, nil)
			continue
		}
		into := r.Data
		if f.op != uint8(torus.OpRead)|opReply || f.code != 0 {
			into = nil
		}
		if into == nil {
			into = make([]byte, f.payload) // bounded by what was asked for
		}
		if len(rest) >= size {
			copy(into, rest[HeaderSize:size])
			consumed += size
			k.finish(&f, r, into)
			continue
		}
		k.reply, k.req, k.into, k.have = f, r, into, 0
		k.fill()
		return consumed + HeaderSize, 0
	}
	return len(b), 0
}

// lend has f lend the Data of r rather than send it; false if that cannot be.
func (k *link) lend(f *frame, r *torus.Request) bool {
	if !k.lends || r.Owner == nil {
		return false
	}
	r.Owner.Retain()
	if !f.lend(k.lender, r.Data, r.Owner) {
		r.Owner.Release()
		return false
	}
	return true
}

// borrow takes what the peer has lent in reply to a Read.
func (k *link) borrow(f *frame, r *torus.Request) {
	b, err := f.borrow(k.lender)
	if err != nil {
		k.refuse(err)
		return
	}
	copyPieces(r.Data, b)
	k.lender.GiveBack()
	k.send(&frame{op: opReturn, id: f.id})
	k.finish(f, r, nil)
}

// copyPieces is copy, in pieces: what is copied at once in pieces of a megabyte goes past the processor's caches, and is about to be verified.
func copyPieces(dst, src []byte) {
	const piece = 64 << 10
	for n := 0; n < len(src); {
		n += copy(dst[n:], src[n:min(n+piece, len(src))])
	}
}

// fill asks for the next part of a payload.
func (k *link) fill() {
	k.part = min(len(k.into)-k.have, maxPart)
	k.s.ReadInto(k.into[k.have:k.have+k.part], k.filled)
}

func (k *link) onFilled() {
	k.quiet, k.pinged = 0, false
	if k.why != nil {
		return
	}
	k.have += k.part
	if k.have < len(k.into) {
		k.fill()
		return
	}
	r, p := k.req, k.into
	k.req, k.into = nil, nil
	k.finish(&k.reply, r, p)
}

// expected checks a reply against its request, which is nil if there is none.
func expected(f *frame, r *torus.Request) error {
	if r == nil {
		return fmt.Errorf("op %#x with id %#x answers no request: %w", f.op, f.id, torus.ErrInvalid)
	}
	if f.op != uint8(r.Op)|opReply {
		return fmt.Errorf("op %#x answers %v: %w", f.op, r.Op, torus.ErrInvalid)
	}
	ok := f.payload == 0
	switch {
	case f.code != 0:
		ok = f.payload <= maxText && f.flags == 0
	case f.flags&flagLent != 0: // flagsOf allows that to a Read only
		ok = ok && int(f.len) == len(r.Data)
	case r.Op == torus.OpRead:
		ok = int(f.payload) == len(r.Data)
	case r.Op == torus.OpScan:
		ok = f.payload <= r.Len
	case r.Op == opWhere:
		ok = f.payload == whereSize
	case r.Op == torus.OpFence, r.Op == torus.OpList:
		ok = f.payload%tailSize == 0 && uint64(f.payload) <= uint64(r.Len)*tailSize
	}
	if !ok {
		return fmt.Errorf("%v answered with %d bytes: %w", r.Op, f.payload, torus.ErrInvalid)
	}
	return nil
}

// finish completes a request with its reply. The payload p is the Data of a Read, or memory of our own.
func (k *link) finish(f *frame, r *torus.Request, p []byte) {
	c := k.c
	var err error
	switch {
	case f.code != 0:
		err = newRemoteError(c.cfg.Addr, f, p)
	case r.Op == torus.OpFence, r.Op == torus.OpList:
		r.Tails, err = decodeTails(f, p)
	case r.Op == torus.OpScan, r.Op == opWhere:
		if record.Checksum(p) != f.sum {
			err = fmt.Errorf("reply to %v: %w", r.Op, torus.ErrCorrupt)
		}
		r.Data = p
	}
	if err != nil && f.code == 0 {
		k.refuse(err) // the stream cannot be trusted any more; the request fails along with it
		return
	}
	r.Length, r.Fence, r.Committed = f.len, f.fence, f.committed
	c.slots.drop(f.id)
	if k.lends && r.Op == torus.OpAppend {
		k.lender.Reclaim(f.id)
	}
	r.Finish(err)
}

func (k *link) onHello(f *frame, p []byte) {
	c := k.c
	if c.up {
		k.refuse(fmt.Errorf("second hello: %w", torus.ErrInvalid))
		return
	}
	h, err := decodeHello(f, p)
	if err == nil {
		err = agree(&c.cfg.Hello, &h)
	}
	if err == nil && !c.cfg.Peer.IsZero() && h.ID != c.cfg.Peer {
		err = fmt.Errorf("peer %v answers where %v was expected: %w", h.ID, c.cfg.Peer, torus.ErrNoPeer)
	}
	if err != nil {
		k.refuse(err)
		return
	}
	k.dial.Stop()
	k.lends = k.lender != nil && h.Features&featureBorrow != 0
	k.borrows = k.lender != nil && k.lender.CanBorrow()
	k.looks = k.borrows && h.Features&featureWhere != 0
	c.up, c.backoff, c.said = true, c.cfg.MinBackoff, ""
	c.nextTick()
	c.cfg.Log.Debug("connected to peer", "peer", c.cfg.Addr, "uuid", h.ID, "name", h.Name)
	if c.cfg.Up != nil {
		c.cfg.Up(h)
	}
}

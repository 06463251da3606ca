package tdp

import (
	"fmt"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/record"
	"github.com/coreos/torus/transport"
)

// conn is one accepted connection.
type conn struct {
	srv   *Server
	s     transport.Stream
	peer  Hello // the client's
	ready bool  // the hellos have been exchanged
	why   error // set when the connection has been given up
	gone  bool  // Closed was called
	at    int   // in the server's list

	// Requests that were read but are not with the store yet, as the limits do not allow it.
	first, last *call
	calls       int // with the store
	bytes       int // of their payloads
	paused      bool
	pumping     bool

	// The Append whose payload is on its way past Data.
	fill   *call
	have   int // bytes of it that are there
	part   int // bytes asked for by ReadInto
	filled func()

	lender transport.Lender // nil: s is none

	quiet time.Duration // silence of the client
	busy  bool          // something was sent since the last tick
}

// call is a request and, in time, its reply. It goes back to its server's free list.
type call struct {
	req  torus.Request
	conn *conn
	id   uint32
	lend bool     // the payload of the reply may be lent
	lent bool     // req.Data is borrowed
	buf  *buf.Buf // behind req.Data, else
	size int      // bytes it counts for
	next *call
	done func(*torus.Request)
}

// Opened implements transport.Handler.
func (c *conn) Opened(s transport.Stream) {
	c.s = s
	c.lender, _ = s.(transport.Lender)
	c.at = len(c.srv.conns)
	c.srv.conns = append(c.srv.conns, c)
	c.srv.m.conns.Inc()
	switch {
	case c.srv.closing:
		c.refuse(errShutdown)
	case len(c.srv.conns) > c.srv.cfg.MaxConns:
		c.refuse(errCrowded)
	}
}

// Closed implements transport.Handler.
func (c *conn) Closed(_ transport.Stream, err error) {
	if c.why != nil {
		err = c.why
	}
	c.gone = true
	srv := c.srv
	last := len(srv.conns) - 1
	srv.conns[c.at] = srv.conns[last]
	srv.conns[c.at].at = c.at
	srv.conns[last] = nil
	srv.conns = srv.conns[:last]
	srv.m.conns.Dec()
	srv.cfg.Log.Debug("connection closed", "from", c.s.RemoteAddr(), "client", c.peer.Name, "err", err)
	for q := c.first; q != nil; {
		next := q.next
		srv.freeCall(q)
		q = next
	}
	c.first, c.last = nil, nil
	if c.fill != nil {
		srv.freeCall(c.fill)
		c.fill = nil
	}
	srv.maybeClosed()
}

// refuse closes the connection and tells the other side why.
func (c *conn) refuse(why error) {
	if c.why != nil {
		return
	}
	c.why = why
	c.srv.m.refused.Inc()
	c.srv.cfg.Log.Warn("connection refused", "from", c.s.RemoteAddr(), "client", c.peer.Name, "err", why)
	c.s.Write(goodbye(why))
	c.s.CloseAfterWrite()
	c.quiet = 0 // from here on it is the time left for that
}

// drain closes the connection when all that is under way has been answered. Nothing more is read.
func (c *conn) drain() {
	if c.calls > 0 || c.first != nil {
		c.pause()
		return
	}
	if c.why == nil {
		c.why = errShutdown
		c.s.Write(goodbye(errShutdown))
		c.s.CloseAfterWrite()
	}
}

func (c *conn) pause() {
	if !c.paused {
		c.paused = true
		c.s.Pause()
	}
}

func (c *conn) tick() {
	every := c.srv.cfg.KeepAlive
	if c.why == nil && c.ready && !c.busy && (c.calls > 0 || c.first != nil || c.fill != nil) {
		f := frame{op: uint8(torus.OpPing) | opReply}
		c.send(&f)
	}
	c.busy = false
	if c.paused && c.why == nil {
		c.pump() // the queue of replies may have become shorter
		return   // not reading, so silence means nothing
	}
	if c.quiet += every; c.quiet < c.srv.cfg.IdleTimeout {
		return
	}
	if c.why == nil {
		c.why = fmt.Errorf("client silent for %v", c.srv.cfg.IdleTimeout)
	}
	c.s.Close()
}

func (c *conn) send(f *frame) {
	f.put(&c.srv.head)
	c.s.Write(c.srv.head[:])
	c.busy = true
	c.srv.m.out.Add(float64(HeaderSize + f.payload))
}

// Data implements transport.Handler.
func (c *conn) Data(_ transport.Stream, b []byte) (consumed, need int) {
	if c.why == nil {
		c.quiet = 0
	}
	for c.why == nil {
		if c.paused { // a frame whose payload is lent is no more than its header, and many may be here at once
			return consumed, HeaderSize
		}
		rest := b[consumed:]
		if len(rest) < HeaderSize {
			return consumed, HeaderSize
		}
		var f frame
		if err := f.parse(rest); err != nil {
			c.refuse(err)
			break
		}
		size := HeaderSize + int(f.payload)
		if f.op == opHello || f.op == opGoodbye {
			if f.payload > maxHello {
				c.refuse(fmt.Errorf("hello or goodbye of %d bytes: %w", f.payload, torus.ErrInvalid))
				break
			}
			if len(rest) < size {
				return consumed, size
			}
			if f.op == opGoodbye {
				c.why = newRemoteError("the client says", &f, rest[HeaderSize:size])
				c.srv.cfg.Log.Warn("client closes", "from", c.s.RemoteAddr(), "client", c.peer.Name, "err", c.why)
				c.s.Close()
			} else {
				c.onHello(&f, rest[HeaderSize:size])
			}
			consumed += size
			continue
		}
		if err := c.acceptable(&f); err != nil {
			c.refuse(err)
			break
		}
		if f.op == opReturn {
			consumed += HeaderSize
			if c.lender == nil || !c.lender.Reclaim(f.id) {
				c.refuse(fmt.Errorf("id %#x returned, of which nothing is lent: %w", f.id, torus.ErrInvalid))
			}
			continue
		}
		c.srv.m.requests.Inc()
		c.srv.m.in.Add(float64(size))
		if f.op == uint8(torus.OpAppend) && f.flags&flagLent != 0 {
			c.srv.m.in.Add(float64(f.len))
		}
		consumed += HeaderSize
		if f.id == 0 { // acceptable allows that for a Ping only
			c.send(&frame{op: uint8(torus.OpPing) | opReply})
			continue
		}
		if f.op == opWhere {
			c.where(&f)
			continue
		}
		q := c.srv.newCall(c)
		q.id = f.id
		q.lend = f.op == uint8(torus.OpRead) && f.flags&flagLent != 0 && f.len >= lendReadsAtLeast && c.lender != nil
		q.req = torus.Request{
			Op: torus.Op(f.op), Ref: f.ref, Epoch: f.epoch, Off: f.off, Len: f.len,
			Done: q.done, Peer: c.peer.ID,
		}
		if q.req.Op == torus.OpAppend {
			q.req.Reserve, q.req.Durable = f.flags&flagReserve != 0, f.flags&flagDurable != 0
			// The store wants whole pages in memory it may hand to the disk as they are, and may keep them
			// for longer than this call: what is lent is such, for the rest a buffer of our own, aligned.
			if f.flags&flagLent != 0 {
				var err error
				if q.req.Data, err = f.borrow(c.lender); err != nil {
					c.srv.freeCall(q)
					c.refuse(err)
					break
				}
				q.lent = true
				c.enqueue(q)
				continue
			}
			n := int(f.len)
			q.buf = buf.Get(n)
			q.req.Data = q.buf.Bytes()[:n]
			if len(b)-consumed < n {
				c.fill, c.have = q, 0
				c.fillMore()
				return consumed, 0
			}
			copy(q.req.Data, b[consumed:])
			consumed += n
		}
		c.enqueue(q)
	}
	return len(b), 0
}

// acceptable checks what can be seen in the header of a request. An offence ends the connection: no
// client of ours commits one.
func (c *conn) acceptable(f *frame) error {
	if !c.ready {
		return fmt.Errorf("op %#x before the hello: %w", f.op, torus.ErrInvalid)
	}
	bad := f.payload != 0
	switch torus.Op(f.op) {
	case torus.OpPing:
		if !bad && f.id == 0 {
			return nil
		}
	case torus.OpAppend:
		bad = f.len == 0 || f.len%torus.PageSize != 0 || f.len > MaxPayload
		if f.flags&flagLent == 0 {
			bad = bad || f.len != f.payload
		} else {
			bad = bad || f.payload != 0
		}
	case torus.OpRead, torus.OpScan:
		bad = bad || f.len > MaxPayload
	case torus.OpList:
		bad = bad || f.len > MaxTails
	case torus.OpSync, torus.OpFence, torus.OpSeal, torus.OpDelete, torus.OpVerify, opReturn, opWhere:
	default:
		return fmt.Errorf("unknown op %#x: %w", f.op, torus.ErrNotSupported)
	}
	if bad {
		return fmt.Errorf("%v of %d bytes with a payload of %d: %w", torus.Op(f.op), f.len, f.payload, torus.ErrInvalid)
	}
	if f.id == 0 {
		return fmt.Errorf("%v without an id: %w", torus.Op(f.op), torus.ErrInvalid)
	}
	return nil
}

func (c *conn) fillMore() {
	c.part = min(len(c.fill.req.Data)-c.have, maxPart)
	c.s.ReadInto(c.fill.req.Data[c.have:c.have+c.part], c.filled)
}

func (c *conn) onFilled() {
	q := c.fill
	if q == nil || c.why != nil {
		return
	}
	c.quiet = 0
	c.have += c.part
	if c.have < len(q.req.Data) {
		c.fillMore()
		return
	}
	c.fill = nil
	c.enqueue(q)
}

// enqueue hands q to the store, or lets it wait for its turn.
func (c *conn) enqueue(q *call) {
	switch q.req.Op {
	case torus.OpAppend:
		q.size = len(q.req.Data)
	case torus.OpRead, torus.OpScan:
		q.size = int(q.req.Len)
	default:
		q.size = 0
	}
	if c.last == nil {
		c.first = q
	} else {
		c.last.next = q
	}
	c.last = q
	c.pump()
}

// full reports whether the next request must wait. A connection with nothing under way takes any.
func (c *conn) full() bool {
	cfg := &c.srv.cfg
	return c.calls >= cfg.MaxOutstanding || c.bytes+c.s.Queued() > cfg.MaxBytes
}

// pump submits what the limits allow, and has the stream read only while nothing waits.
func (c *conn) pump() {
	if c.pumping { // called by the Done of a request that is being submitted below
		return
	}
	c.pumping = true
	for c.first != nil && c.why == nil && !c.gone && !c.full() {
		q := c.first
		if c.first = q.next; c.first == nil {
			c.last = nil
		}
		q.next = nil
		if q.req.Op == torus.OpRead {
			n := int(q.req.Len)
			if q.lend && c.lender.Lent() < maxLent {
				q.buf = buf.GetShared(n)
			} else {
				q.buf = buf.Get(n)
			}
			q.req.Data = q.buf.Bytes()[:n]
		}
		c.calls++
		c.bytes += q.size
		c.srv.calls++
		c.srv.cfg.Store.Submit(&q.req)
	}
	c.pumping = false
	switch {
	case c.why != nil || c.gone:
	case c.srv.closing:
		c.drain()
	case c.first != nil:
		c.pause()
	case c.paused && !c.full():
		c.paused = false
		c.s.Resume()
	}
}

// finished is the Done of every request: it sends the reply.
func (q *call) finished(r *torus.Request) {
	c := q.conn
	srv := c.srv
	c.calls--
	c.bytes -= q.size
	srv.calls--
	if c.gone || c.why != nil {
		srv.freeCall(q)
		srv.maybeClosed()
		return
	}
	f := frame{op: uint8(r.Op) | opReply, id: q.id, len: r.Length, fence: r.Fence, committed: r.Committed}
	switch {
	case r.Err != nil:
		c.sendError(&f, r.Err)
	case r.Op == torus.OpRead:
		if q.lend && c.lender.Lent() < maxLent && f.lend(c.lender, r.Data, q.buf) {
			q.buf = nil
			f.len = uint32(q.size)
			c.send(&f)
			srv.m.out.Add(float64(q.size))
			break
		}
		f.payload = uint32(q.size)
		c.send(&f)
		if q.size > 0 {
			c.s.WriteBuf(q.buf, q.size)
			q.buf = nil
		}
	case r.Op == torus.OpScan:
		c.sendSummed(&f, r.Data)
	case r.Op == torus.OpFence, r.Op == torus.OpList:
		if len(r.Tails) > MaxTails || len(r.Tails) > int(r.Len) {
			c.sendError(&f, fmt.Errorf("%d tails; ask for fewer blocks at once: %w", len(r.Tails), torus.ErrInvalid))
			break
		}
		c.sendSummed(&f, appendTails(make([]byte, 0, len(r.Tails)*tailSize), r.Tails))
	default:
		c.send(&f)
	}
	srv.freeCall(q)
	c.pump()
}

func (c *conn) sendError(f *frame, err error) {
	f.code = torus.ErrorCode(err)
	c.sendSummed(f, []byte(clip(err.Error())))
}

// sendSummed sends a frame with a payload that is not made of pages.
func (c *conn) sendSummed(f *frame, p []byte) {
	f.payload, f.sum = uint32(len(p)), record.Checksum(p)
	c.send(f)
	if len(p) > 0 {
		c.s.Write(p)
	}
}

func (c *conn) onHello(f *frame, p []byte) {
	if c.ready {
		c.refuse(fmt.Errorf("second hello: %w", torus.ErrInvalid))
		return
	}
	h, err := decodeHello(f, p)
	if err == nil {
		c.peer = h
		err = agree(&c.srv.cfg.Hello, &h)
	}
	if err != nil {
		c.refuse(err)
		return
	}
	c.ready = true
	mine := c.srv.cfg.Hello
	if c.lender != nil && c.lender.CanBorrow() {
		mine.Features |= featureBorrow
	}
	if c.lender != nil && c.srv.places != nil {
		mine.Features |= featureWhere
	}
	c.s.Write(mine.encode())
	c.busy = true
	c.srv.cfg.Log.Debug("client connected", "from", c.s.RemoteAddr(), "client", h.Name, "id", h.ID)
}

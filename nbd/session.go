package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/transport"
)

// A WRITE whose payload has not arrived whole is waited for if it is at most this many bytes; a longer one is
// read straight into a buffer of its own.
const smallWrite = 16 << 10

// handshakeBytes is how many bytes of replies may be unsent in the handshake; then its input waits.
const handshakeBytes = 256 << 10

// How often a session that is paused because its client does not take its replies looks whether it did.
const (
	firstLook = time.Millisecond
	lastLook  = 64 * time.Millisecond
)

// phase is where a session stands.
type phase uint8

const (
	phaseFlags        phase = iota // greeted; the client's flags are to come
	phaseOptions                   // option haggling
	phaseTransmission              // commands
	phaseFinishing                 // nothing more is taken in; requests under way are finished and answered
	phaseFlushing                  // nothing is under way; the connection closes when all has been sent
	phaseClosed                    // hung up: nothing more is sent either
)

// session is one client's connection, a state machine on the server's loop.
type session struct {
	srv   *Server
	st    transport.Stream
	index int // in srv.sessions
	phase phase

	// The handshake.
	noZeroes   bool
	structured bool
	allocation bool   // base:allocation was selected
	contextFor string // the export it was selected for
	waiting    bool   // for the Directory
	timer      *loop.Timer

	// The export, once entered.
	name     string
	dev      device.Device
	size     uint64
	readOnly bool

	// Input.
	busy     bool // within Data: it settles when done
	paused   bool
	skip     int     // bytes to discard
	skipped  refusal // what they belonged to
	incoming *call   // the WRITE whose payload is being read

	// Work and output.
	inflight   int
	bytes      int           // of requests under way
	look       time.Duration // until the next look at a client that does not read; 0: none is planned
	onLook     func()
	complained bool // an I/O error of the device has been logged
	gone       bool // the stream has closed
	removed    bool
	scratch    [64]byte
}

// refusal is the answer that follows when the data of an option or of a command has been discarded.
type refusal struct {
	opt uint32 // an option; 0: a command
	cmd command
	err errno
}

// command is the header of a request.
type command struct {
	flags  uint16
	typ    uint16
	cookie uint64
	off    uint64
	len    uint32
}

// call is one command under way. It is reused, with the functions it hands out.
type call struct {
	s       *session
	req     device.Request
	cmd     command
	started time.Duration

	received func() // the payload is there
}

func newCall() *call {
	c := &call{}
	c.req.Done = c.done
	c.received = c.submitPayload
	return c
}

func newSession(srv *Server, st transport.Stream) *session {
	s := &session{srv: srv, st: st}
	s.onLook = s.lookAgain
	return s
}

// Opened greets the client.
func (s *session) Opened(st transport.Stream) {
	s.st = st
	s.greet()
	s.timer = s.srv.l.After(s.srv.cfg.HandshakeTimeout, s.handshakeTimeout)
}

func (s *session) handshakeTimeout() {
	switch {
	case s.phase > phaseOptions:
	case s.waiting: // not the client's fault
		s.timer = s.srv.l.After(s.srv.cfg.HandshakeTimeout, s.handshakeTimeout)
	default:
		s.fail("the handshake took too long")
	}
}

// transmit begins the transmission phase.
func (s *session) transmit() {
	s.phase = phaseTransmission
	s.timer.Stop()
	s.srv.cfg.Log.Info("nbd: attached", "client", s.st.RemoteAddr(), "export", s.name)
}

// Data takes what has arrived as far as it can; at least one message, because a stream calls Data again with what it has
// seen already only behind some progress.
func (s *session) Data(_ transport.Stream, b []byte) (consumed, need int) {
	s.busy = true
	for consumed < len(b) && s.ready() && (consumed == 0 || !s.full()) {
		n := 0
		if s.skip > 0 {
			n = s.discard(b[consumed:])
		} else {
			n, need = s.take(b[consumed:])
		}
		if n == 0 {
			break
		}
		consumed += n
		need = 1 // when it is resumed, whatever is left
	}
	if !s.open() {
		consumed, need = len(b), 0
	}
	s.busy = false
	s.settle()
	return consumed, need
}

// ready reports whether the next message can be taken now. If not, the input is paused, or belongs to a payload.
func (s *session) ready() bool { return s.open() && !s.waiting && s.incoming == nil }

// open reports whether the session still takes input.
func (s *session) open() bool { return s.phase < phaseFinishing }

// take takes one message off the front of b, which is not empty; or nothing, and then says how much it needs.
func (s *session) take(b []byte) (consumed, need int) {
	switch s.phase {
	case phaseFlags:
		return s.clientFlags(b)
	case phaseOptions:
		return s.option(b)
	}
	return s.command(b)
}

// discard drops bytes of what has been refused already, and sends the refusal behind the last one: not
// earlier, because some clients know a command only when they have sent it.
func (s *session) discard(b []byte) int {
	n := min(s.skip, len(b))
	if s.skip -= n; s.skip == 0 {
		if s.skipped.opt != 0 {
			s.dispatchOversized(s.skipped.opt)
		} else {
			s.replyError(s.skipped.cmd, s.skipped.err, "")
		}
	}
	return n
}

// command takes one request.
func (s *session) command(b []byte) (consumed, need int) {
	if len(b) < requestSize {
		return 0, requestSize
	}
	if magic := binary.BigEndian.Uint32(b); magic != magicRequest {
		s.fail(fmt.Sprintf("bad request magic %#x", magic))
		return requestSize, 0
	}
	cmd := command{
		flags:  binary.BigEndian.Uint16(b[4:]),
		typ:    binary.BigEndian.Uint16(b[6:]),
		cookie: binary.BigEndian.Uint64(b[8:]),
		off:    binary.BigEndian.Uint64(b[16:]),
		len:    binary.BigEndian.Uint32(b[24:]),
	}
	if cmd.typ == cmdDisc {
		s.finish()
		return requestSize, 0
	}
	if err := s.check(cmd); err != 0 {
		s.srv.m.refused.Add(1)
		if cmd.typ == cmdWrite && cmd.len > 0 {
			s.skip, s.skipped = int(cmd.len), refusal{cmd: cmd, err: err}
		} else {
			s.replyError(cmd, err, "")
		}
		return requestSize, 0
	}
	switch cmd.typ {
	case cmdWrite:
		if cmd.len == 0 {
			break
		}
		end := requestSize + int(cmd.len)
		if len(b) >= end {
			c := s.begin(cmd)
			c.req.Data = b[requestSize:end]
			s.submit(c)
			return end, 0
		}
		if cmd.len <= smallWrite {
			return 0, end
		}
		c := s.begin(cmd)
		c.takeBuf()
		s.incoming = c
		s.st.ReadInto(c.req.Data, c.received)
		return requestSize, 0
	case cmdRead:
		if cmd.len == 0 {
			break
		}
		c := s.begin(cmd)
		c.takeBuf()
		s.submit(c)
		return requestSize, 0
	case cmdFlush:
		s.submit(s.begin(cmd))
		return requestSize, 0
	default:
		if cmd.len == 0 {
			break
		}
		s.submit(s.begin(cmd))
		return requestSize, 0
	}
	s.replyEmpty(cmd) // nothing to do, and done
	return requestSize, 0
}

// rules say, for each command, which flags it may carry and how it fails beyond the end of the export.
var rules = [cmdCount]struct {
	flags  uint16
	op     device.Op
	writes bool
	beyond errno
}{
	cmdRead:        {cmdFlagDF, device.Read, false, eINVAL},
	cmdWrite:       {0, device.Write, true, eNOSPC},
	cmdFlush:       {0, device.Flush, false, eINVAL},
	cmdTrim:        {0, device.Trim, true, eINVAL},
	cmdCache:       {0, device.Prefetch, false, eINVAL},
	cmdWriteZeroes: {cmdFlagNoHole | cmdFlagFastZero, device.WriteZeroes, true, eNOSPC},
	cmdBlockStatus: {cmdFlagReqOne, device.Status, false, eINVAL},
}

// check says why a command is refused without asking the device; 0 if it is not. FUA is allowed on every command.
func (s *session) check(cmd command) errno {
	if s.srv.drain != nil {
		return eSHUTDOWN
	}
	if cmd.typ >= cmdCount {
		return eINVAL
	}
	r := &rules[cmd.typ]
	if r.writes && s.readOnly {
		return ePERM
	}
	if cmd.flags&^(r.flags|cmdFlagFUA) != 0 {
		return eINVAL
	}
	// A device may have grown since the client was told its size; nobody else can have told it of more.
	if size := max(s.size, s.dev.Size()); cmd.off > size || uint64(cmd.len) > size-cmd.off {
		return r.beyond
	}
	switch cmd.typ {
	case cmdRead:
		if cmd.flags&cmdFlagDF != 0 && !s.structured {
			return eINVAL
		}
		if cmd.len > maxPayload {
			return eOVERFLOW
		}
	case cmdWrite:
		if cmd.len > maxPayload {
			return eINVAL // not EOVERFLOW, which is for what has no payload
		}
	case cmdFlush:
		if cmd.off != 0 || cmd.len != 0 {
			return eINVAL
		}
	case cmdBlockStatus:
		if !s.allocation || cmd.len == 0 {
			return eINVAL
		}
	}
	return 0
}

// begin makes a call of a command that was accepted, and counts it as under way.
func (s *session) begin(cmd command) *call {
	c := s.srv.getCall()
	c.s, c.cmd = s, cmd
	r := &c.req
	r.Op, r.Flags, r.Off, r.Len = rules[cmd.typ].op, 0, cmd.off, uint64(cmd.len)
	r.Err, r.Zero, r.Extents = nil, false, r.Extents[:0]
	if rules[cmd.typ].writes && cmd.flags&cmdFlagFUA != 0 {
		r.Flags |= device.FUA
	}
	if cmd.flags&cmdFlagNoHole != 0 {
		r.Flags |= device.NoHole
	}
	if cmd.flags&cmdFlagFastZero != 0 {
		r.Flags |= device.FastZero
	}
	if cmd.typ == cmdRead && s.structured {
		r.Flags |= device.Sparse
	}
	s.inflight++
	s.bytes += c.weight()
	s.srv.held += c.weight()
	return c
}

// takeBuf gives a call memory of its own: where the data of a READ goes, or that of a long WRITE is.
func (c *call) takeBuf() {
	c.req.Buf = buf.Get(int(c.cmd.len))
	c.req.Data = c.req.Buf.Bytes()[:c.cmd.len]
}

// weight is how many bytes of memory a call accounts for.
func (c *call) weight() int {
	if c.cmd.typ == cmdRead || c.cmd.typ == cmdWrite {
		return int(c.cmd.len)
	}
	return 0
}

// submit hands a call to the device. It may be done, and reused, on return.
func (s *session) submit(c *call) {
	c.started = s.srv.l.Now()
	s.dev.Submit(&c.req)
}

// submitPayload goes on with a WRITE whose payload was read into a buffer of its own.
func (c *call) submitPayload() {
	s, b := c.s, c.req.Buf
	c.req.Buf, s.incoming = nil, nil
	s.submit(c)
	b.Release() // the device has taken a copy
	s.settle()
}

// done is the device's answer.
func (c *call) done(r *device.Request) {
	s := c.s
	s.srv.m.observe(c.cmd, r.Err, s.srv.l.Now()-c.started)
	if r.Err != nil {
		s.complainOnce(c)
	}
	if s.phase < phaseFlushing {
		s.reply(c)
	}
	s.release(c)
	s.settle()
}

// release ends a call.
func (s *session) release(c *call) {
	if c.req.Buf != nil {
		c.req.Buf.Release()
		c.req.Buf = nil
	}
	s.inflight--
	s.bytes -= c.weight()
	s.srv.putCall(c)
}

// complainOnce logs the first I/O error of a session: clients tend to show a number only.
func (s *session) complainOnce(c *call) {
	if s.complained || errnoOf(c.req.Err, c.cmd) != eIO {
		return
	}
	s.complained = true
	s.srv.cfg.Log.Warn("nbd: I/O error", "client", s.st.RemoteAddr(), "export", s.name, "command", c.cmd.typ,
		"offset", c.cmd.off, "length", c.cmd.len, "err", c.req.Err)
}

// holds is how many bytes the session keeps in memory.
func (s *session) holds() int {
	if s.gone {
		return s.bytes
	}
	return s.bytes + s.st.Queued()
}

// full reports whether the session has so much under way, or so many replies unsent, that its input must wait.
// Once it waits, it waits until half of that is gone. A handshake needs little and does not wait for others.
func (s *session) full() bool {
	if s.phase < phaseTransmission {
		return s.st.Queued() >= handshakeBytes
	}
	inflight, bytes := s.srv.cfg.MaxInFlight, s.srv.cfg.MaxSessionBytes
	if s.paused && !s.waiting {
		inflight, bytes = (inflight+1)/2, (bytes+1)/2
	}
	return s.inflight >= inflight || s.holds() >= bytes || s.srv.full()
}

// settle brings everything else in line after something has happened: whether input is taken, and whether
// the session is over. Within Data it waits for Data's end.
func (s *session) settle() {
	if s.busy {
		return
	}
	if s.gone {
		s.conclude()
		return
	}
	if s.phase == phaseTransmission && s.srv.drain != nil && s.inflight == 0 {
		s.phase = phaseFinishing
	}
	switch s.phase {
	case phaseFlushing, phaseClosed:
	case phaseFinishing:
		if s.inflight == 0 && !s.waiting {
			s.phase = phaseFlushing
			s.pause(false) // to learn when the client goes
			s.st.CloseAfterWrite()
		}
	default:
		full := s.full()
		if s.srv.full() {
			s.srv.pauseAll()
		}
		s.pause(full || s.waiting)
		if full {
			s.planLook()
		}
	}
}

// planLook has a session that is paused look again soon whether it still must be.
func (s *session) planLook() {
	if s.look == 0 {
		s.look = firstLook
		s.srv.l.After(s.look, s.onLook)
	}
}

// pause stops or resumes the input.
func (s *session) pause(on bool) {
	if s.paused == on {
		return
	}
	s.paused = on
	if on {
		s.st.Pause()
	} else {
		s.st.Resume()
	}
}

// lookAgain looks whether the client took its replies: nothing else tells.
func (s *session) lookAgain() {
	next := min(2*s.look, lastLook)
	s.look = 0
	if s.gone || !s.open() || !s.paused {
		return
	}
	if s.full() {
		s.look = next
		s.srv.l.After(next, s.onLook)
		return
	}
	s.settle()
}

// finish takes no more input; what is under way is finished, answered, and then the connection closed.
func (s *session) finish() {
	if s.open() {
		s.phase = phaseFinishing
	}
	s.settle()
}

// fail ends the session at once because of what the client did.
func (s *session) fail(why string) {
	if s.phase != phaseClosed {
		s.srv.m.violations.Add(1)
		s.srv.cfg.Log.Warn("nbd: session ended", "client", s.st.RemoteAddr(), "export", s.name, "err", why)
	}
	s.hangup()
}

// hangup closes the connection at once. The device is given back when what is under way is done.
func (s *session) hangup() {
	if s.phase == phaseClosed {
		return
	}
	s.phase = phaseClosed
	if !s.gone {
		s.st.Close()
	}
}

// Closed gives up what only the connection needed.
func (s *session) Closed(_ transport.Stream, err error) {
	s.gone, s.phase = true, phaseClosed
	s.timer.Stop()
	if c := s.incoming; c != nil { // its payload will never be complete
		s.incoming = nil
		s.release(c)
	}
	s.srv.cfg.Log.Debug("nbd: connection closed", "client", s.st.RemoteAddr(), "export", s.name, "err", err)
	s.conclude()
}

// conclude ends a session whose connection is gone, when nothing is under way any more.
func (s *session) conclude() {
	if s.removed || s.inflight > 0 || s.waiting {
		return
	}
	s.removed = true
	if s.dev != nil {
		s.srv.cfg.Directory.Close(s.name, s.dev)
		s.srv.cfg.Log.Info("nbd: detached", "client", s.st.RemoteAddr(), "export", s.name)
		s.dev = nil
	}
	s.srv.remove(s)
}

// errnoOf is what a client is told for a device's error.
func errnoOf(err error, cmd command) errno {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, device.ErrOutOfSpace):
		return eNOSPC
	case errors.Is(err, device.ErrReadOnly):
		return ePERM
	case errors.Is(err, device.ErrRange):
		return rules[cmd.typ].beyond
	case errors.Is(err, device.ErrInvalid):
		return eINVAL
	case errors.Is(err, device.ErrNotSupported):
		if cmd.flags&cmdFlagFastZero != 0 {
			return eNOTSUP
		}
		return eINVAL // ENOTSUP is for FAST_ZERO only
	case errors.Is(err, device.ErrShutdown):
		return eSHUTDOWN
	}
	return eIO
}

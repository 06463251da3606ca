package mem

import (
	"fmt"
	"maps"
	"slices"

	"github.com/coreos/torus"
	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/transport"
	"github.com/coreos/torus/vfs"
)

type phase uint8

const (
	dialling phase = iota
	established
	finishing // CloseAfterWrite was called
	gone
)

// Stream is one end of a connection.
type Stream struct {
	host   *Host
	c      *connection // nil: a dial that could not even start
	l      loop.Loop
	h      transport.Handler
	out    *pipe
	remote string
	phase  phase

	// Sending.
	queue    []chunk
	queued   int
	flushing bool // planned for the end of the turn

	loans    map[uint32]loan
	shown    []loan     // what the other side may see all the time
	file     vfs.Reader // has come
	expects  bool       // one may
	borrowed int        // pieces of what the other side has lent
	crashed  bool       // what is lent is nobody's any more

	// Receiving.
	kernel  []byte // arrived while paused
	in      []byte // not consumed
	need    int    // length of in from which Data wants to be called
	into    []byte // rest of what ReadInto waits for
	done    func() // nil: nothing waits
	paused  bool
	reading bool // in Data or done: the time for ReadInto
	eof     bool // behind all of that comes the end
}

var _ transport.Lender = (*Stream)(nil)

// chunk is bytes to be sent, and the buffer to release when they have been.
type chunk struct {
	b   []byte
	buf *buf.Buf
}

func (s *Stream) open() bool { return s.phase != gone }

// RemoteAddr implements transport.Stream.
func (s *Stream) RemoteAddr() string { return s.remote }

// Queued implements transport.Stream.
func (s *Stream) Queued() int { return s.queued }

// Write implements transport.Stream.
func (s *Stream) Write(b []byte) { s.enqueue(chunk{b: append([]byte(nil), b...)}) }

// WriteShared implements transport.Stream.
func (s *Stream) WriteShared(b []byte) { s.enqueue(chunk{b: b}) }

// WriteBuf implements transport.Stream.
func (s *Stream) WriteBuf(b *buf.Buf, n int) { s.enqueue(chunk{b: b.Bytes()[:n], buf: b}) }

func (s *Stream) enqueue(k chunk) {
	if s.phase == gone || s.phase == finishing {
		if k.buf != nil {
			k.buf.Release()
		}
		return
	}
	s.queue = append(s.queue, k)
	s.queued += len(k.b)
	s.plan()
}

// plan sends at the end of the turn.
func (s *Stream) plan() {
	if !s.flushing {
		s.flushing = true
		s.l.Defer(s.flush)
	}
}

// flush sends what the window allows, cut at random.
func (s *Stream) flush() {
	s.flushing = false
	if s.phase == gone || s.phase == dialling {
		return
	}
	var b []byte
	room := s.c.n.Window - s.out.inflight
	for len(s.queue) > 0 && (room > 0 || len(s.queue[0].b) == 0) {
		k := &s.queue[0]
		n := min(len(k.b), room)
		b = append(b, k.b[:n]...)
		k.b = k.b[n:]
		room -= n
		if len(k.b) > 0 {
			break
		}
		if k.buf != nil {
			k.buf.Release()
		}
		s.queue = s.queue[1:]
	}
	s.queued -= len(b)
	for len(b) > 0 {
		n := len(b)
		if n > 1 && s.c.n.rand.Float64() < s.c.n.Cuts {
			n = 1 + s.c.n.rand.IntN(n-1)
		}
		s.out.push(packet{kind: data, data: b[:n:n]})
		b = b[n:]
	}
	if s.phase == finishing && len(s.queue) == 0 {
		s.out.push(packet{kind: fin})
		s.end(torus.ErrClosed)
	}
}

// Close implements transport.Stream.
func (s *Stream) Close() {
	if s.phase == gone {
		return
	}
	if s.phase != dialling {
		s.out.push(s.last())
	}
	s.bury()
	s.l.Defer(func() { s.h.Closed(s, torus.ErrClosed) })
}

// last is how the kernel ends a connection: an orderly end, unless there are bytes that nobody has read.
func (s *Stream) last() packet {
	if len(s.in)+len(s.kernel) > 0 {
		return packet{kind: reset}
	}
	return packet{kind: fin}
}

// CloseAfterWrite implements transport.Stream.
func (s *Stream) CloseAfterWrite() {
	if s.phase == established {
		s.phase = finishing
		s.plan()
	} else if s.phase == dialling {
		s.Close()
	}
}

// vanish ends the stream without its handler being called: its process is gone.
func (s *Stream) vanish(tell bool) {
	s.crashed, s.borrowed = true, 0
	if tell && s.phase != dialling {
		s.out.push(s.last())
	}
	if !tell {
		s.out.timer.Stop() // what was still in the host is lost
		s.out.queue = nil
	}
	s.bury()
}

// lost ends the stream from outside of its loop.
func (s *Stream) lost(why error) {
	if s.phase == gone {
		return
	}
	if s.l == nil { // not accepted yet
		s.bury()
		return
	}
	s.l.Post(func() { s.end(why) })
}

// end tells the handler.
func (s *Stream) end(why error) {
	if s.phase == gone {
		return
	}
	s.bury()
	if s.h != nil {
		s.h.Closed(s, why)
	}
}

// bury frees what the stream holds.
func (s *Stream) bury() {
	s.phase = gone
	for _, k := range s.queue {
		if k.buf != nil {
			k.buf.Release()
		}
	}
	s.queue, s.queued, s.in, s.kernel, s.into, s.done = nil, 0, nil, nil, nil, nil
	if s.file != nil {
		s.file.Close()
		s.file = nil
	}
	if s.c != nil {
		s.c.settle()
		s.c.n.forget(s.c)
	}
}

// receive takes a packet, outside of the stream's loop.
func (s *Stream) receive(k packet) {
	switch k.kind {
	case synAck:
		s.l.Post(func() {
			if s.phase == dialling {
				s.phase = established
				s.h.Opened(s)
				s.plan()
			}
		})
	case refuse:
		s.lost(ErrRefused)
	case reset:
		s.lost(ErrReset)
	case data:
		s.l.Post(func() {
			if s.phase == gone {
				return
			}
			if s.paused {
				s.kernel = append(s.kernel, k.data...)
				return
			}
			s.take(k.data)
			s.offer()
		})
	case fin:
		s.l.Post(func() {
			s.eof = true
			s.offer()
		})
	}
}

// take moves bytes from the network to the process.
func (s *Stream) take(b []byte) {
	s.in = append(s.in, b...)
	s.out.reverse.acknowledge(len(b))
}

// offer calls the handler for as long as there is something for it.
func (s *Stream) offer() {
	for !s.paused && s.phase != gone && !s.reading {
		if s.done != nil {
			n := copy(s.into, s.in)
			s.in, s.into = s.in[n:], s.into[n:]
			if len(s.into) > 0 {
				break
			}
			done := s.done
			s.into, s.done, s.need = nil, nil, 0
			s.reading = true
			done()
			s.reading = false
			continue
		}
		if len(s.in) == 0 || len(s.in) < s.need || s.phase == finishing {
			break
		}
		// A copy of its own, so that a handler that keeps b reads garbage, as it would with a real network.
		b := append([]byte(nil), s.in...)
		s.reading = true
		n, need := s.h.Data(s, b)
		s.reading = false
		if s.phase == gone {
			return
		}
		for i := range b {
			b[i] = 0xdb
		}
		s.in = s.in[n:]
		if s.need = need; need == 0 {
			s.need = len(s.in) + 1
		}
	}
	if s.eof && !s.paused && s.phase != gone {
		s.end(nil)
	}
}

// ReadInto implements transport.Stream.
func (s *Stream) ReadInto(dst []byte, done func()) {
	if s.phase == gone {
		return
	}
	if !s.reading || s.done != nil {
		panic("mem: ReadInto twice, or outside of Data and done")
	}
	s.into, s.done = dst, done
}

// loan is something that is lent. Whoever borrows it gets the lender's own memory.
type loan struct {
	b     []byte
	at    uint64
	owner transport.Releaser
}

// Lend implements transport.Lender.
func (s *Stream) Lend(b []byte, id uint32, owner transport.Releaser) (at uint64, ok bool) {
	if _, twice := s.loans[id]; twice || !s.CanBorrow() || s.phase != established {
		return 0, false
	}
	if s.loans == nil {
		s.loans = map[uint32]loan{}
	}
	s.c.places += torus.PageSize
	s.loans[id] = loan{b, s.c.places, owner}
	return s.c.places, true
}

// Reclaim implements transport.Lender.
func (s *Stream) Reclaim(id uint32) bool {
	x, ok := s.loans[id]
	if ok {
		delete(s.loans, id)
		x.owner.Release()
	}
	return ok
}

// Lent implements transport.Lender.
func (s *Stream) Lent() (n int) {
	for _, x := range s.loans {
		n += len(x.b)
	}
	return n
}

// CanBorrow implements transport.Lender.
func (s *Stream) CanBorrow() bool { return s.c != nil && s.c.lends }

// Borrow implements transport.Lender.
func (s *Stream) Borrow(at uint64, n int) ([]byte, error) {
	if s.phase == gone {
		return nil, torus.ErrClosed
	}
	if s.CanBorrow() {
		for _, x := range s.out.dst.loans {
			if x.at == at && len(x.b) == n {
				s.borrowed++
				return x.b, nil
			}
		}
		for _, x := range s.out.dst.shown {
			if x.at == at && len(x.b) == n {
				s.borrowed++
				return x.b, nil
			}
		}
	}
	return nil, fmt.Errorf("%d bytes at %d have not been lent: %w", n, at, torus.ErrInvalid)
}

// GiveBack implements transport.Lender.
func (s *Stream) GiveBack() {
	s.borrowed--
	s.c.settle()
}

// Show implements transport.Lender.
func (s *Stream) Show(b []byte) (at uint64, ok bool) {
	if !s.CanBorrow() || s.phase != established {
		return 0, false
	}
	for _, x := range s.shown {
		if &x.b[0] == &b[0] {
			return x.at, true
		}
	}
	s.c.places += torus.PageSize
	s.shown = append(s.shown, loan{b: b, at: s.c.places})
	return s.c.places, true
}

// SendFile implements transport.Lender.
func (s *Stream) SendFile(f vfs.Reader) bool {
	if !s.CanBorrow() || s.phase != established {
		return false
	}
	if to := s.out.dst; to.open() && to.expects && to.file == nil {
		to.file = f
	} else {
		f.Close()
	}
	return true
}

// ExpectFile implements transport.Lender.
func (s *Stream) ExpectFile() { s.expects = true }

// TakeFile implements transport.Lender.
func (s *Stream) TakeFile() vfs.Reader {
	f := s.file
	s.file, s.expects = nil, false
	return f
}

// Borrowed is how much of what the other side has lent was not given back yet, in pieces.
func (s *Stream) Borrowed() int { return s.borrowed }

// settle gives back what was lent on a connection that has ended on both sides, once nothing of it is borrowed any more.
func (c *connection) settle() {
	for _, s := range []*Stream{c.a, c.b} {
		if s.phase != gone || s.out.dst.phase != gone || s.out.dst.borrowed > 0 || len(s.loans) == 0 {
			continue
		}
		loans := s.loans
		s.loans = nil
		if s.crashed {
			continue
		}
		ids := slices.Sorted(maps.Keys(loans))
		s.l.Post(func() {
			for _, id := range ids {
				loans[id].owner.Abandon()
			}
		})
	}
}

// Pause implements transport.Stream.
func (s *Stream) Pause() { s.paused = true }

// Resume implements transport.Stream.
func (s *Stream) Resume() {
	if !s.paused {
		return
	}
	s.paused = false
	if s.phase == gone {
		return
	}
	s.l.Post(func() {
		if s.phase == gone || s.paused {
			return
		}
		if len(s.kernel) > 0 {
			b := s.kernel
			s.kernel = nil
			s.take(b)
		}
		s.offer()
	})
}

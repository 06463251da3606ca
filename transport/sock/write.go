package sock

import (
	"unsafe"

	"github.com/coreos/torus/buf"
	"golang.org/x/sys/unix"
)

// A stream with more to send than one system call takes may make that many before the others have their turn.
const writesPerTurn = 16

// segment is a piece of the output queue.
type segment struct {
	b     []byte
	buf   *buf.Buf // to be released when b has been sent, or nil
	chunk *chunk   // that holds b, or nil
}

// writable reports whether there is any sense in queueing more.
func (s *stream) writable() bool { return !s.closed && !s.ending && s.broken == 0 }

// Write implements transport.Stream.
func (s *stream) Write(b []byte) {
	if !s.writable() || len(b) == 0 {
		return
	}
	if len(b) > chunkSize {
		bb := buf.Get(len(b))
		s.WriteBuf(bb, copy(bb.Bytes(), b))
		return
	}
	s.queued += len(b)
	for {
		c := s.chunk
		if c == nil {
			c = s.sh.getChunk()
			s.chunk = c
		}
		start := c.used
		n := copy(c.mem[start:], b)
		c.used += n
		if last := len(s.segments) - 1; last >= s.head && s.segments[last].chunk == c {
			seg := &s.segments[last]
			seg.b = seg.b[:len(seg.b)+n] // it ends where the chunk's free part began
		} else if n > 0 {
			c.refs++
			s.push(segment{b: c.mem[start:c.used:chunkSize], chunk: c})
		}
		if b = b[n:]; len(b) == 0 {
			break
		}
		s.chunk = nil // full; its segments hold it
	}
	s.schedule()
}

// WriteShared implements transport.Stream.
func (s *stream) WriteShared(b []byte) {
	if !s.writable() || len(b) == 0 {
		return
	}
	s.queued += len(b)
	s.push(segment{b: b})
	s.schedule()
}

// WriteBuf implements transport.Stream.
func (s *stream) WriteBuf(b *buf.Buf, n int) {
	if !s.writable() || n == 0 {
		b.Release()
		return
	}
	s.queued += n
	s.push(segment{b: b.Bytes()[:n], buf: b})
	s.schedule()
}

// Queued implements transport.Stream.
func (s *stream) Queued() int { return s.queued }

func (s *stream) push(seg segment) {
	if len(s.segments) == cap(s.segments) && s.head > len(s.segments)/2 {
		n := copy(s.segments, s.segments[s.head:])
		clear(s.segments[n:])
		s.segments, s.head = s.segments[:n], 0
	}
	s.segments = append(s.segments, seg)
}

// schedule has the queue sent at the end of the turn, unless that has to wait for the socket anyway.
func (s *stream) schedule() {
	if !s.scheduled && !s.blocked && s.dialing == nil && !s.closed {
		s.scheduled = true
		s.sh.loop.Defer(s.flush)
	}
}

func (s *stream) runFlush() {
	// Those deferred before now may have more to say: one system call for all of it.
	if !s.lastCall {
		s.lastCall = true
		s.sh.loop.Defer(s.flush)
		return
	}
	s.scheduled, s.lastCall = false, false
	if s.reg == nil || s.blocked || s.closed || s.broken != 0 {
		return
	}
	s.write()
}

// write sends what the socket takes.
func (s *stream) write() {
	for range writesPerTurn {
		if s.queued == 0 {
			break
		}
		n, asked, errno := s.send()
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 && errno != unix.EAGAIN {
			s.cut(errno)
			return
		}
		s.sent(n)
		if n < asked {
			s.blocked = true
			s.arm(true)
			return
		}
	}
	if s.queued > 0 {
		s.sh.loop.Post(s.schedule)
		return
	}
	s.arm(false)
	if s.ending && !s.closed {
		s.linger()
	}
}

// cut ends the output. The other side may have closed in order, or said why it did not, before it stopped to
// listen, so what it sent is read first.
func (s *stream) cut(errno unix.Errno) {
	s.broken = errno
	s.dropQueue()
	switch {
	case s.atEOF && !s.ending: // Closed is on its way
	case s.atEOF, s.paused, s.ending:
		s.failIO("send to", errno)
	default:
		s.readable, s.hup = true, true
		s.resume()
	}
}

// send makes one system call for as much of the queue as it takes.
func (s *stream) send() (n, asked int, errno unix.Errno) {
	fd := uintptr(s.reg.FD())
	var r uintptr
	if len(s.segments)-s.head == 1 && !s.accompanied() {
		b := s.segments[s.head].b
		asked = len(b)
		p := uintptr(unsafe.Pointer(unsafe.SliceData(b)))
		if asked > longTransfer {
			r, _, errno = unix.Syscall6(unix.SYS_SENDTO, fd, p, uintptr(asked), unix.MSG_NOSIGNAL, 0, 0)
		} else {
			r, _, errno = unix.RawSyscall6(unix.SYS_SENDTO, fd, p, uintptr(asked), unix.MSG_NOSIGNAL, 0, 0)
		}
	} else {
		iovecs := s.sh.iovecs[:0]
		for i := s.head; i < len(s.segments) && len(iovecs) < maxIovecs; i++ {
			iovecs = append(iovecs, iovec(s.segments[i].b))
			asked += len(s.segments[i].b)
		}
		hdr := unix.Msghdr{Iov: &iovecs[0]}
		hdr.SetIovlen(len(iovecs))
		if s.accompanied() {
			n, errno = s.sendAlong(&hdr)
			r = uintptr(n)
		} else if asked > longTransfer {
			r, _, errno = unix.Syscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&hdr)), unix.MSG_NOSIGNAL)
		} else {
			r, _, errno = unix.RawSyscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&hdr)), unix.MSG_NOSIGNAL)
		}
		clear(iovecs)
	}
	if errno != 0 {
		return 0, asked, errno
	}
	return int(r), asked, 0
}

// sent takes the first n bytes off the queue.
func (s *stream) sent(n int) {
	s.queued -= n
	for n > 0 {
		seg := &s.segments[s.head]
		if n < len(seg.b) {
			seg.b = seg.b[n:]
			break
		}
		n -= len(seg.b)
		s.drop(seg)
		s.head++
	}
	if s.head == len(s.segments) {
		s.segments, s.head = s.segments[:0], 0
		if cap(s.segments) > maxIovecs {
			s.segments = nil
		}
	}
}

// drop gives back what holds the segment's bytes.
func (s *stream) drop(seg *segment) {
	if seg.buf != nil {
		seg.buf.Release()
	}
	if c := seg.chunk; c != nil {
		if c.refs--; c.refs == 0 {
			if s.chunk == c {
				s.chunk = nil
			}
			s.sh.putChunk(c)
		}
	}
	*seg = segment{}
}

func (s *stream) dropQueue() {
	for i := s.head; i < len(s.segments); i++ {
		s.drop(&s.segments[i])
	}
	s.segments, s.head, s.queued = nil, 0, 0
}

// arm asks epoll to tell when there is room, or no more to do so: readers of a unix socket wake its
// writers each time, needed or not.
func (s *stream) arm(on bool) {
	if s.armed == on {
		return
	}
	s.armed = on
	events := uint32(inputEvents)
	if on {
		events |= unix.EPOLLOUT
	}
	if err := s.reg.Modify(events); err != nil {
		s.fail(err)
	}
}

package sock

import (
	"fmt"
	"unsafe"

	"github.com/coreos/torus"
	"github.com/coreos/torus/buf"
	"golang.org/x/sys/unix"
)

const (
	// A stream may read that often before the others have their turn.
	readsPerTurn = 16
	// Longer transfers are announced to the Go scheduler, as they hold the thread for a while.
	longTransfer = 64 << 10
	// Behind a long transfer no more is read than this.
	shortInput = 4 << 10
)

// ReadInto implements transport.Stream.
func (s *stream) ReadInto(dst []byte, done func()) {
	if s.closed || s.ending {
		return
	}
	s.dst, s.done = dst, done
	if !s.delivering {
		s.takeDirect()
		s.resume()
	}
}

// takeDirect gives dst what has been read already.
func (s *stream) takeDirect() {
	if s.in != nil {
		n := copy(s.dst, s.in.Bytes()[s.r:s.w])
		s.dst, s.r = s.dst[n:], s.r+n
	}
}

// Pause implements transport.Stream.
func (s *stream) Pause() {
	if !s.ending {
		s.paused = true
	}
}

// Resume implements transport.Stream.
func (s *stream) Resume() {
	if s.paused {
		s.paused = false
		s.resume()
	}
}

// resume goes on on the next turn, with what has been read already or is in the socket.
func (s *stream) resume() {
	if !s.resuming && !s.closed && s.dialing == nil {
		s.resuming = true
		s.sh.loop.Post(s.readOn)
	}
}

func (s *stream) runReadOn() {
	s.resuming = false
	if s.reg == nil || s.delivering {
		return
	}
	s.deliver()
	s.read()
}

// read moves bytes from the socket to the handler until there are no more, or the turn of others has come.
func (s *stream) read() {
	for range readsPerTurn {
		if !s.readable || s.atEOF || s.paused || s.reg == nil {
			return
		}
		if !s.makeRoom() {
			s.fail(fmt.Errorf("receive from %s: %w: a message of more than %d bytes", s.remote, torus.ErrInvalid, maxInputSize))
			return
		}
		n, asked, errno := s.readv()
		switch {
		case errno == unix.EINTR:
			continue
		case errno == unix.EAGAIN:
			s.readable = false
			s.dropEmptyInput()
			if s.broken != 0 {
				s.failIO("send to", s.broken)
			}
			return
		case errno != 0:
			s.failIO("receive from", errno)
			return
		case n == 0:
			s.ended()
			return
		}
		// An edge-triggered stream that gave less than asked for is empty; more would be an event. Only the end
		// that was announced along with these bytes is not.
		s.readable = n == asked || s.hup
		if k := min(n, len(s.dst)); k > 0 {
			s.dst = s.dst[k:]
			n -= k
		}
		s.w += n
		s.deliver()
	}
	if s.readable {
		s.resume()
	}
}

// readv reads into what is left of dst, and what comes behind it into the input buffer.
func (s *stream) readv() (n, asked int, errno unix.Errno) {
	in := s.in.Bytes()[s.w:]
	if len(s.dst) >= longTransfer { // the next is likely to be as long, and what comes here has to be copied once more
		in = in[:min(len(in), shortInput)]
	}
	asked = len(s.dst) + len(in)
	iovecs := s.sh.iovecs[:0]
	if len(s.dst) > 0 {
		iovecs = append(iovecs, iovec(s.dst))
	}
	iovecs = append(iovecs, iovec(in))
	var r uintptr
	if s.greeting.expect || s.passing.expect {
		n, errno = s.receiveAlong(iovecs)
		asked = n // it ends where a descriptor came, and there may be more behind that
		r = uintptr(n)
	} else if asked > longTransfer+inputSize {
		r, _, errno = unix.Syscall(unix.SYS_READV, uintptr(s.reg.FD()), uintptr(unsafe.Pointer(&iovecs[0])), uintptr(len(iovecs)))
	} else {
		r, _, errno = unix.RawSyscall(unix.SYS_READV, uintptr(s.reg.FD()), uintptr(unsafe.Pointer(&iovecs[0])), uintptr(len(iovecs)))
	}
	clear(iovecs)
	if errno != 0 {
		return 0, asked, errno
	}
	return int(r), asked, 0
}

func iovec(b []byte) (v unix.Iovec) {
	v.Base = unsafe.SliceData(b)
	v.SetLen(len(b))
	return v
}

// makeRoom sees to it that something can be read behind what is there. False if that would need too much.
func (s *stream) makeRoom() bool {
	if s.in == nil {
		s.in, s.r, s.w = s.sh.getInput(), 0, 0
		return true
	}
	mem := s.in.Bytes()
	have := s.w - s.r
	if have == len(mem) {
		// Twice as large, not as large as is wanted: the other side must send what it makes us hold.
		if 2*len(mem) > maxInputSize {
			return false
		}
		larger := buf.Get(2 * len(mem))
		copy(larger.Bytes(), mem)
		s.sh.putInput(s.in)
		s.in = larger
		return true
	}
	// Move to the front if the rest of the message, or of a good read, does not fit behind.
	if free := len(mem) - s.w; s.r > 0 && free < max(s.want-have, min(len(mem)/4, s.r)) {
		copy(mem, mem[s.r:s.w])
		s.r, s.w = 0, have
	}
	return true
}

// deliver hands what has been read to whom it belongs, until they want more or less.
func (s *stream) deliver() {
	s.delivering = true
	for !s.closed && !s.paused && !s.ending {
		if s.done != nil {
			s.takeDirect()
			if len(s.dst) > 0 {
				break
			}
			done := s.done
			s.dst, s.done, s.want = nil, nil, 0
			done()
			continue
		}
		have := s.w - s.r
		if have == 0 || have < s.want {
			break
		}
		consumed, need := s.h.Data(s, s.in.Bytes()[s.r:s.w:s.w])
		if s.closed || s.ending {
			break
		}
		consumed = min(max(consumed, 0), have)
		s.r += consumed
		have -= consumed
		switch {
		case s.done != nil, s.paused: // when it resumes it is shown what there is
			s.want = 0
		case need > maxInputSize:
			s.fail(fmt.Errorf("receive from %s: %w: a message of %d bytes, the limit is %d", s.remote, torus.ErrInvalid, need, maxInputSize))
		case consumed > 0 && need > 0:
			s.want = need
		default: // there must be more than there is, or the handler would be called for ever
			s.want = max(need, have+1)
		}
	}
	s.delivering = false
	if s.ending {
		s.r, s.w = 0, 0
	}
	if s.closed {
		if !s.lingering {
			s.dropInput()
		}
		return
	}
	s.dropEmptyInput()
}

// dropEmptyInput gives the input buffer back if nothing is in it, or trades a large one for a small one if it will do.
func (s *stream) dropEmptyInput() {
	if s.in == nil {
		return
	}
	have := s.w - s.r
	if have == 0 {
		s.dropInput()
	} else if len(s.in.Bytes()) > inputSize && have <= inputSize/4 && s.want <= inputSize {
		small := s.sh.getInput()
		copy(small.Bytes(), s.in.Bytes()[s.r:s.w])
		s.in.Release()
		s.in, s.r, s.w = small, 0, have
	}
}

func (s *stream) dropInput() {
	if s.in != nil {
		s.sh.putInput(s.in)
	}
	s.in, s.r, s.w = nil, 0, 0
}

// ended: the other side has closed its half.
func (s *stream) ended() {
	s.atEOF, s.readable = true, false
	s.dropEmptyInput()
	switch {
	case s.lingering:
		s.release()
	case s.ending: // it may still read; flush goes on
	default:
		// What this turn has produced is offered to the socket once more: the other side may have closed only one half.
		s.sh.loop.Defer(func() {
			if !s.closed && !s.blocked && s.broken == 0 {
				s.write()
			}
			s.fail(nil)
		})
	}
}

// failIO ends the stream because of a failed system call.
func (s *stream) failIO(op string, errno unix.Errno) {
	s.fail(fmt.Errorf("%s %s: %w", op, s.remote, errno))
}

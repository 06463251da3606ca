package sock

import (
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/transport"
	"golang.org/x/sys/unix"
)

// inputEvents is what a stream asks epoll for while its socket has room for output.
const inputEvents = unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLET

// lingerTimeout is how long the other side has to take note of the end after CloseAfterWrite.
const lingerTimeout = time.Second

// stream is one connection.
type stream struct {
	sh     *shared
	h      transport.Handler
	reg    *loop.Registration // nil while dialing and after the end
	remote string

	// Life: dialing → open → (ending →) closed (→ lingering).
	dialing   *dialing // nil once connected
	ending    bool     // CloseAfterWrite: input is dropped, and the socket closed when the queue is empty
	closed    bool     // for the handler; only Closed is still to come
	lingering bool     // closed, and waiting for the other side to see it
	atEOF     bool     // nothing will be read any more

	// Input, see read.go.
	in         *buf.Buf // nil while empty
	r, w       int      // what has been read, but not consumed, is in[r:w]
	want       int      // Data makes no sense with fewer bytes
	dst        []byte   // of ReadInto, what is not filled yet
	done       func()   // of ReadInto, nil if there is none
	paused     bool
	readable   bool // the socket may have more
	hup        bool // the end is in the socket: read up to it, no event will tell again
	delivering bool // a callback is running
	resuming   bool // readOn is posted
	readOn     func()

	// Memory of both sides, see lend.go.
	greeting greeting
	memory   memory
	passing  passing

	// Output, see write.go.
	segments  []segment // segments[head:] wait to be sent
	head      int
	queued    int
	chunk     *chunk     // takes the next small write
	broken    unix.Errno // sending failed; what the other side said before may still be in the socket
	blocked   bool       // the socket is full; epoll tells when there is room
	armed     bool       // EPOLLOUT is asked for
	scheduled bool       // flush is deferred
	lastCall  bool       // it has let those go first who were deferred when it came
	flush     func()
}

var (
	_ transport.Stream = (*stream)(nil)
	_ loop.FD          = (*stream)(nil)
)

func (s *stream) init(sh *shared) {
	s.sh = sh
	s.readOn = s.runReadOn
	s.flush = s.runFlush
}

// RemoteAddr implements transport.Stream.
func (s *stream) RemoteAddr() string { return s.remote }

// Ready is called by the loop when the socket is.
func (s *stream) Ready(events uint32) {
	if events&unix.EPOLLOUT != 0 && s.blocked {
		s.blocked = false
		s.schedule()
	}
	if events&^unix.EPOLLOUT == 0 {
		return
	}
	s.readable = true
	if events&(unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		s.hup = true
	}
	if s.paused && !s.closed && events&unix.EPOLLERR != 0 { // else nobody would notice before Resume
		errno, err := unix.GetsockoptInt(s.reg.FD(), unix.SOL_SOCKET, unix.SO_ERROR)
		if err == nil && errno != 0 {
			s.failIO("receive from", unix.Errno(errno))
			return
		}
	}
	s.read()
}

// Close implements transport.Stream.
func (s *stream) Close() {
	if s.closed {
		return
	}
	s.end(torus.ErrClosed)
	s.release()
}

// CloseAfterWrite implements transport.Stream. What arrives from now on is dropped; the other side has one second
// to receive what was sent, before a reset might destroy it.
func (s *stream) CloseAfterWrite() {
	if s.closed || s.ending {
		return
	}
	s.ending = true
	s.paused = false
	s.dst, s.done = nil, nil
	s.schedule()
	s.resume()
}

// fail ends the stream because of err.
func (s *stream) fail(err error) {
	if s.closed {
		s.release() // while lingering
		return
	}
	s.end(err)
	s.release()
}

// end tells the handler, at the end of the turn, that the stream is closed.
func (s *stream) end(err error) {
	s.closed = true
	s.sh.loop.Defer(func() {
		if s.h != nil { // a listener's accept may have refused it
			s.h.Closed(s, err)
		}
	})
}

// linger, after CloseAfterWrite when all has been sent, waits for the other side to close: closing with input unread
// would send a reset, which may overtake our last words.
func (s *stream) linger() {
	s.end(torus.ErrClosed)
	if s.atEOF || s.memory.borrowed > 0 || unix.Shutdown(s.reg.FD(), unix.SHUT_WR) != nil {
		s.release()
		return
	}
	s.lingering = true
	s.sh.loop.After(lingerTimeout, s.release)
}

// release gives everything back. It may be called twice.
func (s *stream) release() {
	s.closed, s.lingering = true, false
	if s.dialing != nil {
		s.dialing.abort()
		s.dialing = nil
	}
	if s.reg != nil {
		s.part()
		s.reg = nil
	}
	s.dropQueue()
	s.passing.drop()
	s.dst, s.done = nil, nil
	if !s.delivering { // else the handler still looks at it
		s.dropInput()
	}
}

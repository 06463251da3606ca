package sock

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/transport"
	"github.com/coreos/torus/transport/transporttest"
	"golang.org/x/sys/unix"
)

const patience = 20 * time.Second

// newLoop makes a loop that the test runs itself.
func newLoop(t testing.TB) *loop.Epoll {
	t.Helper()
	e, err := loop.NewEpoll(nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

// runUntil runs the loop in the calling goroutine until the condition holds; false if it does not in time.
func runUntil(t testing.TB, e *loop.Epoll, until func() bool) bool {
	t.Helper()
	limit := patience
	if until == nil {
		limit = 20 * time.Millisecond
	}
	held := false
	start := time.Now()
	var check func()
	check = func() {
		if held = until != nil && until(); held || time.Since(start) > limit {
			e.Stop()
			return
		}
		e.After(100*time.Microsecond, check)
	}
	e.Post(check)
	if err := e.Run(); err != nil {
		t.Fatal(err)
	}
	return held
}

// startLoop runs a loop in a goroutine of its own until the test ends.
func startLoop(t testing.TB) *loop.Epoll {
	t.Helper()
	e := newLoop(t)
	ended := make(chan error)
	go func() { ended <- e.Run() }()
	t.Cleanup(func() {
		e.Stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return e
}

// newTCP is a Network without shortcuts.
func newTCP() *Network {
	n := New()
	n.tcpOnly = true
	return n
}

func on(e *loop.Epoll, fn func()) {
	done := make(chan struct{})
	e.Post(func() { fn(); close(done) })
	<-done
}

func TestConformance(t *testing.T) {
	if err := buf.Share(); err != nil { // shortcuts share memory
		t.Fatal(err)
	}
	for name, addr := range map[string]func(t *testing.T) string{
		"tcp4":      func(*testing.T) string { return "tcp://127.0.0.1:0" },
		"tcp6":      func(*testing.T) string { return "tcp://[::1]:0" },
		"localhost": func(*testing.T) string { return "tcp://localhost:0" },
		"shortcut":  func(*testing.T) string { return "tcp://127.0.0.1:0" },
		"unix":      func(t *testing.T) string { return "unix:" + filepath.Join(t.TempDir(), "s") },
	} {
		t.Run(name, func(t *testing.T) {
			transporttest.Run(t, func(t *testing.T) transporttest.World {
				e := newLoop(t)
				n := New()
				n.tcpOnly = name != "shortcut"
				return transporttest.World{
					Network: n, Server: e, Client: e,
					Addr: func() string { return addr(t) },
					Nobody: func() string {
						ln, err := n.Listen(e, addr(t), nil)
						if err != nil {
							t.Fatal(err)
						}
						defer ln.Close()
						return ln.Addr()
					},
					Run: func(until func() bool) bool { return runUntil(t, e, until) },
				}
			})
		})
	}
}

// handler is a Handler of functions, each of which may be nil.
type handler struct {
	opened func(s transport.Stream)
	data   func(s transport.Stream, b []byte) (int, int)
	closed func(s transport.Stream, err error)
}

func (h *handler) Opened(s transport.Stream) {
	if h.opened != nil {
		h.opened(s)
	}
}

func (h *handler) Data(s transport.Stream, b []byte) (int, int) {
	if h.data != nil {
		return h.data(s, b)
	}
	return len(b), 0
}

func (h *handler) Closed(s transport.Stream, err error) {
	if h.closed != nil {
		h.closed(s, err)
	}
}

func echo(transport.Stream) transport.Handler {
	return &handler{data: func(s transport.Stream, b []byte) (int, int) { s.Write(b); return len(b), 0 }}
}

func listen(t testing.TB, e *loop.Epoll, n *Network, addr string, accept func(transport.Stream) transport.Handler) transport.Listener {
	t.Helper()
	ln, err := n.Listen(e, addr, accept)
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

// dialNet connects to addr with a socket of Go's own, as somebody else would.
func dialNet(t testing.TB, addr string) net.Conn {
	t.Helper()
	network, address := "tcp", strings.TrimPrefix(addr, "tcp://")
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		network, address = "unix", path
	}
	c, err := net.Dial(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c
}

// A client that closes its half after the request still gets the answer, and then the end.
func TestHalfClose(t *testing.T) {
	for _, addr := range []string{"tcp://127.0.0.1:0", "unix:" + filepath.Join(t.TempDir(), "s")} {
		e := startLoop(t)
		closed := make(chan error, 1)
		var ln transport.Listener
		on(e, func() {
			ln = listen(t, e, newTCP(), addr, func(s transport.Stream) transport.Handler {
				h := echo(s).(*handler)
				h.closed = func(_ transport.Stream, err error) { closed <- err }
				return h
			})
		})
		c := dialNet(t, ln.Addr())
		request := strings.Repeat("question ", 1000)
		io.WriteString(c, request)
		c.(interface{ CloseWrite() error }).CloseWrite()
		answer, err := io.ReadAll(c)
		if err != nil || string(answer) != request {
			t.Errorf("%s: an answer of %d bytes, want %d: %v", addr, len(answer), len(request), err)
		}
		if err := <-closed; err != nil {
			t.Errorf("%s: closed with %v, want nil", addr, err)
		}
		on(e, func() { ln.Close() })
	}
}

// A reset is an error, noticed even while paused.
func TestReset(t *testing.T) {
	for _, paused := range []bool{false, true} {
		e := startLoop(t)
		closed, opened := make(chan error, 1), make(chan bool, 1)
		var ln transport.Listener
		on(e, func() {
			ln = listen(t, e, newTCP(), "tcp://127.0.0.1:0", func(s transport.Stream) transport.Handler {
				return &handler{
					opened: func(s transport.Stream) {
						if paused {
							s.Pause()
						}
						opened <- true
					},
					closed: func(_ transport.Stream, err error) { closed <- err },
				}
			})
		})
		c := dialNet(t, ln.Addr()).(*net.TCPConn)
		<-opened
		c.SetLinger(0)
		c.Close()
		if err := <-closed; !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("paused %v: closed with %v, want ECONNRESET", paused, err)
		}
	}
}

// The bytes that came before the other side stopped listening are delivered, even if a write finds out first.
func TestDataBeforeBrokenPipe(t *testing.T) {
	for _, addr := range []string{"tcp://127.0.0.1:0", "unix:" + filepath.Join(t.TempDir(), "s")} {
		e := newLoop(t)
		var s transport.Stream
		var got []byte
		var end error
		closed := false
		ln := listen(t, e, newTCP(), addr, func(st transport.Stream) transport.Handler {
			s = st
			return &handler{
				opened: func(s transport.Stream) { s.Pause() },
				data:   func(s transport.Stream, b []byte) (int, int) { got = append(got, b...); return len(b), 0 },
				closed: func(_ transport.Stream, err error) { closed, end = true, err },
			}
		})
		c := dialNet(t, ln.Addr())
		if !runUntil(t, e, func() bool { return s != nil }) {
			t.Fatal("not accepted")
		}
		io.WriteString(c, "why")
		c.Close()
		runUntil(t, e, nil)
		e.Post(func() {
			s.Resume()
			s.Write([]byte("x")) // leaves first
			e.Defer(func() { s.Write([]byte("y")) })
		})
		if !runUntil(t, e, func() bool { return closed }) {
			t.Fatal("never closed")
		}
		if string(got) != "why" || end != nil {
			t.Errorf("%s: received %q, closed with %v", addr, got, end)
		}
	}
}

// A unix socket whose process died is replaced; one that is served, or a file that is none, is not touched.
func TestUnixSocketFile(t *testing.T) {
	e := newLoop(t)
	n := newTCP()
	path := filepath.Join(t.TempDir(), "s")
	ul, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = n.Listen(e, "unix:"+path, echo)
	var te *torus.Error
	if !errors.Is(err, unix.EADDRINUSE) || !errors.As(err, &te) || !strings.Contains(te.Hint, path) {
		t.Errorf("listening on a served socket: %v", err)
	}
	ul.(*net.UnixListener).SetUnlinkOnClose(false)
	ul.Close()
	ln := listen(t, e, n, "unix://"+path, echo) // with two slashes more
	if st, err := os.Stat(path); err != nil || st.Mode().Type() != os.ModeSocket {
		t.Errorf("the stale socket was not replaced: %v", err)
	}
	if err := ln.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the path is still there after Close: %v", err)
	}
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Listen(e, "unix:"+path, echo); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("listening on a file: %v", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "precious" {
		t.Error("a file that is not a socket was removed")
	}
	if _, err := n.Listen(e, "unix:"+filepath.Join(t.TempDir(), "no", "dir"), echo); err == nil || !strings.Contains(err.Error(), "directory") {
		t.Errorf("listening in a directory that does not exist: %v", err)
	}
	if _, err := n.Listen(e, "unix:/"+strings.Repeat("x", 200), echo); !errors.Is(err, torus.ErrInvalid) {
		t.Errorf("a path of 200 bytes: %v", err)
	}

	// A path that somebody else has taken over is left alone.
	path += "2"
	ln = listen(t, e, n, "unix:"+path, echo)
	os.Rename(path, path+"old")
	os.WriteFile(path, nil, 0o600)
	ln.Close()
	if _, err := os.Stat(path); err != nil {
		t.Error("Close removed what was not its own")
	}
}

// Listening on every address serves both kinds, and Addr can be dialed.
func TestListenEverywhere(t *testing.T) {
	e := newLoop(t)
	n := newTCP()
	ln := listen(t, e, n, "tcp://:0", echo)
	_, port, _ := net.SplitHostPort(strings.TrimPrefix(ln.Addr(), "tcp://"))
	for _, addr := range []string{ln.Addr(), "tcp://127.0.0.1:" + port, "tcp://[::1]:" + port, "tcp://localhost:" + port} {
		got := ""
		n.Dial(e, addr, &handler{
			opened: func(s transport.Stream) { s.Write([]byte("hi")) },
			data:   func(s transport.Stream, b []byte) (int, int) { got += string(b); return len(b), 0 },
			closed: func(_ transport.Stream, err error) { t.Errorf("%s: %v", addr, err); got = "hi" },
		})
		if !runUntil(t, e, func() bool { return got == "hi" }) {
			t.Errorf("%s does not answer", addr)
		}
	}
}

// Sockets need a loop that has epoll.
func TestOtherLoop(t *testing.T) {
	v := loop.NewVirtual(1)
	l := v.NewLoop("l")
	n := newTCP()
	if _, err := n.Listen(l, "tcp://127.0.0.1:0", echo); !errors.Is(err, torus.ErrInvalid) {
		t.Errorf("Listen on a virtual loop: %v", err)
	}
	var end error
	s := n.Dial(l, "tcp://127.0.0.1:1", &handler{closed: func(_ transport.Stream, err error) { end = err }})
	s.Write([]byte("x"))
	s.Close()
	v.Run(nil, time.Second)
	if !errors.Is(end, torus.ErrInvalid) {
		t.Errorf("Dial on a virtual loop: %v", end)
	}
}

// A name that does not resolve, and an address that swallows everything, end in an error within the timeout.
func TestDialFails(t *testing.T) {
	e := newLoop(t)
	n := newTCP()
	// A listener with a full backlog lets SYNs fall.
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	sa, _ := unix.Getsockname(fd)
	full := format(sa)
	for range 3 { // the backlog takes one, or two
		n.Dial(e, full, &handler{})
	}
	runUntil(t, e, nil)

	path := filepath.Join(t.TempDir(), "s")
	ufd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(ufd)
	if err := errors.Join(unix.Bind(ufd, &unix.SockaddrUnix{Name: path}), unix.Listen(ufd, 0)); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		n.Dial(e, "unix:"+path, &handler{})
	}
	runUntil(t, e, nil)

	for addr, want := range map[string]error{
		full:                         unix.ETIMEDOUT,
		"unix:" + path:               unix.ETIMEDOUT,
		"tcp://no.such.invalid:1234": nil,
		"tcp://127.0.0.1:0":          torus.ErrInvalid,
	} {
		var end error
		start := time.Now()
		n.Dial(e, addr, &handler{
			opened: func(transport.Stream) { t.Errorf("%s: opened", addr) },
			closed: func(_ transport.Stream, err error) { end = err },
		})
		if !runUntil(t, e, func() bool { return end != nil }) || want != nil && !errors.Is(end, want) {
			t.Errorf("%s: closed with %v, want %v", addr, end, want)
		}
		if !strings.Contains(fmt.Sprint(end), addr) {
			t.Errorf("%v does not name %s", end, addr)
		}
		if d := time.Since(start); d > dialTimeout+patience/2 {
			t.Errorf("%s: gave up after %v", addr, d)
		}
	}

	// What a full unix backlog held up goes through once there is room.
	opened := false
	n.Dial(e, "unix:"+path, &handler{opened: func(transport.Stream) { opened = true }})
	runUntil(t, e, nil)
	for range 4 {
		unix.SetNonblock(ufd, true)
		if c, _, err := unix.Accept(ufd); err == nil {
			defer unix.Close(c)
		}
	}
	if !runUntil(t, e, func() bool { return opened }) {
		t.Error("a unix socket with room again was not tried again")
	}
}

// A TCP socket may connect to itself when the port it asks for is its own; that is nobody's service.
func TestConnectionToItself(t *testing.T) {
	fd, err := socket(unix.AF_INET)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	unix.SetNonblock(fd, false)
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	sa, _ := unix.Getsockname(fd)
	if err := unix.Connect(fd, sa); err != nil {
		t.Fatal(err)
	}
	if !toItself(fd) {
		t.Error("not recognized")
	}

	e := newLoop(t)
	ended := false
	s := newTCP().Dial(e, format(sa), &handler{
		opened: func(transport.Stream) { t.Error("opened") },
		closed: func(transport.Stream, error) { ended = true },
	}).(*stream)
	// Put the connected socket in the place of the one that dials.
	if err := unix.Dup3(fd, s.dialing.reg.FD(), unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	s.dialing.Ready(0)
	if !runUntil(t, e, func() bool { return ended }) {
		t.Error("never closed")
	}
}

// A message without end is cut off at the limit, and costs what was sent, not what was announced.
func TestInputLimit(t *testing.T) {
	e := newLoop(t)
	n := newTCP()
	need, most := maxInputSize+1, 0
	var end error
	var s *stream
	ln := listen(t, e, n, "unix:"+filepath.Join(t.TempDir(), "s"), func(st transport.Stream) transport.Handler {
		s = st.(*stream)
		return &handler{
			data: func(_ transport.Stream, b []byte) (int, int) {
				most = max(most, len(b))
				return 0, need
			},
			closed: func(_ transport.Stream, err error) { end = err },
		}
	})
	zeros := make([]byte, 1<<20)
	client := func(mib int) transport.Stream {
		return n.Dial(e, ln.Addr(), &handler{opened: func(s transport.Stream) {
			for range mib {
				s.WriteShared(zeros)
			}
		}})
	}
	client(1)
	if !runUntil(t, e, func() bool { return end != nil }) || !errors.Is(end, torus.ErrInvalid) {
		t.Errorf("a need above the limit: %v", end)
	}

	end, need = nil, 0 // any longer
	client(maxInputSize>>20 + 1)
	if !runUntil(t, e, func() bool { return end != nil }) || !errors.Is(end, torus.ErrInvalid) {
		t.Errorf("a message above the limit: %v", end)
	}
	if most < maxInputSize/2 || most > maxInputSize {
		t.Errorf("Data saw up to %d bytes, the limit is %d", most, maxInputSize)
	}

	end, need, s = nil, maxInputSize, nil // announced, but only a little is sent
	client(1)
	if !runUntil(t, e, func() bool { return s != nil && s.w-s.r == 1<<20 }) {
		t.Fatal("1 MiB did not arrive")
	}
	if c := len(s.in.Bytes()); c > 2<<20 {
		t.Errorf("a buffer of %d bytes for 1 MiB", c)
	}
}

// Idle streams hold no buffers.
func TestIdleStreamsAreCheap(t *testing.T) {
	e := newLoop(t)
	n := newTCP()
	const many = 1000
	var streams []*stream
	echoed := 0
	ln := listen(t, e, n, "unix:"+filepath.Join(t.TempDir(), "s"), func(s transport.Stream) transport.Handler {
		streams = append(streams, s.(*stream))
		return echo(s)
	})
	for range many {
		s := n.Dial(e, ln.Addr(), &handler{
			opened: func(s transport.Stream) { s.Write(make([]byte, 5000)) },
			data: func(s transport.Stream, b []byte) (int, int) {
				if len(b) < 5000 {
					return 0, 5000
				}
				echoed++
				return len(b), 0
			},
		})
		streams = append(streams, s.(*stream))
	}
	if !runUntil(t, e, func() bool { return echoed == many }) {
		t.Fatalf("%d of %d echoes", echoed, many)
	}
	for _, s := range streams {
		if s.in != nil || s.chunk != nil || cap(s.segments) > 16 {
			t.Fatalf("an idle stream holds input %v, chunk %v, %d segments", s.in != nil, s.chunk != nil, cap(s.segments))
		}
	}
	if n := len(n.loops[e].chunks); n > maxSpareChunks {
		t.Errorf("%d spare chunks", n)
	}
}

// The bytes given to Data stay as they are until it returns, even if it closes the stream and others read meanwhile.
func TestInputOutlivesClose(t *testing.T) {
	e := newLoop(t)
	n := newTCP()
	closed := false
	ln := listen(t, e, n, "unix:"+filepath.Join(t.TempDir(), "s"), func(transport.Stream) transport.Handler {
		return &handler{
			data: func(s transport.Stream, b []byte) (int, int) {
				s.Close()
				other := n.loops[e].getInput() // as another stream would
				clear(other.Bytes())
				n.loops[e].putInput(other)
				if string(b) != "bytes" {
					t.Errorf("they became %q", b)
				}
				return 0, 0
			},
			closed: func(transport.Stream, error) { closed = true },
		}
	})
	n.Dial(e, ln.Addr(), &handler{opened: func(s transport.Stream) { s.Write([]byte("bytes")) }})
	if !runUntil(t, e, func() bool { return closed }) {
		t.Error("never closed")
	}
}

// Without descriptors a listener neither spins nor dies.
func TestOutOfDescriptors(t *testing.T) {
	e := newLoop(t)
	n := newTCP()
	accepted := 0
	ln := listen(t, e, n, "unix:"+filepath.Join(t.TempDir(), "s"), func(s transport.Stream) transport.Handler {
		accepted++
		return &handler{}
	})
	n.Dial(e, ln.Addr(), &handler{})
	runUntil(t, e, func() bool { return accepted == 1 })
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	dialNet(t, ln.Addr())
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	runUntil(t, e, nil)
	pause := ln.(*listener).resume
	runUntil(t, e, nil)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if accepted != 1 || pause == nil || ln.(*listener).resume != pause {
		t.Errorf("%d accepted without descriptors, or no pause, or more than one", accepted)
	}
	if !runUntil(t, e, func() bool { return accepted == 2 }) {
		t.Error("the listener did not recover")
	}
}

// Two loops in two goroutines, for the race detector: nothing is shared between them but the sockets.
func TestTwoLoops(t *testing.T) {
	a, b := startLoop(t), startLoop(t)
	n := newTCP()
	var ln transport.Listener
	on(a, func() { ln = listen(t, a, n, "tcp://127.0.0.1:0", echo) })
	const streams, rounds = 20, 200
	done := make(chan error, streams)
	on(b, func() {
		for i := range streams {
			left := rounds
			msg := make([]byte, 100+i*1000)
			n.Dial(b, ln.Addr(), &handler{
				opened: func(s transport.Stream) { s.Write(msg) },
				data: func(s transport.Stream, b []byte) (int, int) {
					if len(b) < len(msg) {
						return 0, len(msg)
					}
					if left--; left == 0 {
						s.Close()
						return len(msg), 0
					}
					s.Write(msg)
					return len(msg), 0
				},
				closed: func(_ transport.Stream, err error) { done <- err },
			})
		}
	})
	for range streams {
		if err := <-done; !errors.Is(err, torus.ErrClosed) {
			t.Error(err)
		}
	}
	on(a, func() { ln.Close() })
}

// No goroutine and no descriptor is left when a loop with open streams is closed.
func TestNothingLeaks(t *testing.T) {
	descriptors := func() int {
		d, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(d)
	}
	before, goroutines := descriptors(), runtime.NumGoroutine()
	e, err := loop.NewEpoll(nil)
	if err != nil {
		t.Fatal(err)
	}
	n := newTCP()
	ln := listen(t, e, n, "tcp://127.0.0.1:0", echo)
	opened := 0
	var last transport.Stream
	for range 10 {
		last = n.Dial(e, "tcp://localhost:"+ln.Addr()[strings.LastIndexByte(ln.Addr(), ':')+1:], &handler{opened: func(transport.Stream) { opened++ }})
	}
	if !runUntil(t, e, func() bool { return opened == 10 }) {
		t.Fatalf("%d of 10 opened", opened)
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	last.Close() // harmless
	ln.Close()
	if d := descriptors(); d != before {
		t.Errorf("%d descriptors, %d before", d, before)
	}
	if g := runtime.NumGoroutine(); g > goroutines {
		t.Errorf("%d goroutines, %d before", g, goroutines)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"tcp://127.0.0.1:40000", "tcp://[::1]:0", "tcp://[fe80::1%eth0]:1", "tcp://host:65535", "unix:/run/x.sock",
		"unix:///run/x.sock", "unix:rel", "", "tcp://", "tcp://:70000", "unix:", "tcp://a:b:c", "unix:\x00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		a, err := parse(text)
		if err != nil {
			if !errors.Is(err, torus.ErrInvalid) {
				t.Errorf("%q: %v", text, err)
			}
			return
		}
		sa, ok := a.literal()
		if !ok {
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			a.lookup(ctx) // must not panic
			return
		}
		if a.path == "" {
			if _, err := parse(format(sa)); err != nil {
				t.Errorf("%q formats as %q: %v", text, format(sa), err)
			}
		}
	})
}

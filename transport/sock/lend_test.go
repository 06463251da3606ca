package sock

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/transport"
	"golang.org/x/sys/unix"
)

// running runs a loop in a goroutine of its own until the test ends.
func running(t *testing.T) *loop.Epoll {
	t.Helper()
	l, err := loop.NewEpoll(nil)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { l.Run(); close(done) }() //nolint:errcheck // ended by Stop
	t.Cleanup(func() {
		l.Stop()
		<-done
		l.Close() //nolint:errcheck // the test is over
	})
	return l
}

var (
	lentBytes = bytes.Repeat([]byte("x"), 1<<20)
	usedAgain = bytes.Repeat([]byte("!"), 1<<20)
)

// borrower fetches what each message of 16 bytes (place, length) says is lent, and answers with a byte.
type borrower struct {
	t       *testing.T
	fetched *atomic.Int64
	refused *atomic.Int64
}

func (h *borrower) Opened(transport.Stream)        {}
func (h *borrower) Closed(transport.Stream, error) {}
func (h *borrower) Data(s transport.Stream, b []byte) (n int, need int) {
	for ; len(b)-n >= 16; n += 16 {
		at, size := binary.LittleEndian.Uint64(b[n:]), binary.LittleEndian.Uint64(b[n+8:])
		dst := make([]byte, size)
		err := s.(transport.Lender).Fetch(dst, at)
		switch {
		case err == nil:
			h.fetched.Add(1)
			if !bytes.Equal(dst, lentBytes[:size]) {
				h.t.Errorf("fetched %d bytes that have been used again", size)
			}
		case errors.Is(err, torus.ErrClosed):
			h.refused.Add(1)
			return len(b), 0
		default:
			h.t.Errorf("fetch: %v", err)
		}
		s.Write(b[n : n+1])
	}
	return n, 16
}

// lender lends its memory a few times, and fills it with something else as soon as it is closed.
type lender struct {
	t      *testing.T
	mem    []byte
	end    func()
	opened func(s transport.Stream)
	got    int
	fds    bool
}

func (h *lender) Opened(s transport.Stream) {
	s.Write(make([]byte, 16)) // nothing, from nowhere; our descriptor goes with it
	h.opened(s)
}
func (h *lender) Closed(transport.Stream, error) {
	copy(h.mem, usedAgain)
	h.end()
}
func (h *lender) Data(s transport.Stream, b []byte) (int, int) {
	h.got += len(b)
	h.fds = s.(transport.Lender).CanFetch()
	return len(b), 0
}

func lendTo(s transport.Stream, mem []byte) bool {
	at, ok := s.(transport.Lender).Lend(mem)
	if !ok {
		return false
	}
	var m [16]byte
	binary.LittleEndian.PutUint64(m[:], at)
	binary.LittleEndian.PutUint64(m[8:], uint64(len(mem)))
	s.Write(m[:])
	return true
}

// What is lent is fetched as it was, however soon the lender closes and uses the memory for something else: then it is not fetched.
func TestLendAndClose(t *testing.T) {
	if err := buf.Share(); err != nil {
		t.Fatal(err)
	}
	here, there := running(t), running(t)
	var fetched, refused atomic.Int64
	addr := make(chan string, 1)
	n := New()
	there.Post(func() {
		ln, err := n.Listen(there, "tcp://127.0.0.1:0", func(transport.Stream) transport.Handler {
			return &borrower{t: t, fetched: &fetched, refused: &refused}
		})
		if err != nil {
			t.Error(err)
			close(addr)
			return
		}
		t.Cleanup(func() { there.Post(func() { ln.Close() }) }) //nolint:errcheck // it does not fail
		addr <- ln.Addr()
	})
	at := <-addr
	size := len(lentBytes)
	rng := rand.New(rand.NewPCG(1, 2))
	for round := range 600 {
		b := buf.GetShared(size)
		mem := b.Bytes()[:size]
		copy(mem, lentBytes)
		var ended sync.WaitGroup
		ended.Add(1)
		h := &lender{t: t, mem: mem, end: ended.Done}
		wait := time.Duration(rng.IntN(1<<rng.IntN(14))) * time.Microsecond
		orderly := rng.IntN(4) == 0
		h.opened = func(s transport.Stream) {
			var lent func()
			lent = func() {
				if h.got == 0 { // it has our descriptor when it has answered
					here.After(50*time.Microsecond, lent)
					return
				}
				if !h.fds {
					t.Errorf("round %d: the other side's descriptor has not come", round)
				}
				for range 4 {
					if !lendTo(s, mem) {
						t.Error("what is shared cannot be lent")
					}
				}
				here.After(wait, func() {
					if orderly {
						s.CloseAfterWrite()
					} else {
						s.Close()
					}
				})
			}
			lent()
		}
		here.Post(func() { n.Dial(here, at, h) })
		ended.Wait()
		b.Release()
		if t.Failed() {
			return
		}
	}
	t.Logf("%d fetched, %d refused", fetched.Load(), refused.Load())
	if fetched.Load() < 600+20 || refused.Load() < 20 {
		t.Errorf("%d fetched, %d refused: the test tests nothing", fetched.Load(), refused.Load())
	}
}

// Nothing is lent that is not shared, nor over TCP, nor to another user; what was not lent, or is beyond the end, cannot be fetched.
func TestNotLent(t *testing.T) {
	if err := buf.Share(); err != nil {
		t.Fatal(err)
	}
	for _, tcpOnly := range []bool{false, true} {
		l := newLoop(t)
		n := New()
		n.tcpOnly = tcpOnly
		var there, here transport.Stream
		var answered bool
		ln, err := n.Listen(l, "tcp://127.0.0.1:0", func(s transport.Stream) transport.Handler { there = s; return echoes{} })
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close() //nolint:errcheck // it does not fail
		here = n.Dial(l, ln.Addr(), &answers{&answered})
		if !runUntil(t, l, func() bool { return answered }) {
			t.Fatal("no answer")
		}
		for _, s := range []transport.Stream{here, there} {
			x := s.(transport.Lender)
			if _, ok := x.Lend(make([]byte, 1<<20)); ok {
				t.Error("memory that is not shared was lent")
			}
			b := buf.GetShared(1 << 20)
			if _, ok := x.Lend(b.Bytes()); ok == tcpOnly {
				t.Errorf("over TCP %v: lent %v", tcpOnly, ok)
			}
			b.Release()
			if x.CanFetch() == tcpOnly {
				t.Errorf("over TCP %v: can fetch %v", tcpOnly, x.CanFetch())
			}
			for _, at := range []uint64{1 << 36, 1<<36 - 4095, 1 << 63, ^uint64(0)} {
				if err := x.Fetch(make([]byte, 4096), at); !errors.Is(err, torus.ErrInvalid) {
					t.Errorf("fetched from %#x: %v", at, err)
				}
			}
		}
		here.Close()
		if err := here.(transport.Lender).Fetch(make([]byte, 1), 0); !errors.Is(err, torus.ErrClosed) {
			t.Errorf("fetched after Close: %v", err)
		}
		if _, ok := here.(transport.Lender).Lend(make([]byte, 1)); ok {
			t.Error("lent after Close")
		}
	}
}

type answers struct{ got *bool }

func (h *answers) Opened(s transport.Stream)                    { s.Write([]byte("x")) }
func (h *answers) Closed(transport.Stream, error)               {}
func (h *answers) Data(_ transport.Stream, b []byte) (int, int) { *h.got = true; return len(b), 0 }

// Another user may connect, and is given no memory; a descriptor of what could shrink, or of no memory at all, is not mapped.
func TestLentToNobodyElse(t *testing.T) {
	if addr := os.Getenv("TORUS_TEST_STRANGER"); addr != "" {
		stranger(addr)
		return
	}
	if os.Geteuid() != 0 {
		t.Fatal("needs to be root, to be somebody else")
	}
	if err := buf.Share(); err != nil {
		t.Fatal(err)
	}
	l := newLoop(t)
	var there transport.Stream
	ln, err := New().Listen(l, "tcp://127.0.0.1:0", func(s transport.Stream) transport.Handler { there = s; return echoes{} })
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close() //nolint:errcheck // it does not fail
	for _, uid := range []uint32{65534, 0} {
		cmd := exec.Command("/proc/self/exe", "-test.run", "TestLentToNobodyElse", "-test.v")
		a, _ := parse(ln.Addr())
		sa, _ := a.literal()
		ip, port, _ := addrPort(sa)
		cmd.Env = append(os.Environ(), "TORUS_TEST_STRANGER="+shortcutName(ip.String(), port))
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		cmd.Dir = "/"
		there = nil
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		var end error
		if !runUntil(t, l, func() bool {
			select {
			case end = <-ended:
				return true
			default:
				return false
			}
		}) {
			cmd.Process.Kill() //nolint:errcheck // it has ended then
			t.Fatal("it did not end")
		}
		if end != nil {
			t.Fatalf("%v\n%s", end, &out)
		}
		if got := bytes.Contains(out.Bytes(), []byte("descriptors: 1")); got != (uid == 0) {
			t.Errorf("user %d:\n%s", uid, &out)
		}
		if there == nil || there.(transport.Lender).CanFetch() {
			t.Errorf("user %d: what could shrink was mapped, or nobody has connected", uid)
		}
	}
}

// stranger connects, sends the descriptor of something that could be cut off, and says how many it gets.
func stranger(name string) {
	fd := must(unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0))
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: name}); err != nil {
		panic(err)
	}
	mine := must(unix.MemfdCreate("soft", unix.MFD_ALLOW_SEALING))
	if err := unix.Ftruncate(mine, 1<<20); err != nil {
		panic(err)
	}
	if err := unix.Sendmsg(fd, []byte("x"), unix.UnixRights(mine, mine), nil, 0); err != nil {
		panic(err)
	}
	b, oob := make([]byte, 1), make([]byte, 256)
	n, oobn, _, _, err := unix.Recvmsg(fd, b, oob, 0)
	if err != nil || n == 0 {
		panic(io.ErrUnexpectedEOF)
	}
	got := 0
	for _, m := range must(unix.ParseSocketControlMessage(oob[:oobn])) {
		got += len(must(unix.ParseUnixRights(&m)))
	}
	os.Stdout.WriteString("descriptors: " + string(rune('0'+got)) + "\n") //nolint:errcheck // the test notices
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

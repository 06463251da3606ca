package sock

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

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

// borrower borrows what each message of 16 bytes (place, length) says is lent, keeps it for a while, and answers the last byte of it.
type borrower struct {
	t         *testing.T
	l         *loop.Epoll
	keep      func() time.Duration // < 0: for ever
	end       func() int           // 1: the borrower closes, 2: in order
	borrowed  *atomic.Int64
	afterward *atomic.Int64 // given back when the connection had ended
	closed    bool
}

func (h *borrower) Opened(transport.Stream)        {}
func (h *borrower) Closed(transport.Stream, error) { h.closed = true }
func (h *borrower) Data(s transport.Stream, b []byte) (n int, need int) {
	for ; len(b)-n >= 16; n += 16 {
		at, size := binary.LittleEndian.Uint64(b[n:]), binary.LittleEndian.Uint64(b[n+8:])
		if size == 0 {
			s.Write([]byte{0})
			continue
		}
		x := s.(transport.Lender)
		mem, err := x.Borrow(at, int(size))
		if err != nil {
			h.t.Errorf("borrow: %v", err)
			return len(b), 0
		}
		h.borrowed.Add(1)
		if h.end != nil {
			switch h.end() {
			case 1:
				h.l.Post(s.Close)
			case 2:
				h.l.Post(s.CloseAfterWrite)
			}
		}
		if keep := h.keep(); keep >= 0 {
			h.l.After(keep, func() {
				if !bytes.Equal(mem, lentBytes[:size]) {
					h.t.Errorf("%d bytes that were lent have been used again", size)
				}
				if h.closed {
					h.afterward.Add(1)
				}
				x.GiveBack()
				s.Write([]byte{1})
			})
		}
	}
	return n, 16
}

// lender lends its memory a few times, and fills it with something else as soon as it is its own again.
type lender struct {
	t      *testing.T
	mem    []byte
	refs   int
	lent   uint32
	back   uint32
	freed  func()
	opened func(s transport.Stream)
	got    bool
	shares bool
}

func (h *lender) Opened(s transport.Stream) {
	s.Write(make([]byte, 16)) // nothing; our descriptor goes with it
	h.opened(s)
}
func (h *lender) Closed(transport.Stream, error) { h.Release() }
func (h *lender) Data(s transport.Stream, b []byte) (int, int) {
	h.got = true
	h.shares = s.(transport.Lender).CanBorrow()
	for _, what := range b {
		if what == 1 {
			if !s.(transport.Lender).Reclaim(h.back) {
				h.t.Errorf("nothing is lent as %d", h.back)
			}
			h.back++
		}
	}
	return len(b), 0
}

// Abandon and Release are the lender's as the owner of its memory.
func (h *lender) Abandon() { h.Release() }

func (h *lender) Release() {
	if h.refs--; h.refs == 0 {
		copy(h.mem, usedAgain)
		h.freed()
	}
}

func (h *lender) lend(s transport.Stream) bool {
	at, ok := s.(transport.Lender).Lend(h.mem, h.lent, h)
	if !ok {
		return false
	}
	h.lent++
	h.refs++
	var m [16]byte
	binary.LittleEndian.PutUint64(m[:], at)
	binary.LittleEndian.PutUint64(m[8:], uint64(len(h.mem)))
	s.Write(m[:])
	return true
}

// lendAndClose dials at, lends h's memory four times and closes after a while; freed is called when it is its own again.
func (h *lender) lendAndClose(l *loop.Epoll, at string, wait time.Duration, orderly bool) {
	h.refs = 1
	h.opened = func(s transport.Stream) {
		var lent func()
		lent = func() {
			if !h.got { // it has our descriptor when it has answered
				l.After(50*time.Microsecond, lent)
				return
			}
			if !h.shares {
				h.t.Error("the other side's descriptor has not come")
			}
			for range 4 {
				if !h.lend(s) {
					h.t.Error("what is shared cannot be lent")
				}
			}
			l.After(wait, func() {
				if orderly {
					s.CloseAfterWrite()
				} else {
					s.Close()
				}
			})
		}
		lent()
	}
	l.Post(func() { New().Dial(l, at, h) })
}

// borrowing listens with borrowers.
func borrowing(t *testing.T, l *loop.Epoll, made func() *borrower) string {
	t.Helper()
	addr := make(chan string, 1)
	l.Post(func() {
		ln, err := New().Listen(l, "tcp://127.0.0.1:0", func(transport.Stream) transport.Handler { return made() })
		if err != nil {
			t.Error(err)
			close(addr)
			return
		}
		t.Cleanup(func() { l.Post(func() { ln.Close() }) }) //nolint:errcheck // it does not fail
		addr <- ln.Addr()
	})
	return <-addr
}

// What is lent stays as it was until it has been given back, however the connection ends; and then it comes back.
func TestLendAndClose(t *testing.T) {
	if err := buf.Share(); err != nil {
		t.Fatal(err)
	}
	here, there := running(t), running(t)
	var borrowed, afterward atomic.Int64
	rng, keep := rand.New(rand.NewPCG(1, 2)), rand.New(rand.NewPCG(3, 4))
	at := borrowing(t, there, func() *borrower {
		return &borrower{t: t, l: there, borrowed: &borrowed, afterward: &afterward, keep: func() time.Duration {
			return time.Duration(keep.IntN(1<<keep.IntN(14))) * time.Microsecond
		}, end: func() int { return keep.IntN(12) }}
	})
	for range 600 {
		b := buf.GetShared(len(lentBytes))
		mem := b.Bytes()[:len(lentBytes)]
		copy(mem, lentBytes)
		freed := make(chan struct{})
		h := &lender{t: t, mem: mem, freed: func() { close(freed) }}
		h.lendAndClose(here, at, time.Duration(rng.IntN(1<<rng.IntN(14)))*time.Microsecond, rng.IntN(4) == 0)
		select {
		case <-freed:
		case <-time.After(patience):
			t.Fatal("what was lent did not come back")
		}
		b.Release()
		if t.Failed() {
			return
		}
	}
	t.Logf("%d borrowed, %d given back after the end", borrowed.Load(), afterward.Load())
	if borrowed.Load() < 200 || afterward.Load() < 50 {
		t.Errorf("%d borrowed, %d given back after the end: the test tests nothing", borrowed.Load(), afterward.Load())
	}
}

// What a process that hangs has borrowed does not come back; what one that is killed had, does.
func TestLentToTheDead(t *testing.T) {
	if os.Getenv("TORUS_TEST_BORROWER") != "" {
		if err := buf.Share(); err != nil {
			t.Fatal(err)
		}
		l := running(t)
		var n, after atomic.Int64
		os.Stdout.WriteString("at " + borrowing(t, l, func() *borrower { //nolint:errcheck // the test notices
			return &borrower{t: t, l: l, borrowed: &n, afterward: &after, keep: func() time.Duration {
				os.Stdout.WriteString("borrowed\n") //nolint:errcheck // the test notices
				return -1
			}}
		}) + "\n")
		time.Sleep(time.Minute)
		return
	}
	if err := buf.Share(); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "-test.run", "TestLentToTheDead", "-test.v")
	cmd.Env = append(os.Environ(), "TORUS_TEST_BORROWER=1")
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()         //nolint:errcheck // it was killed
	defer cmd.Process.Kill() //nolint:errcheck // it may have been
	lines := bufio.NewScanner(out)
	until := func(prefix string) string {
		for lines.Scan() {
			if rest, ok := strings.CutPrefix(lines.Text(), prefix); ok {
				return rest
			}
		}
		t.Fatalf("it never said %q", prefix)
		return ""
	}
	at := until("at ")
	l := running(t)
	b := buf.GetShared(len(lentBytes))
	defer b.Release()
	mem := b.Bytes()[:len(lentBytes)]
	copy(mem, lentBytes)
	freed := make(chan struct{})
	h := &lender{t: t, mem: mem, freed: func() { close(freed) }}
	h.lendAndClose(l, at, 200*time.Millisecond, false)
	until("borrowed")
	select {
	case <-freed:
		t.Fatal("it came back from one that has it still")
	case <-time.After(500 * time.Millisecond):
	}
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	select {
	case <-freed:
		t.Fatal("it came back from one that is stopped")
	case <-time.After(100 * time.Millisecond):
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-freed:
	case <-time.After(patience):
		t.Error("it did not come back from one that was killed")
	}
}

// Nothing is lent that is not shared, nor over TCP, nor to another user; what was not lent, or is beyond the end, cannot be borrowed.
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
			if _, ok := x.Lend(make([]byte, 1<<20), 1, nil); ok {
				t.Error("memory that is not shared was lent")
			}
			b := buf.GetShared(1 << 20)
			_, ok := x.Lend(b.Bytes()[:4096], 1, b)
			if ok == tcpOnly || (x.Lent() == 4096) != ok || x.Reclaim(1) != ok || x.Reclaim(1) || x.Lent() != 0 {
				t.Errorf("over TCP %v: lent %v", tcpOnly, ok)
			}
			if !ok {
				b.Release()
			}
			if x.CanBorrow() == tcpOnly {
				t.Errorf("over TCP %v: can borrow %v", tcpOnly, x.CanBorrow())
			}
			for _, at := range []uint64{1 << 36, 1<<36 - 4095, 1 << 63, ^uint64(0)} {
				if _, err := x.Borrow(at, 4096); !errors.Is(err, torus.ErrInvalid) {
					t.Errorf("borrowed from %#x: %v", at, err)
				}
			}
		}
		here.Close()
		if _, err := here.(transport.Lender).Borrow(0, 1); !errors.Is(err, torus.ErrClosed) {
			t.Errorf("borrowed after Close: %v", err)
		}
		if _, ok := here.(transport.Lender).Lend(make([]byte, 1), 1, nil); ok {
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
		if there == nil || there.(transport.Lender).CanBorrow() {
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

// What was borrowed is not in the borrower's page tables for ever, and the same when it is looked at again.
func TestLetGo(t *testing.T) {
	if err := buf.Share(); err != nil {
		t.Fatal(err)
	}
	b := buf.GetShared(1 << 20)
	defer b.Release()
	n := copy(b.Bytes(), lentBytes)
	at, ok := buf.SharedAt(b.Bytes())
	if !ok {
		t.Fatal("not shared")
	}
	var m memory
	m.take(mapTheirs(buf.SharedFD()))
	if m.theirs == nil {
		t.Fatal("not mapped")
	}
	pages, err := os.Open("/proc/self/pagemap")
	if err != nil {
		t.Fatal(err)
	}
	defer pages.Close()
	present := func() bool { // bit 63 of the page's entry (Documentation/admin-guide/mm/pagemap.rst)
		var e [8]byte
		if _, err := pages.ReadAt(e[:], int64(uintptr(unsafe.Pointer(&m.theirs[at]))/4096*8)); err != nil {
			t.Fatal(err)
		}
		return e[7]&0x80 != 0
	}
	for range 3 {
		if got := m.theirs[at:][:n]; !bytes.Equal(got, lentBytes[:n]) || !present() {
			t.Fatal("not what was lent, or not here")
		}
		if LetGo(); present() {
			t.Error("still here")
		}
	}
	m.unmap()
	LetGo() // of nothing
}

package sock

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/transport"
	"golang.org/x/sys/unix"
)

// writing is what a borrower asks its disk to write.
type writing struct {
	fd  int
	b   []byte
	off int64
}

func (j *writing) FileIO() (fd int, write bool, b []byte, off int64) { return j.fd, true, j.b, j.off }
func (j *writing) Work()                                             { unix.Pwrite(j.fd, j.b, j.off) } //nolint:errcheck // the test reads what there is
func (j *writing) Done()                                             {}

// doomed writes what it borrows to a file, past the page cache, and is killed while it does.
type doomed struct {
	l  *loop.Epoll
	fd int
}

func (h *doomed) Opened(transport.Stream)        {}
func (h *doomed) Closed(transport.Stream, error) {}
func (h *doomed) Data(s transport.Stream, b []byte) (n, need int) {
	for ; len(b)-n >= 16; n += 16 {
		at, size := binary.LittleEndian.Uint64(b[n:]), binary.LittleEndian.Uint64(b[n+8:])
		if size == 0 {
			s.Write([]byte{0})
			continue
		}
		mem := must(s.(transport.Lender).Borrow(at, int(size)))
		for o := 0; o < len(mem); o += 1 << 20 {
			h.l.Offload(&writing{h.fd, mem[o:][:1<<20], int64(o)})
		}
		h.l.Post(func() {
			h.l.After(200*time.Microsecond, func() { unix.Kill(os.Getpid(), unix.SIGKILL) }) //nolint:errcheck // the test notices
		})
	}
	return n, 16
}

// What the disk still writes for a borrower that was killed is what was lent to it, and nothing that the lender has done with the memory since.
func TestLentToTheDyingAndWritten(t *testing.T) {
	const total = 64 << 20
	if path := os.Getenv("TORUS_TEST_DOOMED"); path != "" {
		if err := buf.Share(); err != nil {
			t.Fatal(err)
		}
		l := running(t)
		fd := must(unix.Open(path, unix.O_RDWR|unix.O_DIRECT, 0))
		addr := make(chan string, 1)
		l.Post(func() {
			addr <- must(New().Listen(l, "tcp://127.0.0.1:0", func(transport.Stream) transport.Handler { return &doomed{l, fd} })).Addr()
		})
		os.Stdout.WriteString("at " + <-addr + "\n") //nolint:errcheck // the test notices
		time.Sleep(time.Minute)
		return
	}
	if err := buf.Share(); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/var/tmp", "torus") // a disk, where TMPDIR may be memory
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir) //nolint:errcheck // nothing depends on it
	path := filepath.Join(dir, "f")
	f := must(os.Create(path))
	defer f.Close() //nolint:errcheck // nothing depends on it
	must(f.Write(make([]byte, total)))
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "-test.run", "TestLentToTheDyingAndWritten", "-test.v")
	cmd.Env = append(os.Environ(), "TORUS_TEST_DOOMED="+path)
	out := must(cmd.StdoutPipe())
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()         //nolint:errcheck // it was killed
	defer cmd.Process.Kill() //nolint:errcheck // it was
	lines := bufio.NewScanner(out)
	at := ""
	for at == "" && lines.Scan() {
		at, _ = strings.CutPrefix(lines.Text(), "at ")
		if !strings.HasPrefix(at, "tcp") {
			at = ""
		}
	}
	l := running(t)
	b := buf.GetShared(total)
	mem := b.Bytes()[:total]
	for n := 0; n < total; {
		n += copy(mem[n:], lentBytes)
	}
	where, _ := buf.SharedAt(mem)
	freed := make(chan bool, 1)
	h := &bufLender{lender: lender{t: t, mem: mem}, b: b, freed: freed}
	h.opened = func(s transport.Stream) {
		var lent func()
		lent = func() {
			if !h.got {
				l.After(50*time.Microsecond, lent)
				return
			}
			b.Retain()
			place, ok := s.(transport.Lender).Lend(mem, 1, h)
			if !ok {
				t.Error("not lent")
			}
			var m [16]byte
			binary.LittleEndian.PutUint64(m[:], place)
			binary.LittleEndian.PutUint64(m[8:], total)
			s.Write(m[:])
		}
		lent()
	}
	l.Post(func() { New().Dial(l, at, h) })
	if abandoned := <-freed; !abandoned {
		t.Error("it was given back")
	}
	again := buf.GetShared(total)
	if place, _ := buf.SharedAt(again.Bytes()); place != where {
		t.Errorf("the next buffer is at %#x, the one that was lent at %#x: the test tests nothing", place, where)
	}
	for n := total; n > 0; n -= len(usedAgain) { // the last pages are written last
		copy(again.Bytes()[n-len(usedAgain):n], usedAgain)
	}
	cmd.Wait() //nolint:errcheck // it was killed
	time.Sleep(time.Second)
	d := must(unix.Open(path, unix.O_RDONLY|unix.O_DIRECT, 0))
	defer unix.Close(d)
	got := buf.Get(total).Bytes()[:total]
	must(unix.Pread(d, got, 0))
	old, right, other := bytes.Count(got, []byte{0})>>12, bytes.Count(got, []byte("x"))>>12, bytes.Count(got, []byte("!"))>>12
	t.Logf("pages on disk: %d of before, %d of what was lent, %d of what came later", old, right, other)
	if other > 0 {
		t.Errorf("%d pages are on disk that were never lent", other)
	}
	again.Release()
}

// bufLender is a lender whose memory is a Buf's.
type bufLender struct {
	lender
	b     *buf.Buf
	freed chan bool
}

func (h *bufLender) Closed(transport.Stream, error) { h.b.Release() }
func (h *bufLender) Release()                       { h.b.Release(); h.freed <- false }
func (h *bufLender) Abandon()                       { h.b.Abandon(); h.freed <- true }

// What a process lends that does away with the loop it did so on stays lent.
func TestLoopClosedWhileLent(t *testing.T) {
	if err := buf.Share(); err != nil {
		t.Fatal(err)
	}
	there := running(t)
	got := make(chan []byte, 1)
	addr := make(chan string, 1)
	there.Post(func() {
		addr <- must(New().Listen(there, "tcp://127.0.0.1:0", func(transport.Stream) transport.Handler { return &keeper{got} })).Addr()
	})
	at := <-addr
	var mem []byte
	func() {
		l := must(loop.NewEpoll(nil))
		b := buf.GetShared(len(lentBytes))
		copy(b.Bytes(), lentBytes)
		h := &bufLender{lender: lender{t: t, mem: b.Bytes()[:len(lentBytes)]}, b: b, freed: make(chan bool, 1)}
		h.opened = func(s transport.Stream) {
			var lent func()
			lent = func() {
				if !h.got {
					l.After(50*time.Microsecond, lent)
					return
				}
				b.Retain()
				place, _ := s.(transport.Lender).Lend(h.mem, 1, h)
				var m [16]byte
				binary.LittleEndian.PutUint64(m[:], place)
				binary.LittleEndian.PutUint64(m[8:], uint64(len(h.mem)))
				s.Write(m[:])
				l.After(100*time.Millisecond, func() { s.Close(); l.Post(l.Stop) })
			}
			lent()
		}
		l.Post(func() { New().Dial(l, at, h) })
		if err := l.Run(); err != nil {
			t.Fatal(err)
		}
		mem = <-got
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}()
	for range 5 {
		runtime.GC()
		time.Sleep(10 * time.Millisecond)
	}
	for range 10 {
		copy(buf.GetShared(len(lentBytes)).Bytes(), usedAgain)
	}
	if !bytes.Equal(mem, lentBytes) {
		t.Error("what is still borrowed has been used again")
	}
}

// keeper borrows and never gives back.
type keeper struct{ got chan []byte }

func (h *keeper) Opened(transport.Stream)        {}
func (h *keeper) Closed(transport.Stream, error) {}
func (h *keeper) Data(s transport.Stream, b []byte) (n, need int) {
	for ; len(b)-n >= 16; n += 16 {
		at, size := binary.LittleEndian.Uint64(b[n:]), binary.LittleEndian.Uint64(b[n+8:])
		if size == 0 {
			s.Write([]byte{0})
			continue
		}
		h.got <- must(s.(transport.Lender).Borrow(at, int(size)))
	}
	return n, 16
}

// A descriptor that comes from another user is not taken, and what comes behind it arrives.
func TestDescriptorOfAStranger(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("needs to be root, to be somebody else")
	}
	if err := buf.Share(); err != nil {
		t.Fatal(err)
	}
	l := newLoop(t)
	h := &counter{}
	ln := must(New().Listen(l, "tcp://127.0.0.1:0", func(transport.Stream) transport.Handler { return h }))
	defer ln.Close() //nolint:errcheck // it does not fail
	port := must(strconv.Atoi(ln.Addr()[len("tcp://127.0.0.1:"):]))
	fds := make(chan int)
	go func() {
		runtime.LockOSThread() // for ever: the thread ends with its user
		unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), 65533, ^uintptr(0))
		fd := must(unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0))
		if err := unix.Connect(fd, &unix.SockaddrUnix{Name: shortcutName("127.0.0.1", port)}); err != nil {
			t.Error(err)
		}
		fds <- fd
	}()
	fd := <-fds
	defer unix.Close(fd)
	if err := unix.Sendmsg(fd, []byte("hello"), unix.UnixRights(buf.SharedFD()), nil, 0); err != nil {
		t.Fatal(err)
	}
	must(unix.Write(fd, []byte("more")))
	if !runUntil(t, l, func() bool { return h.n == 9 }) {
		t.Errorf("%d of 9 bytes arrived", h.n)
	}
	if h.borrows {
		t.Error("the memory of another user was mapped")
	}
}

type counter struct {
	n       int
	borrows bool
}

func (h *counter) Opened(transport.Stream)        {}
func (h *counter) Closed(transport.Stream, error) {}
func (h *counter) Data(s transport.Stream, b []byte) (int, int) {
	h.n += len(b)
	h.borrows = h.borrows || s.(transport.Lender).CanBorrow()
	return len(b), 0
}

// What could kill who reads it is not mapped: a file that is cut short as it is looked at, pages that the kernel may not have, sizes beyond reason.
func TestMapTheirs(t *testing.T) {
	made := func(flags int, size int64, seals int) int {
		fd, err := unix.MemfdCreate("x", flags|unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
		if err != nil {
			t.Logf("flags %#x: %v", flags, err) // no huge pages here
			return -1
		}
		t.Cleanup(func() { unix.Close(fd) })
		if err := unix.Ftruncate(fd, size); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
			t.Fatal(err)
		}
		return fd
	}
	for _, c := range []struct {
		what  string
		fd    int
		taken bool
	}{
		{"as it should be", made(0, 1<<20, unix.F_SEAL_SHRINK), true},
		{"could shrink", made(0, 1<<20, unix.F_SEAL_GROW), false},
		{"empty", made(0, 0, unix.F_SEAL_SHRINK), false},
		{"huge pages", made(unix.MFD_HUGETLB, 64<<20, unix.F_SEAL_SHRINK), false},
		{"too large", made(0, buf.SharedSize+1, unix.F_SEAL_SHRINK), false},
		{"no memory", int(must(os.Open("/proc/self/exe")).Fd()), false},
	} {
		if c.fd < 0 {
			continue
		}
		mem := mapTheirs(c.fd)
		if (mem != nil) != c.taken {
			t.Errorf("%s: mapped %v", c.what, mem != nil)
		}
		if mem != nil {
			unix.Munmap(mem) //nolint:errcheck // nothing depends on it
		}
	}
	b := buf.GetShared(1)
	defer b.Release()
	if _, err := unix.Mmap(buf.SharedFD(), 0, 4096, unix.PROT_WRITE, unix.MAP_SHARED); err != syscall.EACCES {
		t.Errorf("whoever gets our descriptor can write through it: %v", err)
	}
}

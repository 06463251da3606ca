package vfs_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coreos/torus/vfs"
	"github.com/coreos/torus/vfs/vfstest"
)

func TestOS(t *testing.T) {
	vfstest.Run(t, func(t *testing.T) vfs.FS { return vfs.NewOS(t.TempDir()) })
}

// Memory that the file system cannot provide any more is an error, not the end of the process.
func TestOSMapFault(t *testing.T) {
	f := create(t, vfs.NewOS(t.TempDir()), "x")
	defer f.Close()
	write(t, f, 0, make([]byte, 8192))
	m, err := f.Map(8192)
	if errors.Is(err, errors.ErrUnsupported) {
		return // as it may be: who maps files does without where this says so
	}
	must(t, err)
	defer m.Close()
	must(t, m.Write([]byte("a"), 5000))
	must(t, f.Truncate(4096))
	if err := m.Write([]byte("a"), 5000); !errors.Is(err, syscall.EIO) {
		t.Fatalf("error %v, want %v", err, syscall.EIO)
	}
	if err := m.Prepare(0, 8192); err == nil {
		t.Fatal("prepared what is not there")
	}
	must(t, m.Prepare(0, 4096))
	must(t, m.Write([]byte("a"), 0))
}

func TestMem(t *testing.T) {
	vfstest.Run(t, func(*testing.T) vfs.FS { return vfs.NewMem(1) })
}

func TestErrorsWithoutErrors(t *testing.T) {
	vfstest.Run(t, func(*testing.T) vfs.FS {
		return vfs.NewErrors(vfs.NewMem(1), func(vfs.Op) error { return nil })
	})
}

// A clone of a clone is as good as the original.
func TestMemClone(t *testing.T) {
	vfstest.Run(t, func(*testing.T) vfs.FS {
		rng := rand.New(rand.NewPCG(1, 1))
		return vfs.NewMem(1).CrashClone(rng).CrashClone(rng)
	})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func create(t *testing.T, f vfs.FS, name string) vfs.File {
	t.Helper()
	file, err := f.Create(name)
	must(t, err)
	return file
}

func write(t *testing.T, f vfs.File, off int64, b []byte) {
	t.Helper()
	_, err := f.WriteAt(b, off)
	must(t, err)
}

func contents(t *testing.T, f vfs.FS, name string) []byte {
	t.Helper()
	file, err := f.Open(name)
	must(t, err)
	defer file.Close()
	n, err := file.Size()
	must(t, err)
	b := make([]byte, n)
	if n > 0 {
		_, err = file.ReadAt(b, 0)
		must(t, err)
	}
	return b
}

func fill(x byte, n int) []byte { return bytes.Repeat([]byte{x}, n) }

// What was synced survives every crash; what was not is, sooner or later, seen kept, dropped and torn.
func TestCrashKeepsWhatWasSynced(t *testing.T) {
	for _, byteTears := range []bool{false, true} {
		m := vfs.NewMem(1)
		m.SetByteTears(byteTears)
		f := create(t, m, "x")
		write(t, f, 0, fill('a', 8192))
		must(t, f.Datasync())
		must(t, m.SyncDir("."))
		write(t, f, 1024, fill('b', 4096)) // overwrites
		write(t, f, 8192, fill('c', 1024)) // extends
		rng := rand.New(rand.NewPCG(2, 2))
		seen := map[string]bool{}
		for range 300 {
			c := m.CrashClone(rng)
			b := contents(t, c, "x")
			if len(b) < 8192 || !bytes.Equal(b[:1024], fill('a', 1024)) || !bytes.Equal(b[5120:8192], fill('a', 3072)) {
				t.Fatal("bytes that were synced are gone")
			}
			switch mid := b[1024:5120]; {
			case bytes.Equal(mid, fill('a', 4096)):
				seen["old"] = true
			case bytes.Equal(mid, fill('b', 4096)):
				seen["new"] = true
			default:
				seen["torn"] = true
				for i := 1; i < len(mid); i++ {
					if mid[i] != mid[i-1] && i%512 != 0 {
						seen["torn within a sector"] = true
					}
				}
			}
			switch {
			case len(b) == 8192:
				seen["short"] = true
			case bytes.Equal(b[8192:], fill('c', 1024)):
				seen["long"] = true
			}
			if bytes.Equal(b[1024:5120], fill('a', 4096)) && len(b) == 9216 {
				seen["reordered"] = true
			}
			// It is a file system of its own.
			g, err := c.Open("x")
			must(t, err)
			write(t, g, 0, fill('z', 100))
		}
		for _, want := range []string{"old", "new", "torn", "short", "long", "reordered"} {
			if !seen[want] {
				t.Errorf("byte tears %v: never seen: %s", byteTears, want)
			}
		}
		if seen["torn within a sector"] != byteTears {
			t.Errorf("byte tears %v: torn within a sector: %v", byteTears, seen["torn within a sector"])
		}
		if b := contents(t, m, "x"); b[0] != 'a' || b[1024] != 'b' || len(b) != 9216 {
			t.Error("the original was changed")
		}
	}
}

// Random histories: every sector of a crashed file is one it had since the last sync; and what a second crash
// finds after a crash is the same.
func TestCrashSectors(t *testing.T) {
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 3))
		m := vfs.NewMem(seed)
		f := create(t, m, "x")
		must(t, m.SyncDir("."))
		const sectors = 64
		possible := make([]map[byte]bool, sectors) // values of each since the last sync
		now := make([]byte, sectors)
		for i := range possible {
			possible[i] = map[byte]bool{0: true}
		}
		must(t, f.Allocate(0, sectors*512))
		must(t, f.Datasync())
		for range rng.IntN(100) {
			if rng.IntN(8) == 0 {
				must(t, f.Datasync())
				for i := range possible {
					possible[i] = map[byte]bool{now[i]: true}
				}
				continue
			}
			x := byte(rng.IntN(256))
			if rng.IntN(8) == 0 { // whole pages, durable at once, and nothing else
				from := rng.IntN(sectors/8) * 8
				_, err := f.WriteDurable(fill(x, 4096), int64(from)*512)
				must(t, err)
				for i := from; i < from+8; i++ {
					possible[i], now[i] = map[byte]bool{x: true}, x
				}
				continue
			}
			from := rng.IntN(sectors)
			n := rng.IntN(sectors-from) + 1
			write(t, f, int64(from)*512, fill(x, n*512))
			for i := from; i < from+n; i++ {
				possible[i][x], now[i] = true, x
			}
		}
		c := m.CrashClone(rng)
		b := contents(t, c, "x")
		for i := range possible {
			s := b[i*512 : i*512+512]
			if !bytes.Equal(s, fill(s[0], 512)) || !possible[i][s[0]] {
				t.Fatalf("seed %d: sector %d is %x, not one of %v", seed, i, s[:8], possible[i])
			}
		}
		if !bytes.Equal(contents(t, c.CrashClone(rng), "x"), b) {
			t.Fatalf("seed %d: a second crash found something else", seed)
		}
	}
}

// Names are durable after SyncDir, and only then.
func TestCrashDirectories(t *testing.T) {
	m := vfs.NewMem(1)
	old, gone := create(t, m, "old"), create(t, m, "gone")
	write(t, old, 0, []byte("old"))
	must(t, old.Datasync())
	must(t, gone.Datasync())
	must(t, m.SyncDir("."))
	n := create(t, m, "new.tmp")
	write(t, n, 0, []byte("new"))
	must(t, n.Datasync())
	must(t, m.Rename("new.tmp", "old"))
	must(t, m.Remove("gone"))
	must(t, m.MkdirAll("d"))
	in := create(t, m, "d/in")
	must(t, in.Datasync())
	must(t, m.SyncDir("d"))

	rng := rand.New(rand.NewPCG(1, 1))
	seen := map[string]bool{}
	for range 200 {
		c := m.CrashClone(rng)
		b := string(contents(t, c, "old"))
		if b != "old" && b != "new" {
			t.Fatalf("a rename was not atomic: %q", b)
		}
		names, err := c.List(".")
		must(t, err)
		seen[b] = true
		for _, name := range []string{"gone", "new.tmp", "d"} {
			seen[fmt.Sprint(name, slices.Contains(names, name))] = true
		}
		if slices.Contains(names, "d") {
			if inner, _ := c.List("d"); !slices.Equal(inner, []string{"in"}) {
				t.Fatalf("a synced directory holds %q", inner)
			}
		}
	}
	for _, want := range []string{"old", "new", "gonetrue", "gonefalse", "new.tmptrue", "new.tmpfalse", "dtrue", "dfalse"} {
		if !seen[want] {
			t.Errorf("never seen: %s", want)
		}
	}
	must(t, m.SyncDir("."))
	for range 20 {
		names, err := m.CrashClone(rng).List(".")
		must(t, err)
		if !slices.Equal(names, []string{"d", "old"}) {
			t.Fatalf("after SyncDir a crash left %q", names)
		}
	}
}

// Equal seeds give equal crashes.
func TestCrashIsReproducible(t *testing.T) {
	image := func() string {
		m := vfs.NewMem(7)
		var all string
		for i := range 5 {
			f := create(t, m, fmt.Sprint("f", i))
			write(t, f, 0, fill(byte(i+1), 5000))
		}
		c := m.CrashClone(rand.New(rand.NewPCG(5, 5)))
		names, err := c.List(".")
		must(t, err)
		for _, n := range names {
			all += n + string(contents(t, c, n))
		}
		return all
	}
	a, b := image(), image()
	if a != b {
		t.Fatal("two crashes from the same seed differ")
	}
}

// A Reader reads what is there, and outlives the file that it came from, the end of the process that opened it, and its name.
func TestReader(t *testing.T) {
	mem := vfs.NewMem(1)
	for name, fsys := range map[string]vfs.FS{"os": vfs.NewOS(t.TempDir()), "mem": mem, "errors": vfs.NewErrors(mem, func(vfs.Op) error { return nil })} {
		t.Run(name, func(t *testing.T) {
			f, err := fsys.Create(name)
			must(t, err)
			r, err := f.Reader()
			must(t, err)
			b := bytes.Repeat([]byte("abcd"), 1024)
			_, err = f.WriteAt(b, 4096)
			must(t, err)
			read := func(what string) {
				t.Helper()
				got := make([]byte, len(b))
				if _, err := r.ReadAt(got, 4096); err != nil || !bytes.Equal(got, b) {
					t.Errorf("%s: %v, or other bytes", what, err)
				}
				for range 100 {
					if _, err := r.ReadAtCached(got, 4096); err == nil && bytes.Equal(got, b) {
						return
					} else if !errors.Is(err, vfs.ErrWouldBlock) {
						t.Errorf("%s: %v", what, err)
					}
				}
				t.Errorf("%s: never cached", what)
			}
			read("at first")
			must(t, f.Close())
			read("the file closed")
			must(t, fsys.Remove(name))
			read("removed")
			if name != "os" {
				mem.Kill()
				read("killed")
			}
			must(t, r.Close())
			if _, err := r.ReadAt(b, 0); err == nil {
				t.Error("read after Close")
			}
		})
	}
}

// What others hand over is read only, and past the page cache where that pays; only files are taken.
func TestFromDescriptor(t *testing.T) {
	dir := t.TempDir()
	f, err := vfs.NewOS(dir).Create("f")
	must(t, err)
	defer f.Close()
	b := bytes.Repeat([]byte("0123456789abcdef"), 64<<10)
	_, err = f.WriteAt(b, 0)
	must(t, err)
	mine, err := f.Reader()
	must(t, err)
	defer mine.Close()
	if _, err := unix.Pwrite(mine.Descriptor(0, 1), b[:1], 0); err == nil {
		t.Error("a Reader's descriptor can be written to")
	}
	fd, err := unix.Dup(mine.Descriptor(0, 1))
	must(t, err)
	r, err := vfs.FromDescriptor(fd)
	must(t, err)
	got := make([]byte, len(b))
	if _, err := r.ReadAt(got, 0); err != nil || !bytes.Equal(got, b) {
		t.Errorf("%v, or other bytes", err)
	}
	for _, n := range []int{4096, len(b)} { // the second may be a descriptor of its own
		d := r.Descriptor(0, n)
		if k, err := unix.Pread(d, got[:4096], 4096); err != nil || k != 4096 || !bytes.Equal(got[:4096], b[4096:8192]) {
			// O_DIRECT wants memory that is aligned as the disk is
			if flags, _ := unix.FcntlInt(uintptr(d), unix.F_GETFL, 0); flags&unix.O_DIRECT == 0 {
				t.Errorf("%d bytes: %d, %v", n, k, err)
			}
		}
		if flags, err := unix.FcntlInt(uintptr(d), unix.F_GETFL, 0); err != nil || flags&unix.O_ACCMODE != unix.O_RDONLY {
			t.Errorf("%d bytes: flags %#x, %v", n, flags, err)
		}
	}
	must(t, r.Close())
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
		t.Error("the descriptor is still open")
	}
	var pipe [2]int
	must(t, unix.Pipe(pipe[:]))
	if _, err := vfs.FromDescriptor(pipe[0]); err == nil {
		t.Error("a pipe was taken")
	}
	if _, err := unix.FcntlInt(uintptr(pipe[0]), unix.F_GETFD, 0); err == nil {
		t.Error("what was not taken is still open")
	}
	unix.Close(pipe[1]) //nolint:errcheck // the test is over
	if _, err := vfs.FromDescriptor(1 << 20); err == nil {
		t.Error("taken what is none")
	}
}

// The end of a process loses nothing but its locks and files.
func TestKill(t *testing.T) {
	m := vfs.NewMem(1)
	f := create(t, m, "x")
	write(t, f, 0, []byte("unsynced"))
	unlock, err := m.Lock("lock")
	must(t, err)
	m.Kill()
	if string(contents(t, m, "x")) != "unsynced" {
		t.Fatal("a process kill lost what was in the page cache")
	}
	if _, err := f.WriteAt([]byte("x"), 0); !errors.Is(err, fs.ErrClosed) {
		t.Fatalf("a file of the dead process can be written: %v", err)
	}
	_, err = m.Lock("lock")
	must(t, err)
	must(t, unlock()) // of the dead: it must not drop the new one
	if _, err := m.Lock("lock"); !errors.Is(err, vfs.ErrLocked) {
		t.Fatalf("lock taken twice: %v", err)
	}
}

func TestCapacity(t *testing.T) {
	m := vfs.NewMem(1)
	m.SetCapacity(10_000)
	f := create(t, m, "x")
	must(t, f.Allocate(0, 9_000))
	if _, err := f.WriteAt(fill('x', 1001), 9_000); !errors.Is(err, vfs.ErrNoSpace) {
		t.Fatalf("written beyond the capacity: %v", err)
	}
	write(t, f, 0, fill('x', 9_000)) // overwriting needs no space
	g := create(t, m, "y")
	if err := g.Allocate(0, 2_000); !errors.Is(err, vfs.ErrNoSpace) {
		t.Fatalf("allocated beyond the capacity: %v", err)
	}
	must(t, f.Close())
	must(t, m.Remove("x"))
	must(t, g.Allocate(0, 10_000))
	if free, size, _ := m.Free(); free != 0 || size != 10_000 {
		t.Fatalf("free %d of %d", free, size)
	}
}

// A failed fsync is not mended by one that succeeds (TESTING, trap 2): the page looks clean, and is not on the medium.
func TestFailedDatasyncLosesPages(t *testing.T) {
	m := vfs.NewMem(1)
	failing := false
	e := vfs.NewErrors(m, func(op vfs.Op) error {
		if failing && op.Kind == vfs.OpDatasync && op.Name == "x" {
			return syscall.EIO
		}
		return nil
	})
	f := create(t, e, "x")
	must(t, m.SyncDir("."))
	write(t, f, 0, fill('a', 8192))
	must(t, f.Datasync())
	write(t, f, 0, fill('b', 4096))
	other, err := e.Open("x")
	must(t, err)
	failing = true
	if err := f.Datasync(); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	failing = false
	if err := other.Datasync(); !errors.Is(err, syscall.EIO) {
		t.Fatalf("another open file was not told: %v", err)
	}
	must(t, other.Datasync())
	must(t, f.Datasync()) // "succeeds"
	if contents(t, m, "x")[0] != 'b' {
		t.Fatal("the page should still be seen")
	}
	rng := rand.New(rand.NewPCG(1, 1))
	for range 20 {
		if contents(t, m.CrashClone(rng), "x")[0] != 'a' {
			t.Fatal("what a failed fsync lost became durable")
		}
	}
	must(t, f.DropCache(0, 8192))
	if contents(t, m, "x")[0] != 'a' {
		t.Fatal("dropping the cache did not show what is on the medium")
	}
}

func TestErrorsByKindNameAndCount(t *testing.T) {
	writes := 0
	e := vfs.NewErrors(vfs.NewMem(1), func(op vfs.Op) error {
		if op.Kind == vfs.OpWrite && op.Name == "x" {
			if writes++; writes == 2 {
				return vfs.ErrNoSpace
			}
		}
		if op.Kind == vfs.OpRead && op.Off == 512 {
			return syscall.EIO
		}
		return nil
	})
	f := create(t, e, "x")
	write(t, f, 0, fill('a', 1024))
	if _, err := f.WriteAt(fill('b', 1024), 0); !errors.Is(err, vfs.ErrNoSpace) {
		t.Fatal(err)
	}
	write(t, f, 0, fill('c', 10))
	if _, err := f.ReadAt(make([]byte, 10), 512); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	if _, err := f.ReadAtCached(make([]byte, 10), 512); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
}

func TestSyncTime(t *testing.T) {
	f := create(t, vfs.NewOS(t.TempDir()), "x")
	if f.SyncTime() != 0 {
		t.Fatal("a sync time before the first sync")
	}
	write(t, f, 0, fill('a', 4096))
	must(t, f.Datasync())
	if f.SyncTime() <= 0 {
		t.Fatal("no sync time")
	}
	m := vfs.NewMem(1)
	m.SetSlowSyncs(1, time.Second)
	g := create(t, m, "x")
	must(t, g.Datasync())
	if g.SyncTime() != time.Second {
		t.Fatal(g.SyncTime())
	}
}

func BenchmarkReadAtCached(b *testing.B) {
	fsys := vfs.NewOS(b.TempDir())
	f, err := fsys.Create("x")
	if err != nil {
		b.Fatal(err)
	}
	buf := make([]byte, 4096)
	if _, err := f.WriteAt(buf, 0); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := f.ReadAtCached(buf, 0); err != nil {
			b.Fatal(err)
		}
	}
}

// Rot changes what is stored, and what a reader sees; nothing unsynced, and no clone.
func TestMemRot(t *testing.T) {
	m := vfs.NewMem(1)
	f, err := m.Create("a")
	if err != nil {
		t.Fatal(err)
	}
	old := bytes.Repeat([]byte{7}, 3*4096)
	if _, err := f.WriteAt(old, 0); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Datasync(), m.SyncDir(".")); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{8}, 2*4096); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 1))
	clone := m.CrashClone(rng)
	if n := m.Rot(rng, func(name string, off int64, page []byte) bool {
		return name == "a" && off >= 4096 && page[0] == 7
	}); n != 1 {
		t.Fatalf("%d pages damaged, want the second: the third has unsynced changes", n)
	}
	b := make([]byte, 3*4096)
	if _, err := f.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	wrong := 0
	for i := range b[:2*4096] {
		if b[i] != 7 {
			wrong++
		}
	}
	if wrong != 512 || b[2*4096] != 8 {
		t.Fatalf("%d bytes are wrong, want a sector", wrong)
	}
	g, err := clone.Open("a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := g.ReadAt(b[:2*4096], 0); err != nil || !bytes.Equal(b[:2*4096], old[:2*4096]) {
		t.Fatal("a clone was damaged, too")
	}
}

// Every fate of two unsynced writes and a new name, each once.
func TestMemCrashEach(t *testing.T) {
	m := vfs.NewMem(1)
	f, err := m.Create("a")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Datasync(), m.SyncDir(".")); err != nil {
		t.Fatal(err)
	}
	for i, n := range []int{4096, 512} {
		if _, err := f.WriteAt(bytes.Repeat([]byte{byte(i + 1)}, n), int64(i)*4096); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := m.Create("b"); err != nil {
		t.Fatal(err)
	}
	found := map[string]int{}
	rng := rand.New(rand.NewPCG(1, 1))
	n := m.CrashEach(100, rng, func(c *vfs.Mem) bool {
		g, err := c.Open("a")
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 8192)
		if _, err := g.ReadAt(b, 0); err != nil && err != io.EOF {
			t.Fatal(err)
		}
		_, err = c.Open("b")
		found[fmt.Sprint(b[0], b[4095], b[4096], err == nil)]++
		return true
	})
	if n != 4*2*2 || len(found) != n {
		t.Fatalf("%d combinations, %d different: %v", n, len(found), found)
	}
	if n := m.CrashEach(5, rng, func(*vfs.Mem) bool { return true }); n != 5 {
		t.Fatalf("%d of 5", n)
	}
	if n := m.CrashEach(5, rng, func(*vfs.Mem) bool { return false }); n != 1 {
		t.Fatalf("%d of 1", n)
	}
}

// What WriteDurable has written is durable, what was written before it elsewhere is not yet, and a failure loses what a failed Datasync does.
func TestWriteDurable(t *testing.T) {
	m := vfs.NewMem(1)
	failing := false
	e := vfs.NewErrors(m, func(op vfs.Op) error {
		if failing && op.Kind == vfs.OpDatasync {
			return syscall.EIO
		}
		return nil
	})
	f := create(t, e, "x")
	must(t, f.Allocate(0, 4*4096))
	must(t, f.Datasync())
	must(t, m.SyncDir("."))
	write(t, f, 0, fill('a', 3*4096))
	if took, err := f.WriteDurable(fill('b', 4096), 4096); err != nil || took <= 0 {
		t.Errorf("it took %v: %v", took, err)
	}
	rng := rand.New(rand.NewPCG(1, 1))
	seen := map[byte]bool{}
	for range 50 {
		b := contents(t, m.CrashClone(rng), "x")
		if !bytes.Equal(b[4096:8192], fill('b', 4096)) {
			t.Fatal("what was written durably is gone")
		}
		seen[b[0]], seen[b[8192]] = true, true
	}
	if !seen[0] || !seen['a'] {
		t.Errorf("what was written besides was always, or never, durable: %v", seen)
	}
	failing = true
	if _, err := f.WriteDurable(fill('c', 4096), 3*4096); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	failing = false
	must(t, f.Datasync())
	if b := contents(t, m.CrashClone(rng), "x"); b[3*4096] == 'c' || b[0] == 'a' {
		t.Error("what a failure lost became durable")
	}
}

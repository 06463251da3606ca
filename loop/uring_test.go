package loop

import (
	"bytes"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// preadJob reads a piece of a file, which a helper can do as well.
type preadJob struct {
	f      *os.File
	b      []byte
	off    int64
	n      int
	err    error
	worked bool
	done   func(*preadJob)
}

func (j *preadJob) FileIO() (int, bool, []byte, int64) { return int(j.f.Fd()), false, j.b, j.off }
func (j *preadJob) Work()                              { j.worked = true; j.n, j.err = j.f.ReadAt(j.b, j.off) }
func (j *preadJob) Done()                              { j.done(j) }

// Reads by the kernel and by helpers, more at a time than the ring takes, of a file that is not in memory: each gets its own bytes, and those
// that meet the end of the file say so.
func TestFileReads(t *testing.T) {
	e, err := NewEpoll(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	const size, piece, count = 8 << 20, 4096, 2000
	want := make([]byte, size)
	for i := range want {
		want[i] = byte(i>>12) ^ byte(i*7)
	}
	name := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(name, want, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	unix.Sync()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 1))
	left, byKernel := count, 0
	for i := range count {
		j := &preadJob{f: f, b: make([]byte, piece), off: rng.Int64N(size - piece)}
		short := i%10 == 0
		if short {
			j.off = size - 100
		}
		j.done = func(j *preadJob) {
			switch {
			case short && (j.err != io.EOF || j.n != 100 || !bytes.Equal(j.b[:j.n], want[j.off:])):
				t.Errorf("at the end: %d bytes, %v", j.n, j.err)
			case !short && (j.err != nil || !bytes.Equal(j.b, want[j.off:j.off+piece])):
				t.Errorf("wrong bytes at %d: %v", j.off, j.err)
			}
			if !j.worked {
				byKernel++
			}
			if left--; left == 0 {
				e.Stop()
			}
		}
		e.Post(func() { e.Offload(j) })
	}
	timer := time.AfterFunc(30*time.Second, e.Stop)
	defer timer.Stop()
	if err := e.Run(); err != nil {
		t.Fatal(err)
	}
	if left > 0 {
		t.Fatalf("%d reads were never done", left)
	}
	if e.ring != nil && byKernel < uringDepth/2 {
		t.Errorf("the kernel did only %d of %d reads", byKernel, count)
	}
	if e.ring != nil && (e.ring.flying != 0 || len(e.ring.free) != len(e.ring.jobs)) {
		t.Errorf("%d reads under way, %d places free", e.ring.flying, len(e.ring.free))
	}
}

// Close waits for reads under way: the kernel writes to their memory.
func TestFileReadsClose(t *testing.T) {
	for range 20 {
		e, err := NewEpoll(nil)
		if err != nil {
			t.Fatal(err)
		}
		f, err := os.Open("/proc/self/exe")
		if err != nil {
			t.Fatal(err)
		}
		for i := range 100 {
			e.Offload(&preadJob{f: f, b: make([]byte, 64<<10), off: int64(i) << 16, done: func(*preadJob) {}})
		}
		e.Post(e.Stop)
		if err := e.Run(); err != nil {
			t.Fatal(err)
		}
		if err := e.Close(); err != nil {
			t.Fatal(err)
		}
		if e.ring != nil && e.ring.flying != 0 {
			t.Errorf("%d reads still under way after Close", e.ring.flying)
		}
		f.Close()
	}
}

func BenchmarkEpollFileRead(b *testing.B) {
	for _, ring := range []bool{true, false} {
		b.Run(map[bool]string{true: "ring", false: "helpers"}[ring], func(b *testing.B) {
			e, err := NewEpoll(nil)
			if err != nil {
				b.Fatal(err)
			}
			defer e.Close()
			if !ring && e.ring != nil {
				e.ring.close()
				e.ring = nil
			}
			f, err := os.Open("/proc/self/exe")
			if err != nil {
				b.Fatal(err)
			}
			defer f.Close()
			n := b.N
			j := &preadJob{f: f, b: make([]byte, 4096)}
			j.done = func(*preadJob) {
				if n--; n <= 0 {
					e.Stop()
					return
				}
				e.Offload(j)
			}
			b.ReportAllocs()
			e.Post(func() { e.Offload(j) })
			if err := e.Run(); err != nil {
				b.Fatal(err)
			}
		})
	}
}

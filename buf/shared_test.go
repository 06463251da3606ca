package buf

import (
	"runtime"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func share(t *testing.T) {
	t.Helper()
	if err := Share(); err != nil {
		t.Fatal(err)
	}
	empty()
}

// held is how much memory the file of the shared buffers takes.
func held(t *testing.T) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(SharedFD(), &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// What is written to a shared buffer is where SharedAt says, for whoever maps the file; other memory is nowhere in it.
func TestShared(t *testing.T) {
	share(t)
	if err := Share(); err != nil { // once more
		t.Fatal(err)
	}
	mem, err := unix.Mmap(SharedFD(), 0, areaSize, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem) //nolint:errcheck // nothing can be done
	var all []*Buf
	for i, n := range []int{1, 4096, 64 << 10, 64<<10 + 1, 1 << 20, 1<<20 + 4096, 4 << 20, 64 << 20} {
		b := GetShared(n)
		all = append(all, b)
		if len(b.Bytes()) < n || uintptr(unsafe.Pointer(unsafe.SliceData(b.Bytes())))%pageSize != 0 {
			t.Errorf("GetShared(%d): %d bytes, or not aligned", n, len(b.Bytes()))
		}
		if _, ok := SharedAt(b.Bytes()[n-1:]); !ok {
			t.Fatalf("GetShared(%d) is not shared", n)
		}
		b.Bytes()[n-1] = byte(i + 1)
	}
	for i, b := range all {
		for j := range b.Bytes() {
			if b.Bytes()[j] == byte(i+1) {
				if at, _ := SharedAt(b.Bytes()[j:]); mem[at] != byte(i+1) {
					t.Errorf("buffer %d is not where SharedAt says", i)
				}
				break
			}
		}
		b.Release()
	}
	for _, b := range [][]byte{nil, make([]byte, 1<<20), Get(1 << 20).Bytes()} {
		if at, ok := SharedAt(b); ok {
			t.Errorf("memory that is not shared is said to be at %#x", at)
		}
	}
	if _, ok := SharedAt(GetShared(64<<20 + 1).Bytes()); ok {
		t.Error("more than any class has is shared")
	}
}

// Trim gives the memory of shared buffers back to the system; their addresses serve again.
func TestSharedTrim(t *testing.T) {
	share(t)
	before := held(t)
	b := GetShared(8 << 20)
	clear(b.Bytes())
	at, _ := SharedAt(b.Bytes())
	if n := held(t) - before; n != 8<<20 {
		t.Errorf("8 MiB written to, %d taken", n)
	}
	b.Release()
	Trim()
	if n := Trim(); n < 8<<20 {
		t.Errorf("%d bytes given up", n)
	}
	if n := held(t); n > before {
		t.Errorf("%d bytes are held, %d before", n, before)
	}
	again := GetShared(8 << 20)
	if a, _ := SharedAt(again.Bytes()); a != at {
		t.Errorf("it was at %#x, the next one is at %#x", at, a)
	}
	again.Release()
}

// What nobody has released and nobody holds any more comes back.
func TestSharedIsCollected(t *testing.T) {
	share(t)
	at, _ := SharedAt(GetShared(16 << 20).Bytes())
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		runtime.GC()
		b := GetShared(16 << 20)
		again, _ := SharedAt(b.Bytes())
		b.Release()
		if again == at {
			return
		}
	}
	t.Error("it did not come back in ten seconds")
}

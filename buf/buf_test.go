package buf

import (
	"math/rand/v2"
	"sync"
	"testing"
	"unsafe"
)

// Every buffer is aligned, long enough, and not more than an eighth, or a page, too long when it is new.
func TestSizes(t *testing.T) {
	for _, n := range []int{0, 1, pageSize, pageSize + 1, 64 << 10, 64<<10 + 1, 68 << 10, 72 << 10, 72<<10 + 1, 128 << 10, 1 << 20, 1<<20 + pageSize, 4 << 20, 64 << 20, 64<<20 + 1} {
		b := Get(n)
		if len(b.Bytes()) < n {
			t.Errorf("Get(%d) has %d bytes", n, len(b.Bytes()))
		}
		if uintptr(unsafe.Pointer(unsafe.SliceData(b.Bytes())))%pageSize != 0 {
			t.Errorf("Get(%d) is not aligned", n)
		}
		b.Release()
	}
	for pages := smallPages + 1; pages <= smallPages<<octaves; pages += 1 + pages/1000 {
		n := pages * pageSize
		c, size := largeClass(n)
		if c < 0 || c >= largeClasses || size < n || size > n+n/classesPerOctave+pageSize {
			t.Fatalf("%d bytes are of class %d, of %d bytes", n, c, size)
		}
		if c2, size2 := largeClass(size); c2 != c || size2 != size {
			t.Fatalf("class %d has %d bytes, which are of class %d with %d", c, size, c2, size2)
		}
		if c3, _ := largeClass(size + 1); pages < smallPages<<octaves && size < 64<<20 && c3 != c+1 {
			t.Fatalf("%d bytes more than class %d are of class %d", 1, c, c3)
		}
	}
	if c, _ := largeClass(64<<20 + 1); c != -1 {
		t.Errorf("more than 64 MiB are of class %d", c)
	}
}

// A free buffer serves again, also for somewhat less; nobody gets one that another holds.
func TestReuse(t *testing.T) {
	empty()
	a := Get(1<<20 + pageSize)
	a.Release()
	if b := Get(600 << 10); b != a {
		t.Error("the free buffer was not used for 600 KiB")
	} else if c := Get(1<<20 + pageSize); c == a {
		t.Error("a buffer was given away twice")
	}
	a.Release()
	if b := Get(100 << 10); b == a {
		t.Error("1 MiB was used for 100 KiB")
	}
	empty()
	rng := rand.New(rand.NewPCG(1, 1))
	held := map[*Buf]int{}
	for range 100_000 {
		if len(held) < 20 && rng.IntN(2) == 0 {
			n := 64<<10 + 1 + rng.IntN(4<<20)
			b := Get(n)
			if _, twice := held[b]; twice || len(b.mem) < n || len(b.mem) > 9*n/4+pageSize {
				t.Fatalf("asked for %d bytes: %d, held already: %v", n, len(b.mem), twice)
			}
			held[b] = n
			continue
		}
		for b := range held {
			delete(held, b)
			b.Release()
			break
		}
		if rng.IntN(1000) == 0 {
			Trim()
		}
	}
}

// What has been free from one Trim to the next is given up, what was needed in between is kept.
func TestTrim(t *testing.T) {
	empty()
	var all []*Buf
	for range 10 {
		all = append(all, Get(1<<20))
	}
	for _, b := range all {
		b.Release()
	}
	if n := Trim(); n != 0 {
		t.Errorf("%d bytes dropped that were in use a moment ago", n)
	}
	all = all[:0]
	for range 3 {
		all = append(all, Get(1<<20))
	}
	for _, b := range all {
		b.Release()
	}
	if n := Trim(); n != 7<<20 {
		t.Errorf("%d bytes dropped, 7 of 10 MiB were not needed", n)
	}
	if n := Trim(); n != 3<<20 {
		t.Errorf("%d bytes dropped when nothing was needed, 3 MiB were left", n)
	}
	if n := Trim(); n != 0 {
		t.Errorf("%d bytes dropped of nothing", n)
	}
}

func TestConcurrent(t *testing.T) {
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 5000 {
				b := Get(65<<10 + i%7*(100<<10))
				b.mem[0], b.mem[len(b.mem)-1] = byte(g), byte(g)
				if i%100 == 0 {
					Trim()
				}
				if b.mem[0] != byte(g) || b.mem[len(b.mem)-1] != byte(g) {
					t.Error("somebody else has written to this buffer")
				}
				b.Release()
			}
		})
	}
	wg.Wait()
}

func empty() {
	Trim()
	Trim()
}

func BenchmarkGet(b *testing.B) {
	for _, n := range []int{4 << 10, 1 << 20} {
		b.Run("", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				Get(n).Release()
			}
		})
	}
}

// To release what one does not have is found, of every kind.
func TestReleasedTwice(t *testing.T) {
	for _, b := range []*Buf{Get(1), Get(1 << 20), Get(65 << 20), GetShared(1 << 20)} {
		b.Retain()
		b.Release()
		b.Release()
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%d bytes could be released twice", len(b.Bytes()))
				}
			}()
			b.Release()
		}()
	}
	empty() // none of them is of any use now
}

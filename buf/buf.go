// Package buf keeps page-aligned buffers for reuse.
//
// Small ones, of up to 64 KiB, are in a sync.Pool for each power of two: as cheap as can be, and the garbage collector
// takes away what is not used. Larger ones are what makes the memory of a process. They are in lists of their own (large.go), in classes
// an eighth apart, and Trim gives up those that were not needed lately, however seldom the collector runs. What is likely to go to another process on this
// machine is best taken from memory that can be shared with it (shared.go).
package buf

import (
	"math/bits"
	"sync"
	"unsafe"
)

const (
	pageSize = 4096
	minShift = 12 // 4 KiB
	maxShift = 16 // 64 KiB
)

var small [maxShift - minShift + 1]sync.Pool

// Buf is a page-aligned buffer with an owner: whoever holds it calls Release once.
type Buf struct {
	mem   []byte // whole, aligned
	class int    // of small, or of pool
	pool  *pool  // nil: of small, or, if too large for any class, of none
	more  int    // owners beside the first; -1: it has none
	stale bool   // somebody may still read the very pages that are behind it
}

// Get returns a buffer of at least n bytes with arbitrary contents.
func Get(n int) *Buf {
	if n > 1<<maxShift {
		return getLarge(n)
	}
	c := 0
	if n > pageSize {
		c = bits.Len(uint(n-1)) - minShift
	}
	if b, _ := small[c].Get().(*Buf); b != nil {
		b.more = 0
		return b
	}
	return &Buf{mem: aligned(1 << (minShift + c)), class: c}
}

// Bytes is the whole buffer, which may be longer than was asked for.
func (b *Buf) Bytes() []byte { return b.mem }

// Retain adds an owner: Release has to be called once more. Owners beside the first must all be on one loop.
func (b *Buf) Retain() { b.more++ }

// Abandon is Release of a shared buffer that another process had which has ended: before it is used again it gets other pages.
func (b *Buf) Abandon() {
	b.stale = b.pool == &shared
	b.Release()
}

// Release gives the buffer back, unless it has other owners. The caller must not use it afterwards; a second Release panics, unless somebody has it again by then.
func (b *Buf) Release() {
	b.more--
	switch {
	case b.more >= 0:
	case b.more < -1:
		panic("buf: released by nobody who has it")
	case b.stale:
		renew(b)
	case b.pool != nil:
		b.pool.put(b)
	case len(b.mem) <= 1<<maxShift:
		small[b.class].Put(b)
	}
}

// aligned returns n bytes at the beginning of a page. Whole pages are so already, as the Go runtime allocates today; a page more is
// asked for only if one day they are not.
func aligned(n int) []byte {
	if n >= pageSize {
		if mem := make([]byte, n); offset(mem) == 0 {
			return mem
		}
	}
	mem := make([]byte, n+pageSize)
	off := offset(mem)
	return mem[off : off+n : off+n]
}

// offset is how far it is from b to the next beginning of a page.
func offset(b []byte) int {
	return int(-uintptr(unsafe.Pointer(unsafe.SliceData(b))) & (pageSize - 1))
}

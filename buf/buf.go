// Package buf keeps page-aligned buffers for reuse.
package buf

import (
	"math/bits"
	"sync"
	"unsafe"
)

const (
	pageSize = 4096
	minShift = 12 // 4 KiB
	maxShift = 26 // 64 MiB
)

var pools [maxShift - minShift + 1]sync.Pool

// Buf is a page-aligned buffer with an owner: whoever holds it calls Release once.
type Buf struct {
	mem   []byte // whole, aligned
	class int
}

// Get returns a buffer of at least n bytes with arbitrary contents.
func Get(n int) *Buf {
	c := 0
	if n > pageSize {
		c = bits.Len(uint(n-1)) - minShift
	}
	if c >= len(pools) {
		return &Buf{mem: aligned(n), class: -1}
	}
	if b, _ := pools[c].Get().(*Buf); b != nil {
		return b
	}
	return &Buf{mem: aligned(1 << (minShift + c)), class: c}
}

// Bytes is the whole buffer, which may be longer than was asked for.
func (b *Buf) Bytes() []byte { return b.mem }

// Release gives the buffer back. It must not be used afterwards.
func (b *Buf) Release() {
	if b.class >= 0 {
		pools[b.class].Put(b)
	}
}

func aligned(n int) []byte {
	mem := make([]byte, n+pageSize)
	off := int(-uintptr(unsafe.Pointer(&mem[0])) & (pageSize - 1))
	return mem[off : off+n : off+n]
}

// Aligned returns n bytes of fresh, page-aligned, zeroed memory (for O_DIRECT).
func Aligned(n int) []byte { return aligned(n) }

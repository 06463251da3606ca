package buf

import (
	"math/bits"
	"sync"
)

const (
	// The classes of large buffers: classesPerOctave between one power of two and the next, from 64 KiB to 64 MiB. A record is
	// a page longer than its data, so that powers of two alone would nearly double what a record of 1 MiB takes.
	classesPerOctave = 8
	octaves          = 10
	largeClasses     = octaves * classesPerOctave
	smallPages       = 1 << (maxShift - minShift)
)

// pool holds free large buffers. One lock for a whole process will do: what is 64 KiB or more is copied at least once
// by whoever asks for it, which takes a hundred times as long as the list does.
type pool struct {
	sync.Mutex
	free [largeClasses][]*Buf
	// low is the least that free[c] has been since the last trim: so many were not needed.
	low [largeClasses]int
	has [(largeClasses + 63) / 64]uint64 // bit c: free[c] is not empty
	// drop is called with what is given up; nil: that is the garbage collector's.
	drop func([]*Buf)
}

var large pool

// largeClass returns the class of buffers of at least n > 64 KiB bytes, and their size; -1 if n is too much for any.
func largeClass(n int) (c, size int) {
	pages := (n + pageSize - 1) / pageSize
	octave := bits.Len(uint(pages-1)) - 1 - (maxShift - minShift)
	if octave >= octaves {
		return -1, n
	}
	base := smallPages << octave
	step := base / classesPerOctave
	k := (pages - base + step - 1) / step // 1 … classesPerOctave
	return octave*classesPerOctave + k - 1, (base + k*step) * pageSize
}

func getLarge(n int) *Buf {
	c, size := largeClass(n)
	if c < 0 {
		return &Buf{mem: aligned(n)}
	}
	if b := large.get(c); b != nil {
		return b
	}
	return &Buf{mem: aligned(size), class: c, pool: &large}
}

// get returns a free buffer of class c, or of up to twice its size, which will do as well; nil if there is none.
func (p *pool) get(c int) *Buf {
	p.Lock()
	defer p.Unlock()
	for i := c; i < min(c+classesPerOctave, largeClasses); i++ {
		if w := p.has[i/64] >> (i % 64); w == 0 {
			i += 63 - i%64
			continue
		} else if w&1 == 0 {
			i += bits.TrailingZeros64(w) - 1
			continue
		}
		l := p.free[i]
		b := l[len(l)-1]
		l[len(l)-1] = nil
		l = l[:len(l)-1]
		p.free[i] = l
		p.low[i] = min(p.low[i], len(l))
		if len(l) == 0 {
			p.has[i/64] &^= 1 << (i % 64)
		}
		b.more = 0
		return b
	}
	return nil
}

func (p *pool) put(b *Buf) {
	c := b.class
	p.Lock()
	p.free[c] = append(p.free[c], b)
	p.has[c/64] |= 1 << (c % 64)
	p.Unlock()
}

// Trim gives up those large buffers that have been free all the time since it was called last, and returns how many bytes that
// were; the garbage collector has yet to find those that are not shared. Called every now and then it bounds what is kept to what was in use at
// once in the time between.
func Trim() int { return large.trim() + shared.trim() }

func (p *pool) trim() int {
	dropped := 0
	p.Lock()
	defer p.Unlock()
	for c := range p.free {
		l := p.free[c]
		n := p.low[c]
		if n > 0 {
			for _, b := range l[:n] { // the coldest
				dropped += len(b.mem)
			}
			if p.drop != nil {
				p.drop(l[:n])
			}
			kept := copy(l, l[n:])
			clear(l[kept:])
			l = l[:kept]
			p.free[c] = l
			if kept == 0 {
				p.has[c/64] &^= 1 << (c % 64)
			}
		}
		p.low[c] = len(l)
	}
	return dropped
}

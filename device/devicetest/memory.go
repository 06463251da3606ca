// Package devicetest has devices and directories in memory for the tests of front ends.
package devicetest

import (
	"fmt"

	"github.com/coreos/torus/buf/buftest"
	"github.com/coreos/torus/device"
)

// pageSize is the unit in which a Memory remembers what is allocated, in bytes.
const pageSize = 4096

// Memory is a device in memory that remembers what would survive a power cut. It belongs to one loop.
type Memory struct {
	data    []byte // what is read
	durable []byte // what a power cut leaves
	dirty   []span // where the two differ, at most
	pages   []bool // allocated
	ro      bool

	// Deliver, if not nil, is given the rest of each request, to be called later, in any order: it takes
	// effect, and Done is called, then. If nil that happens within Submit.
	Deliver func(r *device.Request, finish func())
	// Fail, if not nil, may fail a request before it takes effect.
	Fail func(r *device.Request) error
	// SlowZeroes fails FastZero with ErrNotSupported.
	SlowZeroes bool

	// Count is how many requests there were of each kind.
	Count map[device.Op]int
	// Last is a copy of the latest request as it was submitted, without Data.
	Last device.Request
}

type span struct{ off, len uint64 }

var _ device.Device = (*Memory)(nil)

// NewMemory returns a device of size bytes of zeroes, nothing of it allocated.
func NewMemory(size uint64, readOnly bool) *Memory {
	return &Memory{
		data: make([]byte, size), durable: make([]byte, size), pages: make([]bool, (size+pageSize-1)/pageSize),
		ro: readOnly, Count: map[device.Op]int{},
	}
}

// Size implements device.Device.
func (m *Memory) Size() uint64 { return uint64(len(m.data)) }

// ReadOnly implements device.Device.
func (m *Memory) ReadOnly() bool { return m.ro }

// Bytes is the contents, to be looked at and changed between requests.
func (m *Memory) Bytes() []byte { return m.data }

// Durable is what a power cut would leave.
func (m *Memory) Durable() []byte { return m.durable }

// Crash cuts the power.
func (m *Memory) Crash() {
	copy(m.data, m.durable)
	m.dirty = nil
}

// Submit implements device.Device.
func (m *Memory) Submit(r *device.Request) {
	m.Count[r.Op]++
	m.Last = *r
	m.Last.Data, m.Last.Buf, m.Last.Done, m.Last.Extents = nil, nil, nil, nil
	if m.Deliver == nil {
		r.Finish(m.apply(r, r.Data))
		return
	}
	data := r.Data
	if r.Op == device.Write {
		data = append([]byte(nil), r.Data...) // ours from now on
	}
	m.Deliver(r, func() { r.Finish(m.apply(r, data)) })
}

func (m *Memory) apply(r *device.Request, data []byte) error {
	if m.Fail != nil {
		if err := m.Fail(r); err != nil {
			return err
		}
	}
	if r.Op == device.Flush {
		for _, d := range m.dirty {
			copy(m.durable[d.off:d.off+d.len], m.data[d.off:])
		}
		m.dirty = m.dirty[:0]
		return nil
	}
	if r.Off > m.Size() || r.Len > m.Size()-r.Off {
		return device.ErrRange
	}
	here := m.data[r.Off : r.Off+r.Len]
	switch r.Op {
	case device.Read:
		if r.Flags&device.Sparse != 0 && !m.allocated(r.Off, r.Len) {
			r.Zero = true
			return nil
		}
		buftest.Exchange(&r.Buf, &r.Data)
		copy(r.Data, here)
		return nil
	case device.Status:
		m.status(r)
		return nil
	case device.Prefetch:
		return nil
	}
	if m.ro {
		return device.ErrReadOnly
	}
	switch r.Op {
	case device.Write:
		copy(here, data)
		m.allocate(r.Off, r.Len)
	case device.Trim:
		clear(here)
		m.free(r.Off, r.Len)
	case device.WriteZeroes:
		if m.SlowZeroes && r.Flags&device.FastZero != 0 {
			return device.ErrNotSupported
		}
		clear(here)
		if r.Flags&device.NoHole != 0 {
			m.allocate(r.Off, r.Len)
		} else {
			m.free(r.Off, r.Len)
		}
	default:
		return fmt.Errorf("operation %d: %w", r.Op, device.ErrInvalid)
	}
	if r.Flags&device.FUA != 0 {
		copy(m.durable[r.Off:r.Off+r.Len], here)
	} else {
		m.dirty = append(m.dirty, span{r.Off, r.Len})
	}
	return nil
}

func (m *Memory) allocated(off, n uint64) bool {
	for p := off / pageSize; p*pageSize < off+n; p++ {
		if m.pages[p] {
			return true
		}
	}
	return false
}

func (m *Memory) allocate(off, n uint64) {
	for p := off / pageSize; p*pageSize < off+n; p++ {
		m.pages[p] = true
	}
}

// free frees the pages that lie wholly in the range.
func (m *Memory) free(off, n uint64) {
	for p := (off + pageSize - 1) / pageSize; p < uint64(len(m.pages)) && min((p+1)*pageSize, m.Size()) <= off+n; p++ {
		m.pages[p] = false
	}
}

func (m *Memory) status(r *device.Request) {
	end := r.Off + r.Len
	for off := r.Off; off < end; {
		p := off / pageSize
		hole := !m.pages[p]
		next := min((p+1)*pageSize, end)
		for next < end && !m.pages[next/pageSize] == hole {
			next = min(next+pageSize, end)
		}
		r.Extents = append(r.Extents, device.Extent{Len: next - off, Hole: hole, Zero: hole})
		off = next
	}
}

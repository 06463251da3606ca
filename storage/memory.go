package storage

import (
	"bytes"
	"fmt"

	"github.com/coreos/torus"
	"github.com/coreos/torus/record"
)

// Memory is a Store that keeps its blocks in memory, for tests and trials. Everything is as durable as the process.
type Memory struct {
	id      Identity
	limit   uint32
	kept    uint32 // see Disk
	metrics *metrics
	slots   []slot
	blocks  []memoryBlock // of each slot
	spare   []uint32      // free slots
	index   index
	hdr     record.Header
	page    []byte
	closed  bool
}

type memoryBlock struct {
	data    []byte
	flushed uint64
}

var _ torus.Store = (*Memory)(nil)

// NewMemory returns an empty store of cfg.SizeBytes, of which nothing is taken before it is used.
func NewMemory(cfg Config) (*Memory, error) {
	limit, _, err := cfg.check()
	if err != nil {
		return nil, err
	}
	m := &Memory{id: cfg.Identity, limit: limit, kept: keptSlots(limit), page: make([]byte, torus.PageSize)}
	m.index.slots = &m.slots
	if m.metrics, err = newMetrics(cfg.Registerer); err != nil {
		return nil, err
	}
	m.metrics.blocksTotal.Set(float64(limit))
	m.metrics.blockBytes.Set(float64(m.id.BlockSize))
	return m, nil
}

// Kind implements torus.Store.
func (m *Memory) Kind() string { return "memory" }

// Stats implements torus.Store.
func (m *Memory) Stats() torus.StoreStats {
	return torus.StoreStats{
		BlockSize: m.id.BlockSize, Size: uint64(m.limit-m.kept) * m.id.BlockSize, Used: uint64(m.index.n) * m.id.BlockSize,
		Full: uint32(m.index.n) >= m.limit-m.kept,
	}
}

// Close implements torus.Store. The blocks are gone.
func (m *Memory) Close() error {
	if m.closed {
		return torus.ErrClosed
	}
	m.closed = true
	m.metrics.unregister()
	m.slots, m.blocks = nil, nil
	return nil
}

// Submit implements torus.BlockStore. Everything is done at once.
func (m *Memory) Submit(r *torus.Request) {
	if m.closed {
		r.Finish(torus.ErrClosed)
		return
	}
	if !validRef(r.Ref) {
		r.Finish(fmt.Errorf("%v with a block reference out of range: %w", r.Op, torus.ErrInvalid))
		return
	}
	err := m.do(r)
	switch r.Op {
	case torus.OpAppend, torus.OpPut:
		count(m.metrics.writes, m.metrics.failedWrites, err)
	case torus.OpRead:
		count(m.metrics.reads, m.metrics.failedReads, err)
	case torus.OpDelete:
		count(m.metrics.deletes, m.metrics.failedDeletes, err)
	case torus.OpSync:
		m.metrics.flushes.Inc()
	}
	m.metrics.blocks.Set(float64(m.index.n))
	r.Finish(err)
}

func count(good, bad interface{ Inc() }, err error) {
	if err == nil {
		good.Inc()
	} else {
		bad.Inc()
	}
}

func (m *Memory) do(r *torus.Request) error {
	s, ok := m.index.find(keyOf(r.Ref))
	var x *slot
	if ok {
		x = &m.slots[s]
	}
	switch r.Op {
	case torus.OpPing:
		return nil
	case torus.OpAppend:
		return m.append(r, s, x)
	case torus.OpPut:
		return m.put(r, s, x)
	case torus.OpFence:
		r.Tails, r.Committed = nil, 0
		m.index.window(r, func(s uint32) {
			r.Tails = append(r.Tails, m.tail(s))
			r.Committed = max(r.Committed, m.blocks[s].flushed)
		})
		return nil
	case torus.OpList:
		r.Tails = nil
		m.index.list(r, func(s uint32) { r.Tails = append(r.Tails, m.tail(s)) })
		return nil
	case torus.OpSync:
		if x == nil || r.Len > x.length {
			return fmt.Errorf("sync of %d bytes of %v: %w", r.Len, r.Ref, torus.ErrGap)
		}
		r.Length = r.Len
		return nil
	case torus.OpDelete:
		if x != nil {
			m.index.remove(x.key)
			m.blocks[s] = memoryBlock{}
			*x = slot{open: -1}
			m.spare = append(m.spare, s)
		}
		return nil
	}
	if x == nil {
		return fmt.Errorf("%v of %v: %w", r.Op, r.Ref, torus.ErrBlockNotExist)
	}
	switch r.Op {
	case torus.OpSeal:
		return m.seal(r, s, x)
	case torus.OpRead:
		if err := checkRead(r, x.length); err != nil {
			return err
		}
		copy(r.Data, m.blocks[s].data[r.Off:])
		return nil
	case torus.OpScan:
		return scanRecords(r, x.length, m.page, &m.hdr, func(b []byte, off uint32) error {
			copy(b, m.blocks[s].data[off:])
			return nil
		})
	}
	return fmt.Errorf("%v in memory: %w", r.Op, torus.ErrNotSupported)
}

func (m *Memory) tail(s uint32) torus.Tail {
	x := &m.slots[s]
	return torus.Tail{Ref: x.key.ref(), Length: x.length, Sealed: x.state == sealed}
}

func (m *Memory) append(r *torus.Request, s uint32, x *slot) error {
	length := uint32(0)
	if x != nil {
		length = x.length
		if x.state == sealed {
			return torus.ErrSealed
		}
	}
	if r.Off > length {
		return torus.ErrGap
	}
	flushed, err := checkAppend(r, m.id.BlockSize, &m.hdr)
	if err != nil {
		return err
	}
	data := r.Data
	if r.Off < length {
		again := data[:min(len(data), int(length-r.Off))]
		if !bytes.Equal(again, m.blocks[s].data[r.Off:][:len(again)]) {
			return errDiffers(r)
		}
		data = data[len(again):]
	}
	if x == nil {
		if s, err = m.add(r); err != nil {
			return err
		}
		x = &m.slots[s]
	}
	b := &m.blocks[s]
	b.data = append(b.data, data...)
	b.flushed = max(b.flushed, flushed)
	x.length = uint32(len(b.data))
	r.Length = x.length
	return nil
}

// add gives a new block a slot.
func (m *Memory) add(r *torus.Request) (s uint32, err error) {
	limit := m.limit
	if !r.Reserve {
		limit -= m.kept
	}
	if uint32(m.index.n) >= limit {
		return 0, fmt.Errorf("all %d slots of the store are taken: %w", limit, torus.ErrOutOfSpace)
	}
	if n := len(m.spare); n > 0 {
		s, m.spare = m.spare[n-1], m.spare[:n-1]
	} else {
		s = uint32(len(m.slots))
		m.slots = append(m.slots, slot{})
		m.blocks = append(m.blocks, memoryBlock{})
	}
	m.slots[s] = slot{key: keyOf(r.Ref), state: open, open: -1}
	m.index.insert(s)
	return s, nil
}

func (m *Memory) put(r *torus.Request, s uint32, x *slot) error {
	if x != nil && x.length > r.Len {
		return fmt.Errorf("put %v: the copy there has %d bytes by now, not %d at most: %w", r.Ref, x.length, r.Len, torus.ErrAgain)
	}
	flushed, err := checkAppend(r, m.id.BlockSize, &m.hdr)
	if err != nil {
		return err
	}
	if x == nil {
		if s, err = m.add(r); err != nil {
			return err
		}
	}
	m.slots[s].state, m.slots[s].length = sealed, uint32(len(r.Data))
	m.blocks[s] = memoryBlock{bytes.Clone(r.Data), flushed}
	return nil
}

func (m *Memory) seal(r *torus.Request, s uint32, x *slot) error {
	switch {
	case r.Len > x.length:
		return fmt.Errorf("seal %v at %d of %d bytes: %w", r.Ref, r.Len, x.length, torus.ErrGap)
	case x.state == sealed && r.Len < x.length:
		return fmt.Errorf("seal %v at %d, sealed at %d: %w", r.Ref, r.Len, x.length, torus.ErrSealed)
	case r.Len < x.length:
		b := m.blocks[s].data
		if r.Len%torus.PageSize != 0 || m.hdr.Decode(b[r.Len:]) != nil || m.hdr.Ref != r.Ref || m.hdr.Offset != r.Len {
			return fmt.Errorf("seal %v at %d: within a record: %w", r.Ref, r.Len, torus.ErrInvalid)
		}
		m.blocks[s].data = b[:r.Len:r.Len]
	}
	x.state, x.length = sealed, r.Len
	return nil
}

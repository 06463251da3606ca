package file

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/coreos/torus/buf"
)

// The map says where each page's newest flushed bytes are. It is a radix tree of 4 KiB nodes with 512
// entries each: a leaf covers 2 MiB of the file, an interior node 1 GiB; the INode lists the interior nodes.
// An entry of a leaf and an entry of an interior node have the same form: a page in some block of the table.
// Leaves are loaded on demand and evicted; interior nodes stay once loaded (4 KiB a GiB and as much again in pointers).
// docs/format/inode.md draws it.

const (
	fanout     = 512
	leafPages  = fanout
	innerPages = fanout * fanout
	nodeSize   = fanout * 8
	// minLeaves is the least the map keeps in memory: more than any one record or request can touch.
	minLeaves = 1024
)

// entry is the place of a page: 24 bits index into the block table, 14 bits page within the block,
// 2 bits kind, 24 bits of the page's CRC32C. A zero entry is a hole.
type entry uint64

const (
	entryHole = 0
	entryData = 1 // table, page and CRC say where the bytes are
	entryZero = 2 // zeroes, explicitly written
	entryLost = 3 // what was here is not known any more: reads fail

	maxTable = 1 << 24
)

func dataEntry(slot uint32, page uint32, crc uint32) entry {
	return entry(slot)<<40 | entry(page)<<26 | entryData<<24 | entry(crc&0xffffff)
}

const (
	zeroEntry = entry(entryZero << 24)
	lostEntry = entry(entryLost << 24)
)

func (e entry) kind() int    { return int(e>>24) & 3 }
func (e entry) slot() uint32 { return uint32(e >> 40) }
func (e entry) page() uint32 { return uint32(e>>26) & 0x3fff }
func (e entry) crc() uint32  { return uint32(e) & 0xffffff }

// place orders entries by where in which block they point to.
func (e entry) place() uint64 { return uint64(e >> 26) }

// near reports whether e points into the block that prev points into, behind it, with at most gap pages in between.
func (e entry) near(prev entry, gap uint32) bool {
	return e.slot() == prev.slot() && e.page()-prev.page() <= gap+1
}

type leaf struct {
	e      *[fanout]entry // by itself, so that it is a page and no more
	dirty  bool           // changed since it was last written
	frozen bool           // being written by a checkpoint
	hot    bool           // used since the clock's hand last passed
	page   uint64
}

type inner struct {
	ptr    [fanout]entry
	leaf   [fanout]*leaf
	dirty  bool
	frozen bool
	loads  map[int][]func(error) // leaves being loaded
}

type topNode struct {
	ptr   entry
	in    *inner
	loads []func(error)
}

// fmap is the map in memory.
type fmap struct {
	top         []*topNode                                  // as pointers, since a volume may grow while a node is on its way
	read        func(e entry, dst []byte, done func(error)) // reads a node
	check       func(e *[fanout]entry, leaf bool) error     // whether a node's entries point to what there is
	leaves      int
	dirtyLeaves int
	frozen      int // leaves that a checkpoint is writing
	maxLeaves   int
	clock       []*leaf
	hand        int
	free        []*leaf // evicted, for reuse
}

// freeLeaves bounds fmap.free.
const freeLeaves = 256

func (m *fmap) init(size uint64, maxBytes int, read func(entry, []byte, func(error)), check func(*[fanout]entry, bool) error) {
	m.grow(size)
	m.read, m.check = read, check
	m.maxLeaves = max(minLeaves, maxBytes/(nodeSize+64))
}

// grow makes room for a larger file.
func (m *fmap) grow(size uint64) {
	pages := (size + pageSize - 1) / pageSize
	for uint64(len(m.top))*innerPages < pages {
		m.top = append(m.top, &topNode{})
	}
}

// get returns the entry of a page; ok is false if its leaf has to be loaded first.
func (m *fmap) get(page uint64) (e entry, ok bool) {
	t := m.top[page/innerPages]
	if t.in == nil {
		return 0, t.ptr == 0
	}
	i := page / leafPages % fanout
	l := t.in.leaf[i]
	if l == nil {
		return 0, t.in.ptr[i] == 0
	}
	l.hot = true
	return l.e[page%fanout], true
}

// hole reports how many pages from page on are certainly unmapped, without loading anything: all the rest of a subtree that is not there.
func (m *fmap) hole(page uint64) uint64 {
	t := m.top[page/innerPages]
	if t.in == nil {
		if t.ptr == 0 {
			return innerPages - page%innerPages
		}
		return 0
	}
	i := page / leafPages % fanout
	if t.in.leaf[i] == nil && t.in.ptr[i] == 0 {
		return leafPages - page%leafPages
	}
	return 0
}

// writable returns the leaf of a page, made if there is none; nil if it has to be loaded first.
func (m *fmap) writable(page uint64) *leaf {
	t := m.top[page/innerPages]
	if t.in == nil {
		if t.ptr != 0 {
			return nil
		}
		t.in = &inner{}
	}
	i := page / leafPages % fanout
	l := t.in.leaf[i]
	if l == nil {
		if t.in.ptr[i] != 0 {
			return nil
		}
		l = m.newLeaf(page)
		clear(l.e[:])
		m.adopt(t.in, int(i), l)
	}
	l.hot = true
	return l
}

func (m *fmap) touch(l *leaf) {
	if !l.dirty {
		l.dirty = true
		m.dirtyLeaves++
		m.top[l.page/innerPages].in.dirty = true
	}
}

func (m *fmap) adopt(in *inner, i int, l *leaf) {
	in.leaf[i] = l
	m.leaves++
	m.clock = append(m.clock, l)
	l.hot = true
}

// newLeaf returns the leaf of a page, with arbitrary contents.
func (m *fmap) newLeaf(page uint64) *leaf {
	page = page / leafPages * leafPages
	if n := len(m.free); n > 0 {
		l := m.free[n-1]
		m.free = m.free[:n-1]
		*l = leaf{e: l.e, page: page}
		return l
	}
	return &leaf{e: new([fanout]entry), page: page}
}

// evict drops clean leaves that were not used lately (clock), until the bound holds or none can go.
func (m *fmap) evict() {
	for steps := 2 * len(m.clock); steps > 0 && m.leaves >= m.maxLeaves && m.leaves-m.dirtyLeaves-m.frozen >= minLeaves; steps-- {
		if m.hand >= len(m.clock) {
			m.hand = 0
		}
		l := m.clock[m.hand]
		if l.hot || l.dirty || l.frozen {
			l.hot = false
			m.hand++
			continue
		}
		m.top[l.page/innerPages].in.leaf[l.page/leafPages%fanout] = nil
		n := len(m.clock) - 1
		m.clock[m.hand] = m.clock[n]
		m.clock[n] = nil
		m.clock = m.clock[:n]
		m.leaves--
		if len(m.free) < freeLeaves {
			m.free = append(m.free, l)
		}
	}
}

// load sees to it that the leaf of a page is in memory, if there is one; done may be called at once.
func (m *fmap) load(page uint64, done func(error)) {
	t := m.top[page/innerPages]
	if t.in == nil {
		if t.ptr == 0 {
			done(nil)
			return
		}
		t.loads = append(t.loads, func(err error) {
			if err != nil {
				done(err)
				return
			}
			m.load(page, done)
		})
		if len(t.loads) > 1 {
			return
		}
		b := make([]byte, nodeSize)
		m.read(t.ptr, b, func(err error) {
			if err == nil && t.in == nil { // it may have been given up meanwhile: see lose
				in := &inner{}
				decodeNode(b, &in.ptr)
				if err = m.check(&in.ptr, false); err == nil {
					t.in = in
				}
			}
			wake(&t.loads, err)
		})
		return
	}
	in := t.in
	i := int(page / leafPages % fanout)
	if in.leaf[i] != nil || in.ptr[i] == 0 {
		done(nil)
		return
	}
	if in.loads == nil {
		in.loads = map[int][]func(error){}
	}
	in.loads[i] = append(in.loads[i], done)
	if len(in.loads[i]) > 1 {
		return
	}
	b := buf.Get(nodeSize)
	m.read(in.ptr[i], b.Bytes()[:nodeSize], func(err error) {
		if err == nil && in.leaf[i] == nil {
			m.evict() // only here: whoever uses leaves that it has found present must not lose them
			l := m.newLeaf(page)
			decodeNode(b.Bytes(), l.e)
			if err = m.check(l.e, true); err == nil {
				m.adopt(in, i, l)
			}
		}
		b.Release()
		waiters := in.loads[i]
		delete(in.loads, i)
		wake(&waiters, err)
	})
}

// lose gives up the node on the way to a page that is not in memory, as it cannot be read: what it pointed to is lost.
// It reports how many pages from which on that are.
func (m *fmap) lose(page uint64) (first, n uint64) {
	t := m.top[page/innerPages]
	if t.in == nil {
		t.ptr, t.in = lostEntry, &inner{dirty: true}
		for i := range t.in.ptr {
			t.in.ptr[i] = lostEntry
		}
		return page / innerPages * innerPages, innerPages
	}
	i := page / leafPages % fanout
	l := m.newLeaf(page)
	for k := range l.e {
		l.e[k] = lostEntry
	}
	t.in.ptr[i] = lostEntry
	m.adopt(t.in, int(i), l)
	m.touch(l)
	return l.page, leafPages
}

func wake(l *[]func(error), err error) {
	fns := *l
	*l = nil
	for _, fn := range fns {
		fn(err)
	}
}

func decodeNode(b []byte, e *[fanout]entry) {
	for i := range e {
		e[i] = entry(binary.LittleEndian.Uint64(b[8*i:]))
	}
}

func encodeNode(e *[fanout]entry, b []byte) {
	for i, x := range e {
		binary.LittleEndian.PutUint64(b[8*i:], uint64(x))
	}
}

// isZero reports whether a node says nothing.
func isZero(e *[fanout]entry) bool {
	return !slices.ContainsFunc(e[:], func(x entry) bool { return x != 0 })
}

func (e entry) String() string {
	return fmt.Sprintf("kind %d slot %d page %d crc %06x", e.kind(), e.slot(), e.page(), e.crc())
}

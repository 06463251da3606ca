package file

import (
	"encoding/binary"
	"fmt"

	"github.com/coreos/torus"
	"github.com/coreos/torus/models"
)

// The block table lists every block the file uses; map entries refer to blocks by their place in it. It is
// kept in memory whole (some 100 bytes a block, 4 MiB of data each) and written in pages, of which
// a checkpoint writes those that changed.

const (
	tableEntrySize = 48
	tablePageSlots = pageSize / tableEntrySize
	maxSets        = 1<<16 - 16 // a checkpoint's own blocks may need some more
)

// tableEntry is one block the file uses.
type tableEntry struct {
	ref    torus.BlockRef
	used   bool
	live   uint32 // pages the map (or the tree itself) points to
	length uint32 // pages that are valid, headers included
	set    uint16 // index into sets
	birth  uint64 // the first INode that listed it
	death  uint64 // the first to which it was of no use; 0: it is
	held   bool   // being written to beside the log; not stored
	sealed bool   // its peers have been told that it is complete; not stored: of an older INode's blocks it is taken for granted
	peers  torus.PeerList
}

type table struct {
	e        []tableEntry
	free     []uint32
	byRef    map[torus.BlockRef]uint32
	dirty    []bool              // pages changed since they were last written
	pages    []*models.TablePage // where each page was last written
	sets     []*models.PlacementSet
	setID    map[string]uint16
	freeSets []uint16 // indexes of sets that no block of the INode attached from was in
	next     uint64   // number of the INode that will be the first to list what is added now
	// sum of live and of length over data blocks, pages
	liveData, lengthAll uint64
}

func (t *table) init() {
	t.byRef = map[torus.BlockRef]uint32{}
	t.setID = map[string]uint16{}
	t.next = 1
}

// isData reports whether blocks of a type hold contents of the volume.
func isData(typ torus.BlockType) bool { return typ == torus.TypeBlock || typ == torus.TypeMoved }

// full reports whether the table cannot list another block: an entry of the map has no more bits for its place, or one of
// the table no more for its placement set.
func (t *table) full() bool {
	return len(t.free) == 0 && len(t.e) >= maxTable || len(t.freeSets) == 0 && len(t.sets) >= maxSets
}

// add lists a block, for which there must be room, and returns its slot.
func (t *table) add(ref torus.BlockRef, ps *models.PlacementSet, peers torus.PeerList) uint32 {
	var slot uint32
	if n := len(t.free); n > 0 {
		slot = t.free[n-1]
		t.free = t.free[:n-1]
	} else {
		slot = uint32(len(t.e))
		t.e = append(t.e, tableEntry{})
	}
	t.e[slot] = tableEntry{ref: ref, used: true, set: t.intern(ps), birth: t.next, peers: peers}
	t.byRef[ref] = slot
	t.touch(slot)
	return slot
}

// remove unlists a block. Its slot may be given to another block after the INode without it has been committed: see reuse.
func (t *table) remove(slot uint32) {
	e := &t.e[slot]
	t.lengthAll -= uint64(e.length)
	delete(t.byRef, e.ref)
	*e = tableEntry{}
	t.touch(slot)
}

func (t *table) reuse(slot uint32) { t.free = append(t.free, slot) }

func (t *table) touch(slot uint32) {
	p := int(slot / tablePageSlots)
	for len(t.dirty) <= p {
		t.dirty = append(t.dirty, false)
		t.pages = append(t.pages, nil)
	}
	t.dirty[p] = true
}

func (t *table) addLive(slot uint32, n int) {
	e := &t.e[slot]
	e.live = uint32(int(e.live) + n)
	if isData(e.ref.Type) {
		t.liveData = uint64(int64(t.liveData) + int64(n))
	}
	t.touch(slot)
}

func (t *table) setLength(slot, pages uint32) {
	e := &t.e[slot]
	if pages > e.length {
		t.lengthAll += uint64(pages - e.length)
		e.length = pages
		t.touch(slot)
	}
}

// cut takes a setLength back.
func (t *table) cut(slot, pages uint32) {
	if e := &t.e[slot]; pages < e.length {
		t.lengthAll -= uint64(e.length - pages)
		e.length = pages
		t.touch(slot)
	}
}

func (t *table) usage() (live, stored uint64) {
	return t.liveData * pageSize, t.lengthAll * pageSize
}

// intern returns the index of a placement set, which is listed if it was not.
func (t *table) intern(ps *models.PlacementSet) uint16 {
	key := setKey(ps)
	id, ok := t.setID[key]
	if !ok {
		if n := len(t.freeSets); n > 0 {
			id, t.freeSets = t.freeSets[n-1], t.freeSets[:n-1]
			t.sets[id] = ps
		} else {
			id = uint16(len(t.sets))
			t.sets = append(t.sets, ps)
		}
		t.setID[key] = id
	}
	return id
}

func setKey(ps *models.PlacementSet) string {
	key := fmt.Sprintf("%d/%d", ps.RingVersion, ps.Replication)
	for _, p := range ps.Peers {
		key += string(p)
	}
	return key
}

// adoptSets finds which sets of an INode just read are used by its blocks, and returns them. The others' indexes are free.
func (t *table) adoptSets() (used []*models.PlacementSet) {
	named := make([]bool, len(t.sets))
	for i := range t.e {
		if t.e[i].used {
			named[t.e[i].set] = true
		}
	}
	for i, ps := range t.sets {
		if !named[i] {
			t.freeSets = append(t.freeSets, uint16(i))
			continue
		}
		t.setID[setKey(ps)] = uint16(i)
		used = append(used, ps)
	}
	return used
}

// encodePage writes page p of the table to b.
func (t *table) encodePage(p int, b []byte) {
	clear(b[:pageSize])
	for i := range tablePageSlots {
		s := p*tablePageSlots + i
		if s >= len(t.e) || !t.e[s].used {
			continue
		}
		e := &t.e[s]
		x := b[i*tableEntrySize:]
		e.ref.AppendTo(x[:0])
		binary.LittleEndian.PutUint16(x[24:], uint16(e.live))
		binary.LittleEndian.PutUint16(x[26:], uint16(e.length))
		binary.LittleEndian.PutUint16(x[28:], e.set)
		binary.LittleEndian.PutUint16(x[30:], 1)
		binary.LittleEndian.PutUint64(x[32:], e.birth)
		binary.LittleEndian.PutUint64(x[40:], e.death)
	}
}

// decodePage reads page p of the table.
func (t *table) decodePage(p int, b []byte) error {
	if len(b) != pageSize {
		return fmt.Errorf("block table page of %d bytes: %w", len(b), torus.ErrCorrupt)
	}
	for i := range tablePageSlots {
		s := p*tablePageSlots + i
		x := b[i*tableEntrySize:]
		for len(t.e) <= s {
			t.e = append(t.e, tableEntry{})
		}
		if binary.LittleEndian.Uint16(x[30:]) == 0 {
			continue
		}
		e := tableEntry{
			ref: torus.BlockRefFromBytes(x), used: true, sealed: true,
			live:   uint32(binary.LittleEndian.Uint16(x[24:])),
			length: uint32(binary.LittleEndian.Uint16(x[26:])),
			set:    binary.LittleEndian.Uint16(x[28:]),
			birth:  binary.LittleEndian.Uint64(x[32:]),
			death:  binary.LittleEndian.Uint64(x[40:]),
		}
		if int(e.set) >= len(t.sets) {
			return fmt.Errorf("block table names placement set %d of %d: %w", e.set, len(t.sets), torus.ErrCorrupt)
		}
		t.e[s] = e
		t.byRef[e.ref] = uint32(s)
		t.lengthAll += uint64(e.length)
		if isData(e.ref.Type) {
			t.liveData += uint64(e.live)
		}
	}
	return nil
}

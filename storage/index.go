package storage

import (
	"cmp"
	"slices"
	"sort"

	"github.com/coreos/torus"
)

// key is a BlockRef in a form that compares quickly, in the order of List.
type key struct{ typeVolume, inode, index uint64 }

func keyOf(r torus.BlockRef) key {
	return key{uint64(r.Type)<<40 | uint64(r.Volume), uint64(r.INode), uint64(r.Index)}
}

func (k key) ref() torus.BlockRef {
	return torus.BlockRef{
		Type:   torus.BlockType(k.typeVolume >> 40),
		Volume: torus.VolumeID(k.typeVolume) & torus.VolumeMax,
		INode:  torus.INodeID(k.inode),
		Index:  torus.IndexID(k.index),
	}
}

func (k key) volume() torus.VolumeID { return torus.VolumeID(k.typeVolume) & torus.VolumeMax }

func (k key) compare(o key) int {
	if c := cmp.Compare(k.typeVolume, o.typeVolume); c != 0 {
		return c
	}
	if c := cmp.Compare(k.inode, o.inode); c != 0 {
		return c
	}
	return cmp.Compare(k.index, o.index)
}

// validRef reports whether r survives being stored.
func validRef(r torus.BlockRef) bool { return r.Type>>24 == 0 && r.Volume <= torus.VolumeMax }

// index finds slots by key and walks them in order. A sorted sequence of slot numbers cut into chunks: some six bytes a
// block, as the keys stay in the slots. The blocks in use right now are found in a small direct-mapped cache.
type index struct {
	slots  *[]slot
	chunks [][]uint32 // none empty
	n      int
	recent [256]uint32 // slot number + 1
}

const maxChunk = 512

func (x *index) key(slot uint32) key { return (*x.slots)[slot].key }

// build fills an empty index from slot numbers in order of their keys.
func (x *index) build(sorted []uint32) {
	x.n = len(sorted)
	for c := range slices.Chunk(sorted, maxChunk/2) {
		x.chunks = append(x.chunks, append(make([]uint32, 0, maxChunk), c...))
	}
}

// seek returns the place of the first slot with a key of at least k.
func (x *index) seek(k key) (chunk, at int) {
	// The first chunk that begins beyond k; k belongs into the one before.
	chunk = sort.Search(len(x.chunks), func(i int) bool { return x.key(x.chunks[i][0]).compare(k) > 0 }) - 1
	if chunk < 0 {
		return 0, 0
	}
	c := x.chunks[chunk]
	at = sort.Search(len(c), func(i int) bool { return x.key(c[i]).compare(k) >= 0 })
	return chunk, at
}

func (k key) hash() uint8 {
	h := (k.typeVolume*31+k.inode)*31 + k.index
	h *= 0x9e3779b97f4a7c15
	return uint8(h >> 56)
}

// find returns the slot of k.
func (x *index) find(k key) (uint32, bool) {
	recent := &x.recent[k.hash()]
	if *recent != 0 && x.key(*recent-1) == k {
		return *recent - 1, true
	}
	c, i := x.seek(k)
	if c >= len(x.chunks) || i >= len(x.chunks[c]) {
		return 0, false
	}
	s := x.chunks[c][i]
	if x.key(s) != k {
		return 0, false
	}
	*recent = s + 1
	return s, true
}

// insert adds a slot, whose key is set and is not in the index.
func (x *index) insert(s uint32) {
	x.n++
	c, i := x.seek(x.key(s))
	if len(x.chunks) == 0 {
		x.chunks = append(x.chunks, append(make([]uint32, 0, maxChunk), s))
		return
	}
	x.chunks[c] = slices.Insert(x.chunks[c], i, s)
	if full := x.chunks[c]; len(full) == maxChunk {
		upper := append(make([]uint32, 0, maxChunk), full[maxChunk/2:]...)
		x.chunks[c] = full[:maxChunk/2]
		x.chunks = slices.Insert(x.chunks, c+1, upper)
	}
}

// remove takes the slot of k out; to be called before the slot's key changes.
func (x *index) remove(k key) {
	if recent := &x.recent[k.hash()]; *recent != 0 && x.key(*recent-1) == k {
		*recent = 0
	}
	c, i := x.seek(k)
	if c >= len(x.chunks) || i >= len(x.chunks[c]) || x.key(x.chunks[c][i]) != k {
		return
	}
	x.n--
	if x.chunks[c] = slices.Delete(x.chunks[c], i, i+1); len(x.chunks[c]) == 0 {
		x.chunks = slices.Delete(x.chunks, c, c+1)
	}
}

// from returns the first slot with a key of at least k.
func (x *index) from(k key) (cursor, bool) {
	c, i := x.seek(k)
	return x.settle(cursor{c, i})
}

// cursor is a place in an index, valid until it changes.
type cursor struct{ chunk, at int }

func (x *index) settle(p cursor) (cursor, bool) {
	if p.chunk < len(x.chunks) && p.at >= len(x.chunks[p.chunk]) {
		p = cursor{p.chunk + 1, 0}
	}
	return p, p.chunk < len(x.chunks)
}

func (x *index) next(p cursor) (cursor, bool) { return x.settle(cursor{p.chunk, p.at + 1}) }

func (x *index) slot(p cursor) uint32 { return x.chunks[p.chunk][p.at] }

// after returns the smallest key above k; false if there is none.
func (k key) after() (key, bool) {
	if k.index++; k.index == 0 {
		if k.inode++; k.inode == 0 {
			k.typeVolume++
		}
	}
	return k, k != key{}
}

// maxTails bounds one reply.
const maxTails = 1 << 16

// list calls fn for the slots greater than r.Ref, of its volume or of every one, until n are through.
func (x *index) list(r *torus.Request, fn func(slot uint32)) {
	n := min(int(r.Len), maxTails)
	volume := r.Ref.Volume
	if r.Off == torus.ListEveryVolume {
		volume = 0
	}
	k, ok := keyOf(r.Ref).after()
	for ok && n > 0 {
		p, found := x.from(k)
		for ; found && n > 0; p, found = x.next(p) {
			s := x.slot(p)
			k = x.key(s)
			if volume != 0 && k.volume() != volume {
				break
			}
			fn(s)
			n--
		}
		if !found || n == 0 {
			return
		}
		// Another volume: on to where ours begins, of this type or the next.
		t := k.typeVolume >> 40
		if k.volume() > volume {
			t++
		}
		k, ok = key{typeVolume: t<<40 | uint64(volume)}, t < 1<<24
	}
}

// window calls fn for the blocks that a Fence asks for.
func (x *index) window(r *torus.Request, fn func(slot uint32)) {
	if r.Len == 0 {
		return
	}
	first := keyOf(r.Ref)
	p, found := x.from(first)
	for ; found; p, found = x.next(p) {
		s := x.slot(p)
		k := x.key(s)
		if k.typeVolume != first.typeVolume || k.inode != first.inode || k.index-first.index >= uint64(r.Len) {
			return
		}
		fn(s)
	}
}

package file

import (
	"fmt"
	"iter"

	"github.com/coreos/torus"
	"github.com/coreos/torus/distributor"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/models"
)

// Listed is a block that a volume needs: data or metadata, the block that holds its newest INode among them.
type Listed struct {
	Ref torus.BlockRef
	// Length is how many bytes of it are valid: each peer that is to hold the block must have them, durably, and
	// they never change.
	Length uint32
	// Set is the registered set. The slice is shared.
	Set torus.PeerList
}

// InventoryConfig is what it takes to read an inventory.
type InventoryConfig struct {
	Dist      *distributor.Distributor
	Volume    torus.VolumeID
	BlockSize uint32 // bytes
	// Until is asked while peers without which the INode cannot be read are unreachable: an error ends the wait, and the reading.
	Until func() error
}

// Inventory is what a volume has stored, as one state of it says: the blocks that its head lists, and which of them anything needs. Blocks
// of the volume that it was cloned from are not among them: that volume lists them, for as long as this one needs any.
type Inventory struct {
	state *models.VolumeState
	table *table
	pins  pins
	roots map[torus.BlockRef]bool // where the head's INode and the pages of its table are
	// newest is the highest index, by type, of the listed blocks of the head's epoch that were written beside the log.
	newest map[torus.BlockType]torus.IndexID
}

// ReadInventory reads the block table of the INode that the head of a state names, and nothing else: no fence, no epoch, whoever may have
// the volume attached. It needs about 150 bytes of memory a block. An error means that the inventory is unknown, not that it is empty
// (D3): torus.ErrCorrupt if no replica has an intact copy, torus.ErrBlockUnavailable, or what Until said.
func ReadInventory(t *loop.Task, cfg InventoryConfig, s *models.VolumeState) (*Inventory, error) {
	v := &Inventory{state: s, pins: newPins(s, s.KeptFrom), roots: map[torus.BlockRef]bool{}, newest: map[torus.BlockType]torus.IndexID{}}
	if s.Deleted {
		v.pins.from = 0 // nobody will rewind it
	}
	f := &File{loop: t.Loop(), dist: cfg.Dist, vol: cfg.Volume, errFn: cfg.Until}
	f.cfg.BlockSize = cfg.BlockSize
	f.table.init()
	v.table = &f.table
	if s.Head == nil {
		return v, nil
	}
	err := f.loadInode(t, cfg.Volume, s.Head)
	for i := range f.table.e {
		if e := &f.table.e[i]; err == nil && e.length > cfg.BlockSize/pageSize {
			err = fmt.Errorf("%v of %d pages: %w", e.ref, e.length, torus.ErrCorrupt)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("inventory of volume %x: %w", uint64(cfg.Volume), err)
	}
	v.roots[extentRef(cfg.Volume, s.Head.Inode)] = true
	for _, x := range f.table.pages {
		v.roots[pageRef(cfg.Volume, x)] = true
	}
	for i := range f.table.e {
		switch e := &f.table.e[i]; {
		case e.used && e.ref.Volume != cfg.Volume:
			f.table.remove(uint32(i))
		case e.used && e.ref.Type != torus.TypeBlock && uint64(e.ref.INode) == s.Head.Epoch:
			v.newest[e.ref.Type] = max(v.newest[e.ref.Type], e.ref.Index)
		}
	}
	return v, nil
}

// need reports whether anything needs a listed block.
func (v *Inventory) need(e *tableEntry) bool {
	x := *e
	if x.death == 0 {
		if !v.state.Deleted {
			return true
		}
		// Of a deleted volume the head is nobody's but its clones', who find in its table what is theirs.
		if x.death = v.state.Head.Number + 1; v.roots[x.ref] {
			return true
		}
	}
	return v.pins.need(&x)
}

// Needed yields the blocks that the head or a pin needs, or the rewinding of the volume.
func (v *Inventory) Needed() iter.Seq[Listed] {
	return func(yield func(Listed) bool) {
		for i := range v.table.e {
			e := &v.table.e[i]
			if e.used && e.length > 0 && v.need(e) && !yield(Listed{Ref: e.ref, Length: e.length * pageSize, Set: e.peers}) {
				return
			}
		}
	}
}

// Garbage reports whether it is proven that nothing needs a block of the volume, now or ever (D3): it lies in no open window, and the head
// lists it as dead and no pin needs it, or does not list it and never will.
//
// The head of a later epoch is enough of a proof for the latter. Of its own epoch, and of later ones, what is not listed may belong to a
// checkpoint, a compaction or a recovery that is not committed yet; unless its writer had done with the block when it laid out that
// head, which lists all that it had not given up by then: a block of the log below the window, another if a block of its type with a
// higher index is listed, as these are begun, and listed at once, in the order of their indexes.
//
// What is garbage stays so, whatever becomes of the volume: an older writer commits nothing any more, a newer one lists
// blocks of its own and of the window; and a dead block comes to life only for a moment that is kept, and what can be kept
// from now on is the head or what was kept before.
func (v *Inventory) Garbage(ref torus.BlockRef) bool {
	h, w := v.state.Head, v.state.Open
	if h == nil || InWindow(v.state, ref) {
		return false
	}
	if slot, ok := v.table.byRef[ref]; ok {
		return !v.need(&v.table.e[slot])
	}
	switch epoch := uint64(ref.INode); {
	case epoch != h.Epoch:
		return epoch < h.Epoch
	case ref.Type == torus.TypeBlock:
		return w != nil && w.Epoch == epoch && len(w.Spans) > 0 && uint64(ref.Index) < w.Spans[0].Lo
	}
	return ref.Index < v.newest[ref.Type]
}

// InWindow reports whether a block lies in the open window of a volume: what it holds is the attached writer's business, or that
// of the next attach. Of a deleted volume there is neither.
func InWindow(s *models.VolumeState, ref torus.BlockRef) bool {
	if s.Deleted || ref.Type != torus.TypeBlock || s.Open == nil || uint64(ref.INode) != s.Open.Epoch {
		return false
	}
	for _, x := range s.Open.Spans {
		if i := uint64(ref.Index); i >= x.Lo && i < x.Hi {
			return true
		}
	}
	return false
}

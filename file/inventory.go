package file

import (
	"fmt"
	"iter"

	"github.com/coreos/torus"
	"github.com/coreos/torus/distributor"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/models"
)

// Listed is a block that an INode lists: data or metadata, the block that holds the INode itself among them.
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

// Inventory reads the block table of the INode that a head names, and nothing else: no fence, no epoch, whoever may have the volume
// attached. It needs about 150 bytes of memory a block. An error means that the inventory is unknown, not that it is empty
// (D3): torus.ErrCorrupt if no replica has an intact copy, torus.ErrBlockUnavailable, or what Until said.
func Inventory(t *loop.Task, cfg InventoryConfig, h *models.Head) (iter.Seq[Listed], error) {
	f := &File{loop: t.Loop(), dist: cfg.Dist, vol: cfg.Volume, errFn: cfg.Until}
	f.cfg.BlockSize = cfg.BlockSize
	f.table.init()
	err := f.loadInode(t, cfg.Volume, h)
	for i := range f.table.e {
		if e := &f.table.e[i]; err == nil && e.length > cfg.BlockSize/pageSize {
			err = fmt.Errorf("%v of %d pages: %w", e.ref, e.length, torus.ErrCorrupt)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("inventory of volume %x: %w", uint64(cfg.Volume), err)
	}
	return func(yield func(Listed) bool) {
		for i := range f.table.e {
			e := &f.table.e[i]
			if e.used && e.length > 0 && !yield(Listed{Ref: e.ref, Length: e.length * pageSize, Set: e.peers}) {
				return
			}
		}
	}, nil
}

// InWindow reports whether a block lies in the open window of a volume: what it holds is the attached writer's business, or that
// of the next attach.
func InWindow(s *models.VolumeState, ref torus.BlockRef) bool {
	if ref.Type != torus.TypeBlock || s.Open == nil || uint64(ref.INode) != s.Open.Epoch {
		return false
	}
	for _, x := range s.Open.Spans {
		if i := uint64(ref.Index); i >= x.Lo && i < x.Hi {
			return true
		}
	}
	return false
}

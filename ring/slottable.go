package ring

import (
	"encoding/binary"
	"fmt"

	"github.com/coreos/torus"
	"github.com/coreos/torus/models"
)

// DefaultSlots is the number of slots of a new table. More slots balance many peers more finely (a peer's share is a
// whole number of slots); fewer mean fewer different sets of peers, hence lower odds that peers lost together held all copies of something.
const DefaultSlots = 2048

// MaxWidth is the number of peers a slot lists when there are that many members: the registered set and the fall-backs after it.
// 2048 slots × 8 peers × 2 bytes = 32 KiB in the MDS.
const MaxWidth = torus.MaxReplication

// SlotTable is the default ring. GetPeers is a hash and an index.
type SlotTable struct {
	base
	width int
	table []uint16 // slots × width, positions in members
	perms []torus.PeerPermutation
}

var _ torus.Ring = (*SlotTable)(nil)

// NewSlotTable fills a table from nothing; slots 0 means DefaultSlots. To change one that is in use, see AddPeers:
// a table made anew would move far more data.
func NewSlotTable(version uint64, replication int, members []Member, slots int) (*SlotTable, error) {
	if slots == 0 {
		slots = DefaultSlots
	}
	b, err := newBase(version, replication, members)
	if err != nil {
		return nil, err
	}
	if err := checkShape(len(members), slots); err != nil {
		return nil, err
	}
	width := min(len(members), MaxWidth)
	return newSlotTable(b, width, fill(b.members, replication, slots, width, nil)), nil
}

func checkShape(members, slots int) error {
	if members == 0 {
		return fmt.Errorf("ring: a slot table without members: %w", torus.ErrInvalid)
	}
	if slots < 1 || slots > MaxSlots {
		return fmt.Errorf("ring: %d slots: %w (from 1 to %d)", slots, torus.ErrInvalid, MaxSlots)
	}
	return nil
}

// newSlotTable computes every slot's answer, so that GetPeers need not.
func newSlotTable(b base, width int, table []uint16) *SlotTable {
	r := &SlotTable{base: b, width: width, table: table, perms: make([]torus.PeerPermutation, len(table)/width)}
	peers := make(torus.PeerList, len(table))
	for i, m := range table {
		peers[i] = b.ids[m]
	}
	for s := range r.perms {
		lo, hi := s*width, (s+1)*width
		r.perms[s] = torus.PeerPermutation{Replication: b.replication, Peers: peers[lo:hi:hi]}
	}
	return r
}

// Type is torus.RingSlotTable.
func (r *SlotTable) Type() torus.RingType { return torus.RingSlotTable }

// Slots returns the number of slots.
func (r *SlotTable) Slots() int { return len(r.perms) }

// GetPeers returns the peers of ref's slot, MaxWidth at most. It does not allocate.
func (r *SlotTable) GetPeers(ref torus.BlockRef) torus.PeerPermutation {
	return r.perms[slot(hashRef(ref), len(r.perms))]
}

// at returns the answer for position i of n equal parts of the range of the hash.
func (r *SlotTable) at(i, n int) torus.PeerPermutation { return r.perms[i*len(r.perms)/n] }

// Marshal returns the stored form.
func (r *SlotTable) Marshal() ([]byte, error) {
	m := r.message(torus.RingSlotTable)
	m.Slots, m.Width = uint32(len(r.perms)), uint32(r.width)
	m.Table = make([]byte, 0, 2*len(r.table))
	for _, x := range r.table {
		m.Table = binary.BigEndian.AppendUint16(m.Table, x)
	}
	return marshal(m)
}

func decodeSlotTable(m *models.Ring, members []Member) (torus.Ring, error) {
	b, err := newBase(m.Version, int(m.Replication), members)
	if err != nil {
		return nil, err
	}
	if m.Slots > MaxSlots {
		return nil, fmt.Errorf("ring: %d slots: %w (from 1 to %d)", m.Slots, torus.ErrInvalid, MaxSlots)
	}
	if err := checkShape(len(members), int(m.Slots)); err != nil {
		return nil, err
	}
	if m.Width < 1 || int64(m.Width) > int64(len(members)) || m.Width > 64 {
		return nil, fmt.Errorf("ring: slots of %d peers among %d members: %w", m.Width, len(members), torus.ErrInvalid)
	}
	width := int(m.Width)
	if len(m.Table) != int(m.Slots)*width*2 {
		return nil, fmt.Errorf("ring: a table of %d bytes for %d slots of %d peers: %w", len(m.Table), m.Slots, width, torus.ErrInvalid)
	}
	table := make([]uint16, int(m.Slots)*width)
	for i := range table {
		x := binary.BigEndian.Uint16(m.Table[2*i:])
		if int(x) >= len(members) {
			return nil, fmt.Errorf("ring: slot %d names member %d of %d: %w", i/width, x, len(members), torus.ErrInvalid)
		}
		for j := i / width * width; j < i; j++ {
			if table[j] == x {
				return nil, fmt.Errorf("ring: slot %d names member %d twice: %w", i/width, x, torus.ErrInvalid)
			}
		}
		table[i] = x
	}
	return newSlotTable(b, width, table), nil
}

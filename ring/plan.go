package ring

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"sort"

	"github.com/coreos/torus"
)

// AddPeers returns the ring after old, with the members added. One that is a member already gets the new weight
// and labels. ErrExists if that changes nothing.
func AddPeers(old torus.Ring, add ...Member) (torus.Ring, error) {
	members := slices.Clone(Members(old))
	changed := false
	for _, a := range add {
		i, found := find(members, a.ID)
		switch {
		case !found:
			members = slices.Insert(members, i, a)
		case members[i].Weight == a.Weight && maps.Equal(members[i].Labels, a.Labels):
			continue
		default:
			members[i] = a
		}
		changed = true
	}
	if !changed {
		return nil, fmt.Errorf("ring version %d: all of them are members: %w", old.Version(), torus.ErrExists)
	}
	return next(old, old.Replication(), members)
}

// RemovePeers returns the ring after old without those members. ErrNoPeer if one is no member.
func RemovePeers(old torus.Ring, ids ...torus.PeerID) (torus.Ring, error) {
	members := slices.Clone(Members(old))
	if len(ids) == 0 {
		return nil, fmt.Errorf("ring version %d: nobody to remove: %w", old.Version(), torus.ErrInvalid)
	}
	for _, id := range ids {
		i, found := find(members, id)
		if !found {
			return nil, fmt.Errorf("ring version %d: %s is not a member: %w", old.Version(), id, torus.ErrNoPeer)
		}
		members = slices.Delete(members, i, i+1)
	}
	return next(old, old.Replication(), members)
}

// SetReplication returns the ring after old, with that many copies. ErrExists if it has that many.
func SetReplication(old torus.Ring, replication int) (torus.Ring, error) {
	if old.Replication() == replication {
		return nil, fmt.Errorf("ring version %d: replication is %d: %w", old.Version(), replication, torus.ErrExists)
	}
	return next(old, replication, Members(old))
}

func find(members []Member, id torus.PeerID) (int, bool) {
	return slices.BinarySearchFunc(members, id, func(m Member, id torus.PeerID) int { return bytes.Compare(m.ID[:], id[:]) })
}

// next plans a slot table for members, starting from the placement of old where that is one.
func next(old torus.Ring, replication int, members []Member) (torus.Ring, error) {
	if old.Type() != torus.RingEmpty && Members(old) == nil {
		return nil, fmt.Errorf("ring of type %d: %w", old.Type(), torus.ErrNotSupported)
	}
	version := old.Version() + 1
	if len(members) == 0 {
		return NewEmpty(version, replication)
	}
	b, err := newBase(version, replication, members)
	if err != nil {
		return nil, err
	}
	width := min(len(members), MaxWidth)
	from, ok := old.(*SlotTable)
	if !ok {
		// A single ring is a table whose slots list one peer.
		slots := DefaultSlots
		start := vacant(slots, width)
		if s, ok := old.(*Single); ok {
			if i, found := find(b.members, s.ids[0]); found {
				for s := range slots {
					start[s*width] = uint16(i)
				}
			}
		}
		return newSlotTable(b, width, fill(b.members, replication, slots, width, start)), nil
	}
	start := vacant(from.Slots(), width)
	position := make([]uint16, len(from.members)) // of the old members among the new
	for i, id := range from.ids {
		position[i] = none
		if j, found := find(b.members, id); found {
			position[i] = uint16(j)
		}
	}
	for s := range from.perms {
		for k := range min(width, from.width) {
			start[s*width+k] = position[from.table[s*from.width+k]]
		}
	}
	return newSlotTable(b, width, fill(b.members, replication, from.Slots(), width, start)), nil
}

func vacant(slots, width int) []uint16 {
	t := make([]uint16, slots*width)
	for i := range t {
		t[i] = none
	}
	return t
}

// Share is how much of the cluster's copies a member gets.
type Share struct {
	Member
	// Copies is the fraction of all copies that the ring places here, Ideal what its weight asks for, as
	// far as no peer can hold two copies of a block.
	Copies, Ideal float64
}

// Shares returns every member's share, sorted by UUID; nil for a ring of another package.
func Shares(r torus.Ring) []Share {
	members := Members(r)
	p, ok := r.(placer)
	if !ok || len(members) == 0 {
		return nil
	}
	n := parts(p, p)
	copies := min(r.Replication(), len(members))
	counts := make([]int, len(members))
	for i := range n {
		for _, id := range p.at(i, n).Set(0) {
			j, _ := find(members, id)
			counts[j]++
		}
	}
	ideal := ideals(scaled(members), n, copies)
	shares := make([]Share, len(members))
	for i, m := range members {
		shares[i] = Share{m, float64(counts[i]) / float64(n*copies), ideal[i] / float64(n*copies)}
	}
	sort.SliceStable(shares, func(i, j int) bool { return bytes.Compare(shares[i].ID[:], shares[j].ID[:]) < 0 })
	return shares
}

// Moved returns how much must be copied to get from one ring to another: the copies that the new one places on a
// peer where the old one does not, as a fraction of all copies under the new one.
func Moved(from, to torus.Ring) float64 {
	a, ok1 := from.(placer)
	b, ok2 := to.(placer)
	if !ok1 || !ok2 {
		return 1
	}
	n, moved, all := parts(a, b), 0, 0
	for i := range n {
		was := a.at(i, n).Set(0)
		for _, id := range b.at(i, n).Set(0) {
			all++
			if !was.Has(id) {
				moved++
			}
		}
	}
	if all == 0 {
		return 0
	}
	return float64(moved) / float64(all)
}

// placer is a ring of this package: at(i, n) answers for the i-th of n equal parts of the hash's range.
type placer interface {
	at(i, n int) torus.PeerPermutation
}

// parts returns into how many parts the range of the hash must be cut so that neither ring's answer changes within
// one; for tables of unlike sizes whose least common multiple is out of reach, nearly.
func parts(a, b placer) int {
	n := 1
	for _, p := range []placer{a, b} {
		if t, ok := p.(*SlotTable); ok {
			n = min(n/gcd(n, t.Slots())*t.Slots(), 1<<20)
		}
	}
	return n
}

func gcd(a, b int) int {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

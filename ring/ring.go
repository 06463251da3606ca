// Package ring holds the rings: pure, versioned functions from a BlockRef to the peers that keep the block.
//
// Empty has no members, Single has one, SlotTable is the default: a table of slots, each a list of peers in
// order of preference, looked up by a hash of the reference. Decode reads the stored form (docs/format/ring.md).
// AddPeers, RemovePeers and SetReplication plan the next version from the present one, moving no more than must.
//
// A table is planned once, by whoever changes the ring, and published in the MDS: everybody else only looks
// up, so the same version gives the same placement everywhere (invariant P1).
package ring

import (
	"bytes"
	"fmt"
	"maps"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/coreos/torus"
	"github.com/coreos/torus/models"
)

// Bounds on every ring, checked when one is made and when one is decoded.
const (
	MaxMembers  = 4096
	MaxSlots    = 1 << 16
	maxEncoded  = 8 << 20 // bytes
	maxLabels   = 64      // per member
	maxLabelLen = 256     // bytes, key or value
)

// Member is a peer's place in a ring.
type Member struct {
	ID torus.PeerID
	// Weight is the peer's share relative to the others', usually its size in bytes. Never 0.
	Weight uint64
	// Labels are zone, rack, host. Kept with the ring so that placement can come to respect them.
	Labels map[string]string
}

// base is what all rings have. Immutable.
type base struct {
	version     uint64
	replication int
	members     []Member // sorted by ID
	ids         torus.PeerList
}

func newBase(version uint64, replication int, members []Member) (base, error) {
	b := base{version: version, replication: replication}
	if version == 0 {
		return b, fmt.Errorf("ring: versions start at 1: %w", torus.ErrInvalid)
	}
	if replication < 1 || replication > torus.MaxReplication {
		return b, fmt.Errorf("ring: replication %d: %w (from 1 to %d)", replication, torus.ErrInvalid, torus.MaxReplication)
	}
	if len(members) > MaxMembers {
		return b, fmt.Errorf("ring: %d members: %w (%d at most)", len(members), torus.ErrInvalid, MaxMembers)
	}
	b.members = slices.Clone(members)
	slices.SortFunc(b.members, func(x, y Member) int { return bytes.Compare(x.ID[:], y.ID[:]) })
	b.ids = make(torus.PeerList, len(b.members))
	for i := range b.members {
		m := &b.members[i]
		b.ids[i] = m.ID
		switch {
		case m.ID.IsZero():
			return b, fmt.Errorf("ring: a member without a UUID: %w", torus.ErrInvalid)
		case i > 0 && b.ids[i-1] == m.ID:
			return b, fmt.Errorf("ring: member %s is there twice: %w", m.ID, torus.ErrInvalid)
		case m.Weight == 0:
			return b, fmt.Errorf("ring: member %s has no weight: %w (its size is not known yet, or it should be removed)", m.ID, torus.ErrInvalid)
		case len(m.Labels) > maxLabels:
			return b, fmt.Errorf("ring: member %s has %d labels: %w (%d at most)", m.ID, len(m.Labels), torus.ErrInvalid, maxLabels)
		}
		for k, v := range m.Labels {
			if len(k) > maxLabelLen || len(v) > maxLabelLen {
				return b, fmt.Errorf("ring: member %s: a label is longer than %d bytes: %w", m.ID, maxLabelLen, torus.ErrInvalid)
			}
		}
		m.Labels = maps.Clone(m.Labels)
	}
	return b, nil
}

func (b *base) Version() uint64         { return b.version }
func (b *base) Replication() int        { return b.replication }
func (b *base) Members() torus.PeerList { return slices.Clone(b.ids) }
func (b *base) info() []Member          { return b.members }

func (b *base) message(t torus.RingType) *models.Ring {
	m := &models.Ring{Type: uint32(t), Version: b.version, Replication: uint32(b.replication)}
	for _, x := range b.members {
		m.Members = append(m.Members, &models.RingMember{Uuid: x.ID.String(), Weight: x.Weight, Labels: x.Labels})
	}
	return m
}

func marshal(m *models.Ring) ([]byte, error) {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("ring version %d: %v: %w", m.Version, err, torus.ErrInvalid)
	}
	return b, nil
}

// Members returns the members of a ring of this package with their weights and labels, sorted by UUID; nil for others.
// They are the ring's own: do not change them.
func Members(r torus.Ring) []Member {
	if x, ok := r.(interface{ info() []Member }); ok {
		return x.info()
	}
	return nil
}

// Decode reads the stored form of any ring. Errors wrap torus.ErrNotSupported for a type this version does
// not know, torus.ErrInvalid for everything else.
func Decode(b []byte) (torus.Ring, error) {
	if len(b) > maxEncoded {
		return nil, fmt.Errorf("ring of %d bytes: %w (%d at most)", len(b), torus.ErrInvalid, maxEncoded)
	}
	var m models.Ring
	if err := proto.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("ring: %v: %w", err, torus.ErrInvalid)
	}
	if len(m.Members) > MaxMembers {
		return nil, fmt.Errorf("ring: %d members: %w (%d at most)", len(m.Members), torus.ErrInvalid, MaxMembers)
	}
	members := make([]Member, len(m.Members))
	for i, x := range m.Members {
		id, err := torus.ParsePeerID(x.GetUuid())
		if err != nil {
			return nil, fmt.Errorf("ring: %w", err)
		}
		members[i] = Member{ID: id, Weight: x.GetWeight(), Labels: x.GetLabels()}
	}
	if m.Replication > torus.MaxReplication {
		return nil, fmt.Errorf("ring: replication %d: %w (from 1 to %d)", m.Replication, torus.ErrInvalid, torus.MaxReplication)
	}
	replication := int(m.Replication)
	switch torus.RingType(m.Type) {
	case torus.RingEmpty:
		if len(members) != 0 {
			return nil, fmt.Errorf("ring: an empty ring with %d members: %w", len(members), torus.ErrInvalid)
		}
		return NewEmpty(m.Version, replication)
	case torus.RingSingle:
		if len(members) != 1 {
			return nil, fmt.Errorf("ring: a single ring with %d members: %w", len(members), torus.ErrInvalid)
		}
		return NewSingle(m.Version, replication, members[0])
	case torus.RingSlotTable:
		// The table speaks of members by their position, so that must be the sorted one already.
		for i := 1; i < len(members); i++ {
			if bytes.Compare(members[i-1].ID[:], members[i].ID[:]) >= 0 {
				return nil, fmt.Errorf("ring: members of a slot table are not in order: %w", torus.ErrInvalid)
			}
		}
		return decodeSlotTable(&m, members)
	}
	return nil, fmt.Errorf("ring of type %d, version %d: %w (made by a newer Torus?)", m.Type, m.Version, torus.ErrNotSupported)
}

// Empty is the ring of a cluster without members: nothing can be stored. Its replication is what the
// first real ring starts with.
type Empty struct{ base }

var _ torus.Ring = (*Empty)(nil)

// NewEmpty returns an empty ring.
func NewEmpty(version uint64, replication int) (*Empty, error) {
	b, err := newBase(version, replication, nil)
	if err != nil {
		return nil, err
	}
	return &Empty{b}, nil
}

// Type is torus.RingEmpty.
func (r *Empty) Type() torus.RingType { return torus.RingEmpty }

// GetPeers returns nobody.
func (r *Empty) GetPeers(torus.BlockRef) torus.PeerPermutation {
	return torus.PeerPermutation{Replication: r.replication}
}

func (r *Empty) at(int, int) torus.PeerPermutation {
	return torus.PeerPermutation{Replication: r.replication}
}

// Marshal returns the stored form.
func (r *Empty) Marshal() ([]byte, error) { return marshal(r.message(torus.RingEmpty)) }

// Single is the ring of one member that holds everything.
type Single struct{ base }

var _ torus.Ring = (*Single)(nil)

// NewSingle returns a ring of one member. A replication above 1 is more than it can give, and for its users to refuse (F1).
func NewSingle(version uint64, replication int, m Member) (*Single, error) {
	b, err := newBase(version, replication, []Member{m})
	if err != nil {
		return nil, err
	}
	return &Single{b}, nil
}

// Type is torus.RingSingle.
func (r *Single) Type() torus.RingType { return torus.RingSingle }

// GetPeers returns the one member.
func (r *Single) GetPeers(torus.BlockRef) torus.PeerPermutation { return r.at(0, 1) }

func (r *Single) at(int, int) torus.PeerPermutation {
	return torus.PeerPermutation{Replication: r.replication, Peers: r.ids[:1:1]}
}

// Marshal returns the stored form.
func (r *Single) Marshal() ([]byte, error) { return marshal(r.message(torus.RingSingle)) }

package torus

// PeerList is an ordered list of peers.
type PeerList []PeerID

// Has reports whether p is in the list.
func (l PeerList) Has(p PeerID) bool {
	for _, x := range l {
		if x == p {
			return true
		}
	}
	return false
}

// PeerPermutation is what a ring answers for a block: members in order of preference. The first Replication of
// them are the block's registered set, those behind are fall-backs; a slot table lists MaxReplication in all.
type PeerPermutation struct {
	Replication int
	Peers       PeerList
}

// Set returns the registered set: the first n peers, or the first Replication if n is 0. Fewer
// peers than that give a shorter set; it is the caller's to refuse it (F1).
func (p PeerPermutation) Set(n int) PeerList {
	if n == 0 {
		n = p.Replication
	}
	return p.Peers[:min(n, len(p.Peers))]
}

// RingType names a kind of ring; the number is stored in etcd.
type RingType int32

// The kinds of rings.
const (
	RingEmpty     RingType = 0 // no members: nothing can be stored yet
	RingSingle    RingType = 1 // one member holds everything
	RingSlotTable RingType = 2 // the default: slots filled by weighted rendezvous hashing
)

// Ring is a versioned pure function from BlockRef to peers: the same version gives the same placement
// everywhere (P1). Values are immutable and safe for concurrent use.
type Ring interface {
	Type() RingType
	Version() uint64
	// Members lists the peers that may hold blocks.
	Members() PeerList
	// Replication is how many copies a block gets unless its volume's spec says otherwise.
	Replication() int
	// GetPeers returns the permutation for ref. The slices are shared: do not change them.
	GetPeers(ref BlockRef) PeerPermutation
	// Marshal returns the stored form, a models.Ring.
	Marshal() ([]byte, error)
}

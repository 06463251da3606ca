package distributor

import (
	"fmt"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/models"
)

// SetRing makes r the current ring: where new blocks go, and where copies of those go whose peers have left it.
func (d *Distributor) SetRing(r torus.Ring) {
	d.ring = r
	d.rings[r.Version()] = r
	d.members = make(map[torus.PeerID]bool, len(r.Members()))
	for _, p := range r.Members() {
		d.members[p] = true
	}
	d.changed()
}

// Ring is the current ring; nil before the first SetRing.
func (d *Distributor) Ring() torus.Ring { return d.ring }

// NeedRing makes sure that a version of the ring is known, fetching it if it is not.
func (d *Distributor) NeedRing(t *loop.Task, version uint64) error {
	if d.rings[version] != nil {
		return nil
	}
	var r torus.Ring
	var err error
	t.Call(func() { r, err = d.cfg.LoadRing(version) })
	if err != nil {
		return fmt.Errorf("ring version %d: %w", version, err)
	}
	d.rings[version] = r
	return nil
}

// Set returns the registered set of block ref under s: the peers it names, or what the ring of its version
// says, which must be known (NeedRing). nil if it is not. The slice is shared.
func (d *Distributor) Set(ref torus.BlockRef, s *models.PlacementSet) torus.PeerList {
	if len(s.Peers) > 0 {
		l := make(torus.PeerList, len(s.Peers))
		for i, b := range s.Peers {
			copy(l[i][:], b)
		}
		return l
	}
	r := d.rings[s.RingVersion]
	if r == nil {
		return nil
	}
	return r.GetPeers(ref).Set(int(s.Replication))
}

// Home returns the peers that are to hold a block now: those of its registered set that are still members of the ring, and
// for each that is not, the next of the ring's permutation. So all who know the ring's version agree, and nothing moves
// but what has lost its peer. There are fewer than in the registered set if the ring has too few members. The slice is shared.
func (d *Distributor) Home(ref torus.BlockRef, registered torus.PeerList) torus.PeerList {
	if d.ring == nil || d.stay(registered) {
		return registered
	}
	home := make(torus.PeerList, 0, len(registered))
	for _, p := range registered {
		if d.members[p] {
			home = append(home, p)
		}
	}
	for _, list := range []torus.PeerList{d.ring.GetPeers(ref).Peers, d.ring.Members()} { // a permutation need not list everybody
		for _, p := range list {
			if len(home) < len(registered) && !home.Has(p) {
				home = append(home, p)
			}
		}
	}
	return home
}

func (d *Distributor) stay(registered torus.PeerList) bool {
	for _, p := range registered {
		if !d.members[p] {
			return false
		}
	}
	return true
}

// Candidates returns the peers that may hold a block, in the order in which readers ask them: its registered set, then those
// that have taken the place of members that left. The slice is shared.
func (d *Distributor) Candidates(ref torus.BlockRef, registered torus.PeerList) torus.PeerList {
	if d.ring == nil || d.stay(registered) {
		return registered
	}
	all := append(make(torus.PeerList, 0, 2*len(registered)), registered...)
	for _, p := range d.Home(ref, registered) {
		if !all.Has(p) {
			all = append(all, p)
		}
	}
	return all
}

// Others returns all connected peers that are not in list, for a block that nobody in it has: a copy that was made under a ring
// in between may be anywhere.
func (d *Distributor) Others(list torus.PeerList) (others torus.PeerList) {
	for _, p := range d.order {
		if p.up && !list.Has(p.id) {
			others = append(others, p.id)
		}
	}
	return others
}

package distributor

import (
	"fmt"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/models"
)

// SetRing makes r the current ring: where new blocks go.
func (d *Distributor) SetRing(r torus.Ring) {
	d.ring = r
	d.rings[r.Version()] = r
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

package node

import (
	"fmt"
	"strings"

	"github.com/coreos/torus"
	"github.com/coreos/torus/models"
)

// shortUUID is how many digits of a UUID are enough to name a peer.
const shortUUID = 8

// FindPeer finds the peer that name names: by its address, with or without tdp://, by its UUID, or by the
// first eight or more digits of that. ErrNoPeer if there is none, ErrInvalid if there are several.
func FindPeer(peers []*models.Peer, name string) (*models.Peer, error) {
	var found []*models.Peer
	lower := strings.ToLower(name)
	for _, p := range peers {
		if lower == p.Uuid {
			return p, nil
		}
		if strings.TrimPrefix(name, addressScheme) == strings.TrimPrefix(p.Address, addressScheme) ||
			len(lower) >= shortUUID && strings.HasPrefix(p.Uuid, lower) {
			found = append(found, p)
		}
	}
	// A peer that was set up anew at the same address leaves its predecessor's record behind.
	if len(found) > 1 {
		var alive []*models.Peer
		for _, p := range found {
			if p.Alive {
				alive = append(alive, p)
			}
		}
		if len(alive) == 1 {
			return alive[0], nil
		}
	}
	switch len(found) {
	case 0:
		return nil, &torus.Error{Op: "find", Obj: fmt.Sprintf("peer %q", name), Err: torus.ErrNoPeer,
			Hint: "`torusctl peer list` shows the peers there are"}
	case 1:
		return found[0], nil
	}
	return nil, &torus.Error{Op: "find", Obj: fmt.Sprintf("peer %q", name),
		Err: fmt.Errorf("%d peers are called that: %w", len(found), torus.ErrInvalid), Hint: "give the UUID, see `torusctl peer list`"}
}

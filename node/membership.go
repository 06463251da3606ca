package node

import (
	"context"
	"errors"
	"fmt"

	"github.com/coreos/torus"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/ring"
)

// ErrUnchanged is returned, along with the present ring, by changes that change nothing.
var ErrUnchanged = errors.New("the ring is like that already")

// ringAttempts bounds how often a change of the ring is planned anew because somebody else was faster.
const ringAttempts = 64

// defaultReplication is the replication of rings of clusters whose block spec names none.
const defaultReplication = 2

// firstRing is the ring of a new cluster: no members.
func firstRing(replication int) (torus.Ring, error) {
	if replication == 0 {
		replication = defaultReplication
	}
	return ring.NewEmpty(1, replication)
}

// CurrentRing reads the ring. For a cluster made without one it is what the first would be.
func CurrentRing(ctx context.Context, mds torus.MetadataService) (torus.Ring, error) {
	b, err := mds.Ring(ctx)
	if errors.Is(err, torus.ErrNotExist) {
		return firstRing(0)
	}
	if err != nil {
		return nil, err
	}
	r, err := ring.Decode(b)
	if err != nil {
		return nil, fmt.Errorf("the ring stored in the MDS: %w", err)
	}
	return r, nil
}

// ensureRing gives a cluster that was made without a ring its first one.
func ensureRing(ctx context.Context, mds torus.MetadataService) error {
	_, err := mds.Ring(ctx)
	if !errors.Is(err, torus.ErrNotExist) {
		return err
	}
	first, err := firstRing(0)
	if err == nil {
		err = setRing(ctx, mds, first)
	}
	if errors.Is(err, torus.ErrNonSequentialRing) { // somebody else made it
		return nil
	}
	return err
}

func setRing(ctx context.Context, mds torus.MetadataService, r torus.Ring) error {
	stored, err := r.Marshal()
	if err != nil {
		return err
	}
	return mds.SetRing(ctx, r.Version(), stored)
}

// changeRing publishes what plan makes of the present ring; when somebody else was faster, of theirs.
func changeRing(ctx context.Context, mds torus.MetadataService, plan func(torus.Ring) (torus.Ring, error)) (torus.Ring, error) {
	if err := ensureRing(ctx, mds); err != nil {
		return nil, err
	}
	for range ringAttempts {
		old, err := CurrentRing(ctx, mds)
		if err != nil {
			return nil, err
		}
		next, err := plan(old)
		if errors.Is(err, torus.ErrExists) {
			return old, ErrUnchanged
		}
		if err != nil {
			return nil, err
		}
		err = setRing(ctx, mds, next)
		if !errors.Is(err, torus.ErrNonSequentialRing) {
			return next, err
		}
	}
	return nil, fmt.Errorf("change the ring: %d times somebody else was faster: %w", ringAttempts, torus.ErrNonSequentialRing)
}

// AddToRing puts peers into the ring, each with its size as its weight.
func AddToRing(ctx context.Context, mds torus.MetadataService, peers []*models.Peer) (torus.Ring, error) {
	add := make([]ring.Member, 0, len(peers))
	for _, p := range peers {
		id, err := torus.ParsePeerID(p.Uuid)
		if err != nil {
			return nil, err
		}
		if p.SizeBytes == 0 {
			return nil, fmt.Errorf("peer %s offers no space: %w\nstart it with a --size above 0", p.Uuid, torus.ErrInvalid)
		}
		add = append(add, ring.Member{ID: id, Weight: p.SizeBytes, Labels: p.Labels})
	}
	return changeRing(ctx, mds, func(old torus.Ring) (torus.Ring, error) { return ring.AddPeers(old, add...) })
}

// RemoveFromRing takes peers out of the ring; those that are no members are left alone.
func RemoveFromRing(ctx context.Context, mds torus.MetadataService, peers []*models.Peer) (torus.Ring, error) {
	return changeRing(ctx, mds, func(old torus.Ring) (torus.Ring, error) {
		var ids []torus.PeerID
		for _, p := range peers {
			if id, err := torus.ParsePeerID(p.Uuid); err == nil && old.Members().Has(id) {
				ids = append(ids, id)
			}
		}
		if len(ids) == 0 {
			return nil, torus.ErrExists
		}
		return ring.RemovePeers(old, ids...)
	})
}

// SetReplication changes how many copies new blocks get.
func SetReplication(ctx context.Context, mds torus.MetadataService, n int) (torus.Ring, error) {
	return changeRing(ctx, mds, func(old torus.Ring) (torus.Ring, error) { return ring.SetReplication(old, n) })
}

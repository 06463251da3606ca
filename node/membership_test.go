package node

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/google/uuid"

	"github.com/coreos/torus"
	"github.com/coreos/torus/metadata/temp"
	"github.com/coreos/torus/models"
)

func testMDS(t *testing.T, withRing bool) torus.MetadataService {
	t.Helper()
	s := temp.NewServer(nil)
	var first torus.Ring
	if withRing {
		var err error
		if first, err = firstRing(2); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Init(torus.GlobalMetadata{ClusterID: uuid.NewString(), BlockSize: 1 << 20, DefaultBlockSpec: DefaultBlockSpec}, first); err != nil {
		t.Fatal(err)
	}
	mds := s.Client()
	t.Cleanup(func() { mds.Close() })
	return mds
}

func testPeer(n int) *models.Peer {
	return &models.Peer{Uuid: torus.NewPeerID().String(), Address: fmt.Sprintf("tdp://10.0.0.%d:40000", n), SizeBytes: 1 << 40}
}

// Everybody who joins at the same moment gets in, each with one version of the ring (--auto-join).
func TestAddToRingTogether(t *testing.T) {
	for _, withRing := range []bool{true, false} { // init --no-ring leaves the first to whoever comes
		mds := testMDS(t, withRing)
		const peers = 12
		var wg sync.WaitGroup
		for i := range peers {
			wg.Go(func() {
				if _, err := AddToRing(context.Background(), mds, []*models.Peer{testPeer(i)}); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		r, err := CurrentRing(t.Context(), mds)
		if err != nil {
			t.Fatal(err)
		}
		if len(r.Members()) != peers || r.Version() != 1+peers {
			t.Errorf("%d members in version %d", len(r.Members()), r.Version())
		}
	}
}

func TestRingChanges(t *testing.T) {
	mds, ctx := testMDS(t, true), t.Context()
	a, b := testPeer(1), testPeer(2)
	if _, err := AddToRing(ctx, mds, []*models.Peer{a, b}); err != nil {
		t.Fatal(err)
	}
	if r, err := AddToRing(ctx, mds, []*models.Peer{a}); !errors.Is(err, ErrUnchanged) || r.Version() != 2 {
		t.Errorf("added again: %v", err)
	}
	if r, err := SetReplication(ctx, mds, 3); err != nil || r.Replication() != 3 || r.Version() != 3 {
		t.Errorf("replication: %v", err)
	}
	if _, err := SetReplication(ctx, mds, 3); !errors.Is(err, ErrUnchanged) {
		t.Errorf("the same replication: %v", err)
	}
	if r, err := RemoveFromRing(ctx, mds, []*models.Peer{a, testPeer(3)}); err != nil || len(r.Members()) != 1 {
		t.Errorf("removed: %v", err)
	}
	if _, err := RemoveFromRing(ctx, mds, []*models.Peer{a}); !errors.Is(err, ErrUnchanged) {
		t.Errorf("removed again: %v", err)
	}
	if r, err := RemoveFromRing(ctx, mds, []*models.Peer{b}); err != nil || len(r.Members()) != 0 || r.Replication() != 3 {
		t.Errorf("removed the last: %v", err)
	}
	empty := testPeer(4)
	empty.SizeBytes = 0
	if _, err := AddToRing(ctx, mds, []*models.Peer{empty}); !errors.Is(err, torus.ErrInvalid) {
		t.Errorf("a peer of size 0: %v", err)
	}
}

package node

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/models"
)

// D1: a peer that is gone for good is removed; the others make its copies again and say so; then another may go, and every byte that was
// flushed is still there.
func TestRepairAfterRemoval(t *testing.T) {
	cfg := testDev(t)
	d, err := StartDev(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	data := make([]byte, 40<<20)
	rng := rand.NewChaCha8([32]byte{1})
	_, _ = rng.Read(data)
	c := dialNBD(t, d.NBD(), "demo")
	for at := 0; at < len(data); at += 1 << 20 {
		if err := c.WriteAt(data[at:at+1<<20], uint64(at), 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	c.Close()
	mds, err := d.Etcd().Connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer mds.Close()
	waitFor(t, "the volume to be released", func() error {
		v, err := mds.Volumes(t.Context())
		if err != nil {
			return err
		}
		st, err := mds.VolumeState(t.Context(), torus.VolumeID(v[0].Id))
		if err == nil && (st.Head == nil || st.Open != nil) {
			return fmt.Errorf("head %v, window %v", st.Head, st.Open)
		}
		return err
	})

	dead := d.peers[0]
	held := dead.stats().Used
	if held == 0 {
		t.Fatal("the peer holds nothing")
	}
	if err := dead.Close(); err != nil {
		t.Fatal(err)
	}
	r, err := RemoveFromRing(t.Context(), mds, []*models.Peer{dead.Record()})
	if err != nil {
		t.Fatal(err)
	}
	if err := mds.DeletePeer(t.Context(), dead.ID()); err != nil {
		t.Fatal(err)
	}
	repaired := uint64(0)
	waitFor(t, "the copies to be made again", func() error {
		peers, err := mds.Peers(t.Context())
		if err != nil {
			return err
		}
		repaired = 0
		for _, p := range peers {
			repaired += p.RepairedBlocks
			if p.ShortBlocks > 0 || p.CorruptBlocks > 0 || p.UnknownVolumes > 0 || p.CheckedRing != r.Version() {
				return fmt.Errorf("%v", p)
			}
		}
		return nil
	})
	if repaired == 0 {
		t.Fatal("nothing was repaired")
	}
	if err := d.peers[1].Close(); err != nil {
		t.Fatal(err)
	}
	// Two copies need two peers: one more, so that the volume can be attached.
	global, err := mds.GlobalMetadata(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	spare, err := StartPeer(t.Context(), PeerConfig{
		MDS: mds, Global: global, DataDir: t.TempDir(), Capacity: Capacity{Bytes: 256 << 20}, Address: "tdp://127.0.0.1:0", AutoJoin: true, Log: cfg.Log,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer spare.Close()
	c = dialNBD(t, d.NBD(), "demo")
	defer c.Close()
	got := make([]byte, 1<<20)
	for at := 0; at < len(data); at += len(got) {
		if err := c.ReadAt(got, uint64(at)); err != nil || !bytes.Equal(got, data[at:at+len(got)]) {
			t.Fatalf("D1: at %d: %v", at, err)
		}
	}
}

func waitFor(t *testing.T, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waiting for %s: %v", what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

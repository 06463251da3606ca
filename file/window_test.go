package file_test

import (
	"context"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
)

func (r *rig) lo() (uint64, uint64) {
	st, err := r.mds.Client().VolumeState(context.Background(), torus.VolumeID(r.vol.Id))
	if err != nil {
		r.t.Fatal(err)
	}
	if len(st.Open.Spans) == 0 {
		return 1 << 62, st.Txn
	}
	return st.Open.Spans[0].Lo, st.Txn
}

func (r *rig) each(hold func(*torus.Request) bool, drop func(*torus.Request) error) {
	for _, p := range r.peers {
		p.hold, p.drop = hold, drop
	}
}

// A peer that is alive and takes a moment longer to connect has its share of the first window all the same.
func TestWindowWaitsForSlowConnections(t *testing.T) {
	r := newRig(t, 1, 4, 2, 8<<20)
	r.peers[2].connects, r.peers[3].connects = 100*time.Millisecond, time.Hour
	r.attach(nil)
	st, err := r.mds.Client().VolumeState(context.Background(), torus.VolumeID(r.vol.Id))
	if err != nil {
		t.Fatal(err)
	}
	has := map[string]int{}
	for _, s := range st.Open.Spans {
		for i := s.Lo; i < s.Hi; i++ {
			if o := s.Overrides[i]; o != nil {
				for _, p := range o.Peers {
					has[string(p)]++
				}
				continue
			}
			ref := torus.BlockRef{Type: torus.TypeBlock, Volume: torus.VolumeID(r.vol.Id), INode: torus.INodeID(st.Open.Epoch), Index: torus.IndexID(i)}
			for _, p := range r.ring.GetPeers(ref).Set(2) {
				has[string(p[:])]++
			}
		}
	}
	if n := has[string(r.peers[2].id[:])]; n < 5 {
		t.Errorf("the peer that connects after 100 ms is in the sets of %d blocks", n)
	}
	if n := has[string(r.peers[3].id[:])]; n > 0 {
		t.Errorf("a peer that nobody can talk to is in the sets of %d blocks", n)
	}
}

// Rule 4, W1: a record that was acknowledged keeps the block it was whole in within the window, until it is whole in a later one.
func TestWindowKeepsHomeOfRolledRecords(t *testing.T) {
	r := newRig(t, 1, 3, 2, 8<<20)
	tune := func(c *file.Config) { c.CheckpointEvery = time.Second }
	c := r.attach(tune)
	c.must(&device.Request{Op: device.Write, Data: pg(1, 1), Flags: device.FUA})
	c.must(&device.Request{Op: device.Write, Off: 4096, Data: pg(2, 1)}) // acknowledged in block 0, or wherever that was
	failed := false
	var at torus.BlockRef
	r.each(func(q *torus.Request) bool {
		return failed && q.Op == torus.OpAppend && q.Ref.Type == torus.TypeBlock && q.Ref.Index > at.Index
	},
		func(q *torus.Request) error {
			if q.Op == torus.OpSync && q.Ref.Type == torus.TypeBlock && !failed {
				failed, at = true, q.Ref
				return torus.ErrGap
			}
			return nil
		})
	c.l.Post(func() { c.f.Submit(&device.Request{Op: device.Flush, Done: func(*device.Request) {}}) }) // rolls, before the first checkpoint
	r.v.RunFor(4 * time.Second)
	if !failed || c.f.Stats().Checkpoints == 0 || c.f.Stats().Flushed > 1 {
		t.Fatalf("not the schedule this is about: %+v", c.f.Stats())
	}
	if lo, _ := r.lo(); lo > uint64(at.Index) {
		t.Errorf("rule 4: the window begins at %d, record 2 is acknowledged for its copies in block %d", lo, at.Index)
	}
	c.kill()
	r.each(nil, nil)
	c = r.attach(tune)
	b := make([]byte, 4096)
	c.must(&device.Request{Op: device.Read, Off: 4096, Data: b})
	if b[0] != 2 {
		t.Fatal("W1: an acknowledged write is lost with the client")
	}
}

// Rule 4, W1: nor may a block leave the window that holds the only copies of records not yet acknowledged.
func TestWindowKeepsBlocksOfRecordsInFlight(t *testing.T) {
	r := newRig(t, 1, 3, 2, 8<<20)
	tune := func(c *file.Config) { c.CheckpointEvery = time.Second }
	c := r.attach(tune)
	c.must(&device.Request{Op: device.Write, Data: pg(1, 1), Flags: device.FUA})
	held := true
	var slow *fakePeer
	for _, p := range r.peers {
		for ref := range p.blocks {
			if ref.Type == torus.TypeBlock {
				slow = p
			}
		}
	}
	for _, p := range r.peers {
		p.drop = func(q *torus.Request) error { // a hint that was lost
			if q.Op == torus.OpSeal {
				return torus.ErrBlockUnavailable
			}
			return nil
		}
	}
	slow.hold = func(q *torus.Request) bool { return held && q.Op == torus.OpAppend && q.Ref.Type == torus.TypeBlock }
	left := 12
	for i := range 12 {
		q := &device.Request{Op: device.Write, Off: uint64(i) * 60 << 10, Len: 60 << 10, Data: pg(byte(10+i), 15)}
		q.Done = func(*device.Request) { left-- }
		c.l.Post(func() { c.f.Submit(q) })
		r.v.RunFor(time.Millisecond)
	}
	r.v.RunFor(4 * time.Second)
	if c.f.Stats().Checkpoints == 0 || left < 2 {
		t.Fatalf("not the schedule this is about: %d left, %+v", left, c.f.Stats())
	}
	if lo, _ := r.lo(); lo > 0 {
		t.Errorf("rule 4: the window begins at %d, block 0 holds records that may yet be acknowledged", lo)
	}
	held = false
	if !r.v.Run(func() bool { return left == 0 }, time.Second) {
		t.Fatal("writes are not done")
	}
	c.kill()
	c = r.attach(tune)
	b := make([]byte, 12*60<<10)
	c.must(&device.Request{Op: device.Read, Data: b})
	for i := range 12 {
		if b[i*60<<10] != byte(10+i) {
			t.Fatalf("W1: acknowledged write %d is lost with the client", i)
		}
	}
}

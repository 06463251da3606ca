package file_test

import (
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/loop"
)

// A checkpoint that fails leaves nothing in the block table: where a block was to be written to, and was not, is not listed by
// the next one as part of it (F1: every peer of its set has all that is listed).
func TestFailedCheckpointIsNotListed(t *testing.T) {
	r := newRig(t, 1, 3, 2, 8<<20)
	c := r.attach(func(c *file.Config) { c.CheckpointEvery = time.Second })
	c.must(&device.Request{Op: device.Write, Data: pg(1, 1), Flags: device.FUA})
	r.v.RunFor(5 * time.Second)
	r.each(nil, func(q *torus.Request) error {
		if q.Op == torus.OpAppend && q.Ref.Type == torus.TypeINode {
			return torus.ErrBlockUnavailable
		}
		return nil
	})
	before := c.f.Stats().Checkpoints
	c.must(&device.Request{Op: device.Write, Off: 4096, Data: pg(2, 1), Flags: device.FUA})
	r.v.RunFor(5 * time.Second)
	if n := c.f.Stats().Checkpoints; before == 0 || n != before {
		t.Fatalf("not the schedule this is about: %d checkpoints, then %d", before, n)
	}
	r.each(nil, nil)
	r.v.RunFor(5 * time.Second)
	st, err := c.mds.VolumeState(t.Context(), torus.VolumeID(r.vol.Id))
	if err != nil || c.f.Stats().Checkpoints == before {
		t.Fatalf("no checkpoint: %v", err)
	}
	over := false
	c.l.Post(func() {
		loop.Go(c.l, func(task *loop.Task) {
			defer func() { over = true }()
			list, err := file.ReadInventory(task, file.InventoryConfig{Dist: c.d, Volume: torus.VolumeID(r.vol.Id), BlockSize: rigBlock}, st.VolumeState)
			if err != nil {
				t.Error(err)
				return
			}
			for b := range list.Needed() {
				for _, p := range r.peers {
					if have := p.blocks[b.Ref]; b.Set.Has(p.id) && (have == nil || len(have.data) < int(b.Length)) {
						t.Errorf("F1: %v is listed with %d bytes, which a peer of its set does not have", b.Ref, b.Length)
					}
				}
			}
		})
	})
	if !r.v.Run(func() bool { return over }, time.Minute) {
		t.Fatal("no inventory")
	}
}

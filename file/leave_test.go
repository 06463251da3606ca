package file_test

import (
	"context"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/loop"
)

// D1: an idle writer does not keep flushed records where they have lost a copy and nobody may make another: it leaves the block, and
// the INode lists it outside the window. A peer that is back soon changes nothing.
func TestIdleWriterLeavesBlock(t *testing.T) {
	r := newRig(t, 1, 3, 2, 1<<20)
	c := r.attach(nil)
	c.must(&device.Request{Op: device.Write, Data: pg(1, 4)})
	c.must(&device.Request{Op: device.Flush})
	r.v.RunFor(40 * time.Second) // a checkpoint
	state := func() torus.VolumeState {
		s, err := c.mds.VolumeState(context.Background(), torus.VolumeID(r.vol.Id))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	holds := func() (*fakePeer, torus.BlockRef) {
		for _, p := range r.peers {
			for ref := range p.blocks {
				if ref.Type == torus.TypeBlock {
					return p, ref
				}
			}
		}
		t.Fatal("no data block")
		return nil, torus.BlockRef{}
	}
	p, ref := holds()
	before := state()
	if !file.InWindow(before.VolumeState, ref) {
		t.Fatal("the open block is not in the window")
	}
	p.crash(false)
	r.v.RunFor(5 * time.Second)
	p.restart()
	r.v.RunFor(40 * time.Second)
	if s := state(); s.Head.Number != before.Head.Number || !file.InWindow(s.VolumeState, ref) {
		t.Fatal("a restart made the writer leave its block")
	}
	p.crash(false)
	r.v.RunFor(60 * time.Second)
	s := state()
	if s.Head.Number == before.Head.Number || file.InWindow(s.VolumeState, ref) {
		t.Fatalf("head %d, the block is still in the window", s.Head.Number)
	}
	listed := false
	c.l.Post(func() {
		loop.Go(c.l, func(task *loop.Task) {
			all, err := file.ReadInventory(task, file.InventoryConfig{Dist: c.d, Volume: ref.Volume, BlockSize: rigBlock}, s.VolumeState)
			if err != nil {
				t.Error(err)
				return
			}
			for b := range all.Needed() {
				listed = listed || b.Ref == ref && b.Length == 5*4096 && len(b.Set) == 2
			}
		})
	})
	r.v.RunFor(time.Second)
	if !listed {
		t.Fatal("the block is not listed")
	}
	// It happens once, and the writer goes on.
	r.v.RunFor(3 * time.Minute)
	if n := state().Head.Number; n != s.Head.Number {
		t.Fatalf("head %d, then %d", s.Head.Number, n)
	}
	c.must(&device.Request{Op: device.Write, Data: pg(2, 4)})
	c.must(&device.Request{Op: device.Flush})
	c.detach()
}

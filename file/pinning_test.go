package file_test

import (
	"bytes"
	"context"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/metadata/temp"
	"github.com/coreos/torus/models"
)

// S1: a snapshot that is pinned while a checkpoint is being written needs the log that this checkpoint was about to let go.
func TestPinWhileCheckpointIsWritten(t *testing.T) {
	r := newRig(t, 1, 3, 2, 1<<20)
	c := r.attach(func(c *file.Config) { c.CheckpointEvery, c.Utilisation = 5*time.Second, -1 })
	c.must(&device.Request{Op: device.Write, Data: pg(1, 1), Flags: device.FUA})
	if !r.v.Run(func() bool { return c.f.Stats().Checkpoints == 1 }, time.Minute) {
		t.Fatal("no checkpoint")
	}
	for i := range 10 { // more than a block of log, of which only the end is alive
		c.must(&device.Request{Op: device.Write, Data: pg(byte(10+i), 15), Flags: device.FUA})
	}
	want := make([]byte, r.size)
	copy(want, pg(19, 15))
	held, began := true, false
	r.each(func(q *torus.Request) bool {
		if q.Op != torus.OpAppend || q.Ref.Type != torus.TypeINode {
			return false
		}
		began = true
		return held
	}, nil)
	if !r.v.Run(func() bool { return began }, time.Minute) {
		t.Fatal("no second checkpoint")
	}
	base := r.state().Head.Number
	at := r.snapshot(c, "s")
	if at.Base.GetNumber() != base || c.f.Stats().Checkpoints != 1 {
		t.Fatalf("not the schedule this is about: base %v, %+v", at.Base, c.f.Stats())
	}
	held = false
	if !r.v.Run(func() bool { return file.Settled(r.state().VolumeState, at) }, time.Minute) {
		t.Fatal("the log of the snapshot is not listed")
	}
	r.v.RunFor(time.Second) // what is deleted is gone
	same(t, "S1: the snapshot", r.image(r.view(c, at), c), want)
}

// S1: a snapshot reads as what its last record left. A checkpoint that begins while that is being flushed would cover later ones, and be what the
// snapshot begins with, where peers answer so soon that it is committed before the pin.
func TestNoCheckpointWhilePinning(t *testing.T) {
	r := newRig(t, 1, 3, 2, 1<<20)
	c := r.attach(func(c *file.Config) { c.CheckpointBytes = 64 << 10 })
	c.must(&device.Request{Op: device.Write, Data: pg(1, 16), Flags: device.FUA})
	if !r.v.Run(func() bool { return c.f.Stats().Checkpoints == 1 }, time.Minute) {
		t.Fatal("no checkpoint")
	}
	held, syncs := true, 0
	ofLog := func(q *torus.Request) bool { return q.Op == torus.OpSync && q.Ref.Type == torus.TypeBlock }
	r.each(func(q *torus.Request) bool { return held && ofLog(q) }, nil)
	for _, p := range r.peers {
		p.now = func(q *torus.Request) bool {
			if ofLog(q) {
				syncs++
			}
			return !ofLog(q)
		}
	}
	c.must(&device.Request{Op: device.Write, Data: pg(2, 1)})
	r.v.RunFor(2 * time.Second)
	if syncs == 0 {
		t.Fatal("nobody has begun to sync")
	}
	// Both of these are left for the next round of syncs. The snapshot is of the first, and with the second a checkpoint is due.
	c.must(&device.Request{Op: device.Write, Data: pg(3, 1)})
	r.edit(c, func(s *models.VolumeState) { s.Asks = append(s.Asks, &models.Ask{Snapshot: "s"}) })
	r.v.RunFor(time.Millisecond)
	c.must(&device.Request{Op: device.Write, Data: pg(4, 16)})
	if s := c.f.Stats(); s.Acked != 4 || s.Flushed != 1 || s.Checkpoints != 1 || len(r.state().Pins) > 0 {
		t.Fatalf("not the schedule this is about: %+v", s)
	}
	held = false
	var at *models.Moment
	if !r.v.Run(func() bool {
		if s := r.state(); len(s.Pins) == 1 {
			at = s.Pins[0].At
		}
		return at != nil
	}, time.Minute) {
		t.Fatal("no snapshot")
	}
	if at.Seq != 3 {
		t.Fatalf("not the schedule this is about: the snapshot ends with record %d", at.Seq)
	}
	c.must(&device.Request{Op: device.Write, Data: pg(5, 16), Flags: device.FUA}) // the next checkpoint lists its log, if that is not yet done
	if !r.v.Run(func() bool { return file.Settled(r.state().VolumeState, at) }, time.Minute) {
		t.Fatal("the log of the snapshot is not listed")
	}
	same(t, "S1: the snapshot", r.image(r.view(c, at), c)[:4096], pg(3, 1))
}

// S1: what a snapshot consists of is durable before it is pinned: it is there, and so is the volume, when power has been lost everywhere.
func TestSnapshotIsFlushedBeforeItIsPinned(t *testing.T) {
	r := newRig(t, 1, 3, 2, 1<<20)
	c := r.attach(nil)
	c.must(&device.Request{Op: device.Write, Data: pg(1, 1), Flags: device.FUA})
	held := true
	r.each(func(q *torus.Request) bool { return held && q.Op == torus.OpSync && q.Ref.Type == torus.TypeBlock }, nil)
	c.must(&device.Request{Op: device.Write, Data: pg(2, 1)})
	r.edit(c, func(s *models.VolumeState) { s.Asks = append(s.Asks, &models.Ask{Snapshot: "s"}) })
	r.v.RunFor(5 * time.Second)
	if s := c.f.Stats(); s.Acked == s.Flushed {
		t.Fatalf("not the schedule this is about: %+v", s)
	}
	c.l.Kill()
	for _, p := range r.peers {
		p.conns = nil
		for _, b := range p.blocks {
			b.data = b.data[:b.synced]
		}
	}
	held = false
	c = r.client(nil)
	if r.v.Run(func() bool { return c.done }, time.Minute); c.f == nil {
		t.Fatalf("S1: no attach after power was lost, pinned %v: %v", r.state().Pins, c.err)
	}
	now := r.image(c.f, c)
	if !bytes.Equal(now[:4096], pg(1, 1)) {
		t.Fatalf("D1: a flushed write reads %x", now[:8])
	}
	var at *models.Moment
	if !r.v.Run(func() bool {
		if s := r.state(); len(s.Pins) == 1 && file.Settled(s.VolumeState, s.Pins[0].At) {
			at = s.Pins[0].At
		}
		return at != nil
	}, time.Minute) {
		t.Fatal("the snapshot that was asked for is not taken")
	}
	same(t, "S1: the snapshot", r.image(r.view(c, at), c), now)
}

// LIVE, D1: an attach whose transaction was made and whose answer was lost knows it again, though it would register another window by now, and ends
// as soon as the metadata service answers.
func TestLostAnswerIsKnownAgain(t *testing.T) {
	r := newRig(t, 1, 4, 2, 1<<20)
	r.attach(nil).detach()
	before := r.state().Txn
	c := r.client(nil)
	lost := 0
	c.mds.SetFaults(func(_ context.Context, method string) temp.Fault {
		switch {
		case method == "Commit" && lost == 0:
			lost = 1
			return temp.FailAfter
		case method == "VolumeState" && lost == 1:
			lost = 2
			return temp.FailBefore
		}
		return temp.None
	})
	if !r.v.Run(func() bool { return lost == 2 }, time.Minute) || c.done || r.state().Txn != before+1 {
		t.Fatalf("not the schedule this is about: %d, done %v, transaction %d", lost, c.done, r.state().Txn)
	}
	r.peers[0].crash(false) // a window that is laid out now has none of it
	if !r.v.Run(func() bool { return c.done }, time.Minute) || c.err != nil {
		t.Fatalf("the metadata service answers, and the attach goes on for ever: done %v, %v", c.done, c.err)
	}
	c.must(&device.Request{Op: device.Write, Data: pg(1, 1), Flags: device.FUA})
	c.kill()
	c = r.attach(nil)
	b := make([]byte, 4096)
	c.must(&device.Request{Op: device.Read, Data: b})
	if b[0] != 1 {
		t.Fatal("D1: a flushed write is lost")
	}
}

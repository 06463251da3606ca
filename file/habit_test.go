package file_test

import (
	"testing"
	"time"

	"github.com/coreos/torus/device"
)

// Who flushes each write by itself finds the next flush under way before he has asked; who does not causes no syncs.
func TestSyncAhead(t *testing.T) {
	r := newRig(t, 1, 3, 2, 8<<20)
	c := r.attach(nil)
	write := func(flags device.Flags) {
		t.Helper()
		c.must(&device.Request{Op: device.Write, Data: pg(1, 1), Flags: flags})
	}
	durable := func() bool {
		r.v.RunFor(20 * time.Millisecond)
		s := c.f.Stats()
		return s.Flushed == s.Acked
	}
	for i := range 3 {
		write(0)
		if durable() {
			t.Fatalf("write %d was synced with nobody asking", i)
		}
		c.must(&device.Request{Op: device.Flush})
	}
	write(0)
	if !durable() {
		t.Error("the fourth write was not synced ahead of its flush")
	}
	syncs := c.f.Stats().Syncs
	c.must(&device.Request{Op: device.Flush})
	if c.f.Stats().Syncs != syncs {
		t.Error("a flush with nothing to do caused a sync")
	}
	write(0)
	durable()
	write(0) // the habit is broken
	if durable() {
		t.Error("a write was synced although the last was not flushed")
	}
	before := c.f.Stats().Syncs
	write(device.FUA)
	if s := c.f.Stats(); s.Syncs != before+1 || s.Flushed != s.Acked {
		t.Errorf("a write with FUA took %d syncs, flushed %d of %d", s.Syncs-before, s.Flushed, s.Acked)
	}
}

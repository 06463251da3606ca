package file_test

import (
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
)

// holding attaches a volume whose peers answer no append until release is called.
func holding(t *testing.T) (r *rig, c *client, release func()) {
	t.Helper()
	r = newRig(t, 1, 3, 2, 8<<20)
	c = r.attach(nil)
	c.must(&device.Request{Op: device.Write, Data: pg(1, 1), Flags: device.FUA})
	held := true
	for _, p := range r.peers {
		p.hold = func(q *torus.Request) bool { return held && q.Op == torus.OpAppend }
	}
	return r, c, func() { held = false }
}

// Small writes wait for each other while much is on its way, and for nothing else: the first are sent at once, and so is one that is to be flushed.
func TestGather(t *testing.T) {
	r, c, release := holding(t)
	left, page := 0, uint64(0)
	write := func(pages int, flags device.Flags) {
		left++
		q := &device.Request{Op: device.Write, Off: page * 4096, Len: uint64(pages) * 4096, Data: pg(9, pages), Flags: flags, Done: func(q *device.Request) {
			if q.Err != nil {
				t.Error(q.Err)
			}
			left--
		}}
		page += uint64(pages)
		c.l.Post(func() { c.f.Submit(q) })
		r.v.RunFor(time.Millisecond)
	}
	was := c.f.Stats().Records
	for i, x := range []struct {
		pages, records int
		flags          device.Flags
	}{
		{1, 1, 0}, // nothing else is on its way
		{1, 2, 0},
		{8, 3, 0},
		{1, 3, 0}, // 10 pages are
		{1, 3, 0},
		{1, 3, 0},
		{1, 3, 0},
		{1, 4, device.FUA},
		{34, 5, 0},
		{32, 7, 0}, // cut in two by the end of a block
		{2, 7, 0},
	} {
		write(x.pages, x.flags)
		if n := int(c.f.Stats().Records - was); n != x.records {
			t.Fatalf("write %d: %d records were sent, want %d", i, n, x.records)
		}
	}
	release()
	if !r.v.Run(func() bool { return left == 0 }, time.Second) {
		t.Fatalf("%d writes are not done: nobody told the last ones that there is nothing more to wait for", left)
	}
}

// A write that the end of a block cuts in two does not wait for itself.
func TestGatherNotItself(t *testing.T) {
	r, c, release := holding(t)
	was, done := c.f.Stats().Records, false
	q := &device.Request{Op: device.Write, Len: 70 * 4096, Data: pg(2, 70), Done: func(*device.Request) { done = true }}
	c.l.Post(func() { c.f.Submit(q) })
	r.v.RunFor(time.Millisecond)
	if n := c.f.Stats().Records - was; n != 2 {
		t.Errorf("%d records were sent, want 2: a block has 64 pages", n)
	}
	release()
	if !r.v.Run(func() bool { return done }, time.Second) {
		t.Fatal("the write is not done")
	}
}

// While compaction empties blocks, a small write waits for all that is on its way.
func TestGatherWhileBlocksAreEmptied(t *testing.T) {
	r, c, release := holding(t)
	left := 0
	was := c.f.Stats().Records
	write := func(page uint64, pages int) int {
		left++
		c.l.Post(func() {
			c.f.SetEmptying(true)
			c.f.Submit(&device.Request{Op: device.Write, Off: page * 4096, Len: uint64(pages) * 4096, Data: pg(9, pages), Done: func(*device.Request) { left-- }})
		})
		r.v.RunFor(time.Millisecond)
		return int(c.f.Stats().Records - was)
	}
	if n := write(0, 1); n != 1 {
		t.Fatalf("%d records were sent, want 1: nothing was on its way", n)
	}
	if n := write(1, 8); n != 1 {
		t.Errorf("%d records were sent, want 1", n)
	}
	if n := write(9, 32); n != 2 {
		t.Errorf("%d records were sent, want 2: it is large", n)
	}
	write(41, 1)
	release()
	if !r.v.Run(func() bool { return left == 0 }, time.Second) {
		t.Fatalf("%d writes are not done", left)
	}
	c.l.Post(func() { c.f.SetEmptying(false) })
	r.v.RunFor(time.Millisecond)
	c.detach()
}

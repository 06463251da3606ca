package file_test

import (
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
)

// A read waits for the replicas of a block, which are both away. Meanwhile its page is written anew, elsewhere. The read must not wait for
// peers that may never come back for bytes that nobody wants any more.
func TestWaitingReadFollowsTheMap(t *testing.T) {
	r := newRig(t, 1, 4, 2, 8<<20)
	c := r.attach(nil)
	c.must(&device.Request{Op: device.Write, Data: pg(1, 1), Flags: device.FUA})
	holders := map[*fakePeer]bool{}
	for _, p := range r.peers {
		for ref := range p.blocks {
			if ref.Type == torus.TypeBlock {
				holders[p] = true
			}
		}
	}
	for _, p := range r.peers {
		if holders[p] {
			p.crash(false)
		}
	}
	done := false
	q := &device.Request{Op: device.Read, Len: 4096, Data: make([]byte, 4096), Done: func(*device.Request) { done = true }}
	c.l.Post(func() { c.f.Submit(q) })
	if len(holders) != 2 || r.v.Run(func() bool { return done }, 5*time.Second) {
		t.Fatalf("not the schedule this is about: %d holders, %v", len(holders), q.Err)
	}
	c.must(&device.Request{Op: device.Write, Data: pg(2, 1), Flags: device.FUA})
	if !r.v.Run(func() bool { return done }, 5*time.Second) || q.Err != nil || q.Data[0] != 2 {
		t.Fatalf("done %v, %v, found %d, want 2", done, q.Err, q.Data[0])
	}
}

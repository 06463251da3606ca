package file_test

import (
	"bytes"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/record"
)

// holders are the peers that have data blocks.
func (r *rig) holders() (l []*fakePeer, ref torus.BlockRef) {
	for _, p := range r.peers {
		for x := range p.blocks {
			if x.Type == torus.TypeBlock {
				l, ref = append(l, p), x
			}
		}
	}
	return l, ref
}

// D1: a checkpoint covers what is applied. What is flushed and waits for a leaf must stay in the log.
func TestCheckpointLeavesUnappliedInTheLog(t *testing.T) {
	r := newRig(t, 1, 3, 2, 64<<20)
	tune := func(c *file.Config) { c.CheckpointEvery = time.Second }
	c := r.attach(tune)
	c.must(&device.Request{Op: device.Write, Data: pg(1, 1)})
	c.must(&device.Request{Op: device.Write, Off: 32 << 20, Data: pg(1, 1)})
	c.detach()
	c = r.attach(tune)
	c.must(&device.Request{Op: device.Read, Data: make([]byte, 4096)}) // loads the interior node and the first leaf
	c.must(&device.Request{Op: device.Write, Data: pg(2, 1), Flags: device.FUA})
	r.each(func(q *torus.Request) bool { return q.Op == torus.OpRead && q.Ref.Type == torus.TypeINode }, nil)
	c.must(&device.Request{Op: device.Write, Off: 32 << 20, Data: pg(2, 1), Flags: device.FUA})
	r.v.RunFor(3 * time.Second)
	if s := c.f.Stats(); s.Applied == s.Flushed || s.Checkpoints == 0 {
		t.Fatalf("not the schedule this is about: %+v", s)
	}
	c.kill()
	r.each(nil, nil)
	c = r.attach(tune)
	b := make([]byte, 4096)
	c.must(&device.Request{Op: device.Read, Off: 32 << 20, Data: b})
	if b[0] != 2 {
		t.Fatal("D1: a flushed write is lost")
	}
}

// Step 4: a log that ends below what was committed is not served.
func TestRecoveryStopsBelowCommitted(t *testing.T) {
	r := newRig(t, 1, 3, 2, 8<<20)
	c := r.attach(nil)
	for i := range 3 {
		c.must(&device.Request{Op: device.Write, Off: uint64(i) << 12, Data: pg(5, 1), Flags: device.FUA})
	}
	c.kill()
	l, ref := r.holders()
	next := ref
	next.Index++
	for _, p := range l {
		b := p.blocks[ref]
		b.data = b.data[:8192] // the first record is left
	}
	for _, p := range r.peers { // and one of the next block says how much was flushed
		h := record.Header{Ref: next, Seq: 4, Flushed: 3, Extents: []record.Extent{{Page: 9, Count: 1, Kind: record.Trim}}}
		page := make([]byte, 4096)
		h.Encode(page)
		p.blocks[next] = &fakeBlock{data: page}
	}
	c = r.client(nil)
	r.v.Run(func() bool { return c.done }, time.Minute)
	if c.f != nil || !errors.Is(c.err, torus.ErrCorrupt) {
		t.Fatalf("D1: attached although flushed records are missing: %v", c.err)
	}
}

// Step 2: nobody has answered for a block of the window: no attach.
func TestAttachWaitsForEveryBlock(t *testing.T) {
	r := newRig(t, 1, 5, 2, 8<<20)
	c := r.attach(nil)
	c.must(&device.Request{Op: device.Write, Data: pg(5, 1)})
	c.kill()
	l, _ := r.holders()
	for _, p := range l {
		p.crash(false)
	}
	c = r.client(nil)
	if r.v.Run(func() bool { return c.done }, 5*time.Minute) {
		t.Fatalf("W1: attached, and nobody who holds the last block was asked: %v", c.err)
	}
	l[1].restart()
	if !r.v.Run(func() bool { return c.done }, time.Minute) || c.err != nil {
		t.Fatalf("one of its peers is back: %v", c.err)
	}
	b := make([]byte, 4096)
	c.must(&device.Request{Op: device.Read, Data: b})
	if b[0] != 5 {
		t.Fatal("W1: an acknowledged write is lost")
	}
}

// Step 3: a peer that lost its unsynced tail in a restart does not decide for one that still has it.
func TestRecoveryTakesTheLongestTail(t *testing.T) {
	for i := range 2 {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			r := newRig(t, 1, 3, 2, 8<<20)
			c := r.attach(nil)
			c.must(&device.Request{Op: device.Write, Data: pg(5, 1)})
			c.kill()
			l, ref := r.holders()
			l[i].blocks[ref].data = nil
			c = r.attach(nil)
			b := make([]byte, 4096)
			c.must(&device.Request{Op: device.Read, Data: b})
			if b[0] != 5 {
				t.Fatal("an acknowledged write is lost with the tail of one replica")
			}
		})
	}
}

// Step 5: what an attach serves is durable on R peers before it commits.
func TestRecoveredRecordsAreDurable(t *testing.T) {
	for i := range 2 {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			r := newRig(t, 1, 3, 2, 8<<20)
			c := r.attach(nil)
			c.must(&device.Request{Op: device.Write, Data: pg(5, 1)})
			c.kill()
			l, ref := r.holders()
			l[i].drop = func(q *torus.Request) error {
				if q.Op == torus.OpSync && q.Ref == ref {
					return torus.ErrGap
				}
				return nil
			}
			c = r.attach(nil)
			c.kill()
			r.each(nil, nil)
			l[1-i].crash(false) // R-1 peers lost, and power
			for _, p := range r.peers {
				if p.up {
					for _, b := range p.blocks {
						b.data = b.data[:b.synced]
					}
				}
			}
			c = r.attach(nil)
			b := make([]byte, 4096)
			c.must(&device.Request{Op: device.Read, Data: b})
			if b[0] != 5 {
				t.Fatal("D1: what an attach has committed is lost")
			}
		})
	}
}

// W1, D1: what one replica has lost to rot is waited for at the other, which is connected and takes its time.
func TestRecoveryWaitsForASlowPeer(t *testing.T) {
	r := newRig(t, 1, 3, 2, 8<<20)
	c := r.attach(nil)
	for i := range 3 {
		c.must(&device.Request{Op: device.Write, Off: uint64(i) << 12, Data: pg(5, 1), Flags: device.FUA})
	}
	c.kill()
	l, ref := r.holders()
	l[0].blocks[ref].data = l[0].blocks[ref].data[:8192]
	ready := r.v.Now() + 2*time.Second
	l[1].hold = func(q *torus.Request) bool { return q.Op == torus.OpFence && r.v.Now() < ready }
	c = r.attach(nil)
	b := make([]byte, 3<<12)
	c.must(&device.Request{Op: device.Read, Data: b})
	for i := range 3 {
		if b[i<<12] != 5 {
			t.Errorf("D1: flushed write %d is lost", i)
		}
	}
}

// A peer that cannot keep its promise, as its disk has failed, is neither waited for nor asked without a pause.
func TestRecoveryWithAPeerThatFails(t *testing.T) {
	r := newRig(t, 1, 3, 2, 8<<20)
	c := r.attach(nil)
	c.must(&device.Request{Op: device.Write, Data: pg(5, 1), Flags: device.FUA})
	c.kill()
	l, _ := r.holders()
	asked := 0
	l[0].drop = func(q *torus.Request) error {
		if q.Op != torus.OpFence {
			return nil
		}
		asked++
		return torus.ErrIO
	}
	began := r.v.Now()
	r.attach(nil)
	if took := r.v.Now() - began; took > 4*time.Second || asked > 15 {
		t.Errorf("attach took %v and asked it %d times", took, asked)
	}
}

// A replica that says at first that its bytes are damaged, as one does that lost power between two answers of the same attach, is asked
// again before that is final.
func TestDamageThatPasses(t *testing.T) {
	for _, times := range []int{1, 2, 3} {
		r := newRig(t, 1, 3, 2, 8<<20)
		c := r.attach(nil)
		c.must(&device.Request{Op: device.Write, Data: pg(1, 1), Flags: device.FUA})
		c.must(&device.Request{Op: device.Write, Data: pg(2, 1), Flags: device.FUA})
		c.kill()
		l, _ := r.holders()
		l[1].crash(false)
		left := times
		l[0].drop = func(q *torus.Request) error {
			if q.Op == torus.OpRead && q.Ref.Type == torus.TypeBlock && left > 0 {
				left--
				return torus.ErrCorrupt
			}
			return nil
		}
		c = r.client(nil)
		if !r.v.Run(func() bool { return c.done }, time.Minute) {
			t.Fatal("the attach does not end")
		}
		if times == 3 {
			if !errors.Is(c.err, torus.ErrCorrupt) {
				t.Errorf("damage that stays: %v", c.err)
			}
			continue
		}
		if c.err != nil {
			t.Fatalf("damage that passed after %d answers: %v", times, c.err)
		}
		b := make([]byte, 4096)
		c.must(&device.Request{Op: device.Read, Data: b})
		if !bytes.Equal(b, pg(2, 1)) {
			t.Error("the last write is gone")
		}
	}
}

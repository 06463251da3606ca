package file_test

import (
	"bytes"
	"context"
	"errors"
	"runtime"
	"testing"
	"time"
	"weak"

	"math/rand/v2"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/metadata/temp"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/record"
)

func pg(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n*4096) }

// R1: a flush submitted from the Done of a flush is forgotten.
func TestFlushFromDone(t *testing.T) {
	for seed := range uint64(20) {
		t.Run("", func(t *testing.T) { flushFromDone(t, seed) })
	}
}

func flushFromDone(t *testing.T, seed uint64) {
	r := newRig(t, seed, 3, 2, 8<<20)
	c := r.attach(nil)
	second, acked2 := false, false
	c.l.Post(func() {
		w1 := &device.Request{Op: device.Write, Len: 4096, Data: pg(1, 1)}
		w1.Done = func(*device.Request) {
			f1 := &device.Request{Op: device.Flush}
			f1.Done = func(*device.Request) {
				if !acked2 {
					t.Log("second write not acknowledged yet; schedule is of no use")
				}
				f2 := &device.Request{Op: device.Flush, Done: func(q *device.Request) { second = true }}
				c.f.Submit(f2)
			}
			c.f.Submit(f1) // its round begins now
		}
		c.f.Submit(w1)
	})
	// A second write, acknowledged while the sync round of f1 is under way.
	for _, p := range r.peers {
		p.drop = func(q *torus.Request) error { return nil }
	}
	w2started := false
	for i := 0; i < 2000 && !second; i++ {
		r.v.RunFor(5 * time.Microsecond)
		s := c.f.Stats()
		if s.Syncs == 1 && !w2started {
			w2started = true
			w2 := &device.Request{Op: device.Write, Off: 4096, Len: 4096, Data: pg(2, 1)}
			w2.Done = func(*device.Request) { acked2 = true }
			c.l.Post(func() { c.f.Submit(w2) })
		}
	}
	r.v.Run(func() bool { return second }, time.Minute)
	if !second {
		t.Fatalf("the second flush never completes: %+v (acked2 %v)", c.f.Stats(), acked2)
	}
}

// R2: a write whose read-modify-write is under way when Close is called is acknowledged, FUA and all, and lost.
func TestCloseDuringRMW(t *testing.T) {
	r := newRig(t, 1, 3, 2, 8<<20)
	c := r.attach(nil)
	c.must(&device.Request{Op: device.Write, Data: pg(1, 16)})
	c.detach()
	c = r.attach(nil)
	// an etcd that takes 5 ms
	r.v.SetOffloadDelay(func(*rand.Rand) time.Duration { return 5 * time.Millisecond })
	q := &device.Request{Op: device.Write, Off: 512, Len: 512, Data: bytes.Repeat([]byte{9}, 512), Flags: device.FUA}
	var acked, closed bool
	var werr, cerr error
	q.Done = func(q *device.Request) { acked, werr = true, q.Err }
	c.l.Post(func() {
		c.f.Submit(q)
		c.f.Close(func(err error) { closed, cerr = true, err })
	})
	r.v.Run(func() bool { return acked && closed }, time.Minute)
	t.Logf("write done %v err %v; close done %v err %v", acked, werr, closed, cerr)
	c = r.attach(nil)
	b := make([]byte, 512)
	c.must(&device.Request{Op: device.Read, Off: 512, Data: b})
	if acked && werr == nil && b[0] != 9 {
		t.Fatal("D1: a write acknowledged with FUA is lost by an orderly close")
	}
}

// R4: filling a fresh volume never evicts a leaf.
func TestLeavesUnbounded(t *testing.T) {
	const n = 6000
	r := newRig(t, 1, 3, 2, n*2<<20)
	c := r.attach(func(c *file.Config) { c.MapBytes = 1 })
	for i := range n {
		c.must(&device.Request{Op: device.Write, Off: uint64(i) * 2 << 20, Len: 4096, Data: pg(1, 1)})
	}
	c.must(&device.Request{Op: device.Flush})
	r.v.RunFor(time.Minute)
	if s := c.f.Stats(); s.Leaves > 1024+512 {
		t.Fatalf("%d leaves in memory (%d dirty), bound is 1024", s.Leaves, s.DirtyLeaves)
	}
}

func mdsAway(c *temp.Client, away *bool) {
	c.SetFaults(func(ctx context.Context, method string) temp.Fault {
		if *away {
			return temp.FailBefore
		}
		return temp.None
	})
}

// R5: while the rest of the map's memory is dirty or frozen, a read that spans two cold leaves never ends.
func TestReadThrash(t *testing.T) {
	const n = 3000
	r := newRig(t, 1, 3, 2, n*2<<20)
	tune := func(c *file.Config) { c.MapBytes = 1 }
	c := r.attach(tune)
	for i := range n {
		c.must(&device.Request{Op: device.Write, Off: uint64(i) * 2 << 20, Len: 4096, Data: pg(1, 1)})
	}
	c.must(&device.Request{Op: device.Write, Off: 2900*2<<20 - 4096, Len: 8192, Data: pg(7, 2)})
	c.detach()
	c = r.attach(tune)
	away := true
	mdsAway(c.mds, &away)
	for i := 0; i < 1100; i += 50 {
		left := 50
		c.l.Post(func() {
			for k := range 50 {
				q := &device.Request{Op: device.Write, Off: uint64(i+k) * 2 << 20, Len: 4096, Data: pg(2, 1)}
				q.Done = func(*device.Request) { left-- }
				c.f.Submit(q)
			}
		})
		if !r.v.Run(func() bool { return left == 0 }, time.Minute) {
			t.Fatalf("writes stall: %+v", c.f.Stats())
		}
		c.must(&device.Request{Op: device.Flush})
		r.v.RunFor(20 * time.Millisecond)
	}
	c.must(&device.Request{Op: device.Flush})
	r.v.RunFor(time.Second)
	reads := 0
	for _, p := range r.peers {
		p.drop = func(q *torus.Request) error {
			if q.Op == torus.OpRead {
				reads++
			}
			return nil
		}
	}
	r.v.RunFor(10 * time.Second)
	t.Logf("%+v", c.f.Stats())
	if s := c.f.Stats(); s.Applied < s.Flushed || reads > 100 {
		t.Errorf("nobody asks for anything, yet %d reads in 10 s, applied %d of %d", reads, s.Applied, s.Flushed)
	}
	b := make([]byte, 8192)
	q := &device.Request{Op: device.Read, Off: 2900*2<<20 - 4096, Len: 8192, Data: b}
	finished := false
	q.Done = func(*device.Request) { finished = true }
	c.l.Post(func() { c.f.Submit(q) })
	if !r.v.Run(func() bool { return finished }, 2*time.Second) {
		t.Fatalf("a read of two pages is not done after 2 s with every peer up: %+v", c.f.Stats())
	}
}

// R6: close with the MDS away: closePatience says 10 s.
func TestCloseMDSAway(t *testing.T) {
	r := newRig(t, 1, 3, 2, 8<<20)
	c := r.attach(nil)
	c.must(&device.Request{Op: device.Write, Data: pg(1, 1), Flags: device.FUA})
	away := true
	mdsAway(c.mds, &away)
	closed := false
	c.l.Post(func() { c.f.Close(func(error) { closed = true }) })
	if !r.v.Run(func() bool { return closed }, 5*time.Minute) {
		t.Fatal("close still not done after 5 min without the MDS")
	}
}

// R7: the distributor closed before a file: stop panics.
func TestDistClosedFirst(t *testing.T) {
	r := newRig(t, 1, 3, 2, 8<<20)
	c := r.attach(nil)
	defer func() {
		if p := recover(); p != nil {
			t.Fatalf("panic: %v", p)
		}
	}()
	c.l.Post(func() {
		c.d.Close()
		c.f.Abandon(device.ErrShutdown)
	})
	r.v.RunFor(time.Second)
}

// R8: a read of a file that has failed for good, whose peers are away.
func TestReadOnFailedFile(t *testing.T) {
	r := newRig(t, 1, 3, 2, 8<<20)
	c := r.attach(nil)
	c.must(&device.Request{Op: device.Write, Data: pg(1, 4), Flags: device.FUA})
	r.v.RunFor(2 * time.Second)
	for _, p := range r.peers {
		p.crash(false)
	}
	rd := &device.Request{Op: device.Read, Len: 4096, Data: make([]byte, 4096)}
	rmw := &device.Request{Op: device.Write, Off: 4096 + 512, Len: 512, Data: make([]byte, 512)}
	n := 0
	rd.Done = func(q *device.Request) { n++ }
	rmw.Done = func(q *device.Request) { n++ }
	c.l.Post(func() { c.f.Submit(rd); c.f.Submit(rmw) })
	r.v.RunFor(time.Second)
	c.l.Post(func() { c.f.Observe(torus.VolumeState{VolumeState: &models.VolumeState{Epoch: 99}}) })
	if !r.v.Run(func() bool { return n == 2 }, 10*time.Minute) {
		t.Fatalf("file failed with %v; %d of 2 requests done after 10 min", c.f.Err(), n)
	}
}

// R9: a fenced file is kept in memory by the distributor's list of watchers.
func TestFencedFileLeaks(t *testing.T) {
	r := newRig(t, 1, 3, 2, 8<<20)
	c := r.attach(nil)
	c.must(&device.Request{Op: device.Write, Data: pg(1, 4), Flags: device.FUA})
	c.l.Post(func() { c.f.Observe(torus.VolumeState{VolumeState: &models.VolumeState{Epoch: 99}}) })
	r.v.RunFor(time.Minute)
	w := weak.Make(c.f)
	c.f = nil
	for range 5 {
		runtime.GC()
	}
	r.v.RunFor(time.Minute)
	for range 5 {
		runtime.GC()
	}
	leaked := w.Value() != nil
	runtime.KeepAlive(c.d)
	if leaked {
		t.Fatal("the failed file is still reachable")
	}
}

// R10: extents beyond the volume, or empty, in a record that a peer serves.
func TestHostileExtents(t *testing.T) {
	for name, x := range map[string]record.Extent{
		"beyond":  {Page: 1 << 40, Count: 1, Kind: record.Trim},
		"empty":   {Page: 0, Count: 0, Kind: record.Trim},
		"unknown": {Page: 0, Count: 1, Kind: 4},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 1, 3, 2, 8<<20)
			c := r.attach(nil)
			c.must(&device.Request{Op: device.Write, Data: pg(5, 1)})
			seq := c.f.Stats().Acked
			c.kill()
			for _, p := range r.peers {
				for ref, b := range p.blocks {
					if ref.Type == torus.TypeBlock {
						h := record.Header{Ref: ref, Seq: seq + 1, Offset: uint32(len(b.data)), Extents: []record.Extent{x}}
						page := make([]byte, 4096)
						h.Encode(page)
						b.data = append(b.data, page...)
					}
				}
			}
			defer func() {
				if p := recover(); p != nil {
					t.Fatalf("panic: %v", p)
				}
			}()
			c = r.client(nil)
			r.v.Run(func() bool { return c.done }, time.Minute)
			t.Logf("done %v, err %v", c.done, c.err)
			if c.f != nil {
				b := make([]byte, 4096)
				c.must(&device.Request{Op: device.Read, Data: b})
				if b[0] != 5 {
					t.Fatal("an unknown kind of extent was taken for a trim")
				}
			}
		})
	}
}

// R11: with three copies on three peers and a connection that refuses at once while it is said to be up (tdp between fail and
// Closed; up to 2 s after refuse), the whole window is burned in one turn, and the next, and the next.
func TestBurnsWindow(t *testing.T) {
	r := newRig(t, 1, 3, 3, 8<<20)
	c := r.attach(nil)
	c.must(&device.Request{Op: device.Write, Data: pg(1, 1), Flags: device.FUA})
	p := r.peers[1]
	for _, x := range p.conns {
		if x.l == c.l {
			x.open = false // Submit fails at once; down is called 2 s later
			x := x
			c.l.After(2*time.Second, func() { x.down(torus.ErrBlockUnavailable) })
		}
	}
	q := &device.Request{Op: device.Write, Data: pg(2, 1), Len: 4096}
	q.Done = func(*device.Request) {}
	c.l.Post(func() { c.f.Submit(q) })
	r.v.RunFor(30 * time.Millisecond)
	st, err := c.mds.VolumeState(context.Background(), torus.VolumeID(r.vol.Id))
	if err != nil {
		t.Fatal(err)
	}
	hi := st.Open.Spans[len(st.Open.Spans)-1].Hi
	t.Logf("rolls %d, window to %d", c.f.Stats().Rolls, hi)
	if hi > 128 {
		t.Fatalf("one failed peer burned %d indexes in 30 ms, %d rolls", hi, c.f.Stats().Rolls)
	}
}

// R12: recovery reads what it copies from the longest holder for ever, although the rest would do.
func TestAttachHolderDies(t *testing.T) {
	for seed := range uint64(1) {
		r := newRig(t, seed, 3, 2, 8<<20)
		c := r.attach(nil)
		c.must(&device.Request{Op: device.Write, Data: pg(1, 1)})
		// One more record reaches one replica only.
		var only *fakePeer
		for _, p := range r.peers {
			p.drop = func(q *torus.Request) error {
				if q.Op == torus.OpAppend && q.Ref.Type == torus.TypeBlock {
					if only == nil {
						only = p
					}
					if only != p {
						c.kill()
						return torus.ErrGap
					}
				}
				return nil
			}
		}
		q := &device.Request{Op: device.Write, Data: pg(2, 1), Len: 4096}
		q.Done = func(*device.Request) {}
		c.l.Post(func() { c.f.Submit(q) })
		r.v.RunFor(10 * time.Millisecond)
		if !c.l.Dead() {
			c.kill()
		}
		for _, p := range r.peers {
			p.drop = nil
		}
		// It answers the fence and the scan, and dies for good when it is asked for the bytes.
		only.drop = func(q *torus.Request) error {
			if q.Op == torus.OpRead {
				r.v.At(0, func() { only.crash(false) })
				return torus.ErrBlockUnavailable
			}
			return nil
		}
		c = r.client(nil)
		if !r.v.Run(func() bool { return c.done }, 10*time.Minute) {
			t.Fatal("attach waits for ever for a peer without which it could begin again")
		}
		if c.err != nil {
			t.Fatal(c.err)
		}
	}
}

// R13: a flush in a cluster that has become full after a roll.
func TestFlushWhenFull(t *testing.T) {
	r := newRig(t, 1, 3, 2, 8<<20)
	c := r.attach(nil)
	c.must(&device.Request{Op: device.Write, Data: pg(1, 1)})
	for _, p := range r.peers {
		p.full = true
	}
	// the block the write lies in loses a replica for a moment; nothing else can be opened
	fail := true
	for _, p := range r.peers {
		p.drop = func(q *torus.Request) error {
			if q.Op == torus.OpSync && fail {
				fail = false
				return torus.ErrGap
			}
			return nil
		}
	}
	finished := false
	q := &device.Request{Op: device.Flush, Done: func(*device.Request) { finished = true }}
	c.l.Post(func() { c.f.Submit(q) })
	if !r.v.Run(func() bool { return finished }, 10*time.Minute) {
		t.Fatalf("flush not done after 10 min: %+v; a write gets %v", c.f.Stats(), c.do(&device.Request{Op: device.Write, Data: pg(1, 1)}))
	}
	t.Log(q.Err)
}

// R14: a close right after a peer of the metadata block went away.
func TestCloseAfterPeerLoss(t *testing.T) {
	r := newRig(t, 3, 4, 2, 8<<20)
	c := r.attach(func(c *file.Config) { c.CheckpointEvery = 20 * time.Second })
	c.must(&device.Request{Op: device.Write, Data: pg(1, 1), Flags: device.FUA})
	r.v.RunFor(25 * time.Second) // a checkpoint
	if c.f.Stats().Checkpoints == 0 {
		t.Fatal("no checkpoint")
	}
	var meta torus.BlockRef
	for _, p := range r.peers {
		for ref := range p.blocks {
			if ref.Type == torus.TypeINode {
				meta = ref
			}
		}
	}
	c.must(&device.Request{Op: device.Write, Data: pg(2, 1), Flags: device.FUA})
	for _, p := range r.peers {
		if p.blocks[meta] != nil {
			p.crash(false)
			break
		}
	}
	t.Log("crashed holder of ", meta)
	c.must(&device.Request{Op: device.Write, Data: pg(3, 1), Flags: device.FUA})
	var err error
	closed := false
	c.l.Post(func() { c.f.Close(func(e error) { closed, err = true, e }) })
	r.v.Run(func() bool { return closed }, time.Minute)
	if err != nil {
		t.Fatalf("closed %v, with three of four peers up: %v", closed, err)
	}
}

var _ = errors.Is

package file_test

import (
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
)

const (
	paceSize  = 16 << 20
	pacePages = paceSize / 4096
)

// flood writes single pages at random, so many at a time, until stop is called, which waits for them.
func (c *client) flood(depth int) (stop func()) {
	busy, stopped := 0, false
	data := make([]byte, 4096)
	var write func()
	write = func() {
		busy++
		c.f.Submit(&device.Request{Op: device.Write, Off: c.r.rng.Uint64N(pacePages) * 4096, Data: data, Len: 4096, Done: func(q *device.Request) {
			busy--
			if q.Err != nil {
				c.r.t.Error(q.Err)
			} else if !stopped {
				write()
			}
		}})
	}
	c.l.Post(func() {
		for range depth {
			write()
		}
	})
	return func() {
		c.r.t.Helper()
		stopped = true
		if !c.r.v.Run(func() bool { return busy == 0 }, time.Minute) {
			c.r.t.Fatalf("%d writes are never done", busy)
		}
	}
}

// untilCompaction overwrites pages until compaction reads, slowly enough that it has no pace.
func (c *client) untilCompaction(reads *int) {
	c.r.t.Helper()
	for i := 0; *reads == 0; i++ {
		if i == 100 {
			c.r.t.Fatal("compaction does not begin")
		}
		c.overwrite(10, 10*time.Millisecond, func() uint64 { return c.r.rng.Uint64N(pacePages) }, func() {})
	}
}

// Compaction that began while there was time, and then hangs, has those who write fast wait as well.
func TestPaceWhileCompactionHangs(t *testing.T) {
	const most = 48 << 20
	r, c := compacting(t, paceSize, pacePages, 2<<20)
	hangs, reads := true, 0
	for _, p := range r.peers {
		p.hold = func(q *torus.Request) bool {
			if q.Op == torus.OpRead && hangs {
				reads++
				return true
			}
			return false
		}
	}
	c.untilCompaction(&reads)
	if c.f.Pace() > 0 {
		t.Fatal("there is a pace already")
	}
	before := c.f.Stats()
	stop := c.flood(64)
	r.v.RunFor(3 * time.Second)
	if c.f.Pace() == 0 {
		t.Error("there is still no pace")
	}
	s := c.f.Stats()
	t.Logf("%d MiB were written while compaction hung, %d waited", (s.LogBytes-before.LogBytes)>>20, s.Paced-before.Paced)
	if s.LogBytes-before.LogBytes > most {
		t.Errorf("more than %d MiB were written while compaction hung", most>>20)
	}
	hangs = false
	stop()
	c.detach()
}

// Compaction goes on with what a second replica answers when the first does not.
func TestCompactionBesideASlowReplica(t *testing.T) {
	r, c := compacting(t, paceSize, pacePages, 2<<20)
	slow, reads := r.peers[0], 0
	slow.hold = func(q *torus.Request) bool {
		if q.Op == torus.OpRead {
			reads++
		}
		return q.Op == torus.OpRead
	}
	before := c.f.Stats().MovedBytes
	c.overwrite(pacePages/32, 10*time.Millisecond, func() uint64 { return r.rng.Uint64N(pacePages) }, func() {})
	r.v.RunFor(time.Second)
	if reads == 0 {
		t.Fatal("the slow replica was asked for nothing")
	}
	if moved := c.f.Stats().MovedBytes - before; moved < paceSize/8 {
		t.Errorf("%d bytes were moved while one of %d replicas was slow", moved, len(r.peers))
	}
	slow.hold = nil
	c.detach()
}

// While there is a pace, blocks are read as others are moved.
func TestCompactionReadsAhead(t *testing.T) {
	r, c := compacting(t, paceSize, pacePages, 2<<20)
	since := map[*torus.Request]time.Duration{}
	ahead := 0
	for _, p := range r.peers {
		p.hold = func(q *torus.Request) bool {
			switch {
			case q.Op == torus.OpRead && q.Ref.Type != torus.TypeINode && len(since) > 0:
				ahead++
			case q.Op == torus.OpAppend && q.Ref.Type == torus.TypeMoved: // moving takes its time
				if since[q] == 0 {
					since[q] = r.v.Now()
				}
				if r.v.Now()-since[q] < 20*time.Millisecond {
					return true
				}
				delete(since, q)
			}
			return false
		}
	}
	stop := c.flood(32)
	r.v.RunFor(3 * time.Second)
	stop()
	if ahead == 0 {
		t.Error("nothing was read while something was being moved")
	}
	c.detach()
}

// Compaction that cannot write what it moves is not tried again at every turn.
func TestCompactionThatFails(t *testing.T) {
	r, c := compacting(t, paceSize, pacePages, 2<<20)
	reads := 0
	for _, p := range r.peers {
		p.drop = func(q *torus.Request) error {
			switch {
			case q.Op == torus.OpRead:
				reads += int(q.Len)
			case q.Op == torus.OpAppend && q.Ref.Type == torus.TypeMoved:
				return torus.ErrAgain
			}
			return nil
		}
	}
	stop := c.flood(64)
	r.v.RunFor(3 * time.Second)
	log := c.f.Stats().LogBytes
	t.Logf("%d MiB were written, %d MiB read in vain", log>>20, reads>>20)
	if reads == 0 || uint64(reads) > log/8 {
		t.Error("compaction is tried too often, or never")
	}
	for _, p := range r.peers {
		p.drop = nil
	}
	stop()
	r.v.RunFor(2 * time.Second)
	c.detach()
}

// Whoever detaches a volume waits for the blocks that are being read, and not for the next ones.
func TestCloseWhileCompactionGetsNowhere(t *testing.T) {
	for off := time.Duration(0); off < 6*time.Second; off += 500 * time.Millisecond {
		r, c := compacting(t, paceSize, pacePages, 2<<20)
		fails, reads := false, 0
		for _, p := range r.peers {
			p.drop = func(q *torus.Request) error {
				if q.Op == torus.OpRead {
					reads++
					if fails {
						return torus.ErrBlockUnavailable
					}
				}
				return nil
			}
		}
		c.untilCompaction(&reads)
		fails = true
		stop := c.flood(64)
		r.v.RunFor(off + time.Second)
		stop()
		began := r.v.Now()
		c.detach()
		if took := r.v.Now() - began; took > 6*time.Second {
			t.Errorf("%v after reads began to fail it took %v", off, took)
		}
	}
}

// There is a pace while blocks are emptied, and neither for the sake of the map nor when there is nothing to be emptied.
func TestNoPaceWithoutVictims(t *testing.T) {
	r := newRig(t, 1, 3, 2, 800<<20)
	c := r.attach(func(cfg *file.Config) { cfg.CheckpointEvery, cfg.Utilisation = time.Second, -1 })
	change := func(page uint64) {
		c.must(&device.Request{Op: device.WriteZeroes, Flags: device.NoHole, Off: page * 4096, Len: 4096})
	}
	for i := range uint64(260) { // metadata blocks that are hardly of use any more, and no data
		change(i * 512)
		for k := range uint64(10) {
			change(k*512 + 1)
		}
		r.v.RunFor(1100 * time.Millisecond)
	}
	c.detach()
	c = r.attach(nil)
	hold, held := true, 0
	for _, p := range r.peers {
		p.hold = func(q *torus.Request) bool {
			if q.Op == torus.OpRead && q.Ref.Type == torus.TypeINode && hold {
				held++
				return true
			}
			return false
		}
	}
	r.v.RunFor(1500 * time.Millisecond)
	if !c.f.Compacting() || held == 0 {
		t.Fatal("nobody empties metadata blocks")
	}
	c.must(&device.Request{Op: device.Write, Off: 100 << 20, Data: pg(1, 1), Len: 4096})
	r.v.RunFor(200 * time.Millisecond)
	if c.f.Pace() > 0 {
		t.Error("there is a pace while nothing is moved")
	}
	hold = false
	r.v.RunFor(10 * time.Second)
	if c.f.Pace() > 0 {
		t.Error("there is still a pace when all is done")
	}
	c.detach()
}

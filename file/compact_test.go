package file_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
)

// overwrite writes batches of 32 pages at places that draw chooses, one every so often, and looks at the volume now and then.
func (c *client) overwrite(batches int, every time.Duration, draw func() uint64, look func()) {
	c.r.t.Helper()
	data := make([]byte, 4096)
	busy := 0
	for i := range batches {
		c.l.Post(func() {
			for range 32 {
				busy++
				q := &device.Request{Op: device.Write, Off: draw() * 4096, Data: data, Len: 4096}
				q.Done = func(q *device.Request) {
					if q.Err != nil {
						c.r.t.Error(q.Err)
					}
					busy--
				}
				c.f.Submit(q)
			}
		})
		c.r.v.RunFor(every)
		if i%100 == 99 {
			look()
		}
	}
	if !c.r.v.Run(func() bool { return busy == 0 }, time.Minute) {
		c.r.t.Fatalf("%d writes are never done", busy)
	}
}

// compacting attaches a volume that is compacted to 0.7, and fills its first pages once.
func compacting(t *testing.T, size uint64, pages int, checkpoint uint64) (*rig, *client) {
	t.Helper()
	r := newRig(t, 1, 4, 2, size)
	c := r.attach(func(cfg *file.Config) {
		r.tune()(cfg)
		cfg.CheckpointBytes, cfg.RetainBytes = checkpoint, 4<<20 // else all of so small a volume is flushed, and counted as dead, at once
		cfg.Utilisation = 0.7
	})
	next := uint64(0)
	c.overwrite(pages/32, time.Millisecond, func() uint64 { next++; return next - 1 }, func() {})
	return r, c
}

// What is stored stays near what is alive however often a volume is overwritten, and that costs no more than the rule by which victims are
// chosen promises.
func TestCompactionKeepsUp(t *testing.T) {
	const (
		size   = 48 << 20
		pages  = size / 4096
		rounds = 6
	)
	for _, hot := range []bool{false, true} {
		t.Run(fmt.Sprintf("80-20=%v", hot), func(t *testing.T) {
			r, c := compacting(t, size, pages, 2<<20)
			if s := c.f.Stats(); s.LiveBytes != size {
				r.v.RunFor(10 * time.Second)
			}
			before := c.f.Stats()
			const slack = (8 + 8 + 32) * rigBlock // of compaction, what waits for a checkpoint, and a window
			c.overwrite(rounds*pages/32, 10*time.Millisecond, func() uint64 {
				if hot && r.rng.IntN(5) > 0 {
					return r.rng.Uint64N(pages / 5)
				}
				return r.rng.Uint64N(pages)
			}, func() {
				if s := c.f.Stats(); float64(s.StoredBytes) > 1.5*float64(s.LiveBytes)+slack {
					t.Fatalf("%d bytes are stored for %d alive", s.StoredBytes, s.LiveBytes)
				}
			})
			s := c.f.Stats()
			amplified := float64(s.LogBytes+s.MovedBytes-before.LogBytes-before.MovedBytes) / (rounds * size)
			t.Logf("%.2f bytes written for each, %.2f of them moved; stored %.2f times what is alive", amplified, float64(s.MovedBytes-before.MovedBytes)/(rounds*size), float64(s.StoredBytes)/float64(s.LiveBytes))
			most := 2.0
			if hot {
				most = 1.9
			}
			if amplified > most {
				t.Errorf("%.2f bytes are written for each, more than %.1f", amplified, most)
			}
			r.v.RunFor(2 * time.Second)
			c.detach()
		})
	}
}

// A block that is damaged in every copy, or out of reach, stays where it is, and the others are compacted nevertheless; once it is mended
// it is compacted as well.
func TestCompactionLeavesTheUnreadable(t *testing.T) {
	const (
		size  = 16 << 20
		pages = size / 4096
		kept  = rigBlock / 4096
	)
	for name, op := range map[string]torus.Op{"scan": torus.OpScan, "read": torus.OpRead} {
		t.Run(name, func(t *testing.T) {
			r, c := compacting(t, size, pages, 1<<20)
			r.v.RunFor(time.Second)
			bad := map[torus.BlockRef]bool{}
			for _, p := range r.peers {
				for ref := range p.blocks {
					if ref.Type == torus.TypeBlock && ref.Index < 2 {
						bad[ref] = true
					}
				}
				p.drop = func(q *torus.Request) error {
					if q.Op == op && bad[q.Ref] {
						return torus.ErrCorrupt
					}
					return nil
				}
			}
			if len(bad) == 0 {
				t.Fatal("no block to damage")
			}
			c.overwrite(6*pages/32, 10*time.Millisecond, func() uint64 {
				p := r.rng.Uint64N(pages)
				if p < 2*kept && p%4 == 0 {
					p++ // the others of the bad blocks stay alive
				}
				return p
			}, func() {
				const slack = (8 + 8 + 32) * rigBlock // of compaction, what waits for a checkpoint, and a window
				if s := c.f.Stats(); float64(s.StoredBytes) > 1.5*float64(s.LiveBytes)+slack {
					t.Fatalf("%d bytes are stored for %d alive", s.StoredBytes, s.LiveBytes)
				}
			})
			left := func() (n int) {
				for ref := range bad {
					for _, p := range r.peers {
						if p.blocks[ref] != nil {
							n++
						}
					}
				}
				return n
			}
			if left() == 0 {
				t.Fatal("what could not be read was deleted")
			}
			for _, p := range r.peers {
				p.drop = nil
			}
			for i := 0; left() > 0; i++ { // it is among those that pay most, but nothing happens while enough is alive
				if i == 10 {
					t.Fatal("what can be read again is not compacted")
				}
				r.v.RunFor(time.Minute)
				c.overwrite(pages/32, 10*time.Millisecond, func() uint64 { return 2*kept + r.rng.Uint64N(pages-2*kept) }, func() {})
			}
			c.detach()
		})
	}
}

// Whoever writes as fast as possible waits for compaction as much as it takes to stay near what is alive, and never for long; and when compaction
// gets nowhere, as the peers of what it would read are away, writes go on.
func TestCompactionSetsThePace(t *testing.T) {
	const (
		size  = 32 << 20
		pages = size / 4096
		slack = (8+32)*rigBlock + 32<<20 // of compaction, a window, and what comes until the next checkpoint
	)
	for _, stuck := range []bool{false, true} {
		t.Run(fmt.Sprintf("stuck=%v", stuck), func(t *testing.T) {
			r, c := compacting(t, 2*size, pages, 2<<20) // of which half is never written
			for _, p := range r.peers {                 // reading is slow, and so is compaction
				since := map[*torus.Request]time.Duration{}
				p.hold = func(q *torus.Request) bool {
					if q.Op != torus.OpRead {
						return false
					}
					if since[q] == 0 {
						since[q] = r.v.Now()
					}
					if r.v.Now()-since[q] < 20*time.Millisecond {
						return true
					}
					delete(since, q)
					return false
				}
			}
			if stuck {
				for _, p := range r.peers {
					p.drop = func(q *torus.Request) error {
						if q.Op == torus.OpRead || q.Op == torus.OpScan {
							return torus.ErrBlockUnavailable
						}
						return nil
					}
				}
			}
			left := 5 * pages
			busy := 0
			var longest time.Duration
			most := 0.0
			data := make([]byte, 4096)
			var write func()
			write = func() {
				began := c.l.Now()
				left--
				busy++
				q := &device.Request{Op: device.Write, Off: r.rng.Uint64N(pages) * 4096, Data: data, Len: 4096}
				q.Done = func(q *device.Request) {
					busy--
					if q.Err != nil {
						t.Error(q.Err)
						return
					}
					longest = max(longest, c.l.Now()-began)
					if left > 0 {
						write()
					}
				}
				c.f.Submit(q)
			}
			c.l.Post(func() {
				for range 2 {
					write()
				}
			})
			for !t.Failed() && (left > 0 || busy > 0) {
				c.l.Post(func() { // it costs nothing to store, and holds nobody up, however large
					c.f.Submit(&device.Request{Op: device.Trim, Off: size, Len: size, Done: func(*device.Request) {}})
				})
				r.v.RunFor(10 * time.Millisecond)
				if s := c.f.Stats(); s.LiveBytes == size {
					most = max(most, (float64(s.StoredBytes)-slack)/float64(s.LiveBytes))
				}
			}
			t.Logf("stored at most %.2f times what is alive and %d MiB; the longest write took %v, all %v", most, slack>>20, longest, r.v.Now())
			if most > 2.2 && !stuck {
				t.Error("compaction does not keep up")
			}
			if longest > 1100*time.Millisecond || longest > 200*time.Millisecond && !stuck {
				t.Error("somebody waited for long")
			}
			for _, p := range r.peers {
				p.drop, p.hold = nil, nil
			}
			c.detach()
		})
	}
}

package file_test

import (
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/sim"
)

// Schedules of package sim, against the rig's peers: without network and disk, faults fall closer to what the log decides. Writers
// with many requests in flight, peers that crash with and without power, writers killed and replaced. After every attach the
// image is compared with the history: C1, D1, and W1 as long as no power was lost since. One seed again:
//
//	TORUS_SEED=n go test ./file -run TestSchedules -v

// load is what a schedule of the rig is made of.
type load struct {
	seeds         uint64
	pages, stride uint64
	most          int // steps between two attaches
	faulty        bool
}

// Pages that lie together.
func TestSchedules(t *testing.T) {
	schedules(t, load{seeds: 60, pages: 700, stride: 1, most: 200})
}

// Each page in a leaf of its own, more leaves than the map keeps, and a metadata service that fails now and then.
func TestSparseSchedules(t *testing.T) {
	schedules(t, load{seeds: 30, pages: 2600, stride: 512, most: 900, faulty: true})
}

func schedules(t *testing.T, x load) {
	from, n := uint64(0), x.seeds
	if s := os.Getenv("TORUS_SEED"); s != "" {
		from, _ = strconv.ParseUint(s, 10, 64)
		n = 1
	}
	if s := os.Getenv("TORUS_SEEDS"); s != "" {
		n, _ = strconv.ParseUint(s, 10, 64)
	}
	for seed := from; seed < from+n; seed++ {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { x.play(t, seed) })
	}
}

func (x *load) play(t *testing.T, seed uint64) {
	r := newRig(t, seed, 3, 2, x.pages*x.stride*4096)
	h := sim.NewHistory(seed + 1)
	r.faulty = x.faulty
	tune := func(c *file.Config) {
		c.CheckpointBytes = uint64(64<<10 + r.rng.IntN(4<<20))
		c.RetainBytes = 128<<10 + r.rng.IntN(2<<20)
		c.CheckpointEvery = time.Duration(1+r.rng.IntN(20)) * time.Second
		c.MapBytes = 1
	}
	c := r.attach(tune)
	for round := range 6 {
		w := sim.NewWriter(h, c.f, c.l, r.rng, x.pages, x.stride)
		power := r.disturb(w, 20+r.rng.IntN(x.most))
		switch r.rng.IntN(5) {
		case 0: // detached in order
			for _, p := range r.peers {
				if !p.up {
					p.restart()
				}
			}
			if !r.v.Run(w.Idle, time.Minute) {
				t.Fatalf("writes are still not done: %+v", c.f.Stats())
			}
			c.detach()
		case 1: // power loss of everything, at the same time
			for _, p := range r.peers {
				if p.up {
					p.crash(true)
				}
			}
			c.kill()
			power = true
		case 2: // frozen, then taken over: must know that it is fenced, and never be acknowledged again (L1)
		default:
			c.kill()
		}
		// One peer may be away while the attach decides, and comes back later: what is promised must be elsewhere, too.
		away := r.rng.IntN(2 * len(r.peers))
		for i, p := range r.peers {
			if !p.up && i != away {
				p.restart()
			}
		}
		if away < len(r.peers) && r.peers[away].up {
			r.peers[away].crash(r.rng.IntN(2) == 0)
		}
		old := c
		c = r.attach(tune)
		atLeast := h.Acked()
		if power {
			atLeast = h.Flushed()
		}
		read := func(p uint64) ([]byte, error) {
			b := make([]byte, 4096)
			return b, c.do(&device.Request{Op: device.Read, Off: p * x.stride * 4096, Data: b})
		}
		if x.stride == 1 {
			image := make([]byte, x.pages*4096)
			c.must(&device.Request{Op: device.Read, Data: image})
			read = func(p uint64) ([]byte, error) { return image[p*4096:][:4096], nil }
		}
		n, err := h.Check(read, atLeast)
		if err == nil {
			err = h.Decide(n, read)
		}
		if err == nil {
			err = w.Err
		}
		if err != nil {
			t.Fatalf("round %d: %v (acked %d, flushed %d, written %d)", round, err, h.Acked(), h.Flushed(), h.Last())
		}
		w.Over = true
		if !old.l.Dead() && old.f.Err() == nil {
			// The old writer has been fenced; its next write must tell it.
			q := &device.Request{Op: device.Write, Len: 4096, Data: make([]byte, 4096)}
			finished := false
			q.Done = func(*device.Request) { finished = true }
			old.l.Post(func() { old.f.Submit(q) })
			if !r.v.Run(func() bool { return finished }, time.Minute) || q.Err == nil {
				t.Fatalf("L1: round %d: a fenced writer's write: done %v, err %v", round, finished, q.Err)
			}
			old.kill()
		}
		if w.Err != nil {
			t.Fatalf("round %d: %v", round, w.Err)
		}
		if away < len(r.peers) {
			r.peers[away].restart()
		}
	}
}

// disturb lets w write, with faults in between; it reports whether power was lost.
func (r *rig) disturb(w *sim.Writer, steps int) (power bool) {
	for i := 0; i < steps && w.File.Err() == nil; i++ {
		w.Step()
		r.v.RunFor(time.Duration(r.rng.IntN(300)) * time.Microsecond)
		if r.rng.IntN(15) != 0 {
			continue
		}
		p := r.peers[r.rng.IntN(len(r.peers))]
		up := 0
		for _, x := range r.peers {
			if x.up {
				up++
			}
		}
		switch {
		case !p.up:
			p.restart()
		case up < len(r.peers):
			// R-1 = 1 peer at a time, else power loss below could take both copies
			r.v.RunFor(time.Duration(r.rng.IntN(2000)) * time.Millisecond)
		case r.rng.IntN(3) == 0:
			p.crash(true)
			power = true
		case r.rng.IntN(2) == 0:
			p.crash(false)
		case r.rng.IntN(2) == 0:
			r.v.RunFor(time.Duration(r.rng.IntN(3)) * time.Second)
		default:
			r.v.RunFor(time.Duration(r.rng.IntN(20)) * time.Second)
		}
	}
	return power
}

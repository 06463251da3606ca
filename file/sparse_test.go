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

// TestSparseSchedules drives a writer with many requests in flight through random faults: peers that crash with and without
// power, that run full, that refuse; writers killed and replaced. After every attach the image is compared with the history: C1, D1, and
// W1 as long as no power was lost since. One seed again: TORUS_SEED=n go test ./file -run TestSparseSchedules -v
func TestSparseSchedules(t *testing.T) {
	from, n := uint64(0), uint64(30)
	if s := os.Getenv("TORUS_SEED"); s != "" {
		from, _ = strconv.ParseUint(s, 10, 64)
		n = 1
	}
	if s := os.Getenv("TORUS_SEEDS"); s != "" {
		n, _ = strconv.ParseUint(s, 10, 64)
	}
	for seed := from; seed < from+n; seed++ {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { sparse(t, seed) })
	}
}

const (
	sparsePages = 2600
	stride      = 512 // each page in a leaf of its own: more leaves than the map keeps
)

type sparseWriter struct {
	*client
	h        *sim.History
	inflight map[uint64]bool
	done     map[uint64]bool // acknowledged, out of order of submission
	frontier uint64
	flushing int
	power    bool // power was lost: W1 does not hold
	full     bool
}

func sparse(t *testing.T, seed uint64) {
	r := newRig(t, seed, 3, 2, sparsePages*stride*4096)
	h := sim.NewHistory(seed + 1)
	r.faulty = true
	tune := func(c *file.Config) {
		c.CheckpointBytes = uint64(64<<10 + r.rng.IntN(4<<20))
		c.RetainBytes = 128<<10 + r.rng.IntN(2<<20)
		c.CheckpointEvery = time.Duration(1+r.rng.IntN(20)) * time.Second
		c.MapBytes = 1
	}
	w := &sparseWriter{client: r.attach(tune), h: h}
	for round := range 6 {
		w.inflight, w.done, w.frontier, w.flushing = map[uint64]bool{}, map[uint64]bool{}, h.Len(), 0
		w.power = false
		w.run(20 + r.rng.IntN(900))
		switch r.rng.IntN(5) {
		case 0:
			w.drain()
			w.detach()
		case 1: // power loss of everything, at the same time
			for _, p := range r.peers {
				if p.up {
					p.crash(true)
				}
			}
			w.kill()
			w.power = true
		case 2: // frozen, then taken over: must know that it is fenced, and never be acknowledged again (L1)
		default:
			w.kill()
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
		old := w.client
		w.client = r.attach(tune)
		atLeast := h.Acked()
		if w.power {
			atLeast = h.Flushed()
		}
		n, err := h.Check(func(p uint64) ([]byte, error) {
			b := make([]byte, 4096)
			w.must(&device.Request{Op: device.Read, Off: p * 4096 * stride, Data: b})
			return b, nil
		}, atLeast)
		if err != nil {
			t.Fatalf("round %d: %v (acked %d, flushed %d, written %d)", round, err, h.Acked(), h.Flushed(), h.Len())
		}
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
		h.Decide(n)
		if away < len(r.peers) {
			r.peers[away].restart()
		}
	}
}

// run submits n writes with faults in between.
func (w *sparseWriter) run(n int) {
	r := w.r
	for i := 0; i < n && w.f.Err() == nil; i++ {
		page := uint64(r.rng.IntN(sparsePages))
		count := 1
		ok := page+uint64(count) <= sparsePages
		for k := range uint64(count) {
			ok = ok && !w.inflight[page+k]
		}
		if ok {
			w.submit(page, count)
		}
		if r.rng.IntN(10) == 0 {
			w.flushNow()
		}
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
			w.power = true
		case r.rng.IntN(2) == 0:
			p.crash(false)
		case r.rng.IntN(2) == 0:
			r.v.RunFor(time.Duration(r.rng.IntN(3)) * time.Second)
		default:
			r.v.RunFor(time.Duration(r.rng.IntN(20)) * time.Second)
		}
	}
	for _, p := range r.peers {
		p.full = false
	}
}

func (w *sparseWriter) submit(page uint64, count int) {
	b := make([]byte, count*4096)
	var ids []uint64
	for k := range count {
		ids = append(ids, w.h.Write(page+uint64(k), b[k*4096:][:4096], false))
		w.inflight[page+uint64(k)] = true
	}
	q := &device.Request{Op: device.Write, Off: page * 4096 * stride, Len: uint64(len(b)), Data: b}
	q.Done = func(q *device.Request) {
		for k, id := range ids {
			delete(w.inflight, page+uint64(k))
			if q.Err == nil {
				w.done[id] = true
			} else {
				w.full = true
			}
		}
		if w.full {
			return // a failed write may or may not be there: the frontier stays
		}
		for w.done[w.frontier+1] {
			delete(w.done, w.frontier+1)
			w.frontier++
		}
		w.h.Ack(w.frontier)
	}
	w.l.Post(func() { w.f.Submit(q) })
}

func (w *sparseWriter) flushNow() {
	q := &device.Request{Op: device.Flush}
	target := uint64(0)
	q.Done = func(q *device.Request) {
		if q.Err == nil {
			w.h.Flush(target)
		}
	}
	w.l.Post(func() {
		target = w.h.Acked()
		w.f.Submit(q)
	})
}

// drain waits until nothing is in flight.
func (w *sparseWriter) drain() {
	for _, p := range w.r.peers {
		if !p.up {
			p.restart()
		}
	}
	if !w.r.v.Run(func() bool { return len(w.inflight) == 0 }, time.Minute) {
		w.r.t.Fatalf("%d writes are still not done: %+v", len(w.inflight), w.f.Stats())
	}
}

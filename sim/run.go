package sim

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/models"
)

// pages is the size of a simulated volume.
const pages = 700

// Run is one seeded schedule: a volume on three peers with two copies, a writer with many requests in flight, and
// faults: peers killed, losing power, stopped, cut off; writers killed, frozen and replaced. After every attach the volume is
// compared with its history: C1, D1, W1 (unless power was lost), L1.
type Run struct {
	*Cluster
	rng      *rand.Rand
	vol      *models.Volume
	h        *History
	w        *Client
	f        *file.File
	n        int // of clients made
	inflight map[uint64]bool
	done     map[uint64]bool
	frontier uint64
	power    bool
	Rounds   int // attaches that were checked
}

// Play runs the schedule of a seed; the error says what was violated.
func Play(seed uint64, rounds int, log *slog.Logger) (*Run, error) {
	c, err := New(seed, Options{Peers: 3, Replication: 2, BlockSize: 256 << 10, PeerBytes: 64 << 20, Log: log})
	if err != nil {
		return nil, err
	}
	defer c.V.Close()
	r := &Run{Cluster: c, rng: rand.New(rand.NewPCG(seed, 2)), h: NewHistory(seed + 1)}
	if r.vol, err = c.CreateVolume("v", pages*PageSize); err != nil {
		return r, err
	}
	if err := r.attach(); err != nil {
		return r, err
	}
	for round := range rounds {
		if err := r.round(); err != nil {
			return r, fmt.Errorf("round %d at %v: %w (acked %d, flushed %d, written %d)", round, c.V.Now(), err, r.h.Acked(), r.h.Flushed(), r.h.Len())
		}
	}
	return r, nil
}

func (r *Run) tune(c *file.Config) {
	c.CheckpointBytes = uint64(64<<10 + r.rng.IntN(4<<20))
	c.RetainBytes = 128<<10 + r.rng.IntN(2<<20)
	c.CheckpointEvery = time.Duration(1+r.rng.IntN(20)) * time.Second
	c.MapBytes = 1
}

func (r *Run) attach() error {
	r.n++
	r.w, r.f = r.NewClient(fmt.Sprintf("client%d", r.n)), nil
	var failed error
	over := false
	r.w.Attach(r.vol, r.tune, func(f *file.File, err error) { r.f, failed, over = f, err, true })
	if !r.V.Run(func() bool { return over }, 2*time.Minute) {
		return fmt.Errorf("attach: %w", errStuck)
	}
	return failed
}

func (r *Run) round() error {
	r.inflight, r.done, r.frontier, r.power = map[uint64]bool{}, map[uint64]bool{}, r.h.Len(), false
	if err := r.load(20 + r.rng.IntN(150)); err != nil {
		return err
	}
	frozen := false
	switch r.rng.IntN(5) {
	case 0: // detached in order
		if err := r.startAll(-1); err != nil {
			return err
		}
		over := false
		r.w.Loop.Post(func() { r.f.Close(func(error) { over = true }) })
		if !r.V.Run(func() bool { return over }, time.Minute) {
			return fmt.Errorf("close: %w", errStuck)
		}
		r.w.Kill()
	case 1: // power loss of everything at once
		for _, p := range r.Peers {
			p.PowerLoss()
		}
		r.w.Kill()
		r.power = true
	case 2: // taken over while it runs
		frozen = true
	default:
		r.w.Kill()
	}
	r.Net.HealAll()
	// One peer may be away while the attach decides, and comes back later.
	away := r.rng.IntN(2 * len(r.Peers))
	if err := r.startAll(away); err != nil {
		return err
	}
	if away < len(r.Peers) && r.Peers[away].Up {
		r.stop(r.Peers[away])
	}
	old, oldFile := r.w, r.f
	if err := r.attach(); err != nil {
		return err
	}
	if err := r.check(); err != nil {
		return err
	}
	if frozen && oldFile.Err() == nil {
		err := old.Do(oldFile, &device.Request{Op: device.Write, Len: PageSize, Data: make([]byte, PageSize)}, time.Minute)
		if err == nil || errors.Is(err, errStuck) {
			return fmt.Errorf("L1: a write of epoch %d under epoch %d: %v", oldFile.Epoch(), r.f.Epoch(), err)
		}
	}
	if !old.dead {
		old.Kill()
	}
	return r.startAll(-1)
}

// check compares the volume with its history, and takes what it serves as decided.
func (r *Run) check() error {
	atLeast := r.h.Acked()
	if r.power {
		atLeast = r.h.Flushed()
	}
	image := make([]byte, pages*PageSize)
	if err := r.w.Do(r.f, &device.Request{Op: device.Read, Len: uint64(len(image)), Data: image}, time.Minute); err != nil {
		return err
	}
	n, err := r.h.Check(func(p uint64) ([]byte, error) { return image[p*PageSize:][:PageSize], nil }, atLeast)
	if err != nil {
		return err
	}
	r.h.Decide(n)
	r.Rounds++
	return nil
}

func (r *Run) startAll(but int) error {
	for i, p := range r.Peers {
		if !p.Up && i != but {
			if err := p.Start(); err != nil {
				return err
			}
		}
	}
	return nil
}

// stop takes a peer down, with or without power.
func (r *Run) stop(p *Peer) {
	if r.rng.IntN(2) == 0 {
		p.PowerLoss()
		r.power = true
	} else {
		p.Kill()
	}
}

// load submits n writes with faults in between, of one peer at a time: R-1.
func (r *Run) load(n int) error {
	var hurt *Peer
	cut := false
	heal := func() error {
		if cut {
			r.Net.HealAll()
		} else if err := hurt.Start(); err != nil {
			return err
		}
		hurt, cut = nil, false
		return nil
	}
	for i := 0; i < n && r.f.Err() == nil; i++ {
		page, count := uint64(r.rng.IntN(pages)), 1
		if r.rng.IntN(8) == 0 {
			count = 1 + r.rng.IntN(40)
		}
		ok := page+uint64(count) <= pages
		for k := range uint64(count) {
			ok = ok && !r.inflight[page+k]
		}
		if ok {
			r.submit(page, count)
		}
		if r.rng.IntN(10) == 0 {
			r.flush()
		}
		r.V.RunFor(time.Duration(r.rng.IntN(500)) * time.Microsecond)
		if r.rng.IntN(15) != 0 {
			continue
		}
		switch k := r.rng.IntN(6); {
		case hurt != nil && k < 3:
			if err := heal(); err != nil {
				return err
			}
			// It must be back, and data it missed must not be needed, before another may go.
			r.V.RunFor(time.Duration(r.rng.IntN(1500)) * time.Millisecond)
		case hurt != nil:
			r.V.RunFor(time.Duration(r.rng.IntN(2000)) * time.Millisecond)
		case k < 3:
			hurt = r.Peers[r.rng.IntN(len(r.Peers))]
			r.stop(hurt)
		case k < 5:
			hurt, cut = r.Peers[r.rng.IntN(len(r.Peers))], true
			switch r.rng.IntN(3) {
			case 0:
				r.Net.Partition(r.w.Name, hurt.Name)
			case 1:
				r.Net.Cut(r.w.Name, hurt.Name)
			default:
				r.Net.Cut(hurt.Name, r.w.Name)
			}
		default:
			r.V.RunFor(time.Duration(r.rng.IntN(20)) * time.Second)
		}
	}
	return nil
}

func (r *Run) submit(page uint64, count int) {
	b := make([]byte, count*PageSize)
	ids := make([]uint64, count)
	for k := range count {
		ids[k] = r.h.Write(page+uint64(k), b[k*PageSize:][:PageSize], false)
		r.inflight[page+uint64(k)] = true
	}
	q := &device.Request{Op: device.Write, Off: page * PageSize, Len: uint64(len(b)), Data: b}
	q.Done = func(q *device.Request) {
		for k, id := range ids {
			delete(r.inflight, page+uint64(k))
			if q.Err == nil {
				r.done[id] = true
			}
		}
		for r.done[r.frontier+1] {
			delete(r.done, r.frontier+1)
			r.frontier++
		}
		r.h.Ack(r.frontier)
	}
	f := r.f
	r.w.Loop.Post(func() { f.Submit(q) })
}

func (r *Run) flush() {
	f, target := r.f, uint64(0)
	q := &device.Request{Op: device.Flush}
	q.Done = func(q *device.Request) {
		if q.Err == nil {
			r.h.Flush(target)
		}
	}
	r.w.Loop.Post(func() {
		target = r.h.Acked()
		f.Submit(q)
	})
}

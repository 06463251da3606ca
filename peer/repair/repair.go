package repair

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coreos/torus"
	"github.com/coreos/torus/distributor"
	"github.com/coreos/torus/loop"
)

// The defaults of Config.
const (
	DefaultEvery      = time.Minute
	DefaultInFlight   = 2
	DefaultCopyRate   = 64 << 20
	DefaultScrubRate  = 20 << 20
	DefaultScrubEvery = 24 * time.Hour
	DefaultSweepRate  = 1000
)

const (
	mdsTimeout = 5 * time.Second
	// settle is how long a pass waits after a change: connections come up and changes come in numbers.
	settle = time.Second
	// patience bounds the wait for peers without which an inventory cannot be read.
	patience = 10 * time.Second
	// soon is when a pass that failed is tried again.
	soon = 5 * time.Second
	// maxDamaged bounds what is remembered as damaged; the rest is found by the next scrub.
	maxDamaged = 1 << 16
)

// Config is what a Repairer is made of.
type Config struct {
	Loop loop.Loop
	// Dist is the other peers, and the ring. It is the Repairer's to use and stays the caller's to close.
	Dist *distributor.Distributor
	MDS  torus.MetadataService
	// Local is this peer's own blocks, behind its fences: a peer.Service, or what leads to one. Its Done is called on Loop.
	Local     torus.BlockStore
	ID        torus.PeerID // this peer
	BlockSize uint32       // bytes

	// Forget has a volume give up what it keeps for a clone that does not exist any more; nil: it is left at that. It may block.
	Forget func(ctx context.Context, origin, clone torus.VolumeID) error

	Every      time.Duration // from one pass to the next when nothing happens
	InFlight   int           // blocks copied at a time
	CopyRate   uint64        // bytes a second
	ScrubRate  uint64        // bytes a second
	ScrubEvery time.Duration // from the beginning of one scrub to that of the next, at least
	NoScrub    bool
	SweepRate  uint64 // blocks deleted a second

	Log        *slog.Logger          // nil: none
	Registerer prometheus.Registerer // takes torus_repair_* and torus_scrub_*; nil: no metrics
}

func (c *Config) setDefaults() {
	if c.Every == 0 {
		c.Every = DefaultEvery
	}
	if c.InFlight == 0 {
		c.InFlight = DefaultInFlight
	}
	if c.CopyRate == 0 {
		c.CopyRate = DefaultCopyRate
	}
	if c.ScrubRate == 0 {
		c.ScrubRate = DefaultScrubRate
	}
	if c.ScrubEvery == 0 {
		c.ScrubEvery = DefaultScrubEvery
	}
	if c.SweepRate == 0 {
		c.SweepRate = DefaultSweepRate
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
}

// Stats is what a Repairer says of this peer's copies.
type Stats struct {
	// Ring is the version of the ring under which all copies were looked through last; 0: not yet.
	Ring uint64
	// Short is how many blocks this peer is to hold whole and does not, those in open windows and damaged ones included, and how
	// many, of which it is the first holder, the ring has too few members for.
	Short uint64
	// Corrupt is how many of them are here, damaged.
	Corrupt uint64
	// Unknown is how many volumes could not be looked through: their last known counts stand.
	Unknown uint64
	// Repaired is how many blocks were made whole since the start.
	Repaired uint64
	// Garbage is how many blocks here wait to be deleted, as nothing needs them.
	Garbage uint64
	// Swept is how many such were deleted since the start.
	Swept uint64
	// Scrubs is how many scrubs were finished since the start.
	Scrubs uint64
}

// Repairer keeps one peer's copies whole. It belongs to one loop, on which all methods are called.
type Repairer struct {
	cfg  Config
	log  *slog.Logger
	m    *metrics
	copy pace
	read pace // of the scrub
	gone pace // of the sweep; in blocks

	cluster string // whose volumes these are

	volumes map[torus.VolumeID]*volume
	damaged map[torus.BlockRef]struct{}
	told    map[torus.BlockRef]struct{} // blocks without a good copy anywhere, said already

	stats   Stats
	seen    string // the ring and who is connected, as the last pass knew it
	changed bool   // something has happened since the last pass began
	passing bool
	unwatch func()

	kick     func() // ends the wait for the next pass
	sleepers []*sleeper
	tasks    int
	closing  bool
	closed   func()
}

// New makes a Repairer and lets it begin. The error is about metrics.
func New(cfg Config) (*Repairer, error) {
	cfg.setDefaults()
	m, err := newMetrics(cfg.Registerer)
	if err != nil {
		return nil, fmt.Errorf("metrics of the repair: %w", err)
	}
	r := &Repairer{
		cfg: cfg, log: cfg.Log, m: m, copy: pace{perSec: cfg.CopyRate}, read: pace{perSec: cfg.ScrubRate}, gone: pace{perSec: cfg.SweepRate},
		volumes: map[torus.VolumeID]*volume{}, damaged: map[torus.BlockRef]struct{}{}, told: map[torus.BlockRef]struct{}{}, changed: true,
	}
	r.unwatch = cfg.Dist.Watch(r.look)
	r.start(r.run)
	if !cfg.NoScrub {
		r.start(r.scrub)
	}
	return r, nil
}

func (r *Repairer) start(task func(*loop.Task)) {
	r.tasks++
	r.cfg.Loop.Post(func() {
		loop.Go(r.cfg.Loop, func(t *loop.Task) {
			task(t)
			r.tasks--
			r.maybeClosed()
		})
	})
}

// Close ends what is under way, soon, and then calls closed. A block that is being copied is left as it was.
func (r *Repairer) Close(closed func()) {
	if r.closing {
		return
	}
	r.closing, r.closed = true, closed
	r.unwatch()
	sleepers := r.sleepers
	r.sleepers = nil
	for _, s := range sleepers {
		s.end()
	}
	r.maybeClosed()
}

func (r *Repairer) maybeClosed() {
	if closed := r.closed; r.tasks == 0 && closed != nil {
		r.closed = nil
		closed()
	}
}

// Damaged says that a block was found damaged here. It is verified, and replaced if that is so.
func (r *Repairer) Damaged(ref torus.BlockRef) {
	if _, known := r.damaged[ref]; known || len(r.damaged) >= maxDamaged || r.closing {
		return
	}
	r.log.Warn("a copy may be damaged", "block", ref.String())
	r.damaged[ref] = struct{}{}
	r.Kick()
}

// Kick has a pass begin soon.
func (r *Repairer) Kick() {
	r.changed = true
	if r.kick != nil {
		r.kick()
	}
}

// look has a pass begin when the ring or the health of a member has changed.
func (r *Repairer) look() {
	if r.view() != r.seen {
		r.Kick()
	}
}

// view is what of the cluster a pass depends on.
func (r *Repairer) view() string {
	ring := r.cfg.Dist.Ring()
	if ring == nil {
		return ""
	}
	b := fmt.Appendf(nil, "%d", ring.Version())
	for _, p := range ring.Members() {
		if p == r.cfg.ID || r.cfg.Dist.Healthy(p) {
			b = append(b, '+')
		} else {
			b = append(b, '-')
		}
	}
	return string(b)
}

// Stats returns the present counts.
func (r *Repairer) Stats() Stats {
	s := r.stats
	s.Short, s.Corrupt, s.Unknown, s.Garbage = 0, 0, 0, 0
	for _, v := range r.volumes {
		s.Short += uint64(v.short + v.corrupt)
		s.Corrupt += uint64(v.corrupt)
		s.Garbage += uint64(v.garbage)
		if v.unknown {
			s.Unknown++
		}
	}
	return s
}

// Whole reports whether every copy this peer is to hold was found whole by a pass under the present ring, and nothing is known
// to have happened since. What has rotted and was not read since is not known: see Scrub.
func (r *Repairer) Whole() bool {
	s := r.Stats()
	ring := r.cfg.Dist.Ring()
	return ring != nil && s.Ring == ring.Version() && s.Short == 0 && s.Unknown == 0 && !r.changed && !r.passing && len(r.damaged) == 0
}

// run is the task of passes.
func (r *Repairer) run(t *loop.Task) {
	for !r.closing {
		r.sleep(t, settle)
		if r.cfg.Dist.Ring() == nil {
			continue
		}
		r.changed, r.passing = false, true
		r.seen = r.view()
		found, err := r.pass(t)
		if err == nil {
			err = r.execute(t, found.plan)
			r.sweep(t, found.garbage)
		}
		r.passing = false
		r.m.set(r.Stats())
		wait := r.cfg.Every
		if err != nil {
			wait = min(wait, soon)
		}
		if !r.changed {
			r.idle(t, wait)
		}
	}
}

// sleeper is a wait that Close, or a kick, ends.
type sleeper struct {
	timer *loop.Timer
	wake  func()
}

func (s *sleeper) end() {
	s.timer.Stop()
	if wake := s.wake; wake != nil {
		s.wake = nil
		wake()
	}
}

func (r *Repairer) sleep(t *loop.Task, d time.Duration) { r.wait(t, d, func(*sleeper) {}) }

// idle is a sleep that a kick ends.
func (r *Repairer) idle(t *loop.Task, d time.Duration) {
	r.wait(t, d, func(s *sleeper) { r.kick = s.end })
	r.kick = nil
}

func (r *Repairer) wait(t *loop.Task, d time.Duration, with func(*sleeper)) {
	if r.closing || d <= 0 {
		return
	}
	var s *sleeper
	t.Wait(func(wake func()) {
		s = &sleeper{wake: wake}
		s.timer = r.cfg.Loop.After(d, s.end)
		r.sleepers = append(r.sleepers, s)
		with(s)
	})
	r.sleepers = slices.DeleteFunc(r.sleepers, func(x *sleeper) bool { return x == s })
}

// ask has a request answered by p, or by this peer itself.
func (r *Repairer) ask(t *loop.Task, p torus.PeerID, q *torus.Request) error {
	t.Wait(func(wake func()) {
		q.Peer, q.Done = p, func(*torus.Request) { wake() }
		if p == r.cfg.ID {
			r.cfg.Local.Submit(q)
		} else {
			r.cfg.Dist.Submit(p, q)
		}
	})
	return q.Err
}

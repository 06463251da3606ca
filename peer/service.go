package peer

import (
	"fmt"
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/place"
	"github.com/coreos/torus/vfs"
)

// Config is what a Service is made of.
type Config struct {
	Loop  loop.Loop   // of the store, too
	Store torus.Store // stays the caller's to close, after the Service
	FS    vfs.FS      // where the fences file is kept: the peer's data dir

	Log        *slog.Logger          // nil: discard
	Registerer prometheus.Registerer // takes torus_server_*; nil: no metrics
}

// Service is the store of a peer behind its fences. A fence is a promise about one volume: no epoch below it changes
// anything here any more (invariant L1). The promise is kept in memory from the moment a Fence arrives, in the same turn of
// the loop, and is durable before the Fence is answered; it outlives restarts and power cuts.
//
// The epoch of a request is checked when it is submitted, and the request is handed to the store in that same call, so
// nothing can come between. What was admitted before a fence rose may still be under way in the store; the fence is answered
// after all of that has ended.
type Service struct {
	l     loop.Loop
	store torus.Store
	files place.Store // the store, if its blocks can be read from files; else nil
	log   *slog.Logger
	m     *metrics

	volumes map[torus.VolumeID]*volume
	last    *volume // the one asked for last
	free    *flight
	flights int // requests with the store

	journal *fences
	pending []promise // to be made durable by the next write
	batch   []promise // being made durable by the one under way
	all     map[torus.VolumeID]uint64
	writing bool
	failure error // of the write that just ended

	closing bool
	closed  func(error)
}

var _ place.Store = (*Service)(nil)

// volume is what is known of a volume.
type volume struct {
	id      torus.VolumeID
	fence   uint64 // no epoch below is admitted
	durable uint64 // the same, as the journal has it
	asked   uint64 // the same, as the journal has it or has been asked to
	first   *flight
	old     int                // flights of an epoch below the fence
	waiting []*flight          // Fences not answered yet, in order of arrival
	read    prometheus.Counter // bytes; nil before the first fence
	written prometheus.Counter
}

// flight is a request on its way through the service. Flights are used again.
type flight struct {
	s     *Service
	r     *torus.Request
	done  func(*torus.Request) // r's own
	ended func(*torus.Request) // stands in for it
	vol   *volume
	next  *flight // of the volume's; or in the free list
	prev  *flight
	chain bool // is in the volume's list: a change
	old   bool
}

// New reads the fences and returns a service. The error wraps torus.ErrCorrupt if the fences cannot be trusted.
func New(cfg Config) (*Service, error) {
	m, err := newMetrics(cfg.Registerer)
	if err != nil {
		return nil, fmt.Errorf("metrics of the peer: %w", err)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	journal, state, err := openFences(cfg.FS, cfg.Store.Stats().Used == 0)
	if err != nil {
		return nil, err
	}
	s := &Service{l: cfg.Loop, store: cfg.Store, log: cfg.Log, m: m, volumes: map[torus.VolumeID]*volume{}, journal: journal}
	s.files, _ = cfg.Store.(place.Store)
	for id, epoch := range state {
		v := s.volume(id)
		v.fence, v.durable, v.asked = epoch, epoch, epoch
		s.count(v)
	}
	return s, nil
}

// Fence returns the epoch below which requests for a volume are refused; 0 if there is none.
func (s *Service) Fence(id torus.VolumeID) uint64 {
	if v := s.volumes[id]; v != nil {
		return v.fence
	}
	return 0
}

// Close refuses what comes from now on, and calls closed when nothing is under way any more.
func (s *Service) Close(closed func(error)) {
	if s.closing {
		return
	}
	s.closing, s.closed = true, closed
	s.l.Defer(s.maybeClosed)
}

func (s *Service) maybeClosed() {
	if !s.closing || s.flights > 0 || s.writing || s.closed == nil {
		return
	}
	closed := s.closed
	s.closed = nil
	closed(s.journal.close())
}

// volume returns the state of a volume, which is made if need be.
func (s *Service) volume(id torus.VolumeID) *volume {
	if s.last != nil && s.last.id == id {
		return s.last
	}
	v := s.volumes[id]
	if v == nil {
		v = &volume{id: id}
		s.volumes[id] = v
	}
	before := s.last
	s.last = v
	if before != nil {
		s.forget(before)
	}
	return v
}

// count gives a volume its own counters. Only volumes with a fence have them, so that their number is bounded by what was
// ever attached here.
func (s *Service) count(v *volume) {
	if v.read == nil {
		v.read = s.m.read.WithLabelValues(label(v.id))
		v.written = s.m.written.WithLabelValues(label(v.id))
	}
}

// Submit implements torus.BlockStore.
func (s *Service) Submit(r *torus.Request) {
	if r.Op == torus.OpPing {
		s.m.ops[torus.OpPing].Inc()
		r.Finish(nil)
		return
	}
	if r.Op < torus.OpPing || r.Op > torus.OpVerify {
		r.Finish(fmt.Errorf("%v: %w", r.Op, torus.ErrNotSupported))
		return
	}
	switch {
	case s.closing:
		s.refuse(r, torus.ErrClosed)
		return
	case r.Ref.Volume > torus.VolumeMax:
		s.refuse(r, fmt.Errorf("volume %x: %w", uint64(r.Ref.Volume), torus.ErrInvalid))
		return
	case r.Op == torus.OpFence && r.Epoch == 0:
		s.refuse(r, fmt.Errorf("fence without an epoch: %w", torus.ErrInvalid))
		return
	}
	var v *volume
	if s.last != nil && s.last.id == r.Ref.Volume {
		v = s.last
	} else if r.Op.Mutating() || r.Op == torus.OpFence {
		v = s.volume(r.Ref.Volume)
	} else {
		v = s.volumes[r.Ref.Volume] // may be nil
	}
	checked := r.Op.Mutating() || r.Op == torus.OpFence || r.Epoch != 0 && (r.Op == torus.OpRead || r.Op == torus.OpScan)
	if checked && v != nil && r.Epoch < v.fence {
		s.fenced(r, v)
		return
	}
	f := s.take(r, v)
	if r.Op == torus.OpFence {
		s.raise(f)
		return
	}
	if r.Op.Mutating() {
		f.enlist()
	}
	s.store.Submit(r)
}

// Locate implements place.Store. Who reads a block from where it lies is not asked for an epoch, and is not counted here.
func (s *Service) Locate(ref torus.BlockRef) (place.Place, error) {
	switch {
	case s.files == nil:
		return place.Place{}, torus.ErrNotSupported
	case s.closing:
		return place.Place{}, torus.ErrClosed
	}
	return s.files.Locate(ref)
}

// OpenFile implements place.Store.
func (s *Service) OpenFile(number uint32) (vfs.Reader, error) {
	switch {
	case s.files == nil:
		return nil, torus.ErrNotSupported
	case s.closing:
		return nil, torus.ErrClosed
	}
	return s.files.OpenFile(number)
}

// fenced refuses a request of an epoch that has been overtaken.
func (s *Service) fenced(r *torus.Request, v *volume) {
	s.m.fenced.Inc()
	r.Fence = v.fence
	s.refuse(r, fmt.Errorf("%v of volume %x by epoch %d: %w (epoch %d)", r.Op, uint64(v.id), r.Epoch, torus.ErrFenced, v.fence))
}

func (s *Service) refuse(r *torus.Request, err error) {
	s.m.ops[r.Op].Inc()
	s.m.failures[r.Op].Inc()
	r.Finish(err)
}

// take returns a flight for r, whose Done it takes over.
func (s *Service) take(r *torus.Request, v *volume) *flight {
	f := s.free
	if f == nil {
		f = &flight{s: s}
		f.ended = f.end
	} else {
		s.free = f.next
		f.next = nil
	}
	f.r, f.vol, f.done = r, v, r.Done
	r.Done = f.ended
	s.flights++
	return f
}

// enlist puts a change among those that a fence has to wait for.
func (f *flight) enlist() {
	v := f.vol
	f.chain, f.old = true, false
	f.next, f.prev = v.first, nil
	if v.first != nil {
		v.first.prev = f
	}
	v.first = f
}

// end is the Done of a flight.
func (f *flight) end(r *torus.Request) {
	s, v := f.s, f.vol
	old := f.old
	if f.chain {
		if f.next != nil {
			f.next.prev = f.prev
		}
		if f.prev != nil {
			f.prev.next = f.next
		} else {
			v.first = f.next
		}
		f.chain, f.old = false, false
	}
	if r.Op == torus.OpFence && r.Err == nil {
		if r.Epoch < v.fence { // overtaken while it waited for the store
			r.Tails, r.Committed = nil, 0
			r.Fence = v.fence
			r.Err = fmt.Errorf("volume %x: %w (epoch %d)", uint64(v.id), torus.ErrFenced, v.fence)
			s.m.fenced.Inc()
		} else {
			r.Fence = v.fence
			s.m.fences.Inc()
		}
	}
	s.m.ops[r.Op].Inc()
	switch {
	case r.Err != nil:
		s.m.failures[r.Op].Inc()
	case v == nil || v.read == nil:
	case r.Op == torus.OpAppend, r.Op == torus.OpPut:
		v.written.Add(float64(len(r.Data)))
	case r.Op == torus.OpRead:
		v.read.Add(float64(len(r.Data)))
	}
	r.Done = f.done
	f.r, f.vol, f.done, f.prev, f.next = nil, nil, nil, nil, s.free
	s.free = f
	s.flights--
	r.Done(r)
	if old {
		if v.old--; v.old == 0 {
			s.answer(v)
		}
	}
	if v != nil {
		s.forget(v)
	}
	s.maybeClosed()
}

// forget drops the state of a volume that has none, except of the one asked for last: who writes to it one request after the
// other would have it made anew each time.
func (s *Service) forget(v *volume) {
	if v != s.last && v.fence == 0 && v.first == nil && len(v.waiting) == 0 && s.volumes[v.id] == v {
		delete(s.volumes, v.id)
	}
}

// raise takes a Fence: from here on nothing of a lower epoch is admitted.
func (s *Service) raise(f *flight) {
	v, epoch := f.vol, f.r.Epoch
	if epoch > v.fence {
		v.fence = epoch
		s.count(v)
		for x := v.first; x != nil; x = x.next {
			if !x.old && x.r.Epoch < epoch {
				x.old = true
				v.old++
			}
		}
		s.log.Info("fence raised", "volume", label(v.id), "epoch", epoch, "under_way", v.old)
	}
	v.waiting = append(v.waiting, f)
	if v.durable < v.fence {
		s.persist(v)
	}
	s.answer(v)
}

// persist asks for the fence of v to be made durable, with whatever else waits for that.
func (s *Service) persist(v *volume) {
	if v.asked == v.fence {
		return
	}
	v.asked = v.fence
	s.pending = append(s.pending, promise{v.id, v.fence})
	s.write()
}

// write starts a write of the journal, unless one is under way: then the next covers what has gathered.
func (s *Service) write() {
	if s.writing || len(s.pending) == 0 {
		return
	}
	s.writing = true
	s.batch, s.pending = s.pending, nil
	s.all = nil
	if s.journal.broken || s.journal.bloated(len(s.volumes)) {
		s.all = make(map[torus.VolumeID]uint64, len(s.volumes))
		for id, v := range s.volumes {
			if v.fence > 0 {
				s.all[id] = v.fence
			}
		}
	}
	s.l.Offload((*persisting)(s))
}

// persisting is the Service as a loop.Job: the write of s.batch.
type persisting Service

// Work implements loop.Job. It touches nothing that the loop does while s.writing is set.
func (s *persisting) Work() {
	if s.all != nil {
		s.failure = s.journal.rewrite(s.all)
	} else {
		s.failure = s.journal.add(s.batch)
	}
}

// Done implements loop.Job.
func (p *persisting) Done() {
	s := (*Service)(p)
	s.writing = false
	err := s.failure
	s.failure = nil
	if err != nil {
		s.m.lost.Add(float64(len(s.batch)))
		s.log.Error("fences cannot be made durable", "err", err)
	}
	batch := s.batch
	s.batch = nil // what is called below may start the next write
	for _, x := range batch {
		v := s.volumes[x.volume]
		if err == nil {
			v.durable = max(v.durable, x.epoch)
			s.answer(v)
		} else {
			if v.asked == x.epoch {
				v.asked = v.durable // the next Fence asks again
			}
			s.failed(v, x.epoch, err)
		}
	}
	s.write()
	s.maybeClosed()
}

// answer goes on with those Fences of v that are durable, once nothing older is under way.
func (s *Service) answer(v *volume) {
	if v.old > 0 {
		return
	}
	for i := 0; i < len(v.waiting); {
		f := v.waiting[i]
		if v.durable < f.r.Epoch {
			i++
			continue
		}
		v.waiting = append(v.waiting[:i], v.waiting[i+1:]...)
		f.r.Tails, f.r.Committed = nil, 0
		if f.r.Epoch < v.fence {
			f.r.Err = nil
			f.end(f.r) // says by whom it has been overtaken
		} else {
			s.store.Submit(f.r)
		}
		i = 0 // the Done of that one may have changed everything
		if v.old > 0 {
			return
		}
	}
}

// failed ends the Fences of v up to epoch that cannot be made durable. The fence stays as high as it has become: to
// refuse too much is safe.
func (s *Service) failed(v *volume, epoch uint64, err error) {
	for i := 0; i < len(v.waiting); {
		f := v.waiting[i]
		if f.r.Epoch > epoch || f.r.Epoch <= v.durable {
			i++
			continue
		}
		v.waiting = append(v.waiting[:i], v.waiting[i+1:]...)
		f.r.Err = fmt.Errorf("the fence of volume %x cannot be made durable: %w: %w", uint64(v.id), torus.ErrIO, err)
		f.end(f.r)
		i = 0
	}
}

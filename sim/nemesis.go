package sim

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/coreos/torus/metadata/temp"
	"github.com/coreos/torus/transport/mem"
	"github.com/coreos/torus/vfs"
)

// The nemesis. What it may do follows from what DESIGN promises, with R copies:
//
//   - Any number of peers may be down, paused, slow, full or cut off at any time: then things wait, and nothing may be lost.
//   - Power may be lost, by any number of peers: what was flushed stays (D1). A failed fdatasync is the same for one peer. From then until everything
//     written by then is flushed, what was only acknowledged may be lost (W1).
//   - R−1 peers may lose what they had synced: one peer in a schedule is wiped, or rots, or cannot read. While it is not healed, nobody else may
//     be away when an attach decides, for the two together would be R; so in such schedules the others are left alone, except by a wipe,
//     as a peer that is gone says nothing wrong.
//   - The metadata service may be away, slow, lose answers, and carry out requests late.

// kind is a kind of fault.
type kind struct {
	name string
	// begin does it and returns what ends it, nil if there is nothing to end; false if it is not possible now.
	begin func(*Run) (end func(), ok bool)
	// spares: it may be in a schedule in which the peers but one are left alone.
	spares bool
}

var kinds = []kind{
	{"kill", func(r *Run) (func(), bool) { return r.down(false) }, true},
	{"power", func(r *Run) (func(), bool) { return r.down(true) }, true},
	{"power-all", (*Run).blackout, false},
	{"pause", (*Run).pausePeer, true},
	{"freeze", (*Run).freezeClient, true},
	{"cut", (*Run).cutSome, true},
	{"isolate", (*Run).isolate, true},
	{"delay", func(r *Run) (func(), bool) {
		d := time.Duration(1+r.rng.IntN(1500)) * time.Millisecond
		return r.link(mem.LinkConfig{Delay: d / 2, Jitter: d})
	}, true},
	{"loss", func(r *Run) (func(), bool) {
		return r.link(mem.LinkConfig{Delay: 50 * time.Microsecond, Jitter: 100 * time.Microsecond, Loss: 0.02 + r.rng.Float64()/4})
	}, true},
	{"reset", (*Run).reset, true},
	{"slow-disk", func(r *Run) (func(), bool) { return r.slowDisk(time.Duration(1+r.rng.IntN(40)) * time.Millisecond) }, true},
	{"stuck-disk", func(r *Run) (func(), bool) { return r.slowDisk(time.Duration(500+r.rng.IntN(7000)) * time.Millisecond) }, true},
	{"eio-read", (*Run).readErrors, true},
	{"eio-write", func(r *Run) (func(), bool) { return r.diskFails(vfs.OpWrite) }, true},
	{"fsync-fails", func(r *Run) (func(), bool) { return r.diskFails(vfs.OpDatasync) }, true},
	{"full", (*Run).full, true},
	{"rot", (*Run).rot, true},
	{"wipe", (*Run).wipe, false},
	{"mds-away", func(r *Run) (func(), bool) { return r.mdsFails(0, 1, 0, 0) }, true},
	{"mds-flaky", func(r *Run) (func(), bool) { return r.mdsFails(6, 1, 2, 2) }, true},
	{"mds-slow", (*Run).slowMDS, true},
	{"clock", (*Run).clock, true},
	{"ring", (*Run).changeRing, true},
}

// fault is one that has begun and will be ended.
type fault struct {
	name string
	end  func()
	at   time.Duration
}

// harm begins a fault of a kind that this schedule has.
func (r *Run) harm() {
	k := &kinds[r.p.kinds[r.rng.IntN(len(r.p.kinds))]]
	end, ok := k.begin(r)
	if !ok {
		return
	}
	r.Faults[k.name]++
	r.say("fault: %s", k.name)
	if end != nil {
		long := 300
		if r.rng.IntN(4) == 0 {
			long = 6000
		}
		r.until(k.name, end, time.Duration(1+r.rng.IntN(long))*time.Millisecond)
	}
}

func (r *Run) until(name string, end func(), d time.Duration) {
	r.faults = append(r.faults, fault{name, end, r.V.Now() + d})
}

// mend ends the faults whose time has come, or all of them.
func (r *Run) mend(all bool) {
	kept := r.faults[:0]
	var due []fault
	for _, f := range r.faults {
		if all || f.at <= r.V.Now() {
			due = append(due, f)
		} else {
			kept = append(kept, f)
		}
	}
	r.faults = kept
	for _, f := range due {
		r.say("end of %s", f.name)
		f.end()
	}
}

// mayHurt reports whether a peer may be made unavailable: once one has lost data it alone.
func (r *Run) mayHurt(p *Peer) bool { return !p.Gone && (r.victim == nil || p == r.victim) }

// peer picks one that may be hurt.
func (r *Run) peer() *Peer {
	if r.victim != nil {
		return r.victim
	}
	for {
		if p := r.Peers[r.rng.IntN(len(r.Peers))]; !p.Gone {
			return p
		}
	}
}

// client picks a process that lives.
func (r *Run) client() *Client {
	if len(r.viewers) > 0 && r.rng.IntN(3) == 0 {
		if w := r.viewers[r.rng.IntN(len(r.viewers))]; !w.over {
			return w.cl
		}
	}
	v := r.vols[r.rng.IntN(len(r.vols))]
	for range 4 {
		if len(v.sessions) == 0 {
			return nil
		}
		if s := v.sessions[len(v.sessions)-1-r.rng.IntN(min(3, len(v.sessions)))]; !s.over {
			return s.cl
		}
	}
	return nil
}

// lostUnsynced notes that some peer may have lost what it had not synced.
func (r *Run) lostUnsynced() {
	for _, v := range r.vols {
		v.h.LosePower()
	}
}

// start starts a peer, which may fail only if its disk does.
func (r *Run) start(p *Peer) {
	if p.Up || p.Gone {
		return
	}
	if err := p.Start(); err != nil {
		r.say("%v", err)
		if p.fault == nil && !p.Rotten && !p.cramped {
			r.fail(violated("LIVE", "a peer does not start: %w", err))
		}
	}
}

func (r *Run) down(power bool) (func(), bool) {
	p := r.peer()
	if !p.Up {
		return nil, false
	}
	if power {
		p.PowerLoss()
		r.lostUnsynced()
	} else {
		p.Kill()
	}
	return func() { r.start(p) }, true
}

func (r *Run) blackout() (func(), bool) {
	for _, p := range r.Peers {
		if !p.Gone {
			p.PowerLoss()
		}
	}
	r.lostUnsynced()
	// They come back one after another, some of them late.
	for _, p := range r.Peers {
		long := 50
		if r.rng.IntN(3) == 0 {
			long = 4000
		}
		r.until("power-all", func() { r.start(p) }, time.Duration(r.rng.IntN(long))*time.Millisecond)
	}
	return nil, true
}

func (r *Run) pausePeer() (func(), bool) {
	p := r.peer()
	if !p.Up || p.Loop.Paused() {
		return nil, false
	}
	l := p.Loop
	l.Pause()
	return l.Resume, true
}

func (r *Run) freezeClient() (func(), bool) {
	c := r.client()
	if c == nil || c.Loop.Paused() {
		return nil, false
	}
	c.Loop.Pause()
	return c.Loop.Resume, true
}

func (r *Run) freeze(c *Client, d time.Duration) {
	r.say("freeze %s", c.Name)
	c.Loop.Pause()
	r.until("freeze", c.Loop.Resume, d)
}

// cut cuts a client off from a peer, in one direction or both.
func (r *Run) cut(a, b string, d time.Duration) {
	switch r.rng.IntN(3) {
	case 0:
		r.Net.Partition(a, b)
	case 1:
		r.Net.Cut(a, b)
	default:
		r.Net.Cut(b, a)
	}
	r.until("cut", func() { r.Net.Join(a, b) }, d)
}

func (r *Run) cutSome() (func(), bool) {
	c := r.client()
	if c == nil {
		return nil, false
	}
	r.cut(c.Name, r.peer().Name, time.Duration(r.rng.IntN(5000))*time.Millisecond)
	return nil, true
}

// isolate cuts a peer off from all clients that there are.
func (r *Run) isolate() (func(), bool) {
	p := r.peer()
	d := time.Duration(r.rng.IntN(5000)) * time.Millisecond
	for _, v := range r.vols {
		for _, s := range v.sessions {
			if !s.over {
				r.cut(s.cl.Name, p.Name, d)
			}
		}
	}
	return nil, true
}

func (r *Run) link(cfg mem.LinkConfig) (func(), bool) {
	c := r.client()
	if c == nil {
		return nil, false
	}
	p := r.peer().Name
	if r.rng.IntN(3) > 0 {
		r.Net.SetLink(c.Name, p, cfg)
	}
	if r.rng.IntN(3) > 0 {
		r.Net.SetLink(p, c.Name, cfg)
	}
	return func() {
		r.Net.SetLink(c.Name, p, r.Net.Default)
		r.Net.SetLink(p, c.Name, r.Net.Default)
	}, true
}

func (r *Run) reset() (func(), bool) {
	c := r.client()
	if c == nil {
		return nil, false
	}
	r.Net.Reset(c.Name, r.peer().Name)
	return nil, true
}

func (r *Run) slowDisk(d time.Duration) (func(), bool) {
	p := r.peer()
	if !p.Up {
		return nil, false
	}
	l := p.Loop
	l.SetOffloadDelay(func(rng *rand.Rand) time.Duration { return d/2 + time.Duration(rng.Int64N(int64(d))) })
	p.FS.SetSlowSyncs(1, d)
	return func() {
		r.slowUntil = max(r.slowUntil, r.V.Now()+2*d) // what is under way takes as long as it takes
		l.SetOffloadDelay(nil)
		p.FS.SetSlowSyncs(0.3, 3*time.Millisecond)
	}, true
}

var (
	errMedium = errors.New("injected: input/output error")
	errRotten = errors.New("injected: unreadable")
)

// readErrors lets reads of one peer fail now and then.
func (r *Run) readErrors() (func(), bool) {
	for _, p := range r.Peers {
		if p.fault != nil {
			return nil, false
		}
	}
	p := r.peer()
	p.ailing = true
	share := 0.05 + r.rng.Float64()/2
	p.fault = func(op vfs.Op) error {
		if op.Kind == vfs.OpRead && r.rng.Float64() < share {
			return errRotten
		}
		return nil
	}
	return func() {
		p.fault = nil
		if !p.Up || p.Store.Stats().Failed || r.rng.IntN(2) == 0 {
			p.Kill() // what could not be read when it started is read again
			r.start(p)
		}
	}, true
}

// diskFails lets the next write or fdatasync of a peer fail: the store is dead then, until it is started anew.
func (r *Run) diskFails(k vfs.OpKind) (func(), bool) {
	for _, p := range r.Peers {
		if p.fault != nil {
			return nil, false
		}
	}
	p := r.peer()
	once := false
	p.fault = func(op vfs.Op) error {
		if once || op.Kind != k || !strings.HasPrefix(op.Name, "slots-") && !strings.HasPrefix(op.Name, "fences") {
			return nil
		}
		once = true
		p.powers++ // nobody knows what it holds now
		r.lostUnsynced()
		return errMedium
	}
	return func() {
		p.fault = nil
		if once {
			p.powers++ // what it took between the failure and its noticing is lost as well
			r.lostUnsynced()
			p.Kill()
			r.start(p)
		}
	}, true
}

// full leaves a peer, or all, no room to grow.
func (r *Run) full() (func(), bool) {
	some := []*Peer{r.peer()}
	if r.rng.IntN(4) == 0 && r.victim == nil {
		some = r.Peers
	}
	for _, p := range some {
		left, size, _ := p.FS.Free()
		p.FS.SetCapacity(size - left + uint64(r.rng.IntN(300<<10)))
		p.cramped = true
	}
	return func() {
		for _, p := range some {
			p.cramped = false
			p.FS.SetCapacity(vfs.DefaultMemCapacity)
			if !p.Up {
				r.start(p)
			}
		}
	}, true
}

// rot damages what one peer has stored.
func (r *Run) rot() (func(), bool) {
	if r.victim == nil && !r.calm() {
		return nil, false
	}
	p := r.peer()
	n := 0
	skip := r.rng.IntN(60)
	p.FS.Rot(r.rng, func(name string, off int64, page []byte) bool {
		if !strings.HasPrefix(name, "slots-") || off < 3*PageSize {
			return false
		}
		if skip--; skip >= 0 || n >= 12 {
			return false
		}
		n++
		skip = r.rng.IntN(8)
		return true
	})
	if n == 0 {
		return nil, false
	}
	r.victim, p.Rotten = p, true
	if p.Up && r.rng.IntN(2) == 0 {
		p.Kill()
		return func() { r.start(p) }, true
	}
	return nil, true
}

// calm reports whether nobody is hurt: from now on one peer has lost data. Nobody else may be slow to answer, either: an attach
// waits 300 ms for the rest when it has heard one of each set, and believes a damaged replica that answers alone.
func (r *Run) calm() bool {
	for _, p := range r.Peers {
		if !p.Up && !p.Gone || p.fault != nil || p.Gone || p.Loop.Paused() {
			return false
		}
	}
	for _, v := range r.vols {
		if v.h.Promised() < v.h.Acked() {
			return false // the only copy of something may be the one that would be damaged
		}
	}
	return len(r.faults) == 0 && r.V.Now() >= r.slowUntil
}

// wipe takes a peer's disk away. It must not come back under its old identity; a new peer takes its place.
func (r *Run) wipe() (func(), bool) {
	if r.wiped || r.victim != nil {
		return nil, false
	}
	r.wiped = true
	p := r.peer()
	r.say("wipe %s", p.Name)
	p.PowerLoss()
	r.lostUnsynced()
	p.fault = nil
	p.FS = vfs.NewMem(r.rng.Uint64())
	if p.Start() == nil {
		return nil, true // let us see what comes of that
	}
	p.Gone = true
	if _, err := r.AddPeer(); err != nil {
		r.fail(violated("LIVE", "a new peer does not start: %w", err))
		return nil, true
	}
	r.setRing(r.alive())
	return nil, true
}

func (r *Run) alive() (l []*Peer) {
	for _, p := range r.Peers {
		if !p.Gone {
			l = append(l, p)
		}
	}
	return l
}

func (r *Run) setRing(peers []*Peer) {
	if err := r.SetRing(peers); err != nil {
		r.fail(violated("LIVE", "ring: %w", err))
	}
}

// changeRing takes a peer out of the ring, or lets all in.
func (r *Run) changeRing() (func(), bool) {
	l := r.alive()
	if len(l) > r.p.replication+1 && r.rng.IntN(2) == 0 {
		i := r.rng.IntN(len(l))
		l = append(l[:i], l[i+1:]...)
	}
	r.setRing(l)
	return nil, true
}

// mdsFails weighs what becomes of requests to the metadata service: nothing, lost, answer lost, late.
func (r *Run) mdsFails(weights ...int) (func(), bool) {
	if r.mdsWeights != nil {
		return nil, false
	}
	r.mdsWeights = weights
	return func() { r.mdsWeights = nil }, true
}

func (r *Run) mdsFault(context.Context, string) temp.Fault {
	if r.mdsWeights == nil {
		return temp.None
	}
	sum := 0
	for _, w := range r.mdsWeights {
		sum += w
	}
	k := r.rng.IntN(sum)
	for i, w := range r.mdsWeights {
		if k -= w; k < 0 {
			return temp.Fault(i)
		}
	}
	return temp.None
}

// slowMDS lets every call take up to seconds.
func (r *Run) slowMDS() (func(), bool) {
	if r.mdsSlow != nil {
		return nil, false
	}
	most := int64(time.Duration(1+r.rng.IntN(4000)) * time.Millisecond)
	r.mdsSlow = func(rng *rand.Rand) time.Duration { return time.Duration(rng.Int64N(most)) }
	set := func(f func(*rand.Rand) time.Duration) {
		for _, v := range r.vols {
			for _, s := range v.sessions {
				s.cl.Loop.SetOffloadDelay(f)
			}
		}
	}
	set(r.mdsSlow)
	return func() {
		r.mdsSlow = nil
		set(nil)
	}, true
}

// clock lets the clock of the metadata service jump, so that leases end early, and that of a client, either way.
func (r *Run) clock() (func(), bool) {
	r.MDS.Advance(time.Duration(r.rng.IntN(20)) * time.Second)
	if c := r.client(); c != nil && r.p.retain == 0 {
		c.skew += time.Duration(r.rng.IntN(72)-36) * time.Hour
	}
	return nil, true
}

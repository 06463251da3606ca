package storage

import (
	"fmt"
	"slices"
	"time"

	"github.com/coreos/torus"
)

// group is the group commit of one file: all that wait share one fdatasync. A request is answered by an fdatasync that began
// after the bytes it means were written; while one runs, on a helper, appends go on and new requests gather for the next, and so do those of which
// something is still in the air.
type group struct {
	dirty   []uint32         // slots with bytes or an entry that no fdatasync has begun for
	flying  []uint32         // those covered by the one that runs
	bytes   int              // written since the last one began
	waiting []*torus.Request // for the next one
	served  []*torus.Request // by the one that runs
	carried []*flight        // chunks that are written with the one that runs
	alone   bool             // it is all there is to it
	took    time.Duration    // the last one
	running bool
	planned bool   // one begins at the end of this turn
	start   func() // made once
	err     error  // of the one a helper made
}

// An fdatasync is made on the loop itself, which saves two thread switches, if it can be expected to be over before
// anybody notices: no more than inlineBytes to write, and an average below inlineTime.
const (
	inlineTime  = 500 * time.Microsecond
	inlineBytes = 1 << 20
)

// sync makes the first Len bytes of a block durable.
func (d *Disk) sync(r *torus.Request) {
	s, ok := d.index.find(keyOf(r.Ref))
	if !ok || r.Len > d.slots[s].length && !d.lost(s) {
		r.Finish(fmt.Errorf("sync of %d bytes of %v: %w", r.Len, r.Ref, torus.ErrGap))
		return
	}
	x := &d.slots[s]
	if d.lost(s) {
		r.Finish(fmt.Errorf("sync of %v, of which bytes were lost: %w", r.Ref, torus.ErrIO))
		return
	}
	if x.open < 0 || r.Len <= d.opens[x.open].durable {
		r.Length = r.Len
		r.Finish(nil)
		return
	}
	f := d.files[x.file]
	if g := &f.sync; g.running && r.Len <= d.opens[x.open].flying {
		g.served = append(g.served, r)
		return
	}
	f.await(r)
}

// lost reports whether a block lost bytes that were appended.
func (d *Disk) lost(s uint32) bool {
	x := &d.slots[s]
	return x.open >= 0 && (d.opens[x.open].failed || d.opens[x.open].unread)
}

// await has r served by the next fdatasync.
func (f *file) await(r *torus.Request) {
	f.sync.waiting = append(f.sync.waiting, r)
	f.plan()
}

// plan has an fdatasync begin at the end of the turn, when all requests that came in it have been handed out.
func (f *file) plan() {
	if g := &f.sync; !g.planned && !g.running {
		g.planned = true
		f.d.loop.Defer(g.start)
	}
}

func (f *file) begin() {
	g, d := &f.sync, f.d
	g.planned = false
	if d.closed || f.err != nil || g.running {
		return
	}
	for _, r := range g.waiting {
		f.carry(r)
	}
	n := 0
	for _, r := range g.waiting {
		if f.landed(r) {
			g.served = append(g.served, r)
		} else {
			g.waiting[n] = r
			n++
		}
	}
	clear(g.waiting[n:])
	g.waiting = g.waiting[:n]
	if len(g.served) == 0 {
		return // land plans the next
	}
	g.running = true
	g.dirty, g.flying = g.flying, g.dirty
	for _, s := range g.flying {
		x := &d.slots[s]
		if x.entry == entryDirty {
			x.entry = entryFlying
		}
		if x.open >= 0 {
			o := &d.opens[x.open]
			o.flying = min(x.length, d.unwritten(s))
			if o.dirty = o.flying < x.length; o.dirty && !slices.Contains(g.dirty, s) {
				g.dirty = append(g.dirty, s)
			}
		}
	}
	aloft := 0
	for _, fl := range d.flights {
		if fl.f == f && !fl.landed && fl.r != nil {
			aloft += len(fl.data)
		}
	}
	for _, c := range g.carried {
		g.bytes += len(c.data)
	}
	little := g.bytes <= inlineBytes && aloft == 0
	g.bytes = aloft
	g.alone = f.carriesAll()
	d.metrics.flushes.Inc()
	if little && d.quick() && !d.writer.in(f) {
		f.finish(f.flush())
	} else {
		d.loop.Offload(f)
	}
}

// quick reports whether the disk is known to sync so fast that the loop can wait for it.
func (d *Disk) quick() bool { return d.syncTime > 0 && d.syncTime <= inlineTime }

// landed reports whether nothing is in the air any more of what r wants to be durable in f, or gone.
func (f *file) landed(r *torus.Request) bool {
	d := f.d
	s, ok := d.index.find(keyOf(r.Ref))
	switch {
	case r.Op == torus.OpDelete: // so that its slot is free when it is answered
		return !slices.ContainsFunc(d.flights, func(fl *flight) bool {
			x := &d.slots[fl.slot]
			return !fl.landed && x.state == freeing && x.key == keyOf(r.Ref)
		})
	case !ok || d.files[d.slots[s].file] != f: // deleted meanwhile, and made again elsewhere
		return true
	case r.Op == torus.OpSync:
		return r.Len <= d.unwritten(s)
	case r.Op == torus.OpSeal:
		return d.slots[s].length <= d.unwritten(s)
	}
	return true
}

// Work implements loop.Job.
func (f *file) Work() {
	f.sync.err = torus.ErrClosed
	if f.d.enter() {
		f.sync.err = f.flush()
		f.d.leave()
	}
}

// Done implements loop.Job.
func (f *file) Done() {
	if !f.d.closed { // else Close has seen to it
		f.finish(f.sync.err)
	}
}

// finish is called when an fdatasync is over.
func (f *file) finish(err error) {
	g, d := &f.sync, f.d
	g.running = false
	carried := g.carried
	g.carried = nil
	for _, c := range carried {
		c.land(err)
	}
	if f.err != nil { // it failed, now or meanwhile: a success proves nothing
		return
	}
	if err != nil {
		d.fail(f, err)
		return
	}
	d.observeSync(max(g.took, 1))
	freed := false
	for _, s := range g.flying {
		x := &d.slots[s]
		if x.entry == entryFlying {
			x.entry, x.durable = entryClean, 1-x.durable
			if x.state == freeing && x.pins == 0 {
				d.giveBack(s)
				freed = true
			}
		}
		if x.open >= 0 {
			o := &d.opens[x.open]
			o.durable = max(o.durable, min(o.flying, x.length))
			o.flying = 0
			if x.state == sealed && x.entry == entryClean {
				d.dropOpen(s)
			}
		}
	}
	g.flying = g.flying[:0]
	served := g.served
	g.served = nil // a Done may close the store, which answers all that are still listed
	for i, r := range served {
		served[i] = nil
		f.synced(r)
	}
	g.served = served[:0]
	if len(g.waiting) > 0 {
		f.plan()
	}
	if freed {
		d.unpark()
	}
}

// synced answers, or goes on with, a request that an fdatasync has served.
func (f *file) synced(r *torus.Request) {
	d := f.d
	switch {
	case r.Op == torus.OpSync:
		r.Length = r.Len
		r.Finish(nil)
	case r.Op == torus.OpDelete:
		d.metrics.deletes.Inc()
		r.Finish(nil)
	case r.Op == torus.OpPut:
		d.puts[keyOf(r.Ref)].synced()
	case d.closed:
		r.Finish(torus.ErrClosed)
	default:
		d.sealOn(r)
	}
}

// observeSync keeps the average of what an fdatasync takes. It is quick to see that the disk is slow.
func (d *Disk) observeSync(t time.Duration) {
	if d.syncTime == 0 || t > 8*inlineTime {
		d.syncTime = max(d.syncTime, t)
		return
	}
	d.syncTime += (t - d.syncTime) / 8
}

// closeSync makes durable what is not, and answers who waits for it, when the store is closed.
func (f *file) closeSync() error {
	g, d := &f.sync, f.d
	if f.err != nil {
		return nil //nolint:nilerr // said already
	}
	var err error
	if g.running && g.err != nil && g.err != torus.ErrClosed {
		err = g.err // a helper's fdatasync failed, and nobody has heard of it yet
	} else if g.running || len(g.dirty) > 0 || len(g.waiting) > 0 {
		err = f.f.Datasync()
	}
	if err != nil {
		d.fail(f, err)
		return f.err
	}
	waiting, served := g.waiting, g.served
	g.waiting, g.served, g.dirty, g.flying = nil, nil, nil, nil
	for _, r := range served {
		f.synced(r)
	}
	for _, r := range waiting {
		f.synced(r)
	}
	return nil
}

package file

import (
	"slices"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
)

type flushWaiter struct {
	seq uint64
	r   *device.Request
}

// flush completes when every write acknowledged before it is durable on the whole set of a block that holds it.
func (f *File) flush(r *device.Request) {
	f.habit.flushed()
	if f.acked <= f.flushed {
		r.Finish(nil)
		return
	}
	f.waiters = append(f.waiters, flushWaiter{f.acked, r})
	if f.full && f.sent < f.acked {
		f.pump() // what a lost replica held is in memory here: if there is no room for it elsewhere, this is where that shows
	}
	f.startSync()
}

// syncOp is a sync under way at one replica.
type syncOp struct {
	req torus.Request
	f   *File
	blk *openBlock
	rep int
	gen uint64
}

func (f *File) newSync() *syncOp {
	if n := len(f.freeSyncs); n > 0 {
		o := f.freeSyncs[n-1]
		f.freeSyncs = f.freeSyncs[:n-1]
		return o
	}
	o := &syncOp{f: f}
	o.req.Done = o.done
	return o
}

// habit is what the user of the volume does: somebody who has flushed each of his last writes by itself, as the log of a
// database does, will flush the next one, too.
type habit struct {
	writes int // since the last flush
	lone   int // flushes in succession that each found one write
}

func (h *habit) wrote() {
	if h.writes++; h.writes > 1 {
		h.lone = 0
	}
}

func (h *habit) flushed() {
	if h.writes == 1 {
		h.lone++
	}
	h.writes = 0
}

// expectsFlush reports whether a flush is about to follow the write that has just been made.
func (h *habit) expectsFlush() bool { return h.lone >= 3 }

// startSync begins a round: every block with unsynced records is synced at every replica. One round runs at a
// time, and flushes that arrive meanwhile share the next one.
func (f *File) startSync() {
	if !f.syncing && f.held > f.flushed && f.err == nil {
		f.sync(func(b *openBlock) uint32 { return b.stored })
	}
}

// syncAhead begins a round behind records that are still on their way: a replica that has stored them syncs them, without
// waiting to be asked again. For when it is known, or likely, that a flush follows: it saves that a round trip.
func (f *File) syncAhead() {
	if !f.syncing && f.sent == f.last && f.err == nil {
		f.sync(func(b *openBlock) uint32 { return b.end })
	}
}

func (f *File) sync(upTo func(*openBlock) uint32) {
	f.syncing = true
	f.syncGen++
	f.stats.Syncs++
	gen := f.syncGen
	f.syncLeft = 1 // until all are submitted
	for _, b := range f.blocks {
		n := upTo(b)
		for i := range b.replicas {
			if b.replicas[i].synced >= n {
				continue
			}
			o := f.newSync()
			o.blk, o.rep, o.gen = b, i, gen
			q := &o.req
			q.Op, q.Ref, q.Epoch, q.Len, q.Peer = torus.OpSync, b.ref, f.epoch, n, b.set[i]
			f.syncLeft++
			f.dist.Submit(q.Peer, q)
			if f.syncGen != gen {
				return // it failed at once, and the log has rolled
			}
		}
	}
	f.synced()
}

func (o *syncOp) done(q *torus.Request) {
	f, b, i, gen := o.f, o.blk, o.rep, o.gen
	o.blk = nil
	f.freeSyncs = append(f.freeSyncs, o)
	if gen != f.syncGen || f.err != nil {
		return
	}
	if q.Err != nil {
		f.replicaFailed(q, b)
		return
	}
	b.replicas[i].synced = max(b.replicas[i].synced, q.Len)
	f.synced()
}

// synced counts an answer of the round; the last one ends it.
func (f *File) synced() {
	if f.syncLeft--; f.syncLeft > 0 {
		return
	}
	f.syncing = false
	for _, b := range f.blocks {
		b.confirm()
	}
	for f.flushed < f.held {
		r := f.rec(f.flushed + 1)
		if r.end() > r.blk.synced {
			break
		}
		f.flushed++
		f.unflushed -= len(r.mem)
	}
	// A block without unflushed records needs no watching any more.
	n := 0
	for _, b := range f.blocks {
		if !b.closed || b.synced < b.end {
			f.blocks[n] = b
			n++
		} else if f.table.e[b.slot].ref == b.ref {
			f.sealBlock(b.slot, b.end) // all of it is durable on all replicas: nothing can be added, by anybody
		}
	}
	clear(f.blocks[n:])
	f.blocks = f.blocks[:n]
	f.apply()
	f.completeFlushes()
}

// completeFlushes completes the flushes that have what they waited for, and begins the next round for the others.
func (f *File) completeFlushes() {
	// Finish may come back with another flush, so what is done leaves the list first.
	for len(f.waiters) > 0 {
		i := slices.IndexFunc(f.waiters, func(w flushWaiter) bool { return w.seq <= f.flushed })
		if i < 0 {
			break
		}
		r := f.waiters[i].r
		f.waiters = slices.Delete(f.waiters, i, i+1)
		r.Finish(nil)
	}
	if len(f.waiters) > 0 || f.unflushed >= f.cfg.RetainBytes/4 {
		f.startSync()
	}
}

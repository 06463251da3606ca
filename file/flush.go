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
	if f.acked <= f.flushed {
		r.Finish(nil)
		return
	}
	if f.full && f.held < f.acked {
		r.Finish(device.ErrOutOfSpace) // what a lost replica held is in memory here, and there is no room for it elsewhere
		return
	}
	f.waiters = append(f.waiters, flushWaiter{f.acked, r})
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

// startSync begins a round: every block with unsynced records is synced at every replica. One round runs at a
// time, and flushes that arrive meanwhile share the next one.
func (f *File) startSync() {
	if f.syncing || f.held <= f.flushed || f.err != nil {
		return
	}
	f.syncing, f.syncUpTo = true, f.held
	f.syncGen++
	f.stats.Syncs++
	gen := f.syncGen
	f.syncLeft = 1 // until all are submitted
	for _, b := range f.blocks {
		for i := range b.replicas {
			if b.replicas[i].synced >= b.stored {
				continue
			}
			o := f.newSync()
			o.blk, o.rep, o.gen = b, i, gen
			q := &o.req
			q.Op, q.Ref, q.Epoch, q.Len, q.Peer = torus.OpSync, b.ref, f.epoch, b.stored, b.set[i]
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

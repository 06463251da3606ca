package file

import (
	"errors"
	"fmt"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
)

// done takes a replica's answer to an append.
func (o *appendOp) done(q *torus.Request) {
	f, b, i := o.f, o.blk, o.rep
	end := q.Off + q.Len
	o.seg.unref()
	q.Data, q.Owner, o.blk, o.seg = nil, nil, nil, nil
	f.freeOps = append(f.freeOps, o)
	if b.dead || f.err != nil {
		return
	}
	if q.Err != nil {
		f.replicaFailed(q, b)
		return
	}
	b.replicas[i].stored = max(b.replicas[i].stored, end)
	b.confirm()
	f.acknowledge()
}

// replicaFailed: the answer to a mutating request was an error.
func (f *File) replicaFailed(q *torus.Request, b *openBlock) {
	if errors.Is(q.Err, torus.ErrFenced) {
		f.fenced(q.Fence)
		return
	}
	if errors.Is(q.Err, torus.ErrInvalid) {
		// If another peer says the same, not the replica is at fault but what it was sent.
		if f.refusedBy.IsZero() || f.refusedBy == q.Peer {
			f.refusedBy = q.Peer
			f.dist.MarkUnfit(q.Peer) // not asked again until the directory has news of it
			f.roll(fmt.Errorf("%v: %w", q.Op, q.Err), b, q.Peer)
			return
		}
		f.fail(fmt.Errorf("%v of %d bytes at %d to %v refused by peer %v: %w", q.Op, q.Len, q.Off, q.Ref, q.Peer, q.Err))
		return
	}
	switch {
	case errors.Is(q.Err, torus.ErrIO), errors.Is(q.Err, torus.ErrOutOfSpace) && b.kept:
		// A disk that failed refuses whatever comes. Every block begun there meanwhile would cost the others a slot.
		f.dist.MarkUnfit(q.Peer)
	case errors.Is(q.Err, torus.ErrOutOfSpace):
		f.dist.MarkFull(q.Peer)
	}
	if errors.Is(q.Err, torus.ErrNoPeer) {
		f.dist.Lost(q.Peer)
	}
	f.roll(fmt.Errorf("%v: %w", q.Op, q.Err), b, q.Peer)
}

// acknowledge completes, in order, the writes whose record and every lower one is in memory on every replica of one block.
func (f *File) acknowledge() {
	moved := false
	for f.held < f.sent && f.err == nil {
		r := f.rec(f.held + 1)
		if r.end() > r.blk.stored {
			break
		}
		f.held++
		r.home = uint64(r.blk.ref.Index)
		moved = true
		if r.acked {
			continue // it was, before a roll
		}
		r.acked = true
		f.acked = r.seq
		f.over.put(r)
		f.ahead.forget(&r.hdr)
		f.prefetch(&r.hdr)
		// Finish may come back to us, and r may be gone when it returns.
		seq, reqs := r.seq, r.reqs
		r.reqs, f.spareReqs = f.spareReqs, nil
		for i, q := range reqs {
			reqs[i] = nil
			switch {
			case q.Flags&device.FUA == 0:
				q.Finish(nil)
			case f.err != nil: // by the Finish of another
				q.Finish(f.err)
			default:
				f.waiters = append(f.waiters, flushWaiter{seq, q})
			}
		}
		f.spareReqs = reqs[:0]
	}
	if moved {
		f.gathered()
	}
	if moved && (len(f.waiters) > 0 || f.unflushed >= f.cfg.RetainBytes/4) {
		f.startSync()
	}
}

// fenced ends the file: a newer attach has been promised obedience.
func (f *File) fenced(by uint64) {
	f.fail(&torus.Error{
		Op: "write", Obj: "volume " + f.cfg.Volume.Name,
		Err:  fmt.Errorf("%w: epoch %d has taken over from epoch %d", torus.ErrFenced, by, f.epoch),
		Hint: "Another host has attached the volume; see who with `torusctl volume info " + f.cfg.Volume.Name + "`.",
	})
}

package file

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/models"
	"google.golang.org/protobuf/proto"
)

const (
	// windowBlocks is how many indexes are registered at least: 128 MiB of log with 4 MiB blocks.
	windowBlocks = 32
	// maxWindow bounds them. An unused block whose peers are all gone must still be waited for at the next attach.
	maxWindow  = 4096
	mdsTimeout = 5 * time.Second
	mdsRetry   = 300 * time.Millisecond
)

// window is the part of the open set that this writer has registered: the only blocks it may append to.
type window struct {
	spans     []*models.Span
	extending bool
	retryAt   time.Duration
}

func (w *window) hi() uint64 {
	if len(w.spans) == 0 {
		return 0
	}
	return w.spans[len(w.spans)-1].Hi
}

// placement returns where block i, which lies in the window, is.
func (w *window) placement(i uint64) *models.PlacementSet { return spanPlacement(w.spans, i) }

func spanPlacement(spans []*models.Span, i uint64) *models.PlacementSet {
	for _, s := range spans {
		if i >= s.Lo && i < s.Hi {
			if o := s.Overrides[i]; o != nil {
				return o
			}
			return &models.PlacementSet{RingVersion: s.RingVersion, Replication: s.Replication}
		}
	}
	return nil
}

// trimSpans drops what lies below lo.
func trimSpans(spans []*models.Span, lo uint64) []*models.Span {
	var out []*models.Span
	for _, s := range spans {
		if s.Hi <= lo {
			continue
		}
		s = proto.CloneOf(s)
		s.Lo = max(s.Lo, lo)
		for i := range s.Overrides {
			if i < lo {
				delete(s.Overrides, i)
			}
		}
		out = append(out, s)
	}
	return out
}

// newSpan makes a span of n fresh indexes from lo on, placed by the current ring. Where a peer of the ring's choice is not
// usable now but enough others are, the set is overridden: an index never used may have any set. In a full cluster it is enough that
// peers are there.
func (f *File) newSpan(lo uint64, n int) *models.Span {
	ring := f.dist.Ring()
	s := &models.Span{Lo: lo, Hi: lo + uint64(n), RingVersion: ring.Version(), Replication: uint32(f.repl)}
	for i := lo; i < s.Hi; i++ {
		perm := ring.GetPeers(torus.BlockRef{Type: torus.TypeBlock, Volume: f.vol, INode: torus.INodeID(f.epoch), Index: torus.IndexID(i)})
		if f.usable(perm.Set(f.repl)) {
			continue
		}
		if o := f.override(perm); o != nil {
			if s.Overrides == nil {
				s.Overrides = map[uint64]*models.PlacementSet{}
			}
			s.Overrides[i] = o
		}
	}
	return s
}

// override picks the first usable peers of a permutation and, if there are too few, others that may still give a slot that is kept
// back; nil if there are too few of these as well, or the permutation's own are no worse.
func (f *File) override(perm torus.PeerPermutation) *models.PlacementSet {
	o := &models.PlacementSet{RingVersion: f.dist.Ring().Version(), Replication: uint32(f.repl)}
	pick := func(fit func(torus.PeerID) bool) {
		for _, list := range []torus.PeerList{perm.Peers, f.dist.Ring().Members()} { // a permutation need not list everybody
			for _, p := range list {
				if len(o.Peers) < f.repl && fit(p) && !slices.ContainsFunc(o.Peers, func(q []byte) bool { return string(q) == string(p[:]) }) {
					o.Peers = append(o.Peers, append([]byte(nil), p[:]...))
				}
			}
		}
	}
	pick(f.dist.Usable)
	if len(o.Peers) < f.repl && !f.spareSet(perm.Set(f.repl)) {
		pick(f.dist.Spare)
	}
	if len(o.Peers) < f.repl {
		return nil
	}
	return o
}

// spareSet reports whether a whole set may still give slots, were it such that are kept back.
func (f *File) spareSet(set torus.PeerList) bool {
	for _, p := range set {
		if !f.dist.Spare(p) {
			return false
		}
	}
	return len(set) >= f.repl
}

// spare counts the peers that may still give a slot, were it one that is kept back.
func (f *File) spare() (n int) {
	for _, p := range f.dist.Ring().Members() {
		if f.dist.Spare(p) {
			n++
		}
	}
	return n
}

// rate is the log's growth, smoothed over some seconds.
type rate struct {
	last   uint64
	perSec float64
}

func (r *rate) tick(total uint64, d time.Duration) {
	now := float64(total-r.last) / d.Seconds()
	r.last = total
	r.perSec = max(now, r.perSec*0.9)
}

// wantAhead is how many unused indexes the window is extended to. Two thirds of them, when it is extended again, are enough to
// go on for WindowAhead without the MDS at the present rate.
func (f *File) wantAhead() uint64 {
	n := uint64(f.rate.perSec * f.cfg.WindowAhead.Seconds() * 3 / 2 / float64(f.cfg.BlockSize))
	return min(max(n, windowBlocks), maxWindow)
}

// maybeExtend registers more indexes when few are left, or none of those left can be used.
func (f *File) maybeExtend() {
	if f.win.extending || f.closing || f.err != nil || f.dist.Ring() == nil || f.loop.Now() < f.win.retryAt {
		return
	}
	left, want := max(f.win.hi(), f.next)-f.next, f.wantAhead()
	stuck := f.sent < f.last && (f.blk == nil || f.blk.closed)
	if stuck {
		if _, usable := f.dist.Room(); usable < f.repl && (f.sent >= f.mustSend() || f.spare() < f.repl) {
			return // no index would be of use; see Watch
		}
	} else if left > want*2/3 {
		return
	}
	f.win.extending = true
	loop.Go(f.loop, func(t *loop.Task) {
		f.takeMeta(t)
		span := f.newSpan(max(f.win.hi(), f.next), int(max(windowBlocks, want-min(want, left))))
		err := f.commit(t, func(s *models.VolumeState) error {
			s.Open.Spans = append(s.Open.Spans, span)
			return nil
		})
		f.releaseMeta()
		f.win.extending = false
		if err != nil {
			if f.err == nil {
				f.log.Error("cannot extend the window", "err", err)
				f.win.retryAt = f.loop.Now() + time.Second
			}
			return
		}
		f.win.spans = append(f.win.spans, span)
		f.pump()
	})
}

// takeMeta and releaseMeta let one transaction of this file run at a time.
func (f *File) takeMeta(t *loop.Task) {
	for f.metaBusy {
		t.Wait(func(wake func()) { f.metaWait = append(f.metaWait, wake) })
	}
	f.metaBusy = true
}

func (f *File) releaseMeta() {
	f.metaBusy = false
	if len(f.metaWait) > 0 {
		wake := f.metaWait[0]
		f.metaWait = f.metaWait[1:]
		wake()
	}
}

// commit changes the volume's state in the MDS. It returns when the change is known to be made, or known never to be: when
// the MDS does not answer it asks again, for as long as that takes, and tells a late success from a failure by
// the transaction's number. A newer epoch ends the file. The caller holds takeMeta.
//
// Others may amend what is not the writer's: pins, asks, how long to retain. The change
// is then made once more, to what they have left; an error of change ends the commit, and nothing is changed.
func (f *File) commit(t *loop.Task, change func(*models.VolumeState) error) error {
	from := f.state
	var to *models.VolumeState // the same for as long as an earlier attempt may yet be made, which is to be known again
	for warned := false; ; {
		if to == nil {
			to = proto.CloneOf(from.VolumeState)
			if err := change(to); err != nil {
				return err
			}
			to.Txn++
		}
		if f.err != nil {
			return f.err
		}
		var st torus.VolumeState
		var err error
		again, amended := false, false
		t.Call(func() {
			ctx, cancel := context.WithTimeout(context.Background(), mdsTimeout)
			defer cancel()
			if st, err = f.cfg.MDS.Commit(ctx, f.vol, from, to); err == nil {
				return
			}
			now, rerr := f.cfg.MDS.VolumeState(ctx, f.vol)
			switch {
			case rerr != nil:
				err = rerr
			case now.Epoch != from.Epoch:
				st = now
			case now.Txn == to.Txn && proto.Equal(now.Head, to.Head) && proto.Equal(now.Open, to.Open):
				st, err = now, nil // it had been made after all
			case now.Txn == from.Txn:
				again, amended = errors.Is(err, torus.ErrCompareFailed), now.Revision != from.Revision
				from = now // it has not: try again
			}
		})
		switch {
		case err == nil:
			f.state = st
			if warned {
				f.log.Info("the metadata service answers again")
			}
			return nil
		case st.VolumeState != nil && st.Epoch > f.epoch:
			f.fenced(st.Epoch)
			return f.err
		case errors.Is(err, torus.ErrNotExist):
			f.fail(&torus.Error{Op: "commit", Obj: "volume " + f.cfg.Volume.Name, Err: err, Hint: "The volume has been deleted."})
			return f.err
		}
		if amended {
			to = nil
		}
		if again {
			f.state = from
			continue
		}
		if f.closing && f.loop.Now() >= f.closeBy {
			// Whether it was made is not known, so no other transaction may follow: it would take this one for itself, and the
			// head it believes in would not be the one there is. The next attach finds out.
			f.fail(fmt.Errorf("%w: %w", torus.ErrMetadataUnavailable, err))
			return f.err
		}
		if !warned {
			warned = true
			f.log.Warn("the metadata service does not answer; reads, writes and flushes go on", "err", err)
		}
		t.Sleep(mdsRetry)
	}
}

// Observe tells the file of the volume's state as seen by a watch: a newer epoch than its own ends it; what it is asked to do it does.
func (f *File) Observe(st torus.VolumeState) {
	switch {
	case st.Epoch > f.epoch:
		f.fenced(st.Epoch)
	case st.Epoch == f.epoch && st.Txn == f.state.Txn && st.Revision > f.state.Revision:
		f.state = st
	}
	f.answer()
}

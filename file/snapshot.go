package file

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/models"
	"google.golang.org/protobuf/proto"
)

// A snapshot is a pinned moment: the newest INode, and the number of the last record that belongs to it. To take one costs a flush
// and a transaction, however large the volume is; whoever opens it replays the log between the two.

// answer does what others ask for in the volume's state.
func (f *File) answer() {
	if f.pinning || f.closing || f.err != nil || f.tick == nil {
		return
	}
	var compact []uint64
	asks := slices.DeleteFunc(slices.Clone(f.state.GetAsks()), func(a *models.Ask) bool {
		if a.Compact != 0 {
			compact = append(compact, a.Compact)
		}
		return a.Compact != 0 // stays until that is done: see tight
	})
	if len(compact) > 0 && f.tighten == 0 {
		f.tighten, f.tightAsks = f.number+2, compact // what is listed from here on is not meant
		f.loop.Defer(f.maybeCompact)
	}
	if len(asks) == 0 {
		return
	}
	f.pinning = true // no checkpoint begins meanwhile, so that the base is not beyond the moment
	at := f.present()
	loop.Go(f.loop, func(t *loop.Task) {
		err := f.flushTo(t, at.Seq)
		if err == nil {
			f.takeMeta(t)
			err = f.commit(t, func(s *models.VolumeState) error {
				f.fulfil(s, asks, at)
				return nil
			})
			f.releaseMeta()
		}
		f.pinning = false
		if err == nil {
			for _, a := range asks {
				f.grow(a.SizeBytes)
			}
		}
		if err != nil && f.err == nil {
			f.log.Error("cannot take a snapshot, trying again", "err", err)
			f.loop.After(time.Second, f.answer)
			return
		}
		f.maybeCheckpoint()
		f.loop.After(checkpointPause, f.maybeCheckpoint) // if it was too soon: somebody may wait for it
		f.answer()
	})
}

// present is the moment of all that has been acknowledged; its base is what the head will be when it is pinned.
func (f *File) present() *models.Moment {
	return &models.Moment{Seq: f.acked, TimeUs: f.stamp(), SizeBytes: f.size}
}

// flushTo waits until the log is flushed up to seq.
func (f *File) flushTo(t *loop.Task, seq uint64) (err error) {
	if f.flushed >= seq {
		return nil
	}
	t.Wait(func(wake func()) {
		r := &device.Request{Op: device.Flush}
		r.Done = func(r *device.Request) {
			err = r.Err
			wake()
		}
		f.waiters = append(f.waiters, flushWaiter{seq, r})
		f.startSync()
	})
	return err
}

// fulfil does what the asks say: pins the moment at under each name, and removes them.
func (f *File) fulfil(s *models.VolumeState, asks []*models.Ask, at *models.Moment) {
	for _, a := range asks {
		s.Asks = slices.DeleteFunc(s.Asks, func(x *models.Ask) bool { return proto.Equal(x, a) })
		f.flattening = f.flattening || a.Flatten
		if a.Snapshot == "" || slices.ContainsFunc(s.Pins, func(p *models.Pin) bool { return p.Name == a.Snapshot && p.Clone == 0 }) {
			continue
		}
		m := &models.Moment{Base: s.Head, Seq: at.Seq, TimeUs: at.TimeUs, SizeBytes: at.SizeBytes}
		s.Pins = append(s.Pins, &models.Pin{Name: a.Snapshot, At: m, CreatedUnixMs: f.cfg.WallClock().UnixMilli()})
	}
}

// grow makes the volume larger.
func (f *File) grow(size uint64) {
	if size > f.size {
		f.size = size
		f.m.grow(size)
		f.log.Info("the volume has grown", "bytes", size)
	}
}

// listing is whether a state has a pinned moment that reaches beyond its head.
type listing struct {
	of     *models.VolumeState
	beyond bool
}

// unlisted reports whether a pinned moment reaches beyond the head, so that the blocks of its log are not listed yet. It is asked after
// every flush, so the pins are looked through once a state.
func (f *File) unlisted() bool {
	if l := &f.listing; l.of != f.state.VolumeState {
		h := f.state.GetHead()
		l.of = f.state.VolumeState
		l.beyond = slices.ContainsFunc(f.state.GetPins(), func(p *models.Pin) bool {
			return p.At.GetBase().GetNumber() == h.GetNumber() && p.At.Seq > h.GetSeq()
		})
	}
	return f.listing.beyond
}

// Settled reports whether all that a moment needs is listed by a volume's head, so that it can be opened.
func Settled(s *models.VolumeState, m *models.Moment) bool {
	return m.Seq == m.Base.GetSeq() || s.GetHead().GetNumber() > m.Base.GetNumber()
}

var errNotSettled = errors.New("the log of this moment is not listed yet")

// Kept reports whether all that a moment needs is kept.
func Kept(s *models.VolumeState, m *models.Moment) bool {
	if !s.Deleted && s.KeptFrom > 0 && m.Base.GetNumber() >= s.KeptFrom {
		return true
	}
	return slices.ContainsFunc(s.Pins, func(p *models.Pin) bool {
		return p.At.GetBase().GetNumber() == m.Base.GetNumber() && (p.At.Seq >= m.Seq || m.Seq == m.Base.GetSeq())
	})
}

// loadMoment loads what volume vol, whose head is newest, was at a moment. own: to go on from there, so the live pages of each block
// are counted as well, without what the INodes themselves take.
func (f *File) loadMoment(t *loop.Task, vol torus.VolumeID, newest *models.Head, m *models.Moment, own bool) error {
	if newest == nil {
		return nil
	}
	if err := f.loadInode(t, vol, newest); err != nil {
		return err
	}
	if m.Base.GetNumber() != newest.Number || own {
		for i := range f.m.top {
			f.m.top[i].ptr = 0
		}
		n := &models.INode{}
		if m.Base != nil {
			var err error
			if n, err = f.readInode(t, vol, m.Base); err != nil {
				return err
			}
			if err := f.adoptTop(n); err != nil {
				return err
			}
		}
		if own {
			if err := f.recount(t, vol, m.Base, n); err != nil {
				return err
			}
		}
	}
	return f.replayTo(t, vol, m)
}

// recount sets the live pages of each block to those of INode n, but for what n itself consists of.
func (f *File) recount(t *loop.Task, vol torus.VolumeID, h *models.Head, n *models.INode) error {
	var then table
	then.init()
	if err := then.read(t, f, vol, n); err != nil {
		return err
	}
	drop := func(ref torus.BlockRef, pages int) error {
		slot, ok := then.byRef[ref]
		if !ok {
			return fmt.Errorf("INode %d does not list its own blocks: %w", n.Number, torus.ErrCorrupt)
		}
		then.addLive(slot, -pages)
		return nil
	}
	for _, x := range n.Table {
		if err := drop(pageRef(vol, x), 1); err != nil {
			return err
		}
	}
	if h != nil {
		ref := extentRef(vol, h.Inode)
		pages, err := f.inodePages(t, ref, h.Inode)
		if err == nil {
			err = drop(ref, pages)
		}
		if err != nil {
			return err
		}
	}
	for i := range f.table.e {
		e := &f.table.e[i]
		if !e.used {
			continue
		}
		live := uint32(0)
		if i < len(then.e) && then.e[i].used && then.e[i].ref == e.ref {
			live = then.e[i].live
		}
		f.table.addLive(uint32(i), int(live)-int(e.live))
	}
	return nil
}

// rebase begins anew from a moment: of this volume, or of the one it is cloned from.
func (f *File) rebase(t *loop.Task, vol torus.VolumeID, newest *models.Head, m *models.Moment) error {
	if err := f.loadMoment(t, vol, newest, m, true); err != nil {
		return err
	}
	// The table is written whole, wherever it was.
	f.meta.inodeSlot, f.meta.inodePages = 0, 0
	for i := range f.table.pages {
		f.table.pages[i], f.table.dirty[i] = nil, true
	}
	f.appliedStamp = f.stamp() // it becomes what it was then now
	if vol != f.vol {
		f.number, f.table.next, f.history, f.marks = 0, 1, nil, nil
	}
	for i := range f.table.e {
		e := &f.table.e[i]
		switch {
		case !e.used:
		case vol != f.vol:
			e.birth, e.death = 0, 0
			if e.live == 0 {
				f.table.remove(uint32(i))
				f.table.reuse(uint32(i))
			}
		case e.live > 0:
			e.death = 0
		}
	}
	return nil
}

// replayTo applies the log behind the base of a moment.
func (f *File) replayTo(t *loop.Task, vol torus.VolumeID, m *models.Moment) error {
	baseSeq := m.Base.GetSeq()
	if m.Seq == baseSeq {
		return nil
	}
	found, err := f.readLog(t, f.logBehind(vol, m), baseSeq, m.Seq)
	if err != nil {
		return err
	}
	for i, ahead := 0, 0; i < len(found); i++ {
		for ; ahead < min(i+replayAhead, len(found)); ahead++ {
			f.prefetch(&found[ahead].hdr)
		}
		if i > 0 && found[i].hdr.Seq == found[i-1].hdr.Seq {
			continue // another copy
		}
		if err := f.loadLeaves(t, &found[i].hdr); err != nil {
			return err
		}
		f.applyExtents(found[i].blk.slot, found[i].hdr.Offset/pageSize+1, &found[i].hdr)
	}
	return nil
}

// logBehind lists the blocks of the table in which the records behind the base of a moment are.
func (f *File) logBehind(vol torus.VolumeID, m *models.Moment) (blocks []*oldBlock) {
	for i := range f.table.e {
		e := &f.table.e[i]
		if !e.used || e.ref.Type != torus.TypeBlock || e.ref.Volume != vol || e.length == 0 || e.birth > m.Base.GetNumber()+1 || e.death != 0 && e.death <= m.Base.GetNumber() {
			continue
		}
		if b := m.Base; b != nil && (uint64(e.ref.INode) < b.Epoch || uint64(e.ref.INode) == b.Epoch && uint64(e.ref.Index) < b.LogLo) {
			continue
		}
		blocks = append(blocks, &oldBlock{ref: e.ref, set: e.peers, length: e.length * pageSize, slot: uint32(i)})
	}
	return blocks
}

// readLog reads the headers of the records after seq up to last, in order, all copies; last 0: as far as there are any.
func (f *File) readLog(t *loop.Task, blocks []*oldBlock, seq, last uint64) ([]foundRec, error) {
	var failed error
	t.All(len(blocks), func(k int, done func()) {
		b := blocks[k]
		f.scanBlock(b, 0, f.dist.Candidates(b.ref, b.set), func(err error) {
			if err != nil {
				failed = err
			}
			done()
		})
	})
	if failed != nil {
		return nil, failed
	}
	var found []foundRec
	for _, b := range blocks {
		for _, r := range b.recs {
			if r.hdr.Seq > seq && (r.hdr.Seq <= last || last == 0) {
				if err := f.checkExtents(&r.hdr); err != nil {
					return nil, err
				}
				found = append(found, r)
			}
		}
	}
	sortRecs(found)
	for _, r := range found {
		if r.hdr.Seq > seq+1 {
			break
		}
		seq = r.hdr.Seq
	}
	if seq < last {
		return nil, fmt.Errorf("the log of a pinned moment has no record %d: %w", seq+1, torus.ErrCorrupt)
	}
	return found, nil
}

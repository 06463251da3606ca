package file

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/distributor"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/record"
)

// Compaction copies what is still alive out of blocks that are mostly dead, so that these can be deleted: as ever, when an INode that does
// not list them has been committed. What is moved is written beside the log, to blocks of type moved, and no replay ever sees it: a
// page counts as moved when the map says so, and the map is changed only where it still points to the place the page was copied from.
// A crash loses nothing but the work. Which blocks: the cost-benefit rule of Rosenblum and Ousterhout (The Design and
// Implementation of a Log-Structured File System, 1992, section 3.5), which lets cold data wait less than hot data, since that will be dead by itself.

const (
	// compactPages is how many pages are moved at a time, about.
	compactPages = 1024
	// compactGap: dead pages between two that are alive are read with them, if they are not more than this: a request costs as much as so many.
	compactGap = 8
	// compactWait is how long compaction waits for peers that do not answer, before it leaves a block alone.
	compactWait = 5 * time.Second

	// So far below its target, compaction does not make way for anybody any more, and those who write begin to wait for it: they may write paceMost bytes
	// for each one that is moved, and paceLeast when it is paceTo below. Once a second they may write paceTick, come what may. What has died and waits for a
	// checkpoint counts as well, beyond what is always waiting for one (lag in paceAt).
	paceFrom, paceTo    = 0.0075, 0.02
	paceMost, paceLeast = 4, 0.25
	paceTick            = 4 << 20
	paceBurst           = 8 << 20
	// pacePart is after what part of what is alive, but not less than paceBurst, the pace is found out anew.
	pacePart = 512
	// compactNap is how long compaction sleeps at most before it sees whether it has still time to.
	compactNap = 10 * time.Millisecond
	// tightUtilisation: who asks for a volume to be compact has all blocks compacted that are less alive than this.
	tightUtilisation = 0.97
	// roundPages bounds what is moved before it is found out anew what to move.
	roundPages = 8 * compactPages
	// avoidFor is how long a block that could not be read is left alone: its peers may be back by then, or a copy mended.
	avoidFor = time.Minute
)

// moving is a page on the move.
type moving struct {
	page uint64
	from entry
	crc  uint32
	data []byte
	to   entry
}

func (f *File) maybeCompact() {
	if f.compacting || f.closing || f.closed || f.err != nil || f.cfg.Utilisation <= 0 && !f.flattening && f.tighten == 0 || f.full {
		return
	}
	slots, pace := f.victims()
	untidy := f.untidy()
	if len(slots) == 0 && len(untidy) == 0 {
		f.tight()
		return
	}
	f.compacting = true
	f.setPace(pace)
	loop.Go(f.loop, func(t *loop.Task) {
		f.emptying = true
		err := f.compactAll(t, slots)
		f.emptying = false
		f.setPace(0)
		if err != nil {
			f.compactAfter = f.loop.Now() + time.Second
		}
		if len(untidy) > 0 && !f.closing && f.err == nil {
			f.tidy(t, untidy)
		}
		f.compacting = false
		if f.flattening {
			f.sinceCkpt++ // the next one has something to say, even if nothing is written: that the victims are of no more use
		}
		if err != nil && f.err == nil {
			f.log.Warn("compaction failed, trying again later", "err", err)
		}
	})
}

// avoided is a block that could not be compacted, and until when nobody tries again.
type avoided struct {
	ref   torus.BlockRef
	until time.Duration
}

func (f *File) avoid(slot uint32, err error) {
	ref := f.table.e[slot].ref
	if !f.avoids(slot) && !f.closing && f.err == nil {
		f.log.Warn("a block cannot be compacted, leaving it alone for a while", "block", ref, "err", err)
	}
	f.avoided[slot] = avoided{ref, f.loop.Now() + avoidFor}
}

func (f *File) avoids(slot uint32) bool {
	a, ok := f.avoided[slot]
	if ok && (a.until <= f.loop.Now() || a.ref != f.table.e[slot].ref) {
		delete(f.avoided, slot)
		ok = false
	}
	return ok
}

// compactAll compacts victims until there are none. While there is a pace the next blocks are read as those before are moved.
func (f *File) compactAll(t *loop.Task, slots []victim) error {
	var ahead *batch
	defer func() {
		if ahead != nil {
			ahead.wait(t)
			ahead.drop(f)
		}
	}()
	for len(slots) > 0 {
		for ; len(slots) > 0 || ahead != nil; slots = f.still(slots) {
			began, log := f.loop.Now(), f.stats.LogBytes
			b := ahead
			if ahead = nil; b == nil {
				b, slots = f.nextBatch(slots)
			}
			b.wait(t)
			if slots = f.still(slots); len(slots) > 0 && f.pace > 0 && !f.closing && f.err == nil {
				ahead, slots = f.nextBatch(slots)
			}
			err := f.move(t, b.l)
			b.drop(f)
			if err != nil {
				return err
			}
			f.allow(int64(f.pace * float64(b.pages*pageSize)))
			for f.err == nil && !f.closing && f.m.dirtyLeaves > f.m.maxLeaves/2 {
				f.maybeCheckpoint()
				t.Sleep(5 * time.Millisecond)
				f.allow(paceTick / 100)
			}
			if f.closing {
				return nil
			}
			if f.err != nil {
				return f.err
			}
			if f.stats.LogBytes != log {
				for now := f.loop.Now(); f.pace == 0 && !f.closing && f.err == nil && f.loop.Now() < now+now-began; { // half of the time belongs to those who write
					t.Sleep(min(now-began, compactNap))
				}
			}
		}
		var pace float64
		slots, pace = f.victims()
		f.setPace(pace)
	}
	return nil
}

// setPace says how many bytes may be written for each that is moved; 0: any number.
func (f *File) setPace(pace float64) {
	if f.pace == 0 && pace > 0 {
		f.allowance = paceBurst
	}
	f.pace = pace
	if pace == 0 {
		f.resumeWaiting()
	}
}

// allow lets so many bytes more be written.
func (f *File) allow(n int64) {
	if f.pace > 0 {
		f.allowance = min(f.allowance+n, paceBurst)
		f.resumeWaiting()
	}
}

// paced reports whether whoever writes has to wait for compaction.
func (f *File) paced() bool { return f.pace > 0 && f.allowance <= 0 }

// charge takes a request off what may be written: what it brings to store, and not what it trims or fills with zeroes, which may be a terabyte.
func (f *File) charge(r *device.Request) {
	if r.Op != device.Write {
		return
	}
	f.allowance -= int64(r.Len)
	if f.unseen -= int64(r.Len); f.unseen <= 0 {
		live, _ := f.table.usage()
		f.unseen = max(paceBurst, int64(live/pacePart))
		f.loop.Defer(f.wearFn)
	}
}

// worn finds out, after a part of the volume has been written, how worn its blocks are by now.
func (f *File) worn() {
	if !f.compacting {
		if f.loop.Now() >= f.compactAfter {
			f.maybeCompact()
		}
	} else if f.emptying && f.cfg.Utilisation > 0 {
		f.setPace(f.paceAt(f.wear(nil)))
	}
}

// tight ends what somebody has asked for: nothing is left to be moved. The first checkpoint gives back what has been emptied and writes nodes to where they
// are to stay, the second gives back where these were, and takes the ask away.
func (f *File) tight() {
	if f.tighten == 0 || f.checkpointing || f.pinning {
		return
	}
	f.checkpointing = true
	loop.Go(f.loop, func(t *loop.Task) {
		err := f.checkpoint(t, func(*models.VolumeState) error { return nil })
		more := err == nil && (f.compacting || f.tidied == f.number || f.pinning || len(f.untidy()) > 0)
		if err == nil && !more {
			err = f.checkpoint(t, func(s *models.VolumeState) error {
				s.Asks = slices.DeleteFunc(s.Asks, func(a *models.Ask) bool { return slices.Contains(f.tightAsks, a.Compact) })
				return nil
			})
		}
		f.checkpointing = false
		if err != nil {
			if f.err == nil {
				f.log.Warn("checkpoint failed, trying again", "err", err)
			}
			return // the next tick comes back to it
		}
		if more {
			f.maybeCompact()
			return
		}
		f.tighten, f.tightAsks = 0, nil
		f.maybeCheckpoint()
		f.answer()
	})
}

// victim is a block to be compacted: the slot may be another's by the time it is its turn.
type victim struct {
	slot uint32
	ref  torus.BlockRef
}

// still drops from a list of victims what has died in the meantime.
func (f *File) still(l []victim) []victim {
	return slices.DeleteFunc(l, func(v victim) bool {
		e := &f.table.e[v.slot]
		return !e.used || e.ref != v.ref || e.live == 0 || f.avoids(v.slot)
	})
}

// victims returns what to compact, best first: as much as brings the data blocks to the target, and not more than some at once. pace is how many bytes may
// be written meanwhile for each that is moved; see setPace.
// To flatten a clone is to take what it has of its origin for victims, and to tighten a volume to take all that is not nearly whole, once.
func (f *File) victims() (slots []victim, pace float64) {
	type candidate struct {
		slot  uint32
		score float64
	}
	var l []candidate
	var loose []uint32 // to be moved only because somebody has asked
	if f.flattening {
		for i := range f.table.e {
			e := &f.table.e[i]
			if e.used && e.live > 0 && isData(e.ref.Type) && e.ref.Volume != f.vol && !e.held && len(slots) < 16 && !f.avoids(uint32(i)) {
				slots = append(slots, victim{uint32(i), e.ref})
			}
		}
	}
	w := f.wear(func(slot uint32, e *tableEntry) {
		u := float64(e.live) / float64(e.length)
		if u < tightUtilisation && e.birth < f.tighten {
			loose = append(loose, slot)
		}
		if u < 0.95 {
			l = append(l, candidate{slot, (1 - u) * float64(f.number-min(f.number, e.birth)+1) / (1 + u)})
		}
	})
	target := f.cfg.Utilisation
	if dead := int64(w.length) - int64(float64(w.live)/target); target > 0 && dead > 0 && w.length-w.live >= f.slack() {
		slices.SortFunc(l, func(x, y candidate) int {
			return cmp.Or(cmp.Compare(y.score, x.score), cmp.Compare(x.slot, y.slot))
		})
		for moved := uint32(0); len(l) > 0 && dead > 0 && moved < roundPages; l = l[1:] {
			e := &f.table.e[l[0].slot]
			slots = append(slots, victim{l[0].slot, e.ref})
			dead -= int64(e.length - e.live)
			moved += e.live
		}
		if len(slots) > 0 {
			pace = f.paceAt(w)
		}
	}
	if len(slots) == 0 {
		for moved := uint32(0); len(loose) > 0 && moved < roundPages; loose = loose[1:] {
			e := &f.table.e[loose[0]]
			slots = append(slots, victim{loose[0], e.ref})
			moved += e.live
		}
	}
	return slots, pace
}

// wear is what the data blocks hold that compaction deals with, in pages: those of the volume itself that are not being written, nor needed by a pin anyway.
type wear struct {
	live, length uint64 // of those with something alive
	dying        uint64 // length of those with nothing alive, which the next checkpoint gives back
}

// wear counts, and calls each, unless it is nil, for every block with something alive that nobody is at already.
func (f *File) wear(each func(slot uint32, e *tableEntry)) (w wear) {
	keep := newPins(f.state.VolumeState, 0)
	lo := f.lowest()
	for i := range f.table.e {
		e := &f.table.e[i]
		if !e.used || !isData(e.ref.Type) || e.ref.Volume != f.vol || f.moves.at(uint32(i)) || f.avoids(uint32(i)) ||
			e.ref.Type == torus.TypeBlock && uint64(e.ref.INode) == f.epoch && uint64(e.ref.Index) >= lo ||
			keep.need(&tableEntry{ref: e.ref, birth: e.birth, death: f.number + 1}) {
			continue
		}
		if e.live == 0 {
			if e.death == 0 { // else a checkpoint has found that it is to be kept
				w.dying += uint64(e.length)
			}
			continue
		}
		w.live += uint64(e.live)
		w.length += uint64(e.length)
		if each != nil && !e.held {
			each(uint32(i), e)
		}
	}
	return w
}

// slack is how many dead pages are not worth the trouble.
func (f *File) slack() uint64 {
	return uint64(f.cfg.CompactSlack) * uint64(f.cfg.BlockSize) / pageSize
}

// paceAt is how many bytes may be written for each that is moved while the blocks are so worn; 0: any number.
func (f *File) paceAt(w wear) float64 {
	if w.live == 0 {
		return 0
	}
	lag := max(w.live/ckptPart, f.slack())
	dying := min(w.dying, f.sinceCkpt/pageSize, 2*lag) // it is not for writers to wait for what a trim has killed, nor for an MDS that is away
	spare := f.slack() + lag
	below := f.cfg.Utilisation - float64(w.live)/float64(max(w.live, w.length+dying-min(w.length+dying, spare)))
	if below <= paceFrom {
		return 0
	}
	return max(paceLeast, paceMost-(paceMost-paceLeast)*(below-paceFrom)/(paceTo-paceFrom))
}

// batch is some blocks to be compacted, and what is alive in them.
type batch struct {
	slots []victim
	pages int // alive when it was begun
	l     []moving
	bufs  []*buf.Buf // what l lies in
	ready bool
	wake  func() // unless it is nil: of who waits for it
}

// nextBatch begins to read the first of some blocks, and returns the others. One that cannot be read is avoided for a while.
func (f *File) nextBatch(slots []victim) (b *batch, rest []victim) {
	b = &batch{}
	n := 0
	for ; n < len(slots); n++ {
		e := &f.table.e[slots[n].slot]
		if n > 0 && b.pages+int(e.live) > compactPages {
			break
		}
		b.pages += int(e.live)
		e.held = true // nobody else gets its place in the table meanwhile
	}
	b.slots = slots[:n]
	loop.Go(f.loop, func(t *loop.Task) {
		for _, v := range b.slots {
			got, err := f.alive(t, v.slot)
			if err != nil {
				f.avoid(v.slot, err)
				continue
			}
			b.l = append(b.l, got...)
		}
		slices.SortFunc(b.l, func(x, y moving) int { return cmp.Compare(x.page, y.page) })
		b.bufs = f.fetch(t, b.l)
		b.l = slices.DeleteFunc(b.l, func(m moving) bool { return m.data == nil })
		b.ready = true
		if b.wake != nil {
			b.wake()
		}
	})
	return b, slots[n:]
}

// wait returns when what is alive has been read.
func (b *batch) wait(t *loop.Task) {
	if !b.ready {
		t.Wait(func(wake func()) { b.wake = wake })
	}
}

// drop lets go of the blocks, and of what has been read.
func (b *batch) drop(f *File) {
	for _, v := range b.slots {
		f.table.e[v.slot].held = false
	}
	for _, x := range b.bufs {
		x.Release()
	}
}

// alive finds the pages of a block that the map points to.
func (f *File) alive(t *loop.Task, slot uint32) (l []moving, err error) {
	e := f.table.e[slot]
	b := &oldBlock{ref: e.ref, length: e.length * pageSize}
	t.Wait(func(wake func()) {
		f.scanBlock(b, 0, f.dist.Candidates(e.ref, e.peers), func(e error) {
			err = e
			wake()
		})
	})
	if err != nil {
		return nil, err
	}
	byLeaf := map[uint64][]moving{}
	var order []uint64
	for i := range b.recs {
		h := &b.recs[i].hdr
		if err := f.checkExtents(h); err != nil {
			return nil, err
		}
		k := uint32(0)
		for _, x := range h.Extents {
			if !x.Kind.HasPages() {
				continue
			}
			for p := x.Page; p < x.Page+uint64(x.Count); p++ {
				leaf := p / leafPages
				if byLeaf[leaf] == nil {
					order = append(order, leaf)
				}
				byLeaf[leaf] = append(byLeaf[leaf], moving{page: p, from: dataEntry(slot, h.Offset/pageSize+1+k, h.CRCs[k]), crc: h.CRCs[k]})
				k++
			}
		}
	}
	err = f.eachLeaf(t, order, func(leaf uint64) {
		for _, m := range byLeaf[leaf] {
			if now, ok := f.m.get(m.page); ok && now == m.from {
				l = append(l, m)
			}
		}
	})
	return l, err
}

// eachLeaf calls fn for each leaf while it is in memory. It gives up on peers that do not answer.
func (f *File) eachLeaf(t *loop.Task, leaves []uint64, fn func(leaf uint64)) (failed error) {
	const atOnce = 32
	for len(leaves) > 0 && failed == nil {
		part := leaves[:min(atOnce, len(leaves))]
		leaves = leaves[len(part):]
		t.Wait(func(wake func()) {
			waits, over := len(part), false
			end := func(err error) {
				if failed == nil {
					failed = err
				}
				over = true
				wake()
			}
			timer := f.loop.After(compactWait, func() { end(fmt.Errorf("no answer for %v: %w", compactWait, torus.ErrBlockUnavailable)) })
			for _, leaf := range part {
				f.m.load(leaf*leafPages, func(err error) {
					if over {
						return
					}
					if err == nil {
						fn(leaf)
					} else if failed == nil {
						failed = err
					}
					if waits--; waits == 0 {
						timer.Stop()
						end(nil)
					}
				})
			}
		})
		if failed == nil {
			failed = f.err
		}
	}
	return failed
}

// fetch reads pages from wherever they are, those that are near each other together, and verifies each. The caller releases what they are in. The blocks
// of those that could not be read, whose data stays nil, are avoided from then on.
func (f *File) fetch(t *loop.Task, l []moving) (bufs []*buf.Buf) {
	at := make([]int, len(l)) // l by place
	for i := range at {
		at[i] = i
	}
	slices.SortFunc(at, func(x, y int) int { return cmp.Compare(l[x].from.place(), l[y].from.place()) })
	var runs [][]int
	from := func(i int) entry { return l[at[i]].from }
	for n := 0; n < len(at); {
		k := n + 1
		for k < len(at) && from(k).near(from(k-1), compactGap) && from(k).page()-from(n).page() < runPages {
			k++
		}
		runs = append(runs, at[n:k])
		n = k
	}
	until := f.loop.Now() + compactWait
	giveUp := func() error {
		if f.err == nil && f.loop.Now() > until {
			return fmt.Errorf("no answer for %v: %w", compactWait, torus.ErrBlockUnavailable)
		}
		return f.err
	}
	const atOnce = 16
	for len(runs) > 0 {
		part := runs[:min(atOnce, len(runs))]
		runs = runs[len(part):]
		t.All(len(part), func(i int, done func()) {
			run := part[i]
			first := l[run[0]].from
			if f.avoids(first.slot()) {
				done()
				return
			}
			size := int(l[run[len(run)-1]].from.page()-first.page()+1) * pageSize
			b := buf.Get(size)
			at := len(bufs)
			bufs = append(bufs, b)
			in := func(data []byte, x int) []byte { return data[(l[x].from.page()-first.page())*pageSize:][:pageSize] }
			f.readAt(first, b.Bytes()[:size], b, nil, true, giveUp, func(rd *distributor.Read) bool {
				return !slices.ContainsFunc(run, func(x int) bool { return record.Checksum(in(rd.Data, x)) != l[x].crc })
			}, func(rd *distributor.Read) {
				bufs[at] = rd.Buf
				if rd.Err != nil {
					f.avoid(first.slot(), rd.Err)
				} else {
					for _, x := range run {
						l[x].data = in(rd.Data, x)
					}
				}
				rd.Release()
				done()
			})
		})
	}
	return bufs
}

// move writes pages to where they are to be, durably, and has the map point there.
func (f *File) move(t *loop.Task, l []moving) error {
	if len(l) == 0 {
		return nil
	}
	w := &f.moves
	var recs []*sideRec
	var r *sideRec
	finish := func() {
		w.close(f, r)
		r = nil
	}
	defer func() {
		for _, r := range recs {
			r.b.Release()
			if e := &f.table.e[r.blk.slot]; e.ref == r.blk.ref {
				e.held = false
			}
		}
	}()
	for i := range l {
		m := &l[i]
		if r != nil && (r.pages == r.maxPages || len(r.hdr.Extents) == record.MaxExtents) {
			finish()
		}
		if r == nil {
			var err error
			if r, err = w.record(f, 1, true); err != nil {
				w.blk = nil // what has been placed in it is not written
				return err
			}
			recs = append(recs, r)
			f.table.e[r.blk.slot].held = true
		}
		copy(r.b.Bytes()[record.HeaderSize+r.pages*pageSize:], m.data)
		if k := len(r.hdr.Extents) - 1; k >= 0 && r.hdr.Extents[k].Page+uint64(r.hdr.Extents[k].Count) == m.page {
			r.hdr.Extents[k].Count++
		} else {
			r.hdr.Extents = append(r.hdr.Extents, record.Extent{Page: m.page, Count: 1, Kind: record.Moved})
		}
		r.hdr.CRCs = append(r.hdr.CRCs, m.crc)
		m.to = dataEntry(r.blk.slot, r.off/pageSize+1+uint32(r.pages), m.crc)
		r.pages++
	}
	finish()
	if err := f.writeSide(t, recs); err != nil {
		w.blk = nil
		return err
	}
	for _, r := range recs {
		f.table.setLength(r.blk.slot, (r.off+uint32(len(r.mem())))/pageSize)
		f.stats.MovedBytes += uint64(len(r.mem()))
		f.sinceCkpt += uint64(len(r.mem()))
	}
	byLeaf := map[uint64][]*moving{}
	var order []uint64
	for i := range l {
		leaf := l[i].page / leafPages
		if byLeaf[leaf] == nil {
			order = append(order, leaf)
		}
		byLeaf[leaf] = append(byLeaf[leaf], &l[i])
	}
	err := f.eachLeaf(t, order, func(leaf uint64) {
		for _, m := range byLeaf[leaf] {
			if now, ok := f.m.get(m.page); !ok || now != m.from {
				continue // written since
			}
			node := f.m.writable(m.page)
			f.m.touch(node)
			node.e[m.page%fanout] = m.to
			f.table.addLive(m.from.slot(), -1)
			f.table.addLive(m.to.slot(), 1)
		}
	})
	f.maybeCheckpoint()
	if err != nil && !errors.Is(err, torus.ErrCorrupt) { // what a damaged leaf points to stays where it is
		return err
	}
	return nil
}

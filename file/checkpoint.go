package file

import (
	"fmt"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/record"
	"google.golang.org/protobuf/proto"
)

// metaWriter writes what a checkpoint writes.
type metaWriter struct {
	sideWriter
	inodeSlot  uint32 // where the newest INode lies
	inodePages int    // 0: there is none
}

// The classes of metadata pages, kept in the Page of their extent. A hint for whoever reads a block by itself.
const (
	classLeaf  = 1
	classInner = 2
	classTable = 3
	classINode = 4
)

// fullCheckpoint is how often a checkpoint is made, if there is anything to commit, while the cluster is full, or somebody waits for a clone to be flat.
const fullCheckpoint = time.Second

// ckptPart is what part of the live data may be waiting for a checkpoint to be given back; half of that while compaction is at work
// and more is stored than it aims at by ckptHaste.
const (
	ckptPart  = 32
	ckptHaste = 0.05
)

// checkpointPause is the least between two checkpoints.
const checkpointPause = time.Second / 4

func (f *File) maybeCheckpoint() {
	if f.checkpointing || f.closing || f.closed || f.err != nil {
		return
	}
	now := f.loop.Now()
	every := f.cfg.CheckpointEvery
	if f.full || f.tighten > 0 || f.flattening && !f.state.GetOwn() {
		every = min(every, fullCheckpoint) // what has been trimmed is given back by a checkpoint only, and it says that nothing is shared any more
	}
	if f.sinceCkpt < f.checkpointBytes() && f.m.dirtyLeaves < f.m.maxLeaves/2 && !f.unlisted() &&
		(f.sinceCkpt == 0 || now-f.lastCkpt < every) || f.pinning {
		return
	}
	if now-f.lastCkpt < checkpointPause { // one that failed is not repeated at once
		return
	}
	f.checkpointing = true
	loop.Go(f.loop, func(t *loop.Task) {
		err := f.checkpoint(t, func(*models.VolumeState) error { return nil })
		f.checkpointing = false
		if err != nil && f.err == nil {
			f.log.Warn("checkpoint failed, trying again later", "err", err)
		}
		f.apply()
		f.maybeCompact()
	})
}

// checkpointBytes is how much log there may be between two checkpoints: what is configured, or less while more is stored than compaction aims at, as
// only a checkpoint gives back what has died.
func (f *File) checkpointBytes() uint64 {
	live, stored := f.table.usage()
	if f.cfg.Utilisation <= 0 || float64(stored) < float64(live)/f.cfg.Utilisation {
		return f.cfg.CheckpointBytes
	}
	part := live / ckptPart
	if f.compacting && float64(stored) > (1+ckptHaste)*float64(live)/f.cfg.Utilisation {
		part /= 2
	}
	return min(f.cfg.CheckpointBytes, max(part, f.slack()*pageSize))
}

// frozen is a checkpoint being written: the map as it was at one moment.
type frozen struct {
	recs   []*sideRec
	cur    *sideRec
	undo   []func() // what a failure takes back, last first
	leaves []*leaf
	inners []*inner
	dying  []uint32 // slots of blocks that nothing points to any more; the new INode does not list them
	refs   []tableEntry
	head   *models.Head
	lo     uint64
	pins   pins
	// foreign: something of another volume, which this one was cloned from, is listed.
	foreign bool

	history []*models.Head
	marks   []*models.Mark
}

// checkpoint writes the map's changed nodes and the table's changed pages, durably on R peers, then an INode, and
// commits it. It covers what is applied, hence flushed. change may alter the state further in the same transaction.
func (f *File) checkpoint(t *loop.Task, change func(*models.VolumeState) error) error {
	f.lastCkpt = f.loop.Now()
	since := f.sinceCkpt
	f.sinceCkpt = 0
	z, err := f.freeze()
	if err == nil {
		err = f.writeSide(t, z.recs)
	}
	for _, r := range z.recs {
		r.b.Release()
	}
	if err != nil {
		f.meta.blk = nil
		f.thaw(z)
		f.sinceCkpt += since
		return err
	}
	f.takeMeta(t)
	err = f.commit(t, func(s *models.VolumeState) error {
		if !z.pins.cover(s) {
			return fmt.Errorf("more is to be kept than when the checkpoint began: %w", torus.ErrCompareFailed)
		}
		for _, p := range s.Pins { // the blocks of the log behind a pinned INode are listed by the next one, whole
			if p.At.GetBase().GetNumber() == s.Head.GetNumber() && p.At.Seq > z.head.Seq {
				return fmt.Errorf("record %d is pinned, and the checkpoint ends with %d: %w", p.At.Seq, z.head.Seq, torus.ErrCompareFailed)
			}
		}
		s.Head, s.KeptFrom, s.Own = z.head, z.pins.from, f.cfg.Volume.Origin != nil && !z.foreign
		if s.Open != nil {
			s.Open.Spans = trimSpans(s.Open.Spans, z.lo)
		}
		return change(s)
	})
	f.releaseMeta()
	if err != nil {
		f.thaw(z)
		f.sinceCkpt += since
		return err
	}
	for _, l := range z.leaves {
		l.frozen = false
	}
	f.m.frozen -= len(z.leaves)
	f.m.evict() // new leaves are made without a load
	for _, in := range z.inners {
		in.frozen = false
	}
	f.win.spans = trimSpans(f.win.spans, z.lo)
	f.stats.Checkpoints++
	f.history, f.marks = z.history, z.marks
	f.deleteBlocks(z)
	f.sealBlocks(z.lo)
	f.maybeCompact()
	return nil
}

// sealBlocks tells the peers of blocks that will never be appended to again how long they are: data blocks below the window
// that has been committed (full ones have been sealed as soon as they were flushed), and metadata blocks but the present one. A hint: a sealed block is trusted by its
// entry, so that a peer that starts need not read it, nor take rot in it for its end.
func (f *File) sealBlocks(lo uint64) {
	for i := range f.table.e {
		e := &f.table.e[i]
		switch {
		case !e.used || e.sealed || e.length == 0 || e.held || e.ref.Volume != f.vol:
			continue
		case e.ref.Type != torus.TypeBlock:
			if f.meta.at(uint32(i)) || f.moves.at(uint32(i)) {
				continue
			}
		case uint64(e.ref.INode) == f.epoch && uint64(e.ref.Index) >= lo:
			continue
		}
		f.sealBlock(uint32(i), e.length*pageSize)
	}
}

func (f *File) sealBlock(slot, length uint32) {
	e := &f.table.e[slot]
	e.sealed = true
	for _, p := range e.peers {
		f.dist.Submit(p, &torus.Request{Op: torus.OpSeal, Ref: e.ref, Epoch: f.epoch, Len: length, Peer: p, Done: func(r *torus.Request) {
			if r.Err != nil {
				f.log.Debug("seal", "block", r.Ref.String(), "peer", r.Peer, "err", r.Err)
			}
		}})
	}
}

// lowest is where the window may begin: no block above it holds a record that the map lacks. A record that was acknowledged
// keeps the block it was whole in until it is whole in a later one (model rule 4).
func (f *File) lowest() uint64 {
	lo := f.next
	if f.blk != nil {
		lo = uint64(f.blk.ref.Index)
	}
	for s := f.applied + 1; s <= f.last; s++ {
		r := f.rec(s)
		if s <= f.acked {
			lo = min(lo, r.home)
		}
		if s <= f.sent {
			lo = min(lo, uint64(r.blk.ref.Index))
		}
	}
	return lo
}

// freeze lays out and copies everything that a checkpoint has to write.
func (f *File) freeze() (*frozen, error) {
	z := &frozen{lo: f.lowest()}
	f.number++
	f.table.next = f.number
	defer func() { f.table.next = f.number + 1 }()
	f.remember(z)
	z.pins = newPins(f.state.VolumeState, f.keepFrom(z.marks))
	// Blocks that nothing points to: unlist them now, unless a pin needs them, and delete them when that is committed.
	for i := range f.table.e {
		e := &f.table.e[i]
		slot := uint32(i)
		z.foreign = z.foreign || e.used && (e.live > 0 || e.held) && e.ref.Volume != f.vol // one that is held may yet be found to be needed
		if !e.used || e.live > 0 || e.held || f.meta.at(slot) || f.moves.at(slot) ||
			e.ref.Type == torus.TypeBlock && e.ref.Volume == f.vol && uint64(e.ref.INode) == f.epoch && uint64(e.ref.Index) >= z.lo {
			continue
		}
		saved := *e
		if e.death == 0 {
			e.death = f.number
		}
		if z.pins.need(e) {
			z.foreign = z.foreign || e.ref.Volume != f.vol
			if saved.death == 0 {
				f.table.touch(slot)
				z.undo = append(z.undo, func() { f.table.e[slot].death = 0 })
			}
			continue
		}
		z.dying, z.refs = append(z.dying, slot), append(z.refs, saved)
		f.table.remove(slot)
		z.undo = append(z.undo, func() {
			f.table.e[slot] = saved
			f.table.byRef[saved.ref] = slot
			f.table.lengthAll += uint64(saved.length)
			f.table.touch(slot)
		})
	}
	// The INode first, into a record of its own, since its bytes must lie together.
	pages := f.inodeNeeds(z)
	if pages > f.inodeMost() {
		return z, fmt.Errorf("an INode of %d pages does not fit a block: %w", pages, torus.ErrOutOfSpace)
	}
	inode, err := f.meta.record(f, pages, false)
	if err != nil {
		return z, err
	}
	inode.blk.end = inode.off + uint32(record.HeaderSize+pages*pageSize)
	f.table.setLength(inode.blk.slot, inode.blk.end/pageSize)
	z.recs = append(z.recs, inode)
	f.count(z, inode.blk.slot, pages)
	if f.meta.inodePages > 0 {
		f.count(z, f.meta.inodeSlot, -f.meta.inodePages)
	}
	oldSlot, oldPages := f.meta.inodeSlot, f.meta.inodePages
	f.meta.inodeSlot, f.meta.inodePages = inode.blk.slot, pages
	z.undo = append(z.undo, func() { f.meta.inodeSlot, f.meta.inodePages = oldSlot, oldPages })

	for ti := range f.m.top {
		if err := f.freezeInner(z, f.m.top[ti]); err != nil {
			return z, err
		}
	}
	if err := f.freezeTable(z); err != nil {
		return z, err
	}
	f.finishInode(z, inode, pages)
	return z, nil
}

// inodeNeeds bounds from above how many pages the next INode takes.
func (f *File) inodeNeeds(z *frozen) int {
	size := 128 + 9*len(f.m.top) + tablePage*(len(f.table.pages)+2)
	if z != nil {
		size += proto.Size(&models.INode{History: z.history, Marks: z.marks})
	} else {
		size += 16 << 10
	}
	for _, s := range f.table.sets {
		size += (proto.Size(s) + 8) * 2
	}
	return (size + pageSize - 1) / pageSize
}

// tablePage is the most bytes that a models.TablePage takes with numbers below 2^56.
const tablePage = 2 + 1 + 8 + 1 + 8 + 1 + 2 + 1 + 4 + 1 + 3

// inodeMost is how many it may take: it lies in one record of one block.
func (f *File) inodeMost() int { return inodeMost(uint64(f.cfg.BlockSize)) }

func inodeMost(blockSize uint64) int {
	return min(record.MaxPages, int(blockSize/pageSize)-1)
}

// MaxSize is how large a volume may be, in bytes, by the size of blocks: an INode must be able to list it, written to the last page, with what compaction
// leaves behind, and the log of a busy hour. Whole GiB.
func MaxSize(blockSize uint64) uint64 {
	blocks := min(uint64(inodeMost(blockSize)-8)*pageSize/tablePage*tablePageSlots, maxTable)
	return blocks * blockSize / 10 * 7 >> 30 << 30
}

// tableFull reports whether the volume cannot list more blocks: their places have 24 bits in an entry of the map, and the pages
// of the table are listed in the INode. Some are kept for what a checkpoint itself writes.
func (f *File) tableFull(reserve int) bool {
	return f.table.full() || f.inodeNeeds(nil)+reserve > f.inodeMost()
}

// count changes a block's live pages, until the checkpoint fails.
func (f *File) count(z *frozen, slot uint32, n int) {
	f.table.addLive(slot, n)
	z.undo = append(z.undo, func() { f.table.addLive(slot, -n) })
}

// page places one more metadata page, writes it by fill, and returns where it will be.
func (f *File) metaPage(z *frozen, class uint64, fill func([]byte)) (entry, error) {
	r := z.cur
	if r == nil || r.pages == r.maxPages {
		if r != nil {
			f.meta.close(f, r)
			z.cur = nil
		}
		var err error
		if r, err = f.meta.record(f, 1, true); err != nil {
			return 0, err
		}
		z.cur = r
		z.recs = append(z.recs, r)
	}
	dst := r.b.Bytes()[record.HeaderSize+r.pages*pageSize:][:pageSize]
	fill(dst)
	crc := record.Checksum(dst)
	r.hdr.CRCs = append(r.hdr.CRCs, crc)
	if k := len(r.hdr.Extents) - 1; k >= 0 && (r.hdr.Extents[k].Page == class || k+1 == record.MaxExtents) {
		r.hdr.Extents[k].Count++
	} else {
		r.hdr.Extents = append(r.hdr.Extents, record.Extent{Page: class, Count: 1, Kind: record.Node})
	}
	e := dataEntry(r.blk.slot, r.off/pageSize+1+uint32(r.pages), crc)
	r.pages++
	f.count(z, r.blk.slot, 1)
	return e, nil
}

// freezeInner writes the changed leaves below an interior node, and then that.
func (f *File) freezeInner(z *frozen, t *topNode) error {
	in := t.in
	if in == nil || !in.dirty {
		return nil
	}
	for i, l := range in.leaf {
		if l == nil || !l.dirty {
			continue
		}
		var e entry
		if !isZero(l.e) {
			var err error
			if e, err = f.metaPage(z, classLeaf, func(b []byte) { encodeNode(l.e, b) }); err != nil {
				return err
			}
		}
		old := in.ptr[i]
		if old.kind() == entryData {
			f.count(z, old.slot(), -1)
		}
		in.ptr[i] = e
		l.dirty, l.frozen = false, true
		f.m.frozen++
		f.m.dirtyLeaves--
		z.leaves = append(z.leaves, l)
		z.undo = append(z.undo, func() {
			in.ptr[i] = old
			l.frozen = false
			f.m.frozen--
			f.m.touch(l)
		})
	}
	var e entry
	if !isZero(&in.ptr) {
		var err error
		if e, err = f.metaPage(z, classInner, func(b []byte) { encodeNode(&in.ptr, b) }); err != nil {
			return err
		}
	}
	old := t.ptr
	if old.kind() == entryData {
		f.count(z, old.slot(), -1)
	}
	t.ptr = e
	in.dirty, in.frozen = false, true
	z.inners = append(z.inners, in)
	z.undo = append(z.undo, func() {
		t.ptr = old
		in.dirty, in.frozen = true, false
	})
	return nil
}

// freezeTable places the changed pages of the block table. Placing one changes the counts of blocks, and
// so may change another page; when no more pages change, all are written.
func (f *File) freezeTable(z *frozen) error {
	t := &f.table
	type placed struct {
		r    *sideRec
		page int
	}
	at := map[int]placed{}
	for again := true; again; {
		again = false
		for p := 0; p < len(t.dirty); p++ {
			if _, ok := at[p]; ok || !t.dirty[p] {
				continue
			}
			again = true
			e, err := f.metaPage(z, classTable, func([]byte) {})
			if err != nil {
				return err
			}
			at[p] = placed{z.cur, z.cur.pages - 1}
			old := t.pages[p]
			if old != nil {
				if slot, ok := t.byRef[pageRef(f.vol, old)]; ok {
					f.count(z, slot, -1)
				}
			}
			b := &t.e[e.slot()]
			t.pages[p] = &models.TablePage{Epoch: uint64(b.ref.INode), Index: uint64(b.ref.Index), Page: e.page(), Set: uint32(b.set)}
			z.undo = append(z.undo, func() { t.pages[p], t.dirty[p] = old, true })
		}
		if !again && z.cur != nil {
			// Closing the record fixes its block's length, which is in the table, too.
			f.meta.close(f, z.cur)
			for p := range t.dirty {
				if _, ok := at[p]; t.dirty[p] && !ok {
					again = true
				}
			}
		}
	}
	for p := range t.dirty {
		x, ok := at[p]
		if !ok {
			continue
		}
		t.dirty[p] = false
		dst := x.r.b.Bytes()[record.HeaderSize+x.page*pageSize:][:pageSize]
		t.encodePage(p, dst)
		crc := record.Checksum(dst)
		x.r.hdr.CRCs[x.page] = crc
		t.pages[p].Crc32C = crc
	}
	// The headers were made before the last pages were filled.
	for _, r := range z.recs[1:] {
		r.hdr.Encode(r.b.Bytes()[:record.HeaderSize])
	}
	return nil
}

// finishInode writes the INode into the place kept for it, and makes the head that names it.
func (f *File) finishInode(z *frozen, r *sideRec, pages int) {
	n := &models.INode{
		Format: 1, Volume: uint64(f.vol), Epoch: f.epoch, Number: f.number, Seq: f.applied, SizeBytes: f.size,
		Table: f.table.pages, Sets: f.table.sets, History: z.history, Marks: z.marks,
	}
	for i := range f.m.top {
		n.Top = append(n.Top, uint64(f.m.top[i].ptr))
	}
	b, err := proto.Marshal(n)
	if err != nil || len(b) > pages*pageSize {
		panic("file: INode larger than was kept for it") // our own arithmetic, not input
	}
	dst := r.b.Bytes()[record.HeaderSize:][:pages*pageSize]
	clear(dst[copy(dst, b):])
	r.pages = pages
	r.hdr.Extents = append(r.hdr.Extents, record.Extent{Page: classINode, Count: uint32(pages), Kind: record.Node})
	for i := range pages {
		r.hdr.CRCs = append(r.hdr.CRCs, record.Checksum(dst[i*pageSize:][:pageSize]))
	}
	r.hdr.Ref, r.hdr.Offset, r.hdr.Flushed = r.blk.ref, r.off, f.flushed
	r.hdr.Encode(r.b.Bytes()[:record.HeaderSize])
	live, stored := f.table.usage()
	e := &f.table.e[r.blk.slot]
	z.head = &models.Head{
		Epoch: f.epoch, Number: f.number, Seq: f.applied, SizeBytes: f.size, LiveBytes: live, StoredBytes: stored,
		CommittedUnixMs: f.cfg.WallClock().UnixMilli(), LogLo: z.lo, TimeUs: f.appliedStamp,
		Inode: &models.Extent{
			Epoch: f.epoch, Index: uint64(r.blk.ref.Index), Offset: r.off + record.HeaderSize,
			Length: uint32(len(b)), Crc32C: record.Checksum(b), Set: f.table.sets[e.set],
		},
	}
}

// thaw takes a failed checkpoint back: what it froze is changed again, and the blocks it was written to end where they ended before, as
// what lies behind may be on no peer, or not on all.
func (f *File) thaw(z *frozen) {
	// Its number was given to nobody: the next one takes it, and what has been listed since was born with that.
	f.number--
	f.table.next = f.number + 1
	for i := range f.table.e {
		if e := &f.table.e[i]; e.used && e.birth > f.table.next {
			e.birth = f.table.next
		}
	}
	for i := len(z.undo) - 1; i >= 0; i-- {
		z.undo[i]()
	}
	for _, r := range z.recs {
		if f.table.e[r.blk.slot].ref == r.blk.ref {
			f.table.cut(r.blk.slot, r.off/pageSize)
		}
	}
}

// deleteBlocks deletes, by name, blocks of this volume that the durable head does not list. If a peer does not
// hear of it, its own sweep will find them.
func (f *File) deleteBlocks(z *frozen) {
	for i, e := range z.refs {
		f.table.reuse(z.dying[i])
		if e.ref.Volume != f.vol {
			continue // another volume's, which this one was cloned from
		}
		for _, p := range f.dist.Candidates(e.ref, e.peers) {
			f.dist.Submit(p, &torus.Request{Op: torus.OpDelete, Ref: e.ref, Epoch: f.epoch, Peer: p, Done: func(r *torus.Request) {
				if r.Err != nil {
					f.log.Debug("delete", "block", r.Ref.String(), "peer", r.Peer, "err", r.Err)
				}
			}})
		}
	}
}

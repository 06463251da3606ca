package file

import (
	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
)

// openBlock is a block of the window that holds unflushed records.
type openBlock struct {
	ref      torus.BlockRef
	slot     uint32 // its place in the block table
	set      torus.PeerList
	replicas []replica
	end      uint32 // bytes assigned to records
	stored   uint32 // bytes that every replica has in memory
	synced   uint32 // bytes that every replica has made durable
	dead     bool   // a replica failed: nothing more is sent here, nothing more counts
	closed   bool   // full
	kept     bool   // it may take slots that peers keep back: see nextBlock
}

type replica struct{ stored, synced uint32 }

func (b *openBlock) confirm() {
	b.stored, b.synced = b.replicas[0].stored, b.replicas[0].synced
	for _, r := range b.replicas[1:] {
		b.stored, b.synced = min(b.stored, r.stored), min(b.synced, r.synced)
	}
}

// appendOp is an append under way at one replica.
type appendOp struct {
	req torus.Request
	f   *File
	blk *openBlock
	rep int
	seg *segment // holds what is sent
}

func (f *File) newOp() *appendOp {
	if n := len(f.freeOps); n > 0 {
		o := f.freeOps[n-1]
		f.freeOps = f.freeOps[:n-1]
		return o
	}
	o := &appendOp{f: f}
	o.req.Done = o.done
	return o
}

// pump sends what has not been sent, as far as there are blocks to take it.
func (f *File) pump() {
	for f.sent < f.last && f.err == nil {
		r := f.rec(f.sent + 1)
		if f.blk == nil || f.blk.closed || f.blk.end+r.size() > f.cfg.BlockSize || f.blk.kept && f.full && f.sent >= f.mustSend() {
			if !f.nextBlock() {
				if f.full {
					f.failUnsent()
				}
				return
			}
		}
		f.send(r)
	}
}

// mustSend is up to which record the log goes on in a full cluster, in slots that peers keep back: what was acknowledged shall not hang on
// this process and the copies that are left, and trims make room.
func (f *File) mustSend() uint64 {
	for s := f.last; s > max(f.sent, f.acked); s-- {
		if r := f.rec(s); f.closing || r.hdr.Pages() == 0 && len(r.reqs) > 0 {
			return s
		}
	}
	return f.acked
}

// send puts r at the end of the open block and sends it to every replica at once.
func (f *File) send(r *rec) {
	b := f.blk
	if r.blk != nil {
		r.move() // a replica of the block that was given up may still be receiving it, under its old header
	}
	r.blk, r.off = b, b.end
	b.end += r.size()
	f.sent, f.tried = r.seq, max(f.tried, r.seq)
	f.stats.LogBytes += uint64(r.size())
	r.hdr.Ref, r.hdr.Offset, r.hdr.Flushed = b.ref, r.off, f.flushed
	r.hdr.Encode(r.mem[:pageSize])
	for i, p := range b.set {
		o := f.newOp()
		o.blk, o.rep, o.seg = b, i, r.seg
		o.seg.refs++
		q := &o.req
		q.Op, q.Ref, q.Epoch, q.Off, q.Len, q.Data, q.Peer = torus.OpAppend, b.ref, f.epoch, r.off, r.size(), r.mem, p
		q.Owner, q.Reserve, q.Durable = r.seg.b, b.kept, r.flush
		f.dist.Submit(p, q)
		if b.dead {
			return // the submission failed at once, and the log has rolled
		}
	}
}

// nextBlock makes the next index of the window whose peers are all usable the open block. Indexes passed over are burned.
// False: there is none now; pump is called again when there may be.
func (f *File) nextBlock() bool {
	if f.blk != nil && (!f.blk.kept || f.blk.end+f.rec(f.sent+1).size() > f.cfg.BlockSize) {
		f.blk.closed = true
	}
	if f.tableFull(4) {
		f.setFull(true)
		return false
	}
	if f.takeNext(f.usable, false) {
		f.setFull(false)
		return true
	}
	// Nothing usable is registered. F1: fewer copies than asked is never a silent success, so wait, or say it is full.
	healthy, usable := f.dist.Room()
	f.setFull(usable < f.repl && healthy >= f.repl)
	if f.full && f.sent < f.mustSend() && f.takeNext(f.spareSet, true) {
		return true
	}
	f.maybeExtend()
	return false
}

// takeNext makes the next index of the window whose set is fit the open block.
func (f *File) takeNext(fit func(torus.PeerList) bool, kept bool) bool {
	for i := f.next; i < f.win.hi(); i++ {
		ref := torus.BlockRef{Type: torus.TypeBlock, Volume: f.vol, INode: torus.INodeID(f.epoch), Index: torus.IndexID(i)}
		ps := f.win.placement(i)
		set := f.dist.Set(ref, ps)
		if len(set) < f.repl || !fit(set) {
			continue
		}
		f.next = i + 1
		if f.blk != nil {
			f.blk.closed = true
		}
		f.blk = &openBlock{ref: ref, set: set, replicas: make([]replica, len(set)), slot: f.table.add(ref, ps, set), kept: kept}
		f.blocks = append(f.blocks, f.blk)
		f.maybeExtend()
		return true
	}
	return false
}

func (f *File) usable(set torus.PeerList) bool {
	for _, p := range set {
		if !f.dist.Usable(p) {
			return false
		}
	}
	return true
}

// setFull: while the cluster has no room for a new block, writes of data fail with ErrOutOfSpace; trims go on, in slots that the peers keep
// back, and a checkpoint follows them closely, since only that gives room back.
func (f *File) setFull(full bool) {
	if full == f.full {
		return
	}
	f.full = full
	if !full {
		f.log.Info("the cluster has room again")
		return
	}
	f.log.Error("the cluster is out of space: writes fail until peers are added, volumes deleted, or parts of volumes trimmed")
	f.sinceCkpt++ // blocks that were given up may be deleted when it is committed that the window has left them
	waiting := f.waiting
	f.waiting = nil
	for _, p := range waiting {
		if dataless(p.r) {
			f.waiting = append(f.waiting, p)
		} else {
			p.drop().Finish(device.ErrOutOfSpace)
		}
	}
}

// checkRoom ends the state of being full when there is nothing to send by which that would show.
func (f *File) checkRoom() {
	if _, usable := f.dist.Room(); f.full && usable >= f.repl && f.sent == f.last && !f.tableFull(4) {
		f.setFull(false)
	}
}

// failUnsent fails the writes for which there is no block. Records that no replica has ever been sent are forgotten with them; others
// stay in the log, since their numbers may be known: they take effect when there is room again.
func (f *File) failUnsent() {
	for s := f.acked + 1; s <= f.last && f.err == nil; s++ {
		if s <= f.sent {
			continue // under way; it may have come to be by a Finish below
		}
		r := f.rec(s)
		reqs := r.reqs
		r.reqs = nil
		for _, q := range reqs {
			q.Finish(device.ErrOutOfSpace)
		}
	}
	for f.err == nil && f.last > max(f.tried, f.acked) && len(f.rec(f.last).reqs) == 0 {
		r := f.rec(f.last)
		f.last--
		f.unflushed -= len(r.mem)
		f.forget(r)
	}
	f.gathered()
	if f.err == nil && f.sent < f.acked {
		waiters := f.waiters
		f.waiters = nil
		for _, w := range waiters {
			w.r.Finish(device.ErrOutOfSpace)
		}
	}
}

// roll gives up block b, because a replica of it failed, and those after it: their unflushed records go to the next block
// again, under their old numbers. What is flushed stays where it is. No MDS, no waiting.
func (f *File) roll(why error, b *openBlock, peer torus.PeerID) {
	if f.err != nil {
		return
	}
	from := f.flushed + 1
	for from <= f.sent && f.rec(from).blk.ref.Index < b.ref.Index {
		from++
	}
	f.log.Warn("replica failed, going on in the next block", "block", b.ref.String(), "peer", peer, "err", why, "again", f.last+1-from)
	f.stats.Rolls++
	n := 0
	for _, x := range f.blocks {
		x.closed = true
		if x.ref.Index < b.ref.Index {
			f.blocks[n] = x
			n++
		} else {
			x.dead = true
		}
	}
	clear(f.blocks[n:])
	f.blocks, f.blk = f.blocks[:n], nil
	f.sent, f.held = min(f.sent, from-1), min(f.held, from-1)
	f.syncing = false
	f.syncGen++
	// Not at once: the caller may be in the middle of sending, and more replies may be at hand.
	f.loop.Defer(f.resend)
}

func (f *File) resend() {
	if f.err == nil {
		f.pump()
		if len(f.waiters) > 0 {
			f.startSync()
		}
	}
}

package file

import (
	"errors"
	"fmt"

	"github.com/coreos/torus"
	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/record"
)

// A sideWriter appends to blocks of this epoch that no window registers, because nobody will look for them before an
// INode lists them: metadata, records that a recovery copies, and pages that compaction moves. The first two may take slots that peers keep back: without
// them a full cluster could not be recovered, nor become less full.
type sideWriter struct {
	typ  torus.BlockType
	late bool   // the table is told of a record when it is durable, by the caller; else, because an INode that lists it is written together with it, at once
	next uint64 // next index not used
	blk  *openBlock
}

// sideRec is a record placed by a sideWriter.
type sideRec struct {
	blk *openBlock
	off uint32
	b   *buf.Buf
	hdr record.Header
	// pages is how many data pages have been filled.
	pages, maxPages int
}

func (r *sideRec) mem() []byte { return r.b.Bytes()[:record.HeaderSize+r.pages*pageSize] }

// open finds a block with room for size bytes.
func (w *sideWriter) open(f *File, size uint32) (*openBlock, error) {
	if w.blk != nil && !w.blk.dead && f.connected(w.blk.set) && w.blk.end+size <= f.cfg.BlockSize {
		return w.blk, nil
	}
	if f.tableFull(1) {
		return nil, fmt.Errorf("the volume uses %d blocks, which is all it can list: %w", len(f.table.e), torus.ErrOutOfSpace)
	}
	if spare := f.spare(); spare < f.repl {
		err := torus.ErrNoPeer
		if healthy, _ := f.dist.Room(); healthy >= f.repl {
			err = torus.ErrOutOfSpace
		}
		return nil, fmt.Errorf("%d peers with room for %d copies: %w", spare, f.repl, err)
	}
	ring := f.dist.Ring()
	ref := torus.BlockRef{Type: w.typ, Volume: f.vol, INode: torus.INodeID(f.epoch), Index: torus.IndexID(w.next)}
	w.next++
	perm := ring.GetPeers(ref)
	ps := &models.PlacementSet{RingVersion: ring.Version(), Replication: uint32(f.repl)}
	set := perm.Set(f.repl)
	if !f.usable(set) || len(set) < f.repl {
		if o := f.override(perm); o != nil {
			ps = o
			set = f.dist.Set(ref, ps)
		} else if !f.spareSet(set) {
			return nil, torus.ErrNoPeer
		}
		if w.typ == torus.TypeMoved && !f.usable(set) {
			return nil, torus.ErrOutOfSpace
		}
	}
	w.blk = &openBlock{ref: ref, set: set, replicas: make([]replica, len(set)), slot: f.table.add(ref, ps, set)}
	return w.blk, nil
}

// at reports whether the block in that slot of the table is the one that takes the next record.
func (w *sideWriter) at(slot uint32) bool { return w.blk != nil && w.blk.slot == slot }

// record begins a record with room for the given number of pages, or for as many as possible but at least that.
func (w *sideWriter) record(f *File, pages int, grow bool) (*sideRec, error) {
	blk, err := w.open(f, uint32(record.HeaderSize+pages*pageSize))
	if err != nil {
		return nil, err
	}
	most := pages
	if grow {
		most = min(record.MaxPages, int(f.cfg.BlockSize-blk.end)/pageSize-1)
	}
	return &sideRec{blk: blk, off: blk.end, b: recordBuf(record.HeaderSize + most*pageSize), maxPages: most}, nil
}

// close fixes the record's size.
func (w *sideWriter) close(f *File, r *sideRec) {
	r.blk.end = r.off + uint32(len(r.mem()))
	r.hdr.Ref, r.hdr.Offset, r.hdr.Flushed = r.blk.ref, r.off, f.flushed
	if r.hdr.Seq > 0 {
		r.hdr.Flushed = min(f.flushed, r.hdr.Seq-1) // a copy is durable no sooner than it has been synced
	}
	r.hdr.Encode(r.b.Bytes()[:record.HeaderSize])
	if !w.late {
		f.table.setLength(r.blk.slot, r.blk.end/pageSize)
	}
}

// write appends records to all replicas of their blocks and makes them durable there. It returns the
// first failure, and the blocks are then not to be used further.
func (f *File) writeSide(t *loop.Task, recs []*sideRec) error {
	var failed error
	note := func(r *torus.Request) {
		if r.Err == nil || failed != nil {
			return
		}
		failed = fmt.Errorf("%v of %v at peer %v: %w", r.Op, r.Ref, r.Peer, r.Err)
		if errors.Is(r.Err, torus.ErrFenced) {
			f.fenced(r.Fence)
		} else if errors.Is(r.Err, torus.ErrOutOfSpace) && r.Reserve {
			f.dist.MarkUnfit(r.Peer)
		} else if errors.Is(r.Err, torus.ErrOutOfSpace) {
			f.dist.MarkFull(r.Peer)
		}
	}
	var reqs []*torus.Request
	var blocks []*openBlock
	for _, r := range recs {
		if len(blocks) == 0 || blocks[len(blocks)-1] != r.blk {
			blocks = append(blocks, r.blk)
		}
		for _, p := range r.blk.set {
			reqs = append(reqs, &torus.Request{
				Op: torus.OpAppend, Ref: r.blk.ref, Epoch: f.epoch, Off: r.off,
				Len: uint32(len(r.mem())), Data: r.mem(), Owner: r.b, Peer: p, Reserve: r.blk.ref.Type != torus.TypeMoved,
			})
		}
	}
	f.all(t, reqs, note)
	if failed == nil {
		reqs = reqs[:0]
		for _, b := range blocks {
			for _, p := range b.set {
				reqs = append(reqs, &torus.Request{Op: torus.OpSync, Ref: b.ref, Epoch: f.epoch, Len: b.end, Peer: p})
			}
		}
		f.all(t, reqs, note)
	}
	if failed != nil {
		for _, b := range blocks {
			b.dead = true
		}
	}
	return failed
}

// all submits requests to their peers and waits for all answers.
func (f *File) all(t *loop.Task, reqs []*torus.Request, note func(*torus.Request)) {
	t.All(len(reqs), func(i int, done func()) {
		reqs[i].Done = func(r *torus.Request) {
			note(r)
			done()
		}
		f.dist.Submit(reqs[i].Peer, reqs[i])
	})
}

func (f *File) connected(set torus.PeerList) bool {
	for _, p := range set {
		if !f.dist.Healthy(p) {
			return false
		}
	}
	return true
}

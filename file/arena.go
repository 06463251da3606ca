package file

import (
	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/record"
)

// segmentSize is how much memory records are cut from at a time.
const segmentSize = 4 << 20

// segment is a piece of memory that records lie in one behind the other, so that each can leave in one
// write. It goes back to the pool when its last record is forgotten and no append of one is under way any more.
type segment struct {
	b    *buf.Buf
	mem  []byte
	used int
	refs int
}

func (s *segment) unref() {
	if s.refs--; s.refs == 0 {
		s.b.Release()
	}
}

// rec is a record, being built or retained.
type rec struct {
	seq      uint64
	hdr      record.Header
	mem      []byte // header page, data pages
	seg      *segment
	maxPages int
	blk      *openBlock // where it was last sent
	off      uint32
	home     uint64            // index of the block it was last whole in, once acknowledged
	reqs     []*device.Request // done when it is acknowledged
	acked    bool
	flush    bool // a flush is known or expected to follow
	tail     bool // the rest of a write is in the record before
}

func (r *rec) size() uint32 { return uint32(len(r.mem)) }
func (r *rec) end() uint32  { return r.off + r.size() }

// page returns data page i.
func (r *rec) page(i int) []byte {
	return r.mem[record.HeaderSize+i*pageSize:][:pageSize:pageSize]
}

func (f *File) rec(seq uint64) *rec { return f.recs[seq&uint64(len(f.recs)-1)] }

// keep puts r at the end of the log.
func (f *File) keep(r *rec) {
	if n := uint64(len(f.recs)); f.last-f.applied >= n {
		grown := make([]*rec, max(64, 2*n))
		for s := f.applied + 1; s <= f.last; s++ {
			grown[s&uint64(len(grown)-1)] = f.rec(s)
		}
		f.recs = grown
	}
	f.last++
	r.seq, r.hdr.Seq, r.hdr.Time = f.last, f.last, f.stamp()
	f.recs[f.last&uint64(len(f.recs)-1)] = r
	f.retained += len(r.mem)
	f.unflushed += len(r.mem)
}

// forget drops the lowest record of the log, which has been applied.
func (f *File) forget(r *rec) {
	f.recs[r.seq&uint64(len(f.recs)-1)] = nil
	f.retained -= len(r.mem)
	f.freeRec(r)
}

func (f *File) freeRec(r *rec) {
	r.seg.unref()
	clear(r.reqs)
	*r = rec{hdr: record.Header{Extents: r.hdr.Extents[:0], CRCs: r.hdr.CRCs[:0]}, reqs: r.reqs[:0]}
	f.freeRecs = append(f.freeRecs, r)
}

// newRec begins a record with room for at least want pages (1 ≤ want ≤ record.MaxPages) in memory.
func (f *File) newRec(want, most int) *rec {
	need := record.HeaderSize + want*pageSize
	if f.seg == nil || segmentSize-f.seg.used < need {
		if f.seg != nil {
			f.seg.unref()
		}
		b := buf.GetShared(segmentSize)
		f.seg = &segment{b: b, mem: b.Bytes()[:segmentSize], refs: 1}
	}
	var r *rec
	if n := len(f.freeRecs); n > 0 {
		r = f.freeRecs[n-1]
		f.freeRecs = f.freeRecs[:n-1]
	} else {
		r = &rec{}
	}
	f.seg.refs++
	r.seg = f.seg
	r.mem = f.seg.mem[f.seg.used : f.seg.used+record.HeaderSize]
	r.maxPages = min(most, (segmentSize-f.seg.used)/pageSize-1)
	return r
}

// move gives the record memory of its own, so that another header can be put before the same pages.
func (r *rec) move() {
	b := recordBuf(len(r.mem))
	s := &segment{b: b, mem: b.Bytes(), refs: 1}
	s.used = copy(s.mem, r.mem)
	r.mem = s.mem[:s.used:s.used]
	r.seg.unref()
	r.seg = s
}

// recordBuf returns memory for a record. What is small would take more where it can be lent.
func recordBuf(n int) *buf.Buf {
	if n < 64<<10 {
		return buf.Get(n)
	}
	return buf.GetShared(n)
}

// extend adds n pages to the record being built and returns their memory. Only the newest record of a
// segment can grow.
func (r *rec) extend(n int) []byte {
	old := len(r.mem)
	r.mem = r.mem[:old+n*pageSize]
	return r.mem[old:]
}

// finish fixes the record's size: the segment's next record begins behind it.
func (r *rec) finish() {
	r.seg.used += len(r.mem)
	r.mem = r.mem[:len(r.mem):len(r.mem)]
}

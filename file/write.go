package file

import (
	"github.com/coreos/torus"
	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/record"
)

const (
	// atomicPages: a write of up to so many pages is never split over two records, hence never seen in
	// part after a crash. Larger ones may be, between pages.
	atomicPages = 16
	// zeroPages bounds one extent of explicit zeroes, so that applying it stays a small step: 64 MiB.
	zeroPages = 64 << 20 / pageSize
	// trimPages bounds one extent of a trim: 1 GiB, 512 leaves.
	trimPages = 1 << 30 / pageSize
	// gatherPages is when a record is large enough not to wait for more.
	gatherPages = 32
)

// pending is a write that cannot begin yet. It owns a copy of the data, since Submit has returned.
type pending struct {
	r    *device.Request
	data *buf.Buf
}

func newPending(r *device.Request) *pending {
	p := &pending{r: r}
	if r.Op == device.Write && r.Len > 0 {
		p.data = buf.Get(int(r.Len))
		copy(p.data.Bytes(), r.Data[:r.Len])
		r.Data = p.data.Bytes()[:r.Len]
	}
	return p
}

// drop returns the request and gives the copy back.
func (p *pending) drop() *device.Request {
	if p.data != nil {
		p.r.Data = nil
		p.data.Release()
		p.data = nil
	}
	return p.r
}

// write takes a Write, Trim or WriteZeroes.
func (f *File) write(r *device.Request) {
	if r.Len == 0 {
		if r.Flags&device.FUA != 0 {
			f.flush(r)
		} else {
			r.Finish(nil)
		}
		return
	}
	f.habit.wrote()
	if f.full && !dataless(r) {
		r.Finish(device.ErrOutOfSpace)
		return
	}
	paced := f.paced() && r.Op == device.Write
	if f.retained >= f.cfg.RetainBytes || len(f.waiting) > 0 || paced {
		f.waiting = append(f.waiting, newPending(r))
		if paced {
			f.stats.Paced++
		}
		if !paced || f.retained >= f.cfg.RetainBytes {
			f.startSync()
		}
		return
	}
	f.charge(r)
	f.begin(r, nil)
}

// dataless reports whether a write brings nothing to store: it only makes room.
func dataless(r *device.Request) bool {
	return r.Op == device.Trim || r.Op == device.WriteZeroes && r.Off%pageSize == 0 && r.Len%pageSize == 0
}

// resumeWaiting begins writes that were held back, as far as there is room for them.
func (f *File) resumeWaiting() {
	for len(f.waiting) > 0 && f.retained < f.cfg.RetainBytes && !f.paced() && f.err == nil {
		p := f.waiting[0]
		f.charge(p.r)
		f.waiting = f.waiting[1:]
		if len(f.waiting) == 0 {
			f.waiting = nil
		}
		f.begin(p.r, p)
	}
}

// begin puts a write into the log, or, if a page it covers in part must be read first, locks
// that page and begins again when it is known. p is non-nil when r.Data is a copy of ours.
func (f *File) begin(r *device.Request, p *pending) {
	if f.err != nil {
		if p != nil {
			p.drop()
		}
		r.Finish(f.err)
		return
	}
	first, last := r.Off/pageSize, (r.Off+r.Len-1)/pageSize
	if r.Op == device.Trim {
		// A trim covers whole pages; the rest of what it names keeps its contents.
		from, to := (r.Off+pageSize-1)/pageSize, (r.Off+r.Len)/pageSize
		if r.Off+r.Len == f.size {
			to = (f.size + pageSize - 1) / pageSize
		}
		if from >= to {
			r.Finish(nil)
			return
		}
		first, last = from, to-1
	}
	if len(f.locked) > 0 && f.isLocked(first, last) {
		if p == nil {
			p = newPending(r)
		}
		f.blocked = append(f.blocked, p)
		return
	}
	if r.Op == device.Trim {
		f.putRange(r, first, last, record.Trim)
		return
	}
	// The pages covered in part, and their present contents.
	var edges [2]edge
	n := 0
	end := r.Off + r.Len
	if r.Off%pageSize != 0 || (first == last && end%pageSize != 0 && end != f.size) {
		edges[n].page = first
		n++
	}
	if end%pageSize != 0 && end != f.size && (last != first) {
		edges[n].page = last
		n++
	}
	missing := false
	for i := range edges[:n] {
		edges[i].buf = buf.Get(pageSize)
		if !f.contents(edges[i].page, edges[i].buf.Bytes()) {
			missing = true
		}
	}
	if missing {
		for i := range edges[:n] {
			edges[i].buf.Release()
		}
		if p == nil {
			p = newPending(r)
		}
		f.readModifyWrite(p, edges[:n])
		return
	}
	f.put(r, edges[:n])
	if p != nil {
		p.drop()
	}
}

// edge is a page that a write covers in part, with its present contents.
type edge struct {
	page uint64
	buf  *buf.Buf
}

func (f *File) isLocked(first, last uint64) bool {
	if last-first < uint64(len(f.locked)) {
		for p := first; p <= last; p++ {
			if _, ok := f.locked[p]; ok {
				return true
			}
		}
		return false
	}
	for p := range f.locked {
		if p >= first && p <= last {
			return true
		}
	}
	return false
}

// readModifyWrite reads the pages that p covers in part. They stay locked meanwhile: no other
// write to them begins, so what is read is still right when it arrives.
func (f *File) readModifyWrite(p *pending, edges []edge) {
	bufs := make([]edge, len(edges))
	copy(bufs, edges)
	left := len(bufs)
	var failed error
	for i := range bufs {
		if f.locked == nil {
			f.locked = map[uint64]struct{}{}
		}
		f.locked[bufs[i].page] = struct{}{}
	}
	for i := range bufs {
		bufs[i].buf = buf.Get(pageSize)
		f.newest(bufs[i].page, bufs[i].buf.Bytes()[:pageSize], func(err error) {
			if err != nil {
				failed = err
			}
			if left--; left > 0 {
				return
			}
			for _, e := range bufs {
				delete(f.locked, e.page)
			}
			switch {
			case f.err != nil || failed != nil:
				for _, e := range bufs {
					e.buf.Release()
				}
				r := p.drop()
				if f.err != nil {
					failed = f.err
				}
				r.Finish(failed)
			default:
				f.put(p.r, bufs)
				p.drop()
			}
			blocked := f.blocked
			f.blocked = nil
			for _, b := range blocked {
				f.begin(b.r, b)
			}
		})
	}
}

// put copies a write into records. edges holds the contents of the pages it covers in part; they are released.
func (f *File) put(r *device.Request, edges []edge) {
	if r.Op == device.WriteZeroes {
		f.putZeroes(r, edges)
		return
	}
	data := r.Data[:r.Len]
	off := r.Off
	pages := int((off+r.Len-1)/pageSize - off/pageSize + 1)
	var rc *rec
	var began uint64 // Records when the first of it was placed
	for whole := len(data); len(data) > 0; {
		page, in := off/pageSize, int(off%pageSize)
		rc = f.room(pages)
		if len(data) == whole {
			began = f.stats.Records
		}
		n := min(len(data)/pageSize, rc.maxPages-rc.hdr.Pages())
		if in != 0 || n == 0 { // covered in part
			n = 1
			k := min(pageSize-in, len(data))
			dst := rc.extend(1)
			if e := find(edges, page); e != nil {
				copy(dst, e.buf.Bytes()[:pageSize])
			} else {
				clear(dst) // the device ends in this page
			}
			copy(dst[in:], data[:k])
			f.add(rc, page, 1, record.Data, dst, nil)
			data, off = data[k:], off+uint64(k)
		} else {
			k := n * pageSize
			dst := rc.extend(n)
			f.add(rc, page, n, record.Data, dst, data)
			data, off = data[k:], off+uint64(k)
		}
		pages -= n
	}
	for _, e := range edges {
		e.buf.Release()
	}
	rc.tail = rc.tail || f.stats.Records != began
	f.owe(rc, r)
}

func find(edges []edge, page uint64) *edge {
	for i := range edges {
		if edges[i].page == page {
			return &edges[i]
		}
	}
	return nil
}

// putZeroes writes zeroes into the pages covered in part, and an extent for the whole ones.
func (f *File) putZeroes(r *device.Request, edges []edge) {
	var rc *rec
	for i := range edges {
		rc = f.room(1)
		dst := rc.extend(1)
		copy(dst, edges[i].buf.Bytes()[:pageSize])
		edges[i].buf.Release()
		at := edges[i].page * pageSize
		from, to := max(r.Off, at), min(r.Off+r.Len, at+pageSize)
		clear(dst[from-at : to-at])
		f.add(rc, edges[i].page, 1, record.Data, dst, nil)
	}
	from, to := (r.Off+pageSize-1)/pageSize, (r.Off+r.Len)/pageSize
	if r.Off+r.Len == f.size {
		to = (f.size + pageSize - 1) / pageSize
	}
	if from >= to {
		f.owe(rc, r)
		return
	}
	kind := record.Trim
	if r.Flags&device.NoHole != 0 {
		kind = record.Zero
	}
	f.putRange(r, from, to-1, kind)
}

// putRange writes extents without data.
func (f *File) putRange(r *device.Request, first, last uint64, kind record.Kind) {
	first0 := first
	most := uint64(trimPages)
	if kind == record.Zero {
		most = zeroPages
	}
	var rc *rec
	for first <= last {
		n := min(last-first+1, most)
		for n > listPages && f.building != nil {
			f.seal() // see overlay: a span has its record to itself
		}
		rc = f.room(0)
		f.add(rc, first, int(n), kind, nil, nil)
		first += n
		if n > listPages && first <= last {
			f.seal()
		}
	}
	f.owe(rc, r)
	if last-first0+1 > listPages {
		f.seal()
	}
}

// room returns the record being built, with room for one extent and, if the write is still to bring so
// many pages, at least one of them: all, if they are few.
func (f *File) room(pages int) *rec {
	need := 1
	if pages == 0 {
		need = 0
	} else if pages <= atomicPages {
		need = pages
	}
	for r := f.building; r != nil; r = f.building { // sealing one may bring a Done that begins the next
		if len(r.hdr.Extents) < record.MaxExtents && r.maxPages-r.hdr.Pages() >= need {
			return r
		}
		f.seal()
	}
	most := min(record.MaxPages, int(f.cfg.BlockSize)/pageSize-1)
	if f.blk != nil && !f.blk.closed && f.sent == f.last {
		// Fill the open block to its end, if what is left is of any use; else the record goes to the next.
		if left := int(f.cfg.BlockSize-f.blk.end)/pageSize - 1; left >= need {
			most = min(most, left)
		}
	}
	f.building = f.newRec(max(need, 1), most)
	if !f.sealing {
		f.sealing = true
		f.loop.Defer(f.sealFn)
	}
	return f.building
}

func (f *File) sealDeferred() {
	f.sealing = false
	if f.building != nil && !f.gathering() {
		f.seal()
	}
}

// gathering reports whether the record being built waits for more to come: it is small, and less than half as large as what is on its way; or, while
// blocks are emptied, anything is on its way. A record costs a page for its header, room that blocks being emptied are to win, and a request at each
// replica, and is acknowledged after those before it in any case. It is looked at again when it has become large, or some of what is on its way has arrived:
// it waits for a round trip at most.
func (f *File) gathering() bool {
	b := f.building
	if b.flush || b.tail || b.large() || f.full {
		return false
	}
	if f.emptying {
		return f.sent > f.held
	}
	pages, away := b.hdr.Pages(), 0
	for s := f.held + 1; s <= f.sent && pages >= away/2; s++ {
		away += f.rec(s).hdr.Pages()
	}
	return pages < away/2
}

// owe notes a write that is done when record r, the newest, is acknowledged.
func (f *File) owe(r *rec, q *device.Request) {
	r.reqs = append(r.reqs, q)
	r.flush = r.flush || q.Flags&device.FUA != 0 || f.habit.expectsFlush()
	if r.flush || r.large() {
		f.gathered()
	}
}

// large reports whether a record is not to wait for more, or cannot have more.
func (r *rec) large() bool {
	return r.hdr.Pages() >= min(gatherPages, r.maxPages) || len(r.hdr.Extents) == record.MaxExtents
}

// gathered has the record being built sealed, or looked at again, as less is on its way now.
func (f *File) gathered() {
	if f.building != nil && !f.sealing {
		f.sealing = true
		f.loop.Defer(f.sealFn)
	}
}

// add notes an extent and the checksums of its pages. from, unless it is nil, is what to fill them with first: page by page, so that each is in the
// processor's cache for its checksum.
func (f *File) add(r *rec, page uint64, n int, kind record.Kind, data, from []byte) {
	x := r.hdr.Extents
	if k := len(x) - 1; k >= 0 && kind == record.Data && x[k].Kind == kind && x[k].Page+uint64(x[k].Count) == page {
		x[k].Count += uint32(n)
	} else {
		r.hdr.Extents = append(x, record.Extent{Page: page, Count: uint32(n), Kind: kind})
	}
	for len(data) > 0 {
		if from != nil {
			copy(data[:torus.PageSize], from)
			from = from[torus.PageSize:]
		}
		r.hdr.CRCs = append(r.hdr.CRCs, record.Checksum(data[:torus.PageSize]))
		data = data[torus.PageSize:]
	}
}

// seal ends the record being built, gives it its number and sends it.
func (f *File) seal() {
	r := f.building
	f.building = nil
	r.finish()
	f.keep(r)
	f.stats.Records++
	ahead := r.flush
	f.pump()
	if ahead {
		f.syncAhead()
	}
	if f.unflushed >= f.cfg.RetainBytes/4 {
		f.startSync()
	}
}

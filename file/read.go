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
	"github.com/coreos/torus/record"
)

const (
	retryEvery = 100 * time.Millisecond
	// readGap is how many pages that nobody wants are read along rather than ask twice. Fewer than compaction reads (compactGap), as somebody waits for them.
	readGap = 4
	// runPages bounds what is read in one request: 1 MiB, with what may lie in between.
	runPages = record.MaxPages + record.MaxPages/8
	// statusPages bounds what one status request looks at: 256 MiB, 128 leaves.
	statusPages = 256 << 20 / pageSize
)

// readOp is a read under way.
type readOp struct {
	f       *File
	r       *device.Request
	parts   []part
	ahead   bool // is read-ahead itself
	pending int
	err     error
	stale   bool // a run failed and the map has moved on: begin again
	tries   int
	loaded  func(error)
}

// part is a page that is wanted from the replicas.
type part struct {
	page uint64 // of the file
	e    entry
}

// readRun is what one request is to bring: pages of one block that lie side by side, or nearly so.
type readRun struct {
	op     *readOp
	parts  []part   // by their place in the block
	bounce *buf.Buf // where it is read to, if that is not just what is wanted
	asked  bool     // replicas have been asked before
	moved  func() error
}

// errMoved ends a read of a place that is not where the newest bytes are any more.
var errMoved = errors.New("the page has been written since")

// hasMoved is asked whenever a read that waits for replicas is about to ask again. What it waits for may have been overwritten
// meanwhile, its block may be deleted, and a replica that is gone for good may never answer.
func (x *readRun) hasMoved() error {
	f := x.op.f
	if f.err != nil {
		return f.err
	}
	if !x.asked {
		x.asked = true
		return nil
	}
	for _, p := range x.parts {
		if _, _, ok := f.over.get(p.page); ok {
			return errMoved
		}
		if now, ok := f.m.get(p.page); !ok || now != p.e {
			return errMoved
		}
	}
	return nil
}

func (f *File) read(r *device.Request) {
	s := f.ahead.follow(r.Off, r.Len)
	f.reading += r.Len
	f.startRead(r, false)
	f.readAhead(s)
}

func (f *File) startRead(r *device.Request, ahead bool) {
	var op *readOp
	if n := len(f.freeReads); n > 0 {
		op = f.freeReads[n-1]
		f.freeReads = f.freeReads[:n-1]
	} else {
		op = &readOp{f: f}
		op.loaded = op.partLoaded
	}
	op.r, op.ahead, op.err, op.stale, op.tries = r, ahead, nil, false, 0
	op.start()
}

// start looks every page up and asks for what is not in memory. If a part of the map has to be loaded, or is being read ahead, it
// waits for that first, and begins again.
func (op *readOp) start() {
	f, r := op.f, op.r
	op.pending = 1
	if r.Len > 0 {
		first, last := r.Off/pageSize, (r.Off+r.Len-1)/pageSize
		missing := false
		for p := first; p <= last; p = (p/leafPages + 1) * leafPages {
			if _, ok := f.m.get(p); !ok {
				missing = true
				op.pending++
				f.m.load(p, op.loaded)
			}
		}
		if !op.ahead && f.ahead.await(op, first, last) {
			missing = true
		}
		if missing {
			op.stale = true
		} else {
			op.lookUp(first, last)
		}
	}
	op.done(nil)
}

func (op *readOp) partLoaded(err error) { op.done(err) }

func (op *readOp) lookUp(first, last uint64) {
	f, r := op.f, op.r
	parts := op.parts[:0]
	for p := first; p <= last; p++ {
		if data, _, ok := f.over.get(p); ok {
			give(r, p, data)
			continue
		}
		if len(f.ahead.chunks) > 0 && !op.ahead {
			if data, ok := f.ahead.get(p); ok {
				give(r, p, data)
				continue
			}
		}
		switch e, _ := f.m.get(p); e.kind() {
		case entryData:
			parts = append(parts, part{p, e})
		case entryLost:
			op.err = errLost
		default:
			give(r, p, nil)
		}
	}
	op.parts = parts
	byPlace := func(x, y part) int { return cmp.Compare(x.e.place(), y.e.place()) }
	if !slices.IsSortedFunc(parts, byPlace) {
		slices.SortFunc(parts, byPlace)
	}
	for n := 0; n < len(parts); {
		k := n + 1
		for k < len(parts) && parts[k].e.near(parts[k-1].e, readGap) && parts[k].e.page()-parts[n].e.page() < runPages {
			k++
		}
		op.pending++
		f.newRun(op, parts[n:k]).start()
		n = k
	}
}

// give copies what r wants of a page out of its contents; nil are zeroes.
func give(r *device.Request, page uint64, data []byte) {
	at := page * pageSize
	from, to := max(r.Off, at), min(r.Off+r.Len, at+pageSize)
	dst := r.Data[from-r.Off : to-r.Off]
	if data == nil {
		clear(dst)
		return
	}
	copy(dst, data[from-at:])
}

// done counts one part of a read; the last one ends it.
func (op *readOp) done(err error) {
	if err != nil {
		op.err = err
	}
	if op.pending--; op.pending > 0 {
		return
	}
	f, r := op.f, op.r
	if f.err != nil {
		op.err = f.err
	} else if op.stale && op.ahead {
		op.err = errMoved
	} else if op.stale && (op.err == nil || op.tries < 3) {
		if op.err != nil {
			op.tries++
		}
		op.stale, op.err = false, nil
		op.start()
		return
	}
	err = op.err
	if !op.ahead {
		f.reading -= r.Len
		f.ahead.passed(r)
	}
	op.r = nil
	f.freeReads = append(f.freeReads, op)
	r.Finish(err)
}

func (f *File) newRun(op *readOp, parts []part) *readRun {
	var x *readRun
	if n := len(f.freeRuns); n > 0 {
		x = f.freeRuns[n-1]
		f.freeRuns = f.freeRuns[:n-1]
	} else {
		x = &readRun{}
		x.moved = x.hasMoved
	}
	x.op, x.parts = op, append(x.parts, parts...)
	return x
}

func (x *readRun) start() {
	f, first, last := x.op.f, x.parts[0], x.parts[len(x.parts)-1]
	dst, into := x.straight()
	if dst == nil {
		n := int(last.e.page()-first.e.page()+1) * pageSize
		x.bounce = buf.Get(n)
		dst, into = x.bounce.Bytes()[:n], x.bounce
	}
	f.readAt(first.e, dst, into, x, !x.op.ahead, x.moved, runVerify, runDone)
}

// straight is the reader's own memory, if a run is just what it wants there, page for page; and the buffer that is, if the run is all that it wants.
func (x *readRun) straight() ([]byte, *buf.Buf) {
	r, first, n := x.op.r, x.parts[0], uint64(len(x.parts))
	for i, p := range x.parts[1:] {
		if p.page != first.page+uint64(i)+1 || p.e.page() != first.e.page()+uint32(i)+1 {
			return nil, nil
		}
	}
	if first.page*pageSize < r.Off || (first.page+n)*pageSize > r.Off+r.Len {
		return nil, nil
	}
	if n*pageSize == r.Len {
		return r.Data[:r.Len], r.Buf
	}
	return r.Data[first.page*pageSize-r.Off:][:n*pageSize], nil
}

// contents returns page p of what has been read to b.
func (x *readRun) contents(b []byte, p part) []byte {
	return b[(p.e.page()-x.parts[0].e.page())*pageSize:][:pageSize]
}

// readAt reads the run of pages that begins at e into dst, which into is the buffer of (distributor.Read.Buf) if it is not nil, from whichever replica has it; wait: for one that is away, too.
func (f *File) readAt(e entry, dst []byte, into *buf.Buf, user any, wait bool, until func() error, verify func(*distributor.Read) bool, done func(*distributor.Read)) {
	b := &f.table.e[e.slot()]
	rd := f.dist.NewRead()
	rd.Ref, rd.Off, rd.Data, rd.Buf, rd.Set = b.ref, e.page()*pageSize, dst, into, b.peers
	rd.User, rd.Verify, rd.Done, rd.Wait, rd.Until = user, verify, done, wait, until
	rd.Start()
}

func runVerify(rd *distributor.Read) bool {
	x := rd.User.(*readRun)
	for _, p := range x.parts {
		if record.Checksum(x.contents(rd.Data, p))&0xffffff != p.e.crc() {
			return false
		}
	}
	return true
}

func runDone(rd *distributor.Read) {
	x := rd.User.(*readRun)
	op, err := x.op, rd.Err
	f := op.f
	if x.bounce != nil {
		x.bounce = rd.Buf
	} else if rd.Buf != nil {
		op.r.Data, op.r.Buf = rd.Data, rd.Buf
	}
	rd.Release()
	if err == nil && x.bounce != nil {
		for _, p := range x.parts {
			give(op.r, p.page, x.contents(x.bounce.Bytes(), p))
		}
	}
	if (errors.Is(err, torus.ErrCorrupt) || errors.Is(err, torus.ErrIO) || errors.Is(err, torus.ErrGap)) && len(x.parts) > 1 {
		// Each replica has a bad page somewhere in the run, or ends within it. Page by page, each may still have a good copy; and a page in between may be nobody's.
		err = nil
		for i := range x.parts {
			op.pending++
			f.newRun(op, x.parts[i:i+1]).start()
		}
	}
	if err == errMoved {
		op.stale, err = true, nil
	}
	if err != nil && !op.ahead {
		// The block may have been given up since the map was asked: then the map knows better by now.
		for _, p := range x.parts {
			if now, ok := f.m.get(p.page); !ok || now != p.e {
				op.stale = true
			}
		}
		p := x.parts[0]
		f.log.Error("read failed", "page", p.page, "pages", len(x.parts), "at", p.e.String(), "block", f.table.e[p.e.slot()].ref.String(), "err", err, "again", op.stale)
	}
	if x.bounce != nil {
		x.bounce.Release()
	}
	*x = readRun{parts: x.parts[:0], moved: x.moved}
	f.freeRuns = append(f.freeRuns, x)
	op.done(err)
}

// readNode reads a node of the map.
func (f *File) readNode(e entry, dst []byte, done func(error)) {
	if e.kind() != entryData {
		done(errLost)
		return
	}
	f.readAt(e, dst, nil, nil, true, f.errFn, func(rd *distributor.Read) bool {
		return record.Checksum(rd.Data)&0xffffff == e.crc()
	}, func(rd *distributor.Read) {
		err := rd.Err
		rd.Release()
		done(err)
	})
}

// contents fills dst with the newest contents of a page, unacknowledged ones included, if they are in memory.
func (f *File) contents(page uint64, dst []byte) bool {
	dst = dst[:pageSize]
	if r := f.building; r != nil && r.contents(page, dst) {
		return true
	}
	for s := f.last; s > f.acked; s-- {
		if f.rec(s).contents(page, dst) {
			return true
		}
	}
	if data, _, ok := f.over.get(page); ok {
		if data != nil {
			copy(dst, data)
		} else {
			clear(dst)
		}
		return true
	}
	e, ok := f.m.get(page)
	if !ok || e.kind() == entryData || e.kind() == entryLost {
		return false
	}
	clear(dst)
	return true
}

// contents looks a page up in one record.
func (r *rec) contents(page uint64, dst []byte) bool {
	i := len(r.hdr.CRCs)
	for k := len(r.hdr.Extents) - 1; k >= 0; k-- {
		x := r.hdr.Extents[k]
		if x.Kind.HasPages() {
			i -= int(x.Count)
		}
		if page < x.Page || page >= x.Page+uint64(x.Count) {
			continue
		}
		if x.Kind.HasPages() {
			copy(dst, r.page(i+int(page-x.Page)))
		} else {
			clear(dst)
		}
		return true
	}
	return false
}

// newest reads the newest contents of a page into dst, from a replica if need be. The page is locked, so that no
// write can overtake.
func (f *File) newest(page uint64, dst []byte, done func(error)) {
	if f.err != nil {
		done(f.err)
		return
	}
	if f.contents(page, dst) {
		done(nil)
		return
	}
	e, ok := f.m.get(page)
	if !ok {
		f.m.load(page, func(err error) {
			if err != nil {
				done(err)
				return
			}
			f.newest(page, dst, done)
		})
		return
	}
	f.readNode(e, dst, func(err error) {
		if now, ok := f.m.get(page); err != nil && (!ok || now != e) {
			f.newest(page, dst, done)
			return
		}
		done(err)
	})
}

// status replies what is mapped from r.Off on: at least one extent, as far as it has looked.
func (f *File) status(r *device.Request) {
	r.Extents = r.Extents[:0]
	if r.Len == 0 {
		r.Finish(device.ErrInvalid)
		return
	}
	end := r.Off + r.Len
	budget := statusPages
	for at := r.Off; at < end && budget > 0; {
		page := at / pageSize
		var x device.Extent
		stop := (page + 1) * pageSize
		if data, kind, ok := f.over.get(page); ok {
			x.Zero = data == nil
			x.Hole = data == nil && kind == record.Trim
			budget--
		} else if n := f.m.hole(page); n > 0 && f.over.empty() {
			x.Hole, x.Zero = true, true
			stop = (page + n) * pageSize
			budget -= 8
		} else {
			e, ok := f.m.get(page)
			if !ok {
				if len(r.Extents) > 0 {
					break // that much is an answer
				}
				f.m.load(page, func(err error) {
					if err == nil {
						err = f.err
					}
					if err != nil {
						r.Finish(err)
						return
					}
					f.status(r)
				})
				return
			}
			x.Hole, x.Zero = e.kind() == entryHole, e.kind() == entryHole || e.kind() == entryZero
			budget--
		}
		x.Len = min(stop, end) - at
		at += x.Len
		if n := len(r.Extents) - 1; n >= 0 && r.Extents[n].Hole == x.Hole && r.Extents[n].Zero == x.Zero {
			r.Extents[n].Len += x.Len
		} else {
			r.Extents = append(r.Extents, x)
		}
	}
	r.Finish(nil)
}

var errLost = fmt.Errorf("the map of this page was damaged on every replica: %w", torus.ErrCorrupt)

var errGone = errors.New("block table entry without placement")

// resolve finds the peers of every block of the table. The rings must be known.
func (f *File) resolve() error {
	for i := range f.table.e {
		e := &f.table.e[i]
		if !e.used {
			continue
		}
		if e.peers = f.dist.Set(e.ref, f.table.sets[e.set]); len(e.peers) == 0 {
			return &torus.Error{Op: "attach", Obj: "block " + e.ref.String(), Err: errGone}
		}
	}
	return nil
}

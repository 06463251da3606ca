package storage

import (
	"errors"
	"fmt"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/record"
	"github.com/coreos/torus/vfs"
)

// putting is a Put under way: a copy of a block is written to a free slot, and takes the place of the one that is there.
//
//	putBytes   the bytes are written to the new slot by a helper, and become durable
//	putEntry   the new slot's entry, of a newer generation than any before, becomes durable: from here on the new copy counts
//	putFree    the old slot's entry says free, durably, before anything else may happen to the block
//
// A crash before the second step is over leaves the old copy, one after it both, of which the newer generation counts. From the
// second step on the block's other changes wait, as nobody can say which slot a crash would choose.
type putting struct {
	d       *Disk
	r       *torus.Request
	key     key
	slot    uint32
	f       vfs.File
	place   int64 // of the slot, in f
	flushed uint64
	step    putStep
	deleted bool // a Delete came before it
	waiting []*torus.Request
	stuck   error // a file failed after the first step: which slot counts is found out by the next Open
	err     error // of the helper
	hdr     record.Header
}

type putStep uint8

const (
	putBytes putStep = iota
	putEntry
	putFree
)

var (
	_ loop.Job = (*putting)(nil)

	errPutGone = errors.New("deleted before its new copy was durable")
)

// put starts a Put. False if there is no slot yet.
func (d *Disk) put(r *torus.Request) bool {
	n := uint64(len(r.Data))
	switch {
	case d.failed:
		d.failPut(r, fmt.Errorf("put %v: the disk failed before: %w", r.Ref, torus.ErrIO))
		return true
	case n == 0 || n%torus.PageSize != 0 || n > d.id.BlockSize:
		d.failPut(r, fmt.Errorf("put %d bytes to %v, whose size is %d: %w", n, r.Ref, d.id.BlockSize, torus.ErrInvalid))
		return true
	}
	if err := d.mayReplace(r); err != nil {
		d.failPut(r, err)
		return true
	}
	s, wait, err := d.allocate(r.Reserve)
	if wait {
		return false
	}
	if err != nil {
		d.failPut(r, err)
		return true
	}
	d.slots[s].state = filling
	f, place := d.place(s)
	p := &putting{d: d, r: r, key: keyOf(r.Ref), slot: s, f: f.f, place: place}
	d.puts[p.key] = p
	d.loop.Offload(p)
	return true
}

func (d *Disk) failPut(r *torus.Request, err error) {
	d.metrics.failedWrites.Inc()
	r.Finish(err)
}

// mayReplace refuses to drop more than the caller knows of.
func (d *Disk) mayReplace(r *torus.Request) error {
	s, ok := d.index.find(keyOf(r.Ref))
	if !ok {
		return nil
	}
	x := &d.slots[s]
	if x.length > r.Len {
		return fmt.Errorf("put %v: the copy there has %d bytes by now, not %d at most: %w", r.Ref, x.length, r.Len, torus.ErrAgain)
	}
	return d.files[x.file].err
}

// holdUp takes requests for a block that is being put which must wait for that; false for others.
func (d *Disk) holdUp(r *torus.Request) bool {
	p := d.puts[keyOf(r.Ref)]
	switch {
	case p == nil:
		return false
	case p.stuck != nil:
		if r.Op == torus.OpPut {
			d.failPut(r, p.stuck)
		} else {
			d.refuse(r, p.stuck)
		}
	case p.step > putBytes || r.Op == torus.OpPut || len(p.waiting) > 0:
		p.waiting = append(p.waiting, r)
	default:
		p.deleted = p.deleted || r.Op == torus.OpDelete
		return false
	}
	return true
}

// Work implements loop.Job: it verifies the records and writes them.
func (p *putting) Work() {
	d := p.d
	if !d.enter() {
		p.err = torus.ErrClosed
		return
	}
	defer d.leave()
	if p.flushed, p.err = checkAppend(p.r, d.id.BlockSize, &p.hdr); p.err != nil {
		return
	}
	p.err = p.write()
}

// write goes in pieces, as others wait for the file meanwhile.
func (p *putting) write() error {
	for at, data := 0, p.r.Data; at < len(data); at += prewriteWrite {
		piece := data[at:min(at+prewriteWrite, len(data))]
		if _, err := p.f.WriteAt(piece, p.place+int64(at)); err != nil {
			return fmt.Errorf("%w: %w", errPutWrite, err)
		}
	}
	return nil
}

var errPutWrite = errors.New("write")

// Done implements loop.Job.
func (p *putting) Done() {
	d := p.d
	f := d.files[d.slots[p.slot].file]
	switch {
	case d.closed:
		p.end(torus.ErrClosed)
	case errors.Is(p.err, vfs.ErrNoSpace):
		p.failed(fmt.Errorf("put %v: %w (%w)", p.r.Ref, torus.ErrOutOfSpace, p.err))
	case f.err != nil:
		p.failed(f.err)
	case errors.Is(p.err, errPutWrite):
		d.fail(f, p.err)
		p.failed(f.err)
	case p.err != nil:
		p.failed(p.err)
	default:
		f.sync.bytes += len(p.r.Data)
		f.await(p.r)
	}
}

// failed ends a Put that could not be done. The copy that is there stays.
func (p *putting) failed(err error) {
	p.d.metrics.failedWrites.Inc()
	if p.step > putBytes { // what was written may be durable or not
		p.stuck = err
		p.release(err)
		return
	}
	p.d.giveBack(p.slot)
	p.end(err)
	p.d.unpark()
}

// end answers the Put and lets the requests go on that waited for it.
func (p *putting) end(err error) {
	delete(p.d.puts, p.key)
	p.release(err)
}

func (p *putting) release(err error) {
	waiting := p.waiting
	p.waiting = nil
	p.r.Finish(err)
	for _, r := range waiting {
		p.d.Submit(r)
	}
}

// synced goes on after an fdatasync.
func (p *putting) synced() {
	switch {
	case p.d.closed:
		p.end(torus.ErrClosed)
	case p.step == putBytes:
		p.writeEntry()
	case p.step == putEntry:
		p.replace()
	default:
		p.done()
	}
}

func (p *putting) writeEntry() {
	d := p.d
	x := &d.slots[p.slot]
	f := d.files[x.file]
	if p.deleted {
		p.failed(fmt.Errorf("put %v: %w: %w", p.r.Ref, errPutGone, torus.ErrAgain))
		return
	}
	if err := d.mayReplace(p.r); err != nil { // it may have grown meanwhile
		p.failed(err)
		return
	}
	o := d.newOpen(p.slot)
	o.flushed, o.durable = p.flushed, uint32(len(p.r.Data))
	x.key, x.state, x.length = p.key, sealed, o.durable
	p.step = putEntry
	if err := d.writeEntry(p.slot); err != nil {
		d.fail(f, err)
		p.failed(f.err)
		return
	}
	f.await(p.r)
}

// replace makes the new copy, which is durable, the block, and frees the old one's slot.
func (p *putting) replace() {
	d := p.d
	s, ok := d.index.find(p.key)
	if !ok {
		d.index.insert(p.slot)
		p.done()
		return
	}
	d.unlist(s)
	d.index.insert(p.slot)
	p.step = putFree
	f := d.files[d.slots[s].file]
	if f.err == nil {
		_ = d.writeFree(s)
	}
	if f.err != nil {
		p.failed(f.err)
		return
	}
	f.await(p.r)
}

func (p *putting) done() {
	p.d.metrics.writes.Inc()
	p.end(nil)
}

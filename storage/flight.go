package storage

import (
	"errors"
	"math"
	"slices"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
)

// bulkBytes: what is appended in pieces of so many bytes goes past the page cache, where the file system lets it. It is written once, in
// order, and seldom read soon; copying it into the cache, and having the kernel write it out from there, costs more than all the rest of an append (docs/performance.md).
// Reads in such pieces go past the cache as well.
const bulkBytes = 256 << 10

// maxWriting is how many times bulkBytes the disk is given at a time; one flight more takes off as long as it has less. A small write or an fdatasync waits for what the disk was
// given before it, and a MiB is enough to keep it busy (docs/performance.md).
const maxWriting = 4

// flight is what a block has and the file does not yet: an Append that the kernel or a helper writes, as that waits for the disk, or a chunk of the stage. For everybody but the one who sent it, it is done when it takes off:
// the block has its new length, and what is in the air is read from the request's own memory, or the stage. The reply to an Append that flies waits for it, and for what of the
// same block took off before, so that the end of the process takes nothing that was acknowledged. An fdatasync covers only what has landed, or is carried by it.
//
// Small appends fly behind large ones of their block: what goes through the page cache beside a write that goes past it, in the same page of the cache, which may be
// of 2 MiB, makes that write fail. Blocks share no such page (dataOffset).
type flight struct {
	d       *Disk
	r       *torus.Request // nil: a chunk of the stage, which has been answered for
	f       *file
	slot    uint32
	place   int64  // in the file
	off     uint32 // in the block
	data    []byte // of the stage, or the part of r.Data that is new; nothing if all of it is on its way already, and only the reply has to wait
	end     uint32 // of the block, with r.Data
	filling bool   // a chunk that takes more
	carried bool   // a chunk that is written with an fdatasync
	started bool   // the kernel or a helper has it
	landed  bool
	err     error // of the helper
	chunk   int   // its number in the stage
}

var _ loop.FileIO = (*flight)(nil)

// takeOff has data, the last part of r.Data, written to the end of a block.
func (d *Disk) takeOff(r *torus.Request, s uint32, data []byte) {
	x := &d.slots[s]
	f, place := d.place(s)
	fl := &flight{d: d, r: r, f: f, slot: s, place: place + int64(x.length), off: x.length, data: data, end: x.length + uint32(len(data))}
	o := &d.opens[x.open]
	if o.chunk != nil {
		o.chunk.detach()
	}
	x.pins++
	o.flights++
	o.owed++
	d.flights = append(d.flights, fl)
	d.launch()
}

// launch has flights written, in order, as many as may be under way together.
func (d *Disk) launch() {
	if d.closed {
		return // Close writes what is left
	}
	for _, fl := range d.flights {
		if fl.started || fl.filling {
			continue
		}
		if d.writing >= maxWriting*d.bulk {
			return
		}
		fl.started = true
		d.writing += len(fl.data)
		d.loop.Offload(fl)
	}
}

// tagAlong has a reply wait for what is in the air of a block.
func (d *Disk) tagAlong(r *torus.Request, s uint32) {
	x := &d.slots[s]
	o := &d.opens[x.open]
	o.flights++
	o.owed++
	d.flights = append(d.flights, &flight{d: d, r: r, f: d.files[x.file], slot: s, off: x.length, end: r.Off + uint32(len(r.Data)), started: true, landed: true})
}

// write is on a helper, but in Close and where an fdatasync is made on the loop.
func (fl *flight) write() (took time.Duration, err error) { return fl.f.through(fl.data, fl.place) }

// FileIO implements loop.FileIO.
func (fl *flight) FileIO() (fd int, write bool, b []byte, off int64) {
	if !fl.f.apart() {
		return -1, true, nil, 0
	}
	return fl.f.f.WriteDescriptor(), true, fl.data, fl.place
}

// Work implements loop.Job.
func (fl *flight) Work() {
	if !fl.d.enter() {
		return // Close has written it
	}
	defer fl.d.leave()
	_, fl.err = fl.write()
}

// Done implements loop.Job.
func (fl *flight) Done() {
	if !fl.landed { // else Close has answered
		fl.land(fl.err)
	}
}

// land is called when the bytes are written, or cannot be.
func (fl *flight) land(err error) {
	d, f := fl.d, fl.f
	fl.landed = true
	if fl.started {
		d.writing -= len(fl.data)
	}
	if err != nil {
		// Its block may have been read or continued meanwhile, so that there is no way back, even if it is only space that is missing.
		d.fail(f, err)
	}
	d.arrive(fl.slot)
	d.unpin(fl.slot)
	d.launch()
	if f.err == nil && len(f.sync.waiting) > 0 {
		f.plan()
	}
}

// arrive answers the flights of a slot that have landed, as far as none that took off earlier is still in the air.
func (d *Disk) arrive(s uint32) {
	for {
		i := slices.IndexFunc(d.flights, func(fl *flight) bool { return fl.slot == s })
		if i < 0 || !d.flights[i].landed {
			return
		}
		fl := d.flights[i]
		d.flights = slices.Delete(d.flights, i, i+1)
		x := &d.slots[s]
		if x.open >= 0 {
			o := &d.opens[x.open]
			o.flights--
			if fl.r != nil {
				o.owed--
			}
		}
		switch {
		case fl.r == nil:
			if fl.f.err == nil { // else it may be all that is left of it, and the next Open tries again
				d.giveUp(fl)
			}
		case fl.f.err != nil:
			d.refuse(fl.r, fl.f.err)
		case x.open < 0 || x.state == freeing || fl.end > x.length: // deleted or cut off meanwhile
			d.refuse(fl.r, torus.ErrSealed)
		default:
			d.metrics.writes.Inc()
			fl.r.Length = fl.end
			fl.r.Finish(nil)
		}
	}
}

// owing reports whether an append to a block that is in the air has not been answered.
func (d *Disk) owing(s uint32) bool {
	o := d.slots[s].open
	return o >= 0 && d.opens[o].owed > 0
}

// flying reports whether something of a block is in the air below end.
func (d *Disk) flying(s, end uint32) bool { return end > d.aloft(s) }

// aloft is where in a block begins what is in the air: everything from there to the block's end, in order. noFlight if nothing is.
func (d *Disk) aloft(s uint32) (first uint32) {
	if o := d.slots[s].open; o < 0 || d.opens[o].flights == 0 {
		return noFlight
	}
	i := slices.IndexFunc(d.flights, func(fl *flight) bool { return fl.slot == s })
	return d.flights[i].off
}

// unwritten is where in a block begins what no fdatasync that begins now would cover.
func (d *Disk) unwritten(s uint32) uint32 {
	if o := d.slots[s].open; o >= 0 && d.opens[o].flights > 0 {
		for _, fl := range d.flights {
			if fl.slot == s && !fl.carried {
				return fl.off
			}
		}
	}
	return noFlight
}

const noFlight = math.MaxUint32

// readWith fills b from off in a block: what is in the air from memory, the rest by means of readAt.
func (d *Disk) readWith(s uint32, b []byte, off uint32, readAt func(b []byte, off int64) (int, error)) error {
	if first := d.aloft(s); uint64(off)+uint64(len(b)) > uint64(first) {
		for _, fl := range d.flights {
			if fl.slot != s || fl.off+uint32(len(fl.data)) <= off || uint64(fl.off) >= uint64(off)+uint64(len(b)) {
				continue
			}
			if fl.off >= off {
				copy(b[fl.off-off:], fl.data)
			} else {
				copy(b, fl.data[off-fl.off:])
			}
		}
		if first <= off {
			return nil
		}
		b = b[:first-off]
	}
	_, place := d.place(s)
	_, err := readAt(b, place+int64(off))
	return err
}

// landAll is Close's way to end what is in the air: it is written here, once more if a helper has done so already.
func (d *Disk) landAll() error {
	var errs []error
	for _, fl := range slices.Clone(d.flights) {
		if !fl.landed {
			fl.filling = false
			_, err := fl.write()
			errs = append(errs, err)
			fl.land(err)
		}
	}
	return errors.Join(errs...)
}

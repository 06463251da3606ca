package storage

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/coreos/torus"
	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/record"
	"github.com/coreos/torus/vfs"
)

// checkAppend verifies what can be seen without the block: that Data is a run of whole records made for just this place
// within the block. It returns the highest Flushed among them.
func checkAppend(r *torus.Request, blockSize uint64, h *record.Header) (flushed uint64, err error) {
	n := uint64(len(r.Data))
	if n == 0 || n%torus.PageSize != 0 || r.Off%torus.PageSize != 0 {
		return 0, fmt.Errorf("append of %d bytes at %d to %v: not whole pages: %w", n, r.Off, r.Ref, torus.ErrInvalid)
	}
	if uint64(r.Off)+n > blockSize {
		return 0, fmt.Errorf("append of %d bytes at %d to %v: beyond the block's %d bytes: %w", n, r.Off, r.Ref, blockSize, torus.ErrInvalid)
	}
	for at := 0; at < len(r.Data); {
		size, err := record.Check(r.Ref, r.Off+uint32(at), r.Data[at:], h)
		if err != nil {
			return 0, fmt.Errorf("append at %d to %v: %w", r.Off, r.Ref, err)
		}
		flushed = max(flushed, h.Flushed)
		at += size
	}
	return flushed, nil
}

// append verifies, and stages what it is given or, if it is much, has it written at once. False if there is no slot yet.
func (d *Disk) append(r *torus.Request) bool {
	s, found := d.index.find(keyOf(r.Ref))
	var length uint32
	var err error
	if found {
		x := &d.slots[s]
		length = x.length
		switch {
		case x.state != open:
			err = torus.ErrSealed
		case d.opens[x.open].failed || d.opens[x.open].unread:
			err = fmt.Errorf("append to %v, of which bytes were lost: %w", r.Ref, torus.ErrIO)
		case d.opens[x.open].suspect && uint64(r.Off)+uint64(len(r.Data)) > uint64(length):
			// What comes to end where one of those records begins would bring it back.
			err = fmt.Errorf("append to %v, behind which there are records that were never durable: %w", r.Ref, torus.ErrIO)
		}
	}
	switch {
	case err != nil:
	case d.failed:
		err = fmt.Errorf("append to %v: the disk failed before: %w", r.Ref, torus.ErrIO)
	case r.Off > length:
		err = torus.ErrGap
	}
	var flushed uint64
	if err == nil {
		flushed, err = checkAppend(r, d.id.BlockSize, &d.hdr)
	}
	if err != nil {
		d.refuse(r, err)
		return true
	}

	data := r.Data
	if r.Off < length {
		// Sent again. The very same bytes are a success, others never (D2).
		again := data[:min(len(data), int(length-r.Off))]
		same, err := d.holds(s, r.Off, again)
		switch {
		case err == vfs.ErrWouldBlock && len(again) == len(data) && !d.owing(s):
			first := max(r.Off, min(d.aloft(s), r.Off+uint32(len(data))))
			if same, err = d.holds(s, first, data[first-r.Off:]); err == nil && same { // of what is staged
				d.offloadRead(r, s)
				return true
			}
		case err == vfs.ErrWouldBlock:
			// The rest has to be appended right after, so this is not for a helper: a fence that came meanwhile would not see it.
			same, err = d.holdsSlowly(s, r.Off, again)
		}
		if err == nil && !same {
			err = errDiffers(r)
		}
		if err != nil {
			d.refuse(r, err)
			return true
		}
		if data = data[len(again):]; len(data) == 0 {
			if d.owing(s) && d.flying(s, r.Off+uint32(len(again))) {
				d.tagAlong(r, s)
				return true
			}
			r.Length = length
			r.Finish(nil)
			return true
		}
	}

	if !found {
		var wait bool
		if s, wait, err = d.allocate(r.Reserve); wait {
			return false
		}
		if err != nil {
			d.refuse(r, err)
			return true
		}
	}
	f, place := d.place(s)
	if found && d.slots[s].pins == maxPins {
		d.refuse(r, fmt.Errorf("append to %v, of which %d slow reads are under way: %w", r.Ref, maxPins, torus.ErrAgain))
		return true
	}
	durable := r.Durable && found && d.atOnce(f, s, len(data))
	flies := !durable && (len(data) >= d.bulk || found && d.owing(s))
	var c *flight
	if !durable && !flies && r.Ref.Type != torus.TypeINode {
		c = d.toStage(s, found, r.Ref, length, data)
		flies = c == nil && found && d.flying(s, length)
	}
	switch {
	case durable:
		err = d.writeDurable(f, data, place+int64(length))
	case c == nil && !flies:
		_, err = f.f.WriteAt(data, place+int64(length))
	}
	if err == nil && !found {
		d.slots[s].key, d.slots[s].state = keyOf(r.Ref), open
		err = d.writeEntry(s)
	}
	if err != nil {
		if !found {
			if c != nil {
				d.giveUp(c)
			}
			d.giveBack(s)
		}
		// What was written is beyond the block's length and so as if it were not there. But unless it is only space that is
		// missing, nothing can be said any more of what was written before.
		if errors.Is(err, vfs.ErrNoSpace) && !durable {
			err = fmt.Errorf("append to %v: %w (%w)", r.Ref, torus.ErrOutOfSpace, err)
		} else {
			d.fail(f, err)
			err = f.err
		}
		d.refuse(r, err)
		return true
	}
	if !found {
		d.newOpen(s)
		d.index.insert(s)
	}
	x := &d.slots[s]
	o := &d.opens[x.open]
	switch {
	case flies:
		d.takeOff(r, s, data)
	case c != nil:
		c.attach(len(data))
	}
	x.length += uint32(len(data))
	o.flushed = max(o.flushed, flushed)
	if durable {
		o.durable = x.length
	} else {
		if c == nil {
			f.sync.bytes += len(data)
		}
		if !o.dirty {
			o.dirty = true
			f.sync.dirty = append(f.sync.dirty, s)
		}
	}
	d.appended += uint64(len(data))
	if flies {
		return true
	}
	d.metrics.writes.Inc()
	r.Length = x.length
	r.Finish(nil)
	return true
}

// atOnce reports whether n bytes are to be appended to a block so that they are durable with the write itself, which saves an fdatasync and a copy: if all that there is of the
// block is durable, and an fdatasync would be made on the loop as well (begin). One in a turn: who else wants that then shares an fdatasync.
func (d *Disk) atOnce(f *file, s uint32, n int) bool {
	x := &d.slots[s]
	o := &d.opens[x.open]
	g := &f.sync
	return n < d.bulk && f.apart() && d.quick() && !d.writer.in(f) && !g.running && len(g.waiting) == 0 && d.loop.Now() != d.lastDurable &&
		o.durable == x.length && o.flights == 0 && x.entry == entryClean
}

func (d *Disk) writeDurable(f *file, b []byte, place int64) error {
	d.lastDurable = d.loop.Now()
	d.metrics.flushes.Inc()
	took, err := f.f.WriteDurable(b, place)
	if err == nil && took > d.syncTime { // less says nothing of what an fdatasync takes
		d.observeSync(took)
	}
	return err
}

func errDiffers(r *torus.Request) error {
	return fmt.Errorf("append at %d to %v: other bytes are there already: %w", r.Off, r.Ref, torus.ErrInvalid)
}

// holds reports whether b is what the block holds at off; vfs.ErrWouldBlock if that is not in memory.
func (d *Disk) holds(s uint32, off uint32, b []byte) (bool, error) {
	return d.compare(s, off, b, d.files[d.slots[s].file].f.ReadAtCached)
}

func (d *Disk) holdsSlowly(s uint32, off uint32, b []byte) (bool, error) {
	return d.compare(s, off, b, d.files[d.slots[s].file].f.ReadAt)
}

func (d *Disk) compare(s uint32, off uint32, b []byte, readAt func(b []byte, off int64) (int, error)) (bool, error) {
	have := buf.Get(len(b))
	defer have.Release()
	if err := d.readWith(s, have.Bytes()[:len(b)], off, readAt); err != nil {
		if errors.Is(err, vfs.ErrWouldBlock) {
			return false, vfs.ErrWouldBlock
		}
		return false, ioError("read", d.slots[s].key.ref(), err)
	}
	return bytes.Equal(have.Bytes()[:len(b)], b), nil
}

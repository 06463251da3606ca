package storage

import (
	"fmt"

	"github.com/coreos/torus"
)

// seal makes a block immutable: for callers at once, on the medium in two steps, as a sealed entry is trusted without looking
// at the records: first the bytes become durable, then the entry is written, and becomes durable. Only then it is done.
func (d *Disk) seal(r *torus.Request) {
	s, ok := d.index.find(keyOf(r.Ref))
	if !ok {
		r.Finish(fmt.Errorf("seal %v: %w", r.Ref, torus.ErrBlockNotExist))
		return
	}
	x := &d.slots[s]
	f := d.files[x.file]
	switch {
	case d.lost(s):
		r.Finish(fmt.Errorf("seal %v, of which bytes were lost: %w", r.Ref, torus.ErrIO))
		return
	case r.Len > x.length:
		r.Finish(fmt.Errorf("seal %v at %d of %d bytes: %w", r.Ref, r.Len, x.length, torus.ErrGap))
		return
	case x.state != open && r.Len < x.length:
		r.Finish(fmt.Errorf("seal %v at %d, sealed at %d: %w", r.Ref, r.Len, x.length, torus.ErrSealed))
		return
	case x.state == sealed && x.entry == entryClean:
		r.Finish(nil)
		return
	case f.err != nil:
		r.Finish(f.err)
		return
	}
	if x.state == open {
		if r.Len < x.length {
			if err := d.boundary(s, r.Len); err != nil {
				r.Finish(err)
				return
			}
			d.ledger.Change(s)
		}
		o := &d.opens[x.open]
		if r.Len < x.length {
			d.closeChunk(o.chunk)
		}
		x.state, x.length = sealing, r.Len
		o.durable = min(o.durable, r.Len)
	}
	d.sealOn(r)
}

// boundary verifies that a record begins at off, within the block.
func (d *Disk) boundary(s uint32, off uint32) error {
	x := &d.slots[s]
	if off%torus.PageSize == 0 {
		if err := d.readWith(s, d.page, off, d.files[x.file].f.ReadAt); err != nil {
			return ioError("seal", x.key.ref(), err)
		}
		if d.hdr.Decode(d.page) == nil && d.hdr.Ref == x.key.ref() && d.hdr.Offset == off {
			return nil
		}
	}
	return fmt.Errorf("seal %v at %d: within a record: %w", x.key.ref(), off, torus.ErrInvalid)
}

// sealOn takes a seal as far as it gets without waiting.
func (d *Disk) sealOn(r *torus.Request) {
	s, ok := d.index.find(keyOf(r.Ref))
	if !ok { // deleted meanwhile
		r.Finish(fmt.Errorf("seal %v: %w", r.Ref, torus.ErrBlockNotExist))
		return
	}
	x := &d.slots[s]
	f := d.files[x.file]
	switch x.state {
	case open: // deleted and made again meanwhile
		r.Finish(fmt.Errorf("seal %v: %w", r.Ref, torus.ErrBlockNotExist))
		return
	case sealing:
		if d.opens[x.open].durable >= x.length && x.entry == entryClean {
			x.state = sealed
			if err := d.writeEntry(s); err != nil {
				d.fail(f, err)
				r.Finish(f.err)
				return
			}
		}
	case sealed:
		if x.entry == entryClean {
			d.dropOpen(s)
			r.Finish(nil)
			return
		}
	}
	f.await(r)
}

// delete drops a block: for callers at once, on the medium with the next fdatasync, which it waits for.
func (d *Disk) delete(r *torus.Request) {
	s, ok := d.index.find(keyOf(r.Ref))
	if !ok {
		r.Finish(nil)
		return
	}
	x := &d.slots[s]
	f := d.files[x.file]
	if f.err != nil {
		d.refuse(r, f.err)
		return
	}
	d.unlist(s)
	if d.writeFree(s) != nil {
		d.refuse(r, f.err)
		return
	}
	f.await(r)
}

// unlist ends the life of a block as others see it. Its slot is free when that is durable.
func (d *Disk) unlist(s uint32) {
	x := &d.slots[s]
	d.ledger.Change(s)
	d.index.remove(x.key)
	x.state = freeing
}

// writeFree writes that, and then what is staged of the block is not wanted any more. If it fails, the disk has.
func (d *Disk) writeFree(s uint32) error {
	f := d.files[d.slots[s].file]
	err := d.writeEntry(s)
	if err != nil {
		d.fail(f, err)
	}
	d.abandon(s)
	d.dropOpen(s)
	return err
}

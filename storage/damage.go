package storage

import (
	"errors"
	"fmt"

	"github.com/coreos/torus"
)

// Damaged has fn called with every block that turns out to be damaged: at once with those that Open found, then, on the loop,
// whenever a read fails because of the medium or finds something else than the block's records, and when somebody asks for it (torus.OpVerify). The same block may be named
// many times. fn must not use the store before it has returned; nil: nobody is told any more.
func (d *Disk) Damaged(fn func(torus.BlockRef)) {
	if d.damaged = fn; fn == nil {
		return
	}
	for s := range d.slots {
		if x := &d.slots[s]; x.open >= 0 && (d.opens[x.open].suspect || d.opens[x.open].unread) {
			fn(x.key.ref())
		}
	}
}

// verify passes on that a copy may be damaged.
func (d *Disk) verify(r *torus.Request) {
	if d.damaged == nil {
		r.Finish(fmt.Errorf("%v of %v: nobody looks after the copies of this store: %w", r.Op, r.Ref, torus.ErrNotSupported))
		return
	}
	d.damaged(r.Ref)
	r.Finish(nil)
}

func (d *Disk) noteDamage(ref torus.BlockRef, err error) {
	if !errors.Is(err, torus.ErrIO) && !errors.Is(err, torus.ErrCorrupt) {
		return
	}
	if s, ok := d.index.find(keyOf(ref)); ok && d.slots[s].open >= 0 {
		d.opens[d.slots[s].open].hurt = true
	}
	if d.damaged != nil {
		d.damaged(ref)
	}
}

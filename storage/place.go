package storage

import (
	"fmt"

	"github.com/coreos/torus"
	"github.com/coreos/torus/place"
	"github.com/coreos/torus/vfs"
)

// Others on this machine may read a block from its slot, as far as it has been written there, as long as it is a whole and healthy one: damage is for the peer to
// notice and to mend. What is in a slot below the block's length does not change before the slot is used again, and the stamp in the ledger
// changes before that, at the very moment from which on a read here would not find the block either, or less of it.

var _ place.Store = (*Disk)(nil)

// Locate implements place.Store.
func (d *Disk) Locate(ref torus.BlockRef) (p place.Place, err error) {
	if d.closed {
		return p, torus.ErrClosed
	}
	s, ok := d.index.find(keyOf(ref))
	if !ok {
		return p, torus.ErrBlockNotExist
	}
	f, off := d.place(s)
	if f.err != nil || d.tail(s).Suspect {
		return p, torus.ErrIO
	}
	p = place.Place{File: uint32(f.index), Off: off, Length: min(d.slots[s].length, d.aloft(s))}
	p.Page, p.Index, p.Stamp = d.ledger.Find(s)
	return p, nil
}

// OpenFile implements place.Store.
func (d *Disk) OpenFile(number uint32) (vfs.Reader, error) {
	switch {
	case d.closed:
		return nil, torus.ErrClosed
	case int64(number) >= int64(len(d.files)):
		return nil, fmt.Errorf("no file %d: %w", number, torus.ErrInvalid)
	}
	return d.files[number].f.Reader()
}

// Package place is how a store says where its blocks lie, so that other processes of its machine can read them from there: the disk wakes who wants the
// bytes, and nobody else. What they have read is what the store would have told them if the block was still there afterwards, which a stamp says that both
// can see.
package place

import (
	"math/rand/v2"
	"sync/atomic"
	"unsafe"

	"github.com/coreos/torus"
	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/vfs"
)

// Store is a BlockStore whose blocks others may read from the files that they lie in.
type Store interface {
	torus.BlockStore
	// Locate says where a block lies. The error is torus.ErrNotSupported if there are no files at all; others that this block cannot be read from there, or should
	// not be: Submit can tell more.
	Locate(ref torus.BlockRef) (Place, error)
	// OpenFile opens the file of a Place for who wants to read from it.
	OpenFile(number uint32) (vfs.Reader, error)
}

// Place is where a block lies. As long as its stamp is the same, that is so.
type Place struct {
	File   uint32 // its number in the store
	Off    int64  // of the block's first byte in it
	Length uint32 // bytes of the block that are there and stay as they are; more may come behind them
	Stamp  uint64
	Page   *buf.Buf // of the ledger: PageSize bytes, in which is the stamp
	Index  uint32   // of the stamp in that
}

// PageSize is the size of a page of a ledger in bytes, and Stamps how many are in it.
const (
	PageSize = 64 << 10
	Stamps   = PageSize / 8
)

// Ledger has a stamp for each of a store's slots, in memory that others can be shown (buf.Share). It belongs to the store's loop; others may look at any time.
type Ledger struct {
	pages []*buf.Buf
	first uint64 // of every stamp
}

// Find returns where the stamp of a slot is, and what.
func (l *Ledger) Find(slot uint32) (page *buf.Buf, index uint32, stamp uint64) {
	for uint32(len(l.pages)) <= slot/Stamps {
		l.add()
	}
	page, index = l.pages[slot/Stamps], slot%Stamps
	return page, index, Look(page.Bytes(), index)
}

// add makes a page. The first stamps are chance, so that one is never found in what the memory is used for after the ledger.
func (l *Ledger) add() {
	if l.first == 0 {
		l.first = rand.Uint64()
	}
	page := buf.GetShared(PageSize)
	for i := range uint32(Stamps) {
		atomic.StoreUint64(stamp(page.Bytes(), i), l.first)
	}
	l.pages = append(l.pages, page)
}

// Change says that what was said of a slot does not hold any more. It is to be called before anything else is written there.
func (l *Ledger) Change(slot uint32) {
	if i := slot / Stamps; i < uint32(len(l.pages)) { // else nobody was told
		atomic.AddUint64(stamp(l.pages[i].Bytes(), slot%Stamps), 1)
	}
}

// ChangeAll is Change of every slot.
func (l *Ledger) ChangeAll() {
	for _, page := range l.pages {
		for i := range uint32(Stamps) {
			atomic.AddUint64(stamp(page.Bytes(), i), 1)
		}
	}
}

// Look returns a stamp that is in a page of somebody's ledger.
func Look(page []byte, index uint32) uint64 { return atomic.LoadUint64(stamp(page, index)) }

func stamp(page []byte, index uint32) *uint64 {
	b := page[8*index : 8*index+8]
	return (*uint64)(unsafe.Pointer(unsafe.SliceData(b)))
}

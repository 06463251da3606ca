package storage

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/place"
	"github.com/coreos/torus/record"
	"github.com/coreos/torus/vfs"
)

// Config is what a store is made of.
type Config struct {
	Loop      loop.Loop // the store belongs to it
	FS        vfs.FS    // not used by NewMemory
	Identity  Identity
	SizeBytes uint64 // rounded down to whole blocks
	Log       *slog.Logger
	// Registerer takes the metrics torus_storage_*; they are unregistered by Close. Nil for none.
	Registerer prometheus.Registerer

	// SlotsPerFile is how many blocks share a file, DefaultSlotsPerFile if 0. It may change from one Open to the next.
	SlotsPerFile int
	// BulkBytes: an append of so many bytes is written from where it is, 256 KiB if 0. Smaller ones are staged.
	BulkBytes int
	// ReserveBytes is what the store leaves free of the file system. 0: 1/64 of it, 1 GiB at most.
	ReserveBytes uint64
}

// DefaultSlotsPerFile makes files of 1 GiB out of blocks of 4 MiB.
const DefaultSlotsPerFile = 256

// Disk is a Store in a directory.
type Disk struct {
	loop     loop.Loop
	fs       vfs.FS
	id       Identity
	log      *slog.Logger
	metrics  *metrics
	perFile  uint32
	reserve  uint64
	limit    uint32 // slots that may be taken
	kept     uint32 // of these, how many only by requests with Reserve
	appended uint64 // bytes
	unlock   func() error

	files []*file
	slots []slot // of all files, one after another
	// ledger tells those who read blocks from the files themselves when one is not there any more; see place.go.
	ledger place.Ledger
	index  index
	opens  []openBlock
	spare  []int32 // of opens, those not in use
	taken  uint32  // slots that are not free
	gen    uint64  // of the newest entry

	// failed is set once, by the first failure of a write or fdatasync.
	failed bool
	closed bool
	// io is held for reading by whoever uses a file on a helper; Close takes it to wait for them, and sets gone.
	io   sync.RWMutex
	gone bool

	syncTime time.Duration // how long an fdatasync takes, a moving average; 0: not known
	// lastDurable is when an append was made durable with its write.
	lastDurable time.Duration
	hdr         record.Header // reused
	page        []byte        // reused
	readJobs    []*readJob    // to be reused

	grow      grower
	writer    prewriter
	puts      map[key]*putting // under way
	bulk      int              // bytes of an append that is not staged
	stage     stage
	flights   []*flight // in the order in which they took off
	writing   int       // bytes of them that the disk has been given
	damaged   func(torus.BlockRef)
	parked    []*torus.Request // wait for a slot that is in the making, and all that came after them
	unparking bool
}

var _ torus.Store = (*Disk)(nil)

// slot is what is known of a slot: 40 bytes, so that 10 TiB of 4 MiB blocks take 105 MB along with the index.
type slot struct {
	key     key
	length  uint32
	open    int32  // index in Disk.opens; -1 if none
	file    uint16 // index in Disk.files
	pins    uint16 // reads under way on a helper, and what is in the air
	state   state
	durable uint8 // which of the two entries is the last durable one
	entry   entryState
}

// entryState says whether the newest entry of a slot is durable.
type entryState uint8

const (
	entryClean  entryState = iota
	entryFlying            // covered by the fdatasync that runs
	entryDirty             // written since
)

// openBlock is what is known of a block besides, until it is sealed durably.
type openBlock struct {
	durable uint32  // bytes
	flying  uint32  // bytes covered by the fdatasync that runs
	flushed uint64  // highest Flushed of its records
	flights int     // what is in the air
	owed    int     // appends of it that are not answered
	chunk   *flight // the last of them, if it takes more
	dirty   bool    // in its file's list of dirty slots, with bytes
	failed  bool    // bytes were lost by a failed write or fdatasync; length is what was durable
	suspect bool    // records behind the length were found: the slot is kept, and they can be read by who knows their checksums
	unread  bool    // the medium could not be read when the store was opened; length is what was verified
	hurt    bool    // a read failed
}

// file is a slots file.
type file struct {
	d     *Disk
	index uint16 // in Disk.files
	super superblock
	name  string
	f     vfs.File
	base  uint32 // its first slot in Disk.slots
	err   error  // it failed: nothing in it changes any more

	ready []uint32 // free slots, written through before
	raw   []uint32 // free slots that were never used

	sync group
}

// place is where a slot begins in its file.
func (d *Disk) place(s uint32) (*file, int64) {
	f := d.files[d.slots[s].file]
	return f, f.super.dataOffset() + int64(s-f.base)*int64(d.id.BlockSize)
}

// apart reports whether no two blocks share a page of the page cache, so that one may be written past it while another is written through it. Where
// nothing can be written past it, that does not matter.
func (f *file) apart() bool { return f.d.id.BlockSize%largestPage == 0 || f.f.WriteDescriptor() < 0 }

// through writes past the page cache, where that may be. took is how long it waited for that.
func (f *file) through(b []byte, off int64) (took time.Duration, err error) {
	if f.apart() {
		return f.f.WriteThrough(b, off)
	}
	_, err = f.f.WriteAt(b, off)
	return 0, err
}

// Kind implements torus.Store.
func (d *Disk) Kind() string { return "disk" }

// Stats implements torus.Store.
func (d *Disk) Stats() torus.StoreStats {
	return torus.StoreStats{
		BlockSize: d.id.BlockSize,
		Size:      uint64(d.limit-d.kept) * d.id.BlockSize,
		Used:      uint64(d.taken) * d.id.BlockSize,
		Full:      d.taken >= d.limit-d.kept || d.scarce() && d.grow.why != "",
		Failed:    d.failed,
	}
}

// Submit implements torus.BlockStore.
func (d *Disk) Submit(r *torus.Request) {
	if d.closed {
		r.Finish(torus.ErrClosed)
		return
	}
	if len(d.parked) > 0 || !d.do(r) {
		d.parked = append(d.parked, r)
	}
}

// do starts r; false if it has to wait for a slot in the making.
func (d *Disk) do(r *torus.Request) bool {
	if !validRef(r.Ref) {
		r.Finish(fmt.Errorf("%v with a block reference out of range: %w", r.Op, torus.ErrInvalid))
		return true
	}
	if len(d.puts) > 0 && r.Op.Mutating() && d.holdUp(r) {
		return true
	}
	switch r.Op {
	case torus.OpPing:
		r.Finish(nil)
	case torus.OpAppend:
		return d.append(r)
	case torus.OpPut:
		return d.put(r)
	case torus.OpSync:
		d.sync(r)
	case torus.OpFence:
		d.fence(r)
	case torus.OpSeal:
		d.seal(r)
	case torus.OpRead:
		d.read(r)
	case torus.OpScan:
		d.scan(r)
	case torus.OpDelete:
		d.delete(r)
	case torus.OpList:
		r.Tails = nil
		d.index.list(r, func(s uint32) { r.Tails = append(r.Tails, d.tail(s)) })
		r.Finish(nil)
	case torus.OpVerify:
		d.verify(r)
	default:
		r.Finish(fmt.Errorf("%v on a disk: %w", r.Op, torus.ErrNotSupported))
	}
	return true
}

// unpark starts the requests that wait for a slot, in their order, as far as there are slots now.
func (d *Disk) unpark() {
	if d.unparking {
		return
	}
	d.unparking = true
	// A request stays in the list while it is started: what its Done submits goes behind the others.
	for len(d.parked) > 0 && !d.closed && d.do(d.parked[0]) {
		if len(d.parked) > 0 { // unless Done closed the store
			d.parked[0] = nil
			d.parked = d.parked[1:]
		}
	}
	d.unparking = false
}

func (d *Disk) tail(s uint32) torus.Tail {
	x := &d.slots[s]
	t := torus.Tail{Ref: x.key.ref(), Length: x.length, Sealed: x.state == sealed || x.state == sealing}
	if x.open >= 0 {
		o := &d.opens[x.open]
		t.Suspect = o.failed || o.suspect || o.unread || o.hurt
	}
	return t
}

// fence replies the tails of a window of blocks. The fence itself is kept by package peer; nothing that came before is still
// under way here, as what may change a block is done, or waits in the same queue, before this is reached.
func (d *Disk) fence(r *torus.Request) {
	r.Tails, r.Committed = nil, 0
	d.index.window(r, func(s uint32) {
		x, t := &d.slots[s], d.tail(s)
		if x.open >= 0 {
			r.Committed = max(r.Committed, d.opens[x.open].flushed)
		} else if flushed, err := d.sealedFlushed(s); err == nil {
			r.Committed = max(r.Committed, flushed)
		} else {
			t.Suspect = true // how much of it was flushed is not known
			d.noteDamage(t.Ref, err)
		}
		r.Tails = append(r.Tails, t)
	})
	r.Finish(nil)
}

// newOpen gives a slot an openBlock.
func (d *Disk) newOpen(s uint32) *openBlock {
	var i int32
	if n := len(d.spare); n > 0 {
		i, d.spare = d.spare[n-1], d.spare[:n-1]
	} else {
		i = int32(len(d.opens))
		d.opens = append(d.opens, openBlock{})
	}
	d.opens[i] = openBlock{}
	d.slots[s].open = i
	return &d.opens[i]
}

func (d *Disk) dropOpen(s uint32) {
	if i := d.slots[s].open; i >= 0 {
		d.spare = append(d.spare, i)
		d.slots[s].open = -1
	}
}

// keptSlots is how many of a store's slots are kept back (torus.Request.Reserve): enough for some copies that a recovery makes and for
// the metadata of checkpoints, and few beside the rest. A store of less than 8 has none to spare.
func keptSlots(limit uint32) uint32 {
	switch {
	case limit < 8:
		return 0
	case limit < 16:
		return 1
	}
	return min(max(limit/16, 2), 16)
}

// scarce reports whether no more free slots are left, in the files that there are, than are kept back.
func (d *Disk) scarce() bool { return uint32(len(d.slots))-d.taken <= d.kept }

// allocate takes a free slot, one that was written through if there is one. wait: there is none, but soon there may be. reserve: it may be
// one that is kept back.
func (d *Disk) allocate(reserve bool) (s uint32, wait bool, err error) {
	limit := d.limit
	if !reserve {
		limit -= d.kept
	}
	if d.taken >= limit {
		return 0, false, fmt.Errorf("all %d slots of the store are taken (its size is %d bytes); delete volumes or add peers: %w",
			limit, uint64(limit)*d.id.BlockSize, torus.ErrOutOfSpace)
	}
	if !reserve && d.scarce() { // those that are left are kept, and must not be the last that the disk has room for
		if d.startGrowing() {
			return 0, true, nil
		}
		return 0, false, fmt.Errorf("no free slot: %s: %w", d.grow.why, torus.ErrOutOfSpace)
	}
	var raw *file
	for _, f := range d.files {
		if f.err != nil {
			continue
		}
		if len(f.ready) > 0 {
			s, f.ready = f.ready[0], f.ready[1:]
			d.took()
			return s, false, nil
		}
		if raw == nil && len(f.raw) > 0 {
			raw = f
		}
	}
	if raw != nil {
		s, raw.raw = raw.raw[0], raw.raw[1:]
		d.took()
		return s, false, nil
	}
	if d.writer.interrupt() {
		return d.allocate(reserve)
	}
	if d.writer.slot != noSlot || d.startGrowing() {
		return 0, true, nil
	}
	return 0, false, fmt.Errorf("no free slot: %s: %w", d.grow.why, torus.ErrOutOfSpace)
}

func (d *Disk) took() {
	d.taken++
	d.metrics.blocks.Set(float64(d.taken))
	d.keepAhead()
	d.prewrite()
}

// giveBack makes a slot free again.
func (d *Disk) giveBack(s uint32) {
	x := &d.slots[s]
	x.state, x.key, x.length = free, key{}, 0
	f := d.files[x.file]
	if f.err == nil {
		f.ready = append(f.ready, s)
	}
	d.taken--
	d.metrics.blocks.Set(float64(d.taken))
}

// writeEntry writes the slot's entry as its state and length are now, over the one that is not the last durable one.
func (d *Disk) writeEntry(s uint32) error {
	x := &d.slots[s]
	f := d.files[x.file]
	d.gen++
	e := entry{state: x.state, gen: d.gen, slot: s - f.base, file: f.super.number}
	switch x.state {
	case open:
		e.ref = x.key.ref()
	case sealed:
		e.ref, e.length = x.key.ref(), x.length
		if x.open >= 0 {
			e.flushed = d.opens[x.open].flushed
		}
	case freeing:
		e.state = free
	}
	b := d.page[:entrySize]
	e.encode(b)
	if _, err := f.f.WriteAt(b, entryPlace(f.super.slots, 1-x.durable, s-f.base)); err != nil {
		return err
	}
	if x.entry != entryDirty {
		x.entry = entryDirty
		f.sync.dirty = append(f.sync.dirty, s)
	}
	return nil
}

func entryPlace(slots uint32, table uint8, slot uint32) int64 {
	return torus.PageSize + int64(table)*tableSize(slots) + int64(slot)*entrySize
}

// sealedFlushed reads what a durable entry says of its block's records.
func (d *Disk) sealedFlushed(s uint32) (uint64, error) {
	x := &d.slots[s]
	f := d.files[x.file]
	table := x.durable
	if x.entry != entryClean {
		table = 1 - table
	}
	var e entry
	b := d.page[:entrySize]
	if _, err := f.f.ReadAt(b, entryPlace(f.super.slots, table, s-f.base)); err != nil {
		return 0, ioError("read the entry of", x.key.ref(), err)
	}
	if err := e.decodeFor(b, f.super.number, s-f.base, d.id.BlockSize); err != nil {
		return 0, fmt.Errorf("entry of %v: %w", x.key.ref(), err)
	}
	return e.flushed, nil
}

// ioError is ErrIO with its cause.
func ioError(op string, ref torus.BlockRef, err error) error {
	if errors.Is(err, torus.ErrClosed) {
		return err
	}
	return fmt.Errorf("%s %v: %w (%w)", op, ref, torus.ErrIO, err)
}

// fail is the end of a file after a write or fdatasync failed: whatever was not durable in it is lost, but for what the next Open finds in the stage.
func (d *Disk) fail(f *file, cause error) {
	if f.err != nil {
		return
	}
	f.err = fmt.Errorf("%s failed: %w (%w)", f.name, torus.ErrIO, cause)
	d.failed = true
	d.metrics.failed.Set(1)
	lost := 0
	for s := f.base; s < f.base+f.super.slots; s++ {
		x := &d.slots[s]
		if x.open < 0 {
			continue
		}
		o := &d.opens[x.open]
		if o.durable < x.length || x.entry != entryClean {
			o.failed = true
			x.length = o.durable
			d.ledger.Change(s)
			lost++
		}
	}
	f.ready, f.raw = nil, nil
	d.log.Error("the disk failed: the store accepts nothing more until it is restarted and has verified its blocks",
		"file", f.name, "err", cause, "blocks_with_lost_bytes", lost)
	waiting, served := f.sync.waiting, f.sync.served
	f.sync.waiting, f.sync.served, f.sync.dirty = nil, nil, nil
	for _, r := range served {
		d.refuse(r, f.err)
	}
	for _, r := range waiting {
		d.refuse(r, f.err)
	}
	d.unpark()
}

// refuse fails a request because the disk failed.
func (d *Disk) refuse(r *torus.Request, err error) {
	switch r.Op {
	case torus.OpPut:
		d.puts[keyOf(r.Ref)].failed(err)
		return
	case torus.OpAppend:
		d.metrics.failedWrites.Inc()
	case torus.OpDelete:
		d.metrics.failedDeletes.Inc()
	}
	r.Finish(err)
}

// enter is called by a helper before it uses a file; false after Close.
func (d *Disk) enter() bool {
	d.io.RLock()
	if d.gone {
		d.io.RUnlock()
		return false
	}
	return true
}

func (d *Disk) leave() { d.io.RUnlock() }

// Close implements torus.Store. Requests that wait for an fdatasync are answered by one that it makes; those that wait for a
// slot or a seal get ErrClosed, and so do, later, those that a helper had not begun.
func (d *Disk) Close() error {
	if d.closed {
		return torus.ErrClosed
	}
	d.closed = true
	d.io.Lock()
	d.gone = true
	d.io.Unlock()
	if l, ok := d.loop.(interface{ Settle() }); ok {
		l.Settle()
	}
	d.writer.timer.Stop()
	d.grow.timer.Stop()
	d.stage.timer.Stop()
	d.ledger.ChangeAll()

	errs := []error{d.landAll()}
	parked := d.parked
	d.parked = nil
	for _, f := range d.files {
		if err := f.closeSync(); err != nil {
			errs = append(errs, err)
		}
	}
	for _, r := range parked {
		r.Finish(torus.ErrClosed)
	}
	return errors.Join(append(errs, d.release())...)
}

// release gives back files, lock and metrics.
func (d *Disk) release() error {
	var errs []error
	for _, f := range d.files {
		errs = append(errs, f.f.Close())
	}
	errs = append(errs, d.stage.close(), d.unlock())
	d.metrics.unregister()
	return errors.Join(errs...)
}

const noSlot = math.MaxUint32

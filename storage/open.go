package storage

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"slices"
	"strings"

	"github.com/coreos/torus"
	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/record"
	"github.com/coreos/torus/vfs"
)

// Open opens the store in the directory cfg.FS, which Create has given its identity. It blocks, as long as it takes to read
// the tables of the slots and the blocks that are not sealed; so call it before the loop runs, or in a simulation.
// Errors wrap torus.ErrWrongCluster, torus.ErrLocked (in use), torus.ErrInvalid, torus.ErrOutOfSpace, torus.ErrCorrupt,
// torus.ErrIO, or fs.ErrNotExist where there is no store.
func Open(cfg Config) (*Disk, error) {
	d, err := openDisk(cfg)
	if err != nil {
		var e *torus.Error
		if errors.As(err, &e) {
			return nil, err
		}
		return nil, &torus.Error{Op: "open store", Obj: "of " + cfg.Identity.String(), Err: err}
	}
	return d, nil
}

func (cfg *Config) check() (limit, perFile uint32, err error) {
	if cfg.Loop == nil {
		return 0, 0, fmt.Errorf("no loop: %w", torus.ErrInvalid)
	}
	if err := cfg.Identity.validate(); err != nil {
		return 0, 0, err
	}
	n := cfg.SizeBytes / cfg.Identity.BlockSize
	if n == 0 || n >= noSlot {
		return 0, 0, &torus.Error{Op: "open store", Obj: fmt.Sprintf("of %d bytes", cfg.SizeBytes),
			Err:  fmt.Errorf("it holds %d blocks of %d bytes: %w", n, cfg.Identity.BlockSize, torus.ErrInvalid),
			Hint: "Give the peer a size of at least one block, such as --size 20GiB or --size 80%."}
	}
	if cfg.SlotsPerFile < 0 || cfg.SlotsPerFile > maxSlotsPerFile {
		return 0, 0, fmt.Errorf("%d slots per file: %w", cfg.SlotsPerFile, torus.ErrInvalid)
	}
	if cfg.SlotsPerFile == 0 {
		cfg.SlotsPerFile = DefaultSlotsPerFile
	}
	if cfg.BulkBytes == 0 {
		cfg.BulkBytes = bulkBytes
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return uint32(n), uint32(cfg.SlotsPerFile), nil
}

func openDisk(cfg Config) (_ *Disk, err error) {
	limit, perFile, err := cfg.check()
	if err != nil {
		return nil, err
	}
	if cfg.FS == nil {
		return nil, fmt.Errorf("no file system: %w", torus.ErrInvalid)
	}
	id, err := ReadIdentity(cfg.FS)
	if err != nil {
		return nil, err
	}
	if err := sameIdentity(id, cfg.Identity); err != nil {
		return nil, err
	}
	unlock, err := cfg.FS.Lock(lockFile)
	if errors.Is(err, vfs.ErrLocked) {
		return nil, &torus.Error{Op: "open store", Obj: "of " + id.String(), Err: fmt.Errorf("%w: another process uses the data directory (%w)", torus.ErrLocked, err),
			Hint: "Stop the other torusd, or give this one a directory of its own (--data-dir)."}
	}
	if err != nil {
		return nil, err
	}
	d := &Disk{
		loop: cfg.Loop, fs: cfg.FS, id: id, log: cfg.Log, perFile: perFile, limit: limit, kept: keptSlots(limit), unlock: unlock, reserve: cfg.ReserveBytes, bulk: cfg.BulkBytes,
		page: make([]byte, torus.PageSize), puts: map[key]*putting{},
	}
	d.index.slots = &d.slots
	d.grow.d, d.writer = d, prewriter{d: d, slot: noSlot}
	if d.metrics, err = newMetrics(cfg.Registerer); err != nil {
		_ = unlock()
		return nil, err
	}
	if err = d.recover(cfg.SizeBytes); err != nil {
		_ = d.release()
		return nil, err
	}
	d.metrics.blocks.Set(float64(d.taken))
	d.metrics.blocksTotal.Set(float64(d.limit))
	d.metrics.blockBytes.Set(float64(id.BlockSize))
	d.keepAhead()
	d.prewrite()
	return d, nil
}

func sameIdentity(have, want Identity) error {
	wrong := func(err error, hint string) error {
		return &torus.Error{Op: "open store", Obj: "of " + want.String(), Err: fmt.Errorf("the data directory holds %v: %w", have, err), Hint: hint}
	}
	switch {
	case have.ClusterID != want.ClusterID:
		return wrong(torus.ErrWrongCluster, "Point --etcd at the cluster it belongs to, or use another --data-dir; to give the disk to the new cluster, empty the directory.")
	case have.Peer != want.Peer:
		return wrong(torus.ErrInvalid, "Use the data directory of this peer, or none: an empty one gets a new identity.")
	case have.BlockSize != want.BlockSize:
		return wrong(torus.ErrInvalid, "A cluster's block size never changes: this directory is from another `torusctl init`. Empty it or use another.")
	}
	return nil
}

// recovery is what Open knows beyond what stays.
type recovery struct {
	d      *Disk
	window *buf.Buf
	gens   []uint64 // of the newest entry of each slot
	used   []uint32 // slots with blocks
	staged map[key][]staged
	// unstaged: the stage could not be read.
	unstaged bool
	kept     map[key]bool // blocks to which what was staged of them could not be written
	drop     []uint32     // slots whose block is not one: to be freed
	torn     int          // entries
}

// recover reads what a clean end, a killed process or a power cut has left.
func (d *Disk) recover(size uint64) error {
	left, total, err := d.fs.Free()
	if err != nil {
		return err
	}
	if size > total {
		return &torus.Error{Op: "open store", Obj: fmt.Sprintf("of %d bytes", size),
			Err:  fmt.Errorf("the file system has %d bytes in all, %d of them free: %w", total, left, torus.ErrOutOfSpace),
			Hint: "Give the peer a smaller --size (a percentage such as 80% fits any disk), or put --data-dir on a larger disk."}
	}
	if d.reserve == 0 {
		d.reserve = min(1<<30, total/64)
	}
	numbers, err := d.slotsFiles()
	if err != nil {
		return err
	}
	r := &recovery{d: d, window: buf.Get(record.MaxSize), kept: map[key]bool{}}
	defer r.window.Release()
	if r.staged, err = readStage(d.fs); err != nil {
		d.log.Error("cannot read the stage: open blocks take no more appends, and a recovery is told that others may hold more of them; "+
			"if that stays so, stop the peer and remove the file, and what it was given last is missing here", "file", stageFile, "err", err)
		r.unstaged = true
	}
	for _, n := range numbers {
		if err := r.readFile(n); err != nil {
			return &torus.Error{Op: "open store", Obj: "file " + slotsName(n), Err: err,
				Hint: "If the disk is broken, replace it, empty the data directory and let the cluster heal."}
		}
	}
	r.buildIndex()
	// Everything that was read counts as durable from now on; after a process kill some of it may not be yet.
	for _, f := range d.files {
		if err := f.f.Datasync(); err != nil {
			return fmt.Errorf("%s: %w (%w)", f.name, torus.ErrIO, err)
		}
	}
	if err := r.free(); err != nil {
		return err
	}
	for _, list := range r.staged {
		for _, p := range list {
			p.data.Release()
		}
	}
	if err := d.openStage(r); err != nil {
		d.log.Warn("there is no stage for small appends: they go through the page cache", "file", stageFile, "err", err)
	}
	if r.torn > 0 || len(r.drop) > 0 {
		d.log.Info("recovered from a crash", "torn_entries", r.torn, "slots_freed", len(r.drop))
	}
	return nil
}

// slotsFiles returns the numbers of the slots files, in order, and removes what a crash left half made.
func (d *Disk) slotsFiles() ([]uint32, error) {
	names, err := d.fs.List(".")
	if err != nil {
		return nil, err
	}
	var numbers []uint32
	for _, name := range names {
		if !strings.HasPrefix(name, slotsPrefix) && name != identityFile+newSuffix && name != countFile+newSuffix && name != stageFile+newSuffix {
			continue
		}
		if strings.HasSuffix(name, newSuffix) {
			if err := d.fs.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, err
			}
			continue
		}
		var n uint32
		if _, err := fmt.Sscanf(name, slotsPrefix+"%d", &n); err != nil || slotsName(n) != name {
			return nil, fmt.Errorf("%q is not a name for a file of slots: %w", name, torus.ErrCorrupt)
		}
		numbers = append(numbers, n)
	}
	slices.Sort(numbers)
	count, err := readCount(d.fs)
	if err != nil {
		return nil, err
	}
	for i := range max(count, uint32(len(numbers))) {
		if i >= uint32(len(numbers)) || numbers[i] != i {
			return nil, &torus.Error{Op: "open store", Obj: "of " + d.id.String(), Err: fmt.Errorf("the file %s is missing: %w", slotsName(i), torus.ErrCorrupt),
				Hint: "Its blocks are lost here. Put it back, or empty the data directory and let the cluster heal."}
		}
	}
	return numbers, nil
}

// readFile reads a slots file: superblock, tables, and the blocks that are not sealed.
func (r *recovery) readFile(number uint32) error {
	d := r.d
	vf, err := d.fs.Open(slotsName(number))
	if err != nil {
		return err
	}
	var super superblock
	tables, err := readHead(vf, &super)
	if err == nil {
		err = d.checkSuper(super, number, vf)
	}
	if err != nil {
		vf.Close()
		return err
	}
	f := d.addFile(super, vf)
	for i := range super.slots {
		s := f.base + i
		x := &d.slots[s]
		var e [2]entry
		var bad [2]bool
		for t := range e {
			at := int64(t)*tableSize(super.slots) + int64(i)*entrySize
			bad[t] = e[t].decodeFor(tables[at:at+entrySize], number, i, d.id.BlockSize) != nil
			if !bad[t] {
				d.gen = max(d.gen, e[t].gen)
			}
		}
		newest := 0
		if bad[0] || !bad[1] && e[1].gen > e[0].gen {
			newest = 1
		}
		if bad[0] || bad[1] {
			r.torn++
		}
		n := e[newest]
		r.gens = append(r.gens, n.gen)
		x.durable, x.state = uint8(newest), n.state
		switch {
		case bad[newest]:
			d.log.Error("neither entry of a slot can be read: the slot is not used any more", "file", f.name, "slot", i)
			x.state = broken
			d.taken++
		case n.state == sealed:
			x.key, x.length = keyOf(n.ref), n.length
			r.used = append(r.used, s)
			d.taken++
		case n.state == open:
			x.key = keyOf(n.ref)
			d.taken++
			if r.walk(f, s) || r.unstaged {
				d.opens[x.open].unread = d.opens[x.open].unread || r.unstaged
				r.used = append(r.used, s)
			} else {
				r.drop = append(r.drop, s)
			}
		case n.gen > 0:
			f.ready = append(f.ready, s)
		default:
			f.raw = append(f.raw, s)
		}
	}
	return nil
}

// readHead reads the superblock and returns the two tables. Memory is asked to forget what is clean first: after a failed
// fdatasync of a process that is gone it may differ from what is on the medium.
func readHead(f vfs.File, super *superblock) ([]byte, error) {
	if err := f.DropCache(0, torus.PageSize); err != nil {
		return nil, err
	}
	page := make([]byte, torus.PageSize)
	if _, err := f.ReadAt(page, 0); err != nil {
		return nil, readError(err)
	}
	if err := super.decode(page); err != nil {
		return nil, err
	}
	if err := f.DropCache(0, super.dataOffset()); err != nil {
		return nil, err
	}
	tables := make([]byte, 2*tableSize(super.slots))
	if _, err := f.ReadAt(tables, torus.PageSize); err != nil {
		return nil, readError(err)
	}
	return tables, nil
}

func readError(err error) error {
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("the file is too short: %w", torus.ErrCorrupt)
	}
	return fmt.Errorf("%w (%w)", torus.ErrIO, err)
}

func (d *Disk) checkSuper(super superblock, number uint32, f vfs.File) error {
	if err := sameIdentity(super.id, d.id); err != nil {
		return err
	}
	if super.number != number {
		return fmt.Errorf("it is file %d under another name: %w", super.number, torus.ErrCorrupt)
	}
	size, err := f.Size()
	if err != nil {
		return err
	}
	if size < super.fileSize() {
		return fmt.Errorf("it has %d bytes, not %d: %w", size, super.fileSize(), torus.ErrCorrupt)
	}
	if uint64(len(d.slots))+uint64(super.slots) >= noSlot {
		return fmt.Errorf("more than %d slots: %w", noSlot, torus.ErrCorrupt)
	}
	return nil
}

// walk finds how much of an unsealed block there is: the run of valid records from its first byte. What follows is a torn
// write, never written, or left over from a former occupant, whose records name another block. False if there is nothing
// of the block at all.
func (r *recovery) walk(f *file, s uint32) bool {
	d := r.d
	_, place := d.place(s)
	o := d.newOpen(s)
	x := &d.slots[s]
	ref, block := x.key.ref(), d.id.BlockSize
	unread := func(at uint64, err error) bool {
		d.log.Error("cannot read an open block: it takes no more appends, and a recovery is told that others may hold more of it",
			"block", ref, "file", f.name, "offset", at, "err", err)
		o.unread = true
		return true
	}
	err := f.f.DropCache(place, int64(block))
	if err == nil {
		err = r.restore(f, s)
	}
	if err != nil {
		if len(r.staged[x.key]) > 0 {
			r.kept[x.key] = true
		}
		return unread(0, err)
	}
	from := uint64(0) // of the window
	for {
		b := r.window.Bytes()[:min(record.MaxSize, block-from)]
		if _, err := f.f.ReadAt(b, place+int64(from)); err != nil {
			return unread(from, err)
		}
		at := 0
		for at < len(b) {
			n, err := record.Check(ref, uint32(from)+uint32(at), b[at:], &d.hdr)
			if err != nil {
				break
			}
			o.flushed = max(o.flushed, d.hdr.Flushed)
			at += n
		}
		from += uint64(at)
		x.length = uint32(from)
		if at > 0 && from < block { // perhaps only the window was too short
			continue
		}
		// No whole record here, with all the bytes that it could have: a torn or reordered write of the last moments before a
		// power cut, or rot. Headers of this block further on tell.
		size, seq := r.damaged(ref, uint32(from), b)
		later, err := r.headersAfter(f, ref, place, from+uint64(size))
		if err != nil {
			return unread(from, err)
		}
		if size == 0 && !later.any {
			o.durable = x.length
			return x.length > 0
		}
		// What they say to be flushed must not be forgotten, so that a recovery notices what is missing.
		o.flushed = max(o.flushed, later.flushed)
		o.suspect = true
		if size > 0 && seq > 0 && later.flushed >= seq {
			// It was durable: data pages have rotted. Its header is whole, the record stays; who reads its pages finds out
			// which are bad.
			d.log.Error("rot in an open block", "block", ref, "file", f.name, "offset", from)
			from += uint64(size)
			x.length = uint32(from)
			if from < block {
				continue
			}
			o.durable = x.length
			return true
		}
		d.log.Warn("an open block has a hole: records from one that is not whole on do not count, but stay readable",
			"block", ref, "file", f.name, "length", from)
		o.durable = x.length
		return true
	}
}

// damaged returns the size and sequence number of the record at from, if its header is whole, whatever its data pages are.
func (r *recovery) damaged(ref torus.BlockRef, from uint32, b []byte) (size int, seq uint64) {
	h := &r.d.hdr
	if h.Decode(b[:torus.PageSize]) != nil || h.Ref != ref || h.Offset != from || h.Size() > len(b) {
		return 0, 0
	}
	return h.Size(), h.Seq
}

// laterHeaders is what the headers of a block say that lie behind a damaged record.
type laterHeaders struct {
	any     bool
	flushed uint64
}

// headersAfter looks at every page of a block's slot from at on.
func (r *recovery) headersAfter(f *file, ref torus.BlockRef, place int64, at uint64) (l laterHeaders, err error) {
	d := r.d
	h := &d.hdr
	for ; at+torus.PageSize <= d.id.BlockSize; at += torus.PageSize {
		if _, err := f.f.ReadAt(d.page, place+int64(at)); err != nil {
			return l, err
		}
		if h.Decode(d.page) == nil && h.Ref == ref && uint64(h.Offset) == at {
			l.any = true
			l.flushed = max(l.flushed, h.Flushed)
		}
	}
	return l, nil
}

// buildIndex sorts what was found. A block is in two slots when a copy was being put in place of another: the one with the newer
// entry counts, as that was written when all of its bytes were durable.
func (r *recovery) buildIndex() {
	d := r.d
	slices.SortFunc(r.used, func(a, b uint32) int {
		if c := d.slots[a].key.compare(d.slots[b].key); c != 0 {
			return c
		}
		return cmp.Compare(r.gens[b], r.gens[a])
	})
	kept := r.used[:0]
	for _, s := range r.used {
		if n := len(kept); n > 0 && d.slots[kept[n-1]].key == d.slots[s].key {
			d.log.Info("a block is in two slots: the copy put last is kept", "block", d.slots[s].key.ref(), "slot", kept[n-1], "dropped", s)
			r.drop = append(r.drop, s)
			continue
		}
		kept = append(kept, s)
	}
	d.index.build(kept)
}

// free frees the slots of blocks that are none, durably.
func (r *recovery) free() error {
	d := r.d
	if len(r.drop) == 0 {
		return nil
	}
	for _, s := range r.drop {
		d.dropOpen(s)
		d.slots[s].state = freeing
		if err := d.writeEntry(s); err != nil {
			return err
		}
	}
	for _, f := range d.files {
		if len(f.sync.dirty) == 0 {
			continue
		}
		if err := f.f.Datasync(); err != nil {
			return fmt.Errorf("%s: %w (%w)", f.name, torus.ErrIO, err)
		}
		for _, s := range f.sync.dirty {
			x := &d.slots[s]
			x.entry, x.durable = entryClean, 1-x.durable
			d.giveBack(s)
		}
		f.sync.dirty = f.sync.dirty[:0]
	}
	return nil
}

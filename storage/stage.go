package storage

import (
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"slices"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/record"
	"github.com/coreos/torus/vfs"
)

// Small appends are copied to a stage and answered. It is a file of a few MiB, mapped into memory and never made durable: its pages outlive the process as all of the page cache does, and to write to them costs a copy and no
// system call. From there appends go to their blocks, past the page cache, many at a time: as chunks.
//
// A chunk holds bytes of one block that follow each other, and is a flight to everybody else. The first page of the stage says what is in the chunks that have not landed (docs/format/block-slot.md). After the end
// of the process Open writes that to where it belongs, before it looks at the blocks; after a power cut the stage says nothing, as its pages may be of any age.
//
// What does not fit goes through the page cache, and so do metadata, which is read from there, and everything where there is no stage.
type stage struct {
	f       vfs.File
	mem     vfs.Mapping // nil: there is none
	size    int         // of a chunk
	free    []int       // chunks
	filling []*flight   // chunks that take more, the oldest first
	timer   *loop.Timer
	armed   bool
	entry   [stageEntrySize]byte // scratch
}

const (
	stageFile = "stage"
	// A chunk has stageBulks times BulkBytes, 512 KiB, or a block if that is less: the larger it is, the fewer writes. There are stageChunks of them: the more, the less of them
	// stays in the processor's cache (docs/performance.md).
	stageBulks  = 2
	stageChunks = 8
	// stageTime is the longest that a chunk waits for more.
	stageTime = time.Second
)

// staged is what was found in a chunk.
type staged struct {
	off   uint32 // in its block
	data  *buf.Buf
	n     int
	whole bool // that is all that should be there
}

// readStage returns what had been staged and had not landed when the last process ended, if memory has not been lost since.
func readStage(fsys vfs.FS) (map[key][]staged, error) {
	f, err := fsys.Open(stageFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	page := make([]byte, torus.PageSize)
	if _, err := f.ReadAt(page, 0); err == io.EOF {
		return nil, nil
	} else if err != nil {
		return nil, readError(err)
	}
	boot, err := fsys.Boot()
	if err != nil {
		return nil, err
	}
	size, ok := decodeStage(page, boot)
	if !ok {
		return nil, nil
	}
	found := map[key][]staged{}
	var h record.Header
	for i := range stageChunks {
		ref, off, n := decodeChunk(page, i)
		if n == 0 || n > size || !validRef(ref) {
			continue
		}
		p := staged{off: off, data: buf.Get(int(n))}
		b := p.data.Bytes()[:n]
		if _, err := f.ReadAt(b, torus.PageSize+int64(i)*int64(size)); err != nil && err != io.EOF {
			return nil, readError(err)
		}
		for p.n < len(b) {
			n, err := record.Check(ref, off+uint32(p.n), b[p.n:], &h)
			if err != nil {
				break
			}
			p.n += n
		}
		p.whole = p.n == len(b)
		found[keyOf(ref)] = append(found[keyOf(ref)], p)
	}
	return found, nil
}

var (
	errStageDamaged = errors.New("what was staged of it is not whole")
	errStageKept    = errors.New("it holds what could not be written to where it belongs: the next start tries again")
)

// restore writes what was staged of a block to its slot.
func (r *recovery) restore(f *file, s uint32) error {
	_, place := r.d.place(s)
	for _, p := range r.staged[r.d.slots[s].key] {
		if !p.whole || uint64(p.off)+uint64(p.n) > r.d.id.BlockSize {
			return errStageDamaged
		}
		if _, err := f.through(p.data.Bytes()[:p.n], place+int64(p.off)); err != nil {
			return err
		}
	}
	return nil
}

// openStage makes a new stage: what is in the old one is in its blocks by now, durably. It is a new file, as the kernel may still be about to write to a block what it
// was told to by the last process, from pages of the old one.
func (d *Disk) openStage(r *recovery) (err error) {
	if r.unstaged || len(r.kept) > 0 {
		return errStageKept
	}
	g := &d.stage
	g.size = min(stageBulks*d.bulk, int(d.id.BlockSize)) &^ (torus.PageSize - 1)
	boot, err := d.fs.Boot()
	if err != nil {
		return err
	}
	const name = stageFile + newSuffix
	f, err := d.fs.Create(name)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			_ = d.fs.Remove(name)
		}
	}()
	end := torus.PageSize + stageChunks*g.size
	zeroes := make([]byte, max(g.size, torus.PageSize))
	encodeStage(zeroes, boot, g.size)
	if _, err := f.WriteAt(zeroes[:torus.PageSize], 0); err != nil {
		return err
	}
	clear(zeroes[:torus.PageSize])
	for at := torus.PageSize; at < end; at += g.size { // not only allocated: then a page that changes needs no room any more
		if _, err := f.WriteAt(zeroes[:g.size], int64(at)); err != nil {
			return err
		}
	}
	if err := f.Datasync(); err != nil {
		return err
	}
	mem, err := f.Map(end)
	if err != nil {
		return err
	}
	if err := d.fs.Rename(name, stageFile); err != nil {
		_ = mem.Close()
		return err
	}
	g.f, g.mem = f, mem
	for i := range stageChunks {
		g.free = append(g.free, stageChunks-1-i)
	}
	return nil
}

func (g *stage) close() error {
	if g.mem == nil {
		return nil
	}
	return errors.Join(g.mem.Close(), g.f.Close())
}

// chunkPlace is where a chunk begins.
func (g *stage) chunkPlace(chunk int) int { return torus.PageSize + chunk*g.size }

// say writes the entry of a chunk: that so many bytes of it count, whatever becomes of the process.
func (g *stage) say(c *flight, ref torus.BlockRef, length int) error {
	encodeChunk(&g.entry, ref, c.off, uint32(length))
	return g.mem.Write(g.entry[:], stageEntry(c.chunk))
}

// toStage copies data, which is to follow length bytes of slot s, to a chunk: the one of its block, if that is known already (found) and the chunk has room, or a new one. Nil: it has to go another way.
func (d *Disk) toStage(s uint32, found bool, ref torus.BlockRef, length uint32, data []byte) *flight {
	g := &d.stage
	c := d.room(s, found, length, len(data))
	if c == nil {
		return nil
	}
	err := g.mem.Write(data, g.chunkPlace(c.chunk)+len(c.data))
	if err == nil {
		err = g.say(c, ref, len(c.data)+len(data))
	}
	if err == nil {
		return c
	}
	if len(c.data) == 0 {
		d.giveUp(c)
	} else {
		d.closeChunk(c)
	}
	return nil
}

// room finds a chunk with room for n bytes.
func (d *Disk) room(s uint32, found bool, length uint32, n int) *flight {
	g := &d.stage
	if g.mem == nil || n > g.size {
		return nil
	}
	if found {
		if c := d.opens[d.slots[s].open].chunk; c != nil {
			if len(c.data)+n <= g.size {
				return c
			}
			d.closeChunk(c)
		}
	}
	if len(g.free) == 0 {
		if len(g.filling) > 0 {
			d.closeChunk(g.filling[0]) // for who comes next
		}
		return nil
	}
	chunk := g.free[len(g.free)-1]
	g.free = g.free[:len(g.free)-1]
	at := g.chunkPlace(chunk)
	f, place := d.place(s)
	c := &flight{d: d, f: f, slot: s, place: place + int64(length), off: length, data: g.mem.Bytes()[at : at : at+g.size], chunk: chunk, filling: true}
	if g.mem.Prepare(0, torus.PageSize) != nil || g.mem.Prepare(at, g.size) != nil {
		d.giveUp(c)
		return nil
	}
	return c
}

// giveUp ends c, which has no part in its block, or not any more.
func (d *Disk) giveUp(c *flight) {
	_ = d.stage.say(c, torus.BlockRef{}, 0) // else Open writes once more what is where it belongs, or nowhere
	d.stage.free = append(d.stage.free, c.chunk)
}

// attach makes n bytes more of c part of its block.
func (c *flight) attach(n int) {
	d := c.d
	x := &d.slots[c.slot]
	o := &d.opens[x.open]
	c.data = c.data[:len(c.data)+n]
	c.end = c.off + uint32(len(c.data))
	if o.chunk == c {
		return
	}
	o.chunk = c
	o.flights++
	x.pins++
	d.flights = append(d.flights, c)
	g := &d.stage
	g.filling = append(g.filling, c)
	if !g.armed {
		g.armed = true
		g.timer = d.loop.After(stageTime, d.closeChunks)
	}
}

// detach ends the filling of c.
func (c *flight) detach() {
	d := c.d
	g := &d.stage
	c.filling = false
	g.filling = slices.DeleteFunc(g.filling, func(x *flight) bool { return x == c })
	if i := d.slots[c.slot].open; i >= 0 && d.opens[i].chunk == c {
		d.opens[i].chunk = nil
	}
}

// closeChunk has c written to its block; nil: nothing.
func (d *Disk) closeChunk(c *flight) {
	if c != nil {
		c.detach()
		d.launch()
	}
}

// closeChunks has all that is staged written to its blocks.
func (d *Disk) closeChunks() {
	g := &d.stage
	g.armed = false
	for len(g.filling) > 0 {
		g.filling[0].detach()
	}
	d.launch()
}

// abandon ends what is in the air of a block that is deleted, as that is written: what has not begun to be written is not, and the stage has none of it any more.
func (d *Disk) abandon(s uint32) {
	i := d.slots[s].open
	if i < 0 || d.opens[i].flights == 0 {
		return
	}
	if c := d.opens[i].chunk; c != nil {
		c.detach()
		c.land(nil)
	}
	for _, fl := range d.flights {
		if fl.slot == s && fl.r == nil && fl.f.err == nil {
			_ = d.stage.say(fl, torus.BlockRef{}, 0)
		}
	}
}

// carry has what is staged of the block that r wants an fdatasync for written with the one that begins, which is a single step to who makes it.
func (f *file) carry(r *torus.Request) {
	d := f.d
	s, ok := d.index.find(keyOf(r.Ref))
	if !ok || d.slots[s].open < 0 || d.files[d.slots[s].file] != f || r.Op != torus.OpSync && r.Op != torus.OpSeal {
		return
	}
	o := &d.opens[d.slots[s].open]
	c := o.chunk
	switch {
	case c == nil || r.Op == torus.OpSync && r.Len <= c.off:
	case o.flights > 1: // r has to wait for what is before it
		d.closeChunk(c)
	default:
		c.detach()
		c.started, c.carried = true, true
		d.writing += len(c.data)
		f.sync.carried = append(f.sync.carried, c)
	}
}

// flush makes an fdatasync, with what it carries written before. If that is all there is to be made durable, it is so with the write.
func (f *file) flush() (err error) {
	g := &f.sync
	if g.alone {
		g.took, err = f.f.WriteDurable(g.carried[0].data, g.carried[0].place)
		return err
	}
	g.took = 0
	for _, c := range g.carried {
		took, err := c.write()
		if err != nil {
			return err
		}
		g.took += took
	}
	err = f.f.Datasync()
	g.took += f.f.SyncTime()
	return err
}

// carriesAll reports whether nothing but the chunk that it carries is to become durable by the fdatasync that begins. The bytes of a Put are in no list.
func (f *file) carriesAll() bool {
	d, g := f.d, &f.sync
	if len(g.carried) != 1 || len(g.flying) != 1 || g.flying[0] != g.carried[0].slot || !f.apart() ||
		slices.ContainsFunc(g.served, func(r *torus.Request) bool { return r.Op != torus.OpSync }) {
		return false
	}
	x := &d.slots[g.flying[0]]
	return x.entry == entryClean && x.open >= 0 && d.opens[x.open].durable == g.carried[0].off
}

// The first page of the stage: a head, and an entry for each chunk. docs/format/block-slot.md draws it.
const (
	stageMagic = 0x31474154_53524f54 // "TORSTAG1", little endian

	stageOffBoot    = 8 // of 48 bytes, zeroes behind it
	stageOffSize    = 56
	stageOffEntries = 64

	stageEntrySize = 32
	stageOffOff    = 24 // in an entry, behind the reference
	stageOffLength = 28
)

func stageEntry(chunk int) int { return stageOffEntries + chunk*stageEntrySize }

func encodeStage(page []byte, boot string, size int) {
	binary.LittleEndian.PutUint64(page, stageMagic)
	copy(page[stageOffBoot:stageOffSize], boot)
	binary.LittleEndian.PutUint64(page[stageOffSize:], uint64(size))
}

// decodeStage returns the size of a chunk, if the stage is of this boot.
func decodeStage(page []byte, boot string) (size uint32, ok bool) {
	var want [stageOffEntries]byte
	size = binary.LittleEndian.Uint32(page[stageOffSize:])
	encodeStage(want[:], boot, int(size))
	return size, string(page[:stageOffEntries]) == string(want[:])
}

func encodeChunk(e *[stageEntrySize]byte, ref torus.BlockRef, off, length uint32) {
	ref.AppendTo(e[:0])
	binary.LittleEndian.PutUint32(e[stageOffOff:], off)
	binary.LittleEndian.PutUint32(e[stageOffLength:], length)
}

func decodeChunk(page []byte, chunk int) (ref torus.BlockRef, off, length uint32) {
	e := page[stageEntry(chunk):]
	return torus.BlockRefFromBytes(e[:torus.BlockRefByteSize]), binary.LittleEndian.Uint32(e[stageOffOff:]), binary.LittleEndian.Uint32(e[stageOffLength:])
}

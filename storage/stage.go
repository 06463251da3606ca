package storage

import (
	"errors"
	"io/fs"
	"slices"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/record"
	"github.com/coreos/torus/vfs"
)

// Small appends are copied to a stage and answered. It is a file in memory, which outlives the process as the page cache does, so that an append costs a copy and no
// system call; from there they are written to their blocks, past the page cache, many at a time: as chunks. A chunk holds bytes of one block that follow each other, and is a flight to everybody else. After a crash Open puts
// what it finds in the stage where it belongs, before it looks at the blocks.
//
// What does not fit, metadata, which is read from the page cache, and everything where files cannot be mapped, goes through the page cache.
type stage struct {
	f       vfs.File
	mem     vfs.Mapping // nil: there is none
	chunk   int         // bytes of one
	free    []int       // where chunks may begin in mem
	filling []*flight   // chunks that take more, the oldest first
	timer   *loop.Timer
	armed   bool
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

// staged is a record that was found in the stage.
type staged struct {
	at   int64  // in the stage
	off  uint32 // in its block
	data []byte
}

// readStage returns what the last process had staged. What of it had been written to its block long before comes with it.
func readStage(fsys vfs.FS) (map[key][]staged, error) {
	f, err := fsys.Open(stageFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	found := map[key][]staged{}
	page := make([]byte, torus.PageSize)
	var h record.Header
	for at := int64(0); at+torus.PageSize <= size; at += torus.PageSize {
		if _, err := f.ReadAt(page, at); err != nil {
			return nil, readError(err)
		}
		if h.Decode(page) != nil || !validRef(h.Ref) || at+int64(h.Size()) > size {
			continue
		}
		p := staged{at, h.Offset, make([]byte, h.Size())}
		if _, err := f.ReadAt(p.data, at); err != nil {
			return nil, readError(err)
		}
		if _, err := record.Check(h.Ref, h.Offset, p.data, &h); err == nil {
			found[keyOf(h.Ref)] = append(found[keyOf(h.Ref)], p)
		}
	}
	return found, nil
}

// restore writes what was staged of a block to its slot.
func (r *recovery) restore(f *file, s uint32) error {
	x := &r.d.slots[s]
	_, place := r.d.place(s)
	for _, p := range r.staged[x.key] {
		if uint64(p.off)+uint64(len(p.data)) > r.d.id.BlockSize {
			continue
		}
		if _, err := f.f.WriteAt(p.data, place+int64(p.off)); err != nil {
			return err
		}
	}
	return nil
}

// openStage makes the stage, or takes from it what was found there, which is in its blocks by now, durably: what lies in it from now on is of this process. It is made durable that
// this is so, lest a power cut bring back what is older.
func (d *Disk) openStage(found map[key][]staged) error {
	g := &d.stage
	g.chunk = min(stageBulks*d.bulk, int(d.id.BlockSize))
	size := stageChunks * g.chunk
	f, err := d.fs.Open(stageFile)
	if errors.Is(err, fs.ErrNotExist) {
		f, err = d.fs.Create(stageFile)
	}
	if err != nil {
		return err
	}
	mem, err := func() (vfs.Mapping, error) {
		have, err := f.Size()
		if err != nil {
			return nil, err
		}
		// Written, not only allocated: then a page that is changed in memory needs no room any more.
		zeroes := make([]byte, g.chunk)
		for at := have; at < int64(size); at += int64(g.chunk) {
			if _, err := f.WriteAt(zeroes[:min(int64(g.chunk), int64(size)-at)], at); err != nil {
				return nil, err
			}
		}
		for _, list := range found {
			for _, p := range list {
				if _, err := f.WriteAt(zeroes[:torus.PageSize], p.at); err != nil {
					return nil, err
				}
			}
		}
		if have < int64(size) || len(found) > 0 {
			if err := f.Datasync(); err != nil {
				return nil, err
			}
		}
		return f.Map(size)
	}()
	if err != nil {
		f.Close()
		return err
	}
	g.f, g.mem = f, mem
	for i := range stageChunks {
		g.free = append(g.free, (stageChunks-1-i)*g.chunk)
	}
	return nil
}

// room is where n bytes may be staged that follow length bytes of slot s: a chunk that has room for them, and is attached to the block if that is known already (found). Nil: nowhere now.
func (d *Disk) room(s uint32, found bool, length uint32, n int) *flight {
	g := &d.stage
	if found {
		o := &d.opens[d.slots[s].open]
		if c := o.chunk; c != nil {
			if len(c.data)+n <= g.chunk {
				return c
			}
			d.closeChunk(c)
		}
	}
	if g.mem == nil {
		return nil
	}
	if len(g.free) == 0 {
		if len(g.filling) > 0 {
			d.closeChunk(g.filling[0]) // for who comes next
		}
		return nil
	}
	at := g.free[len(g.free)-1]
	g.free = g.free[:len(g.free)-1]
	f, place := d.place(s)
	return &flight{d: d, f: f, slot: s, place: place + int64(length), off: length, data: g.mem.Bytes()[at : at : at+g.chunk], chunk: at, filling: true}
}

// fill copies data behind what c holds. Whether that is part of the block is decided after it.
func (c *flight) fill(data []byte) error {
	return c.d.stage.mem.Write(data, c.chunk+len(c.data))
}

// attach makes n bytes more of c, the chunk that room has returned, part of its block.
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

// closeChunks is called when the oldest has waited for long enough.
func (d *Disk) closeChunks() {
	g := &d.stage
	g.armed = false
	for len(g.filling) > 0 {
		g.filling[0].detach()
	}
	d.launch()
}

// carry has what is staged of the block that r wants an fdatasync for written with the one that begins, which is a single step to who makes it.
func (f *file) carry(r *torus.Request) {
	d := f.d
	s, ok := d.index.find(keyOf(r.Ref))
	if !ok || d.slots[s].open < 0 || d.files[d.slots[s].file] != f {
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
func (f *file) flush() error {
	g := &f.sync
	if g.alone {
		took, err := f.f.WriteDurable(g.carried[0].data, g.carried[0].place)
		g.took = took
		return err
	}
	for _, c := range g.carried {
		if err := c.write(); err != nil {
			return err
		}
	}
	err := f.f.Datasync()
	g.took = f.f.SyncTime()
	return err
}

// carriesAll reports whether nothing but the chunk that it carries is to become durable by the fdatasync that begins.
func (f *file) carriesAll() bool {
	d, g := f.d, &f.sync
	if len(g.carried) != 1 || len(g.flying) != 1 || g.flying[0] != g.carried[0].slot {
		return false
	}
	x := &d.slots[g.flying[0]]
	return x.entry == entryClean && x.open >= 0 && d.opens[x.open].durable == g.carried[0].off
}

// drop gives c back, which has no part in its block.
func (d *Disk) drop(c *flight) {
	if len(c.data) == 0 {
		d.stage.free = append(d.stage.free, c.chunk)
	}
}

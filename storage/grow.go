package storage

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/vfs"
)

// growRetry is how long the store waits, after it could not make a file, before it tries again.
const growRetry = 5 * time.Second

// grower makes one slots file at a time, on a helper: complete and durable before it gets its name.
type grower struct {
	d       *Disk
	running bool
	retry   time.Duration // not before this loop time
	timer   *loop.Timer   // then
	why     string        // there is no further file

	super superblock
	want  uint32 // slots, at most
	f     vfs.File
	err   error
}

func slotsName(number uint32) string { return fmt.Sprintf("%s%06d", slotsPrefix, number) }

// keepAhead has the next file made when less than half of one is left, beside what is kept.
func (d *Disk) keepAhead() {
	if left := uint32(len(d.slots)) - d.taken; left < d.kept+(d.perFile+1)/2 {
		d.startGrowing()
	}
}

// startGrowing reports whether a file is being made.
func (d *Disk) startGrowing() bool {
	g := &d.grow
	if g.running {
		return true
	}
	have := uint32(len(d.slots))
	if have >= d.limit {
		g.why = fmt.Sprintf("all %d slots of the store are taken", have)
		return false
	}
	if len(d.files) > math.MaxUint16 {
		g.why = fmt.Sprintf("the store has %d files already, each of a few slots", len(d.files))
		return false
	}
	if d.closed || d.failed || g.retry > d.loop.Now() {
		return false
	}
	g.running = true
	g.super = superblock{id: d.id, number: uint32(len(d.files))}
	g.want = min(d.perFile, d.limit-have)
	d.loop.Offload(g)
	return true
}

// Work implements loop.Job.
func (g *grower) Work() {
	if !g.d.enter() {
		g.err = torus.ErrClosed
		return
	}
	defer g.d.leave()
	g.err = g.make()
}

func (g *grower) make() error {
	fsys := g.d.fs
	left, _, err := fsys.Free()
	if err != nil {
		return err
	}
	g.super.slots = fitting(left, g.d.reserve, g.want, g.d.id.BlockSize)
	if g.super.slots == 0 {
		return fmt.Errorf("the file system has %d bytes left, of which %d are kept free: %w", left, g.d.reserve, vfs.ErrNoSpace)
	}
	name := slotsName(g.super.number)
	err = writeFile(fsys, name, func(f vfs.File) error {
		if err := f.Allocate(0, g.super.fileSize()); err != nil {
			return err
		}
		page := make([]byte, torus.PageSize)
		g.super.encode(page)
		_, err := f.WriteAt(page, 0)
		return err
	})
	if err != nil {
		return err
	}
	// Only now the file may be missed. Should this fail, the file is found by the next Open all the same.
	if err := writeCount(fsys, g.super.number+1); err != nil {
		return err
	}
	g.f, err = fsys.Open(name)
	return err
}

// fitting is how many slots, want at most, a file may have if the reserve shall stay free.
func fitting(left, reserve uint64, want uint32, blockSize uint64) uint32 {
	overhead := uint64(dataOffset(want, blockSize)) + reserve
	if left < overhead {
		return 0
	}
	return uint32(min(uint64(want), (left-overhead)/blockSize))
}

// Done implements loop.Job.
func (g *grower) Done() {
	d, f, err := g.d, g.f, g.err
	g.running, g.f, g.err = false, nil, nil
	if d.closed {
		if f != nil {
			f.Close()
		}
		return
	}
	if err != nil {
		g.retry = d.loop.Now() + growRetry
		g.timer = d.loop.After(growRetry, d.keepAhead) // nobody else may ask: writers have been told that this peer is full
		if why := err.Error(); why != g.why {
			g.why = why
			d.log.Warn("cannot make another file of slots", "file", slotsName(g.super.number), "err", err)
		}
		d.unpark()
		return
	}
	g.why = ""
	x := d.addFile(g.super, f)
	for s := x.base; s < x.base+x.super.slots; s++ {
		x.raw = append(x.raw, s)
	}
	d.log.Info("made a file of slots", "file", x.name, "slots", x.super.slots)
	d.keepAhead()
	d.unpark()
	d.prewrite()
}

// addFile appends a file and its slots, all free.
func (d *Disk) addFile(super superblock, vf vfs.File) *file {
	f := &file{d: d, index: uint16(len(d.files)), super: super, name: slotsName(super.number), f: vf, base: uint32(len(d.slots))}
	f.sync.start = f.begin
	d.files = append(d.files, f)
	d.slots = slices.Grow(d.slots, int(super.slots))
	for range super.slots {
		d.slots = append(d.slots, slot{file: f.index, open: -1})
	}
	return f
}

// prewriter writes zeroes through slots that were never used, in the background: overwriting what was written before makes
// fdatasync about twice as cheap. One slot at a time, in chunks, each of them durable before the next, with pauses as
// long as the work. It is for those who write little and sync often, so it stops while more is appended than they do, which would
// take the slots faster than they can be written through; and when there are enough. It has an open file of its own: the failure of an fdatasync is reported once to each open file,
// and must not be missed by the one that appends go to.
type prewriter struct {
	d     *Disk
	f     *file
	slot  uint32 // noSlot: none
	off   int64  // next, from the start of the slot
	began time.Duration
	load  load
	timer *loop.Timer
	waits bool // for the timer
	said  bool // that there is no room
	err   error
}

const (
	prewriteChunk = 1 << 20
	prewriteWrite = 256 << 10 // at a time, as others wait for the file meanwhile
	prewritePause = 50 * time.Millisecond
	// prewriteYield is how many bytes a second others may append before it stops, and prewriteLook when it looks again.
	prewriteYield = 32 << 20
	prewriteLook  = time.Second / 2
	// prewriteAhead is how many slots are written through ahead of need, over all files: 256 MiB with blocks of 4 MiB.
	prewriteAhead = 64
)

// in reports whether f is being written through this moment.
func (w *prewriter) in(f *file) bool { return w.slot != noSlot && !w.waits && w.f == f }

// prewrite goes on with the next slot.
func (d *Disk) prewrite() {
	w := &d.writer
	if w.slot != noSlot || w.waits || d.closed || d.failed || len(d.parked) > 0 {
		return
	}
	ready := 0
	for _, f := range d.files {
		if ready += len(f.ready); ready >= prewriteAhead {
			return
		}
	}
	for _, f := range d.files {
		if len(f.raw) > 0 {
			w.f, w.slot, w.off = f, f.raw[0], 0
			f.raw = f.raw[1:]
			w.step()
			return
		}
	}
}

func (w *prewriter) step() {
	w.began = w.d.loop.Now()
	w.d.loop.Offload(w)
}

// after calls next in a while, or later if others are busy then.
func (w *prewriter) after(d time.Duration, next func()) {
	w.waits = true
	w.timer = w.d.loop.After(d, func() {
		w.waits = false
		if w.load.look(w.d.loop.Now(), w.d.appended) > prewriteYield {
			w.after(prewriteLook, next)
			return
		}
		next()
	})
}

// load is how many bytes a second are appended.
type load struct {
	at   time.Duration
	was  uint64
	rate float64
}

// loadOver is the least time over which that is measured.
const loadOver = 100 * time.Millisecond

func (l *load) look(now time.Duration, appended uint64) float64 {
	if d := now - l.at; d >= loadOver {
		l.rate = float64(appended-l.was) / d.Seconds()
		l.at, l.was = now, appended
	}
	return l.rate
}

// interrupt has it give its slot back, if that can be done at once: somebody needs it.
func (w *prewriter) interrupt() bool {
	if w.slot == noSlot || !w.waits {
		return false
	}
	w.timer.Stop()
	w.waits = false
	w.stop()
	return true
}

// Work implements loop.Job.
func (w *prewriter) Work() {
	if !w.d.enter() {
		return
	}
	defer w.d.leave()
	w.err = w.chunk()
}

func (w *prewriter) chunk() error {
	f, err := w.d.fs.Open(w.f.name)
	if err != nil {
		return err
	}
	defer f.Close()
	block := int64(w.d.id.BlockSize)
	place := w.f.super.dataOffset() + int64(w.slot-w.f.base)*block
	zeroes := buf.Get(prewriteWrite)
	defer zeroes.Release()
	clear(zeroes.Bytes())
	for at, end := w.off, min(w.off+prewriteChunk, block); at < end; {
		n := min(prewriteWrite, end-at)
		if _, err := f.WriteAt(zeroes.Bytes()[:n], place+at); err != nil {
			return err
		}
		at += n
	}
	if err := f.Datasync(); err != nil {
		return err
	}
	_ = f.DropCache(place+w.off, min(prewriteChunk, block-w.off)) // nobody reads zeroes
	return nil
}

// Done implements loop.Job.
func (w *prewriter) Done() {
	d, f, err := w.d, w.f, w.err
	w.err = nil
	if d.closed {
		return
	}
	took := d.loop.Now() - w.began
	w.off += prewriteChunk
	next := d.prewrite
	switch {
	case err != nil && !errors.Is(err, vfs.ErrNoSpace):
		w.stop()
		d.fail(f, err)
		return
	case err != nil:
		if !w.said {
			d.log.Warn("cannot write slots through ahead of need", "file", f.name, "err", err)
		}
		w.said = true
		w.giveUp(growRetry)
		return
	case len(d.parked) > 0:
		// Somebody needs the slot right now. What was written is durable, so it cannot come up later over other bytes.
		w.giveUp(prewritePause)
		return
	case w.off < int64(d.id.BlockSize):
		next = w.step
	default:
		s := w.slot
		w.slot = noSlot
		if f.err != nil {
			return
		}
		if err := d.writeEntry(s); err != nil {
			d.fail(f, err)
			return
		}
		f.ready = append(f.ready, s)
		w.said = false
	}
	w.after(took, next)
}

// giveUp gives the slot back to those who wait for one, and goes on in a while: not before, whatever they do.
func (w *prewriter) giveUp(d time.Duration) {
	w.after(d, w.d.prewrite)
	w.stop()
	w.d.unpark()
}

// stop gives the slot back as it is.
func (w *prewriter) stop() {
	if w.f.err == nil {
		w.f.raw = slices.Insert(w.f.raw, 0, w.slot)
	}
	w.slot = noSlot
}

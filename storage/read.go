package storage

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/coreos/torus"
	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/record"
	"github.com/coreos/torus/vfs"
)

// maxPins bounds the reads of one slot on helpers at a time; more are refused with ErrAgain.
const maxPins = math.MaxUint16

// checkRead is what every store asks of an OpRead: how long is the block, and is it within.
func checkRead(r *torus.Request, length uint32) error {
	if uint64(r.Off)+uint64(len(r.Data)) > uint64(length) {
		return fmt.Errorf("read of %d bytes at %d from the %d of %v: %w", len(r.Data), r.Off, length, r.Ref, torus.ErrGap)
	}
	return nil
}

// read is inline as far as the bytes are in memory.
func (d *Disk) read(r *torus.Request) {
	s, ok := d.index.find(keyOf(r.Ref))
	if !ok {
		d.finishRead(r, fmt.Errorf("read from %v: %w", r.Ref, torus.ErrBlockNotExist))
		return
	}
	length := d.slots[s].length
	if o := d.slots[s].open; o >= 0 && d.opens[o].suspect {
		length = uint32(d.id.BlockSize)
	}
	if err := checkRead(r, length); err != nil || len(r.Data) == 0 {
		d.finishRead(r, err)
		return
	}
	err := d.readWith(s, r.Data, r.Off, d.files[d.slots[s].file].f.ReadAtCached)
	if err != nil {
		if errors.Is(err, vfs.ErrWouldBlock) {
			d.offloadRead(r, s)
			return
		}
		err = ioError("read from", r.Ref, err)
	}
	d.finishRead(r, err)
}

func (d *Disk) finishRead(r *torus.Request, err error) {
	if err != nil {
		d.metrics.failedReads.Inc()
		d.noteDamage(r.Ref, err)
	} else {
		d.metrics.reads.Inc()
	}
	r.Finish(err)
}

// scan collects the headers of a block's records.
func (d *Disk) scan(r *torus.Request) {
	r.Data = nil
	s, ok := d.index.find(keyOf(r.Ref))
	if !ok {
		r.Finish(fmt.Errorf("scan of %v: %w", r.Ref, torus.ErrBlockNotExist))
		return
	}
	err := scanRecords(r, d.slots[s].length, d.page, &d.hdr, func(b []byte, off uint32) error {
		return d.readWith(s, b, off, d.files[d.slots[s].file].f.ReadAtCached)
	})
	if errors.Is(err, vfs.ErrWouldBlock) {
		d.offloadRead(r, s)
		return
	}
	d.noteDamage(r.Ref, err)
	r.Finish(err)
}

// scanRecords does an OpScan by means of readAt. page and h are scratch.
func scanRecords(r *torus.Request, length uint32, page []byte, h *record.Header, readAt func(b []byte, off uint32) error) error {
	r.Data = nil
	if r.Off > length {
		return fmt.Errorf("scan from %d of the %d bytes of %v: %w", r.Off, length, r.Ref, torus.ErrGap)
	}
	for off := r.Off; off < length; {
		if err := readAt(page, off); err != nil {
			if errors.Is(err, vfs.ErrWouldBlock) {
				return vfs.ErrWouldBlock
			}
			return ioError("scan", r.Ref, err)
		}
		if err := h.Decode(page); err != nil {
			return fmt.Errorf("scan of %v at %d: %w", r.Ref, off, err)
		}
		if h.Ref != r.Ref || h.Offset != off || uint64(off)+uint64(h.Size()) > uint64(length) {
			return fmt.Errorf("scan of %v at %d: a record of %v at %d: %w", r.Ref, off, h.Ref, h.Offset, torus.ErrCorrupt)
		}
		size := record.ScanEntrySize(page)
		if uint64(len(r.Data))+uint64(size) > uint64(r.Len) {
			if len(r.Data) == 0 { // an empty reply would look like the end
				return fmt.Errorf("scan of %v at %d: an entry has %d bytes, only %d may be sent: %w", r.Ref, off, size, r.Len, torus.ErrInvalid)
			}
			return nil
		}
		r.Data = record.AppendScanEntry(r.Data, off, page)
		off += uint32(h.Size())
	}
	return nil
}

// readJob is a Read, a Scan, or the comparison of an Append that was sent again, on a helper. The slot is pinned: it is not
// used again before the job is done.
type readJob struct {
	d     *Disk
	r     *torus.Request
	slot  uint32
	f     vfs.File
	place int64
	// length is that of the block when the request came.
	length uint32
	b      []byte // of Data: what is to be read, or compared; the rest was in the air, and has been
	same   bool
	err    error
	page   []byte
	hdr    record.Header
}

func (d *Disk) offloadRead(r *torus.Request, s uint32) {
	x := &d.slots[s]
	if x.pins == maxPins {
		d.finishRead(r, fmt.Errorf("%v: %d slow reads of %v at a time: %w", r.Op, maxPins, r.Ref, torus.ErrAgain))
		return
	}
	x.pins++
	var j *readJob
	if n := len(d.readJobs); n > 0 {
		j, d.readJobs = d.readJobs[n-1], d.readJobs[:n-1]
	} else {
		j = &readJob{d: d}
	}
	f, place := d.place(s)
	j.r, j.slot, j.f, j.place, j.length = r, s, f.f, place, x.length
	switch first := d.aloft(s); r.Op {
	case torus.OpScan:
		j.length = min(j.length, first) // who scans goes on where this ends
	case torus.OpRead, torus.OpAppend:
		j.b = r.Data[:min(uint32(len(r.Data)), first-r.Off)]
	}
	d.loop.Offload(j)
}

// FileIO implements loop.FileIO.
func (j *readJob) FileIO() (fd int, write bool, b []byte, off int64) {
	off = j.place + int64(j.r.Off)
	if j.r.Op != torus.OpRead || j.d.closed {
		return -1, false, nil, 0
	}
	return j.f.Descriptor(off, len(j.b)), false, j.b, off
}

// Work implements loop.Job.
func (j *readJob) Work() {
	if !j.d.enter() {
		j.err = torus.ErrClosed
		return
	}
	defer j.d.leave()
	r := j.r
	switch r.Op {
	case torus.OpRead:
		_, j.err = j.f.ReadAt(j.b, j.place+int64(r.Off))
	case torus.OpScan:
		if j.page == nil {
			j.page = make([]byte, torus.PageSize)
		}
		j.err = scanRecords(r, j.length, j.page, &j.hdr, func(b []byte, off uint32) error {
			_, err := j.f.ReadAt(b, j.place+int64(off))
			return err
		})
		return
	case torus.OpAppend:
		have := buf.Get(len(j.b))
		_, j.err = j.f.ReadAt(have.Bytes()[:len(j.b)], j.place+int64(r.Off))
		j.same = bytes.Equal(have.Bytes()[:len(j.b)], j.b)
		have.Release()
	}
	if j.err != nil {
		if j.err == io.EOF {
			j.err = io.ErrUnexpectedEOF // the file is shorter than it was
		}
		j.err = ioError("read from", r.Ref, j.err)
	}
}

// Done implements loop.Job.
func (j *readJob) Done() {
	d, r, err, same := j.d, j.r, j.err, j.same
	d.unpin(j.slot)
	j.r, j.f, j.b, j.err = nil, nil, nil, nil
	if len(d.readJobs) < 64 {
		d.readJobs = append(d.readJobs, j)
	}
	switch r.Op {
	case torus.OpRead:
		if d.closed && err == nil {
			err = torus.ErrClosed // the kernel may have read from what has the descriptor now
		}
		d.finishRead(r, err)
		return
	case torus.OpAppend:
		if err == nil && !same {
			err = errDiffers(r)
		}
		if err == nil {
			r.Length = j.length
		}
	}
	d.noteDamage(r.Ref, err)
	r.Finish(err)
}

// unpin ends a read of a slot; the last one of a deleted block gives the slot back.
func (d *Disk) unpin(s uint32) {
	x := &d.slots[s]
	x.pins--
	if x.pins == 0 && x.state == freeing && x.entry == entryClean {
		d.giveBack(s)
		d.unpark()
	}
}

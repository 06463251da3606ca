package sim

import (
	"errors"
	"fmt"
	"math/rand/v2"

	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/loop"
)

// Writer is a load on one attached file that keeps a History: random writes, zeroes, flushes and reads, many at a time.
// It checks what can be checked at once: that writes are acknowledged in order, what reads return, and that nobody who
// was overtaken is acknowledged anything (L1).
type Writer struct {
	H     *History
	File  *file.File
	Loop  loop.Loop
	Rng   *rand.Rand
	Pages uint64 // that are written to
	// Stride is how far apart they lie on the volume, in pages.
	Stride uint64
	// Most bounds how many pages one write covers.
	Most int
	// Acked, if set, is told of every write of data that is acknowledged.
	Acked func(page uint64, stamped []byte) error
	// Flushed, if set, is asked when a flush begins, and what it returns when the flush is acknowledged.
	Flushed func() func() error
	// Over: a newer attach has decided what there is.
	Over bool
	// Err is the first violation.
	Err error
	// Full: a write has failed for want of space.
	Full bool

	scanned  uint64       // pages that Scan has come to
	pending  []*submitted // not acknowledged, in order
	inflight map[uint64]bool
	free     []*submitted
	Flushing int
	Reading  int
	Acks     int
}

// submitted is a write under way.
type submitted struct {
	w     *Writer
	q     device.Request
	page  uint64
	ids   []uint64
	ended bool
	over  bool // begun when the writer had been overtaken
	buf   []byte
}

// NewWriter returns a writer of up to pages pages.
func NewWriter(h *History, f *file.File, l loop.Loop, rng *rand.Rand, pages, stride uint64) *Writer {
	return &Writer{H: h, File: f, Loop: l, Rng: rng, Pages: pages, Stride: stride, Most: 40, inflight: map[uint64]bool{}}
}

func (w *Writer) fail(err error) {
	if w.Err == nil {
		w.Err = err
	}
}

// Idle reports whether no write is under way.
func (w *Writer) Idle() bool { return len(w.inflight) == 0 }

// Step submits one request, most often a write.
func (w *Writer) Step() {
	switch k := w.Rng.IntN(20); {
	case k < 14:
		n := 1
		if w.Rng.IntN(6) == 0 {
			n = 1 + w.Rng.IntN(w.Most)
		}
		w.Write(n, false, w.Rng.IntN(20) == 0)
	case k < 15:
		w.Write(1+w.Rng.IntN(w.Most), true, false)
	case k < 17:
		w.Flush()
	case k < 19:
		w.Read(1 + w.Rng.IntN(8))
	default:
		w.Scan(1 + w.Rng.IntN(8))
	}
}

// Write submits a write of n pages at random, unless one of them is being written to.
func (w *Writer) Write(n int, zero, fua bool) {
	page := w.Rng.Uint64N(w.Pages)
	if w.Stride > 1 {
		n = 1
	}
	if page+uint64(n) > w.Pages {
		return
	}
	for k := range uint64(n) {
		if w.inflight[page+k] {
			return
		}
	}
	var s *submitted
	if l := len(w.free); l > 0 {
		s, w.free = w.free[l-1], w.free[:l-1]
	} else {
		s = &submitted{w: w}
		s.q.Done = func(*device.Request) { s.done() }
	}
	s.page, s.ids, s.ended, s.over = page, s.ids[:0], false, w.Over
	s.q.Op, s.q.Flags, s.q.Off, s.q.Len, s.q.Data = device.Write, 0, page*w.Stride*PageSize, uint64(n)*PageSize, nil
	if fua {
		s.q.Flags = device.FUA
	}
	if zero {
		s.q.Op = device.Trim
		if w.Rng.IntN(2) == 0 {
			s.q.Op = device.WriteZeroes
			if w.Rng.IntN(2) == 0 {
				s.q.Flags = device.NoHole
			}
		}
	} else {
		if cap(s.buf) < n*PageSize {
			s.buf = make([]byte, n*PageSize)
		}
		s.q.Data = s.buf[:n*PageSize]
	}
	for k := range uint64(n) {
		var b []byte
		if !zero {
			b = s.q.Data[k*PageSize:][:PageSize]
		}
		w.inflight[page+k] = true
		if w.Over {
			s.ids = append(s.ids, w.H.Ghost(page+k, b))
		} else {
			s.ids = append(s.ids, w.H.Write(page+k, b))
		}
	}
	w.pending = append(w.pending, s)
	w.Loop.Post(func() { w.File.Submit(&s.q) })
}

// done takes the end of a write.
func (s *submitted) done() {
	w := s.w
	s.ended = true
	for k, id := range s.ids {
		delete(w.inflight, s.page+uint64(k))
		if errors.Is(s.q.Err, device.ErrOutOfSpace) {
			w.Full = true
			w.H.Fail(s.page+uint64(k), id)
		}
	}
	last := s.ids[len(s.ids)-1]
	switch {
	case s.q.Err != nil:
		if !errors.Is(s.q.Err, device.ErrOutOfSpace) {
			return // the file is over: nothing is acknowledged any more
		}
	case s.over:
		w.fail(violated("L1", "epoch %d acknowledged write %d, which it began when a newer attach had decided", w.File.Epoch(), last))
		return
	case w.Over:
		if err := w.H.Late(last); err != nil {
			w.fail(fmt.Errorf("%w (by epoch %d)", err, w.File.Epoch()))
		}
	case !w.Over:
		w.Acks++
		fua := s.q.Flags&device.FUA != 0
		for _, p := range w.pending {
			if p == s {
				break
			}
			// One with FUA waits for the disk, and others need not wait for it.
			if !p.ended && !fua && p.q.Flags&device.FUA == 0 {
				w.fail(violated("W1", "write %d was acknowledged before write %d", last, p.ids[0]))
			}
		}
		for k, id := range s.ids {
			w.H.AckPage(s.page+uint64(k), id)
			if w.Acked != nil && s.q.Op == device.Write {
				// q.Data may have been a copy of theirs, and be gone.
				if err := w.Acked(s.page+uint64(k), s.buf[k*PageSize:][:PageSize]); err != nil {
					w.fail(err)
				}
			}
		}
		if fua {
			// Everything before it is in the log, and so flushed as well.
			w.H.Flush(last)
		}
	}
	for len(w.pending) > 0 && w.pending[0].ended {
		p := w.pending[0]
		w.pending = w.pending[1:]
		if !w.Over {
			w.H.Ack(p.ids[len(p.ids)-1])
		}
		w.free = append(w.free, p)
	}
}

// Flush submits a flush.
func (w *Writer) Flush() {
	target := uint64(0)
	var durable func() error
	q := &device.Request{Op: device.Flush}
	w.Flushing++
	q.Done = func(q *device.Request) {
		w.Flushing--
		switch {
		case q.Err != nil:
		case !w.Over:
			w.H.Flush(target)
			if durable != nil {
				if err := durable(); err != nil {
					w.fail(err)
				}
			}
		case target > w.H.Decided():
			w.fail(violated("D1", "epoch %d acknowledged a flush of write %d, and a newer attach has decided that the history ends at %d", w.File.Epoch(), target, w.H.Decided()))
		}
	}
	over := w.Over
	w.Loop.Post(func() {
		if !over && !w.Over {
			target = w.H.Acked()
			if w.Flushed != nil {
				durable = w.Flushed()
			}
		}
		w.File.Submit(q)
	})
}

// Read submits a read of n pages at random, and checks what it finds.
func (w *Writer) Read(n int) { w.read(w.Rng.Uint64N(w.Pages), n) }

// Scan submits a read of the n pages behind those of the last one, and checks what it finds: in the end all of them have been read in order.
func (w *Writer) Scan(n int) {
	page := w.scanned
	if w.scanned += uint64(n); w.scanned >= w.Pages {
		w.scanned = 0
	}
	w.read(page, n)
}

func (w *Writer) read(page uint64, n int) {
	if w.Stride > 1 {
		n = 1
	}
	n = min(n, int(w.Pages-page))
	floors := make([]uint64, n)
	b := buf.Get(n * PageSize)
	q := &device.Request{Op: device.Read, Off: page * w.Stride * PageSize, Len: uint64(n) * PageSize, Data: b.Bytes()[:n*PageSize], Buf: b}
	w.Reading++
	q.Done = func(q *device.Request) {
		w.Reading--
		defer q.Buf.Release()
		if q.Err != nil || w.Over {
			if q.Err != nil && w.File.Err() == nil && !w.Over {
				w.fail(violated("C1", "read of %d pages from %d: %w", n, page, q.Err))
			}
			return
		}
		for k := range uint64(n) {
			if err := w.H.Read(page+k, q.Data[k*PageSize:][:PageSize], floors[k]); err != nil {
				w.fail(err)
			}
		}
	}
	w.Loop.Post(func() {
		for k := range floors {
			floors[k] = w.H.Floor(page + uint64(k))
		}
		w.File.Submit(q)
	})
}

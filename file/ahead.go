package file

import (
	"slices"
	"time"

	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/record"
)

// Whoever reads in order is given what comes next from memory: it is read ahead, in larger pieces than are asked for, and while
// the reader is busy with what it has. What is written meanwhile is forgotten here as soon as it is acknowledged.
const (
	aheadStreams = 4         // readers in order that are told apart
	aheadHits    = 2         // reads that each began where the one before ended, before anything is read ahead
	aheadMin     = 128 << 10 // bytes: the first piece; each is twice as long as the one before
	aheadMax     = 1 << 20   // … up to this
	aheadIdle    = 2 * time.Second
)

// ahead is what has been read ahead, and for whom.
type ahead struct {
	streams [aheadStreams]stream
	chunks  []*chunk
	reads   uint64 // counts, to know which stream is the oldest
	timer   *loop.Timer
}

// stream is somebody who reads in order.
type stream struct {
	next  uint64 // byte where his next read should begin
	hits  int    // reads that did
	end   uint64 // byte up to which has been read ahead
	piece uint64 // bytes to be read ahead next
	used  uint64 // by count of reads
}

// chunk is a piece that is, or is being, read ahead.
type chunk struct {
	f       *File
	req     device.Request
	buf     *buf.Buf
	loaded  bool
	dropped bool // is not to be used any more
	used    time.Duration
	waiters []*readOp
}

// follow finds whose read this is.
func (a *ahead) follow(off, n uint64) *stream {
	a.reads++
	oldest := &a.streams[0]
	for i := range a.streams {
		s := &a.streams[i]
		if s.next == off && s.used > 0 {
			s.next += n
			s.hits++
			s.piece = max(s.piece, min(n, aheadMax))
			s.used = a.reads
			return s
		}
		if s.used < oldest.used {
			oldest = s
		}
	}
	*oldest = stream{next: off + n, used: a.reads, piece: aheadMin}
	return oldest
}

// readAhead reads ahead for s, unless it has enough, or has asked for as much itself.
func (f *File) readAhead(s *stream) {
	s.end = max(s.end, (s.next+pageSize-1)/pageSize*pageSize)
	if s.hits < aheadHits || s.end >= f.size || s.end-s.next > s.piece/2 || f.reading > s.piece || f.err != nil || f.closing {
		return
	}
	n := min(s.piece, f.size-s.end)
	for p := s.end / pageSize; p < (s.end+n+pageSize-1)/pageSize; p = (p/leafPages + 1) * leafPages {
		if _, ok := f.m.get(p); !ok {
			f.m.load(p, func(error) {}) // nobody shall wait for more than he has asked for
			return
		}
	}
	c := &chunk{f: f, buf: buf.Get(int(n)), used: f.loop.Now()}
	c.req = device.Request{Op: device.Read, Off: s.end, Len: n, Data: c.buf.Bytes()[:n], Buf: c.buf, Done: c.done}
	s.end += n
	s.piece = min(2*s.piece, aheadMax)
	a := &f.ahead
	if len(a.chunks) >= 2*aheadStreams {
		a.drop(0)
	}
	a.chunks = append(a.chunks, c)
	if a.timer == nil {
		a.timer = f.loop.After(aheadIdle, f.dropIdle)
	}
	f.stats.AheadBytes += n
	f.startRead(&c.req, true)
}

func (c *chunk) done(r *device.Request) {
	a := &c.f.ahead
	c.loaded = true
	c.buf = r.Buf
	switch {
	case c.dropped:
		c.buf.Release()
	case r.Err != nil: // who wants it asks for himself, and hears why
		a.drop(slices.Index(a.chunks, c))
	}
	waiters := c.waiters
	c.waiters = nil
	for _, op := range waiters {
		op.done(nil)
	}
}

// await has op wait for what of pages first to last is being read ahead; false if nothing is.
func (a *ahead) await(op *readOp, first, last uint64) (waits bool) {
	for _, c := range a.chunks {
		if !c.loaded && c.overlaps(first, last) {
			waits = true
			op.pending++
			c.waiters = append(c.waiters, op)
		}
	}
	return waits
}

// get returns the contents of a page that has been read ahead.
func (a *ahead) get(page uint64) ([]byte, bool) {
	for _, c := range a.chunks {
		if c.loaded && page*pageSize >= c.req.Off && (page+1)*pageSize <= c.req.Off+c.req.Len {
			c.used = c.f.loop.Now()
			c.f.stats.AheadUsed += pageSize
			return c.buf.Bytes()[page*pageSize-c.req.Off:][:pageSize], true
		}
	}
	return nil, false
}

// passed drops what a read has come to the end of.
func (a *ahead) passed(r *device.Request) {
	for i := 0; i < len(a.chunks); i++ {
		if c := a.chunks[i]; c.loaded && r.Off < c.req.Off+c.req.Len && r.Off+r.Len >= c.req.Off+c.req.Len {
			a.drop(i)
			i--
		}
	}
}

// forget drops what a record has new contents for.
func (a *ahead) forget(h *record.Header) {
	for i := 0; i < len(a.chunks); i++ {
		for _, x := range h.Extents {
			if a.chunks[i].overlaps(x.Page, x.Page+uint64(x.Count)-1) {
				a.drop(i)
				i--
				break
			}
		}
	}
}

// clear drops everything.
func (a *ahead) clear() {
	for len(a.chunks) > 0 {
		a.drop(0)
	}
	a.timer.Stop()
}

// drop gives chunk i up. Reads that wait for it look again.
func (a *ahead) drop(i int) {
	c := a.chunks[i]
	a.chunks = slices.Delete(a.chunks, i, i+1)
	c.dropped = true
	if c.loaded {
		c.buf.Release()
		return
	}
	if waiters := c.waiters; len(waiters) > 0 {
		c.waiters = nil
		c.f.loop.Post(func() { // not now: they may come back here
			for _, op := range waiters {
				op.done(nil)
			}
		})
	}
}

// dropIdle drops what nobody has come for.
func (f *File) dropIdle() {
	a := &f.ahead
	a.timer = nil
	for i := 0; i < len(a.chunks); i++ {
		if c := a.chunks[i]; c.loaded && f.loop.Now()-c.used > aheadIdle {
			a.drop(i)
			i--
		}
	}
	if len(a.chunks) > 0 {
		a.timer = f.loop.After(aheadIdle, f.dropIdle)
	}
}

func (c *chunk) overlaps(first, last uint64) bool {
	return first*pageSize < c.req.Off+c.req.Len && (last+1)*pageSize > c.req.Off
}

package sim

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/coreos/torus/record"
)

// PageSize is the unit of the history: 4 KiB.
const PageSize = 4096

// History is what was written to a volume, page by page, in the order in which it entered the log, and how much of
// it has been acknowledged and flushed. Every page written is stamped with the number of its write, so that an image
// of the volume says by itself which prefix of the history it is.
//
// It checks C1 (the image is a prefix), D1 (which contains all that was flushed) and, where no power was lost, W1
// (which contains all that was acknowledged); and of single reads that what has once been acknowledged or read never
// un-happens.
type History struct {
	Seed    uint64 // tells this volume's stamps from another's
	last    uint64 // number handed out
	top     uint64 // of these, the last that is part of the history
	pages   map[uint64]*pageHistory
	acked   uint64
	flushed uint64
	decided uint64
	// void: some replica has lost what was not synced at a time when this was the last write. Until all of that is flushed, W1
	// does not hold. voided is the same, as it was at the last decision.
	void, voided uint64
	frozen       []*History // copies
}

// pageHistory is what one page has held.
type pageHistory struct {
	marks []mark // ascending; the first one is what the last decision found
	seen  uint64 // the newest write that was acknowledged or read
}

// mark is one write to a page; 0 is how the volume was made.
type mark struct {
	id    uint64
	zero  bool // it wrote zeroes
	maybe bool // it failed: it may have happened, or may happen later, or never
}

// NewHistory returns the history of an empty volume.
func NewHistory(seed uint64) *History {
	return &History{Seed: seed, pages: map[uint64]*pageHistory{}}
}

// Last is the number of the last write.
func (h *History) Last() uint64 { return h.last }

// Acked and Flushed are the last write known to be acknowledged, or flushed, as are all before it.
func (h *History) Acked() uint64   { return h.acked }
func (h *History) Flushed() uint64 { return h.flushed }

// LosePower notes that some replica may have lost what was not synced.
func (h *History) LosePower() { h.void = h.last }

// Promised is the last write that the next attach must serve: all that was acknowledged, or, if power was lost, flushed.
func (h *History) Promised() uint64 {
	if h.flushed < h.void {
		return h.flushed
	}
	return h.acked
}

// Late checks an acknowledgement of write n that comes when a newer attach has decided: it must be part of what that serves (L1). One that
// had been earned, and was only told late, may have been lost with power meanwhile.
func (h *History) Late(n uint64) error {
	if n > h.decided && n > h.voided {
		return violated("L1", "write %d was acknowledged, and a newer attach has decided that the history ends at %d", n, h.decided)
	}
	return nil
}

// Decided is the last write that the last attach has served.
func (h *History) Decided() uint64 { return h.decided }

func (h *History) page(page uint64) *pageHistory {
	p := h.pages[page]
	if p == nil {
		p = &pageHistory{marks: []mark{{zero: true}}}
		h.pages[page] = p
	}
	return p
}

// Write notes that the next write goes to page, and fills b, one page, with its stamp; a nil b notes that it writes zeroes.
func (h *History) Write(page uint64, b []byte) uint64 {
	id := h.Ghost(page, b)
	p := h.page(page)
	p.marks = append(p.marks, mark{id: id, zero: b == nil})
	h.top = id
	return id
}

// Ghost is Write for a writer that has been overtaken: what it writes must never be acknowledged, nor seen.
func (h *History) Ghost(page uint64, b []byte) uint64 {
	h.last++
	if b != nil {
		Stamp(b, h.Seed, page, h.last)
	}
	return h.last
}

// Fail notes that a write has failed, such as for want of space: it may be there or not, and later ones do not depend on it.
func (h *History) Fail(page, id uint64) {
	p := h.page(page)
	for i := range p.marks {
		if p.marks[i].id == id && i > 0 {
			p.marks[i].maybe = true
		}
	}
	for _, c := range h.frozen { // it was under way when they were made
		c.Fail(page, id)
	}
}

// AckPage notes that a single write has been acknowledged, Ack that all up to n have been, Flush that they have been flushed.
func (h *History) AckPage(page, id uint64) {
	p := h.page(page)
	p.seen = max(p.seen, id)
}
func (h *History) Ack(n uint64)   { h.acked = max(h.acked, n) }
func (h *History) Flush(n uint64) { h.flushed, h.acked = max(h.flushed, n), max(h.acked, n) }

// Floor is what a read of page that begins now must not fall behind.
func (h *History) Floor(page uint64) uint64 {
	if p := h.pages[page]; p != nil {
		return p.seen
	}
	return 0
}

// Read checks what a read has found, which began at a time when Floor was floor.
func (h *History) Read(page uint64, b []byte, floor uint64) error {
	n, err := ReadStamp(b, h.Seed, page)
	if err != nil {
		return err
	}
	p := h.page(page)
	found := uint64(math.MaxUint64)
	for _, m := range p.marks {
		if m.id >= floor && (n == 0 && m.zero || n != 0 && m.id == n && !m.zero) {
			found = m.id
			break
		}
	}
	if found == math.MaxUint64 {
		return violated("C1", "a read of page %d returned write %d (0: zeroes), and write %d had been acknowledged or read before", page, n, floor)
	}
	p.seen = max(p.seen, found)
	return nil
}

// Stamp fills a page with the mark of write n, in every 512-byte sector, so that a torn page shows.
func Stamp(b []byte, seed, page, n uint64) {
	x := seed ^ page*0x9e3779b97f4a7c15 ^ n*0xbf58476d1ce4e5b9
	for i := 0; i < PageSize; i += 8 {
		x = x*0x5851f42d4c957f2d + 0x14057b7ef767814f
		binary.LittleEndian.PutUint64(b[i:], x)
	}
	for s := 0; s < PageSize; s += 512 {
		binary.LittleEndian.PutUint64(b[s:], seed)
		binary.LittleEndian.PutUint64(b[s+8:], page)
		binary.LittleEndian.PutUint64(b[s+16:], n)
	}
	binary.LittleEndian.PutUint32(b[PageSize-4:], stampSum(b))
}

// stampSum is the checksum in a stamped page: not the CRC itself, for the CRC of bytes that end with their own CRC is the same for all, and
// checksums of stamped pages could then not tell one from another.
func stampSum(b []byte) uint32 { return record.Checksum(b[:PageSize-4]) * 0x9e3779b1 }

// errTorn: a page that is neither old nor new.
var errTorn = errors.New("torn or foreign page")

// ReadStamp returns the number of the write that a page holds: 0 for zeroes.
func ReadStamp(b []byte, seed, page uint64) (uint64, error) {
	if len(b) < PageSize {
		return 0, violated("C1", "page %d: %d bytes: %w", page, len(b), errTorn)
	}
	n := binary.LittleEndian.Uint64(b[16:])
	if n == 0 {
		sum := uint64(0)
		for i := 0; i < PageSize; i += 8 {
			sum |= binary.LittleEndian.Uint64(b[i:])
		}
		if sum == 0 {
			return 0, nil
		}
	}
	if stampSum(b) != binary.LittleEndian.Uint32(b[PageSize-4:]) {
		return 0, violated("C1", "page %d: checksum: %w", page, errTorn)
	}
	if s, p := binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:]); s != seed || p != page {
		return 0, violated("C1", "page %d holds page %d of volume %x: %w", page, p, s, errTorn)
	}
	return n, nil
}

// span is a run of lengths of the history.
type span struct{ lo, hi uint64 }

// fits returns the lengths of the history after which page p holds n, in order; 0 for zeroes.
func (p *pageHistory) fits(n uint64, out []span) []span {
	for i, m := range p.marks {
		if n == 0 && !m.zero || n != 0 && (m.id != n || m.zero) {
			continue
		}
		hi := uint64(math.MaxUint64)
		for _, later := range p.marks[i+1:] {
			if !later.maybe {
				hi = later.id - 1
				break
			}
		}
		out = append(out, span{m.id, hi})
	}
	return out
}

// Check finds the prefix of the history that an image is: read returns the contents of a page. atLeast is the
// write that it must contain (Flushed for D1, Acked for W1). It returns the length of the prefix, the longest if several fit:
// zeroes over zeroes leave no trace.
func (h *History) Check(read func(page uint64) ([]byte, error), atLeast uint64) (uint64, error) {
	found, err := h.stamps(read)
	if err != nil {
		return 0, err
	}
	n, err := h.prefix(found)
	if err == nil && n < atLeast {
		which := "W1"
		if n < h.flushed {
			which = "D1"
		}
		return 0, violated(which, "the image is the history up to write %d, and write %d must be in it", n, atLeast)
	}
	return n, err
}

func (h *History) stamps(read func(page uint64) ([]byte, error)) (map[uint64]uint64, error) {
	found := make(map[uint64]uint64, len(h.pages))
	for page := range h.pages {
		b, err := read(page)
		if err != nil {
			return nil, fmt.Errorf("page %d: %w", page, err)
		}
		if found[page], err = ReadStamp(b, h.Seed, page); err != nil {
			return nil, err
		}
	}
	return found, nil
}

func (h *History) prefix(found map[uint64]uint64) (uint64, error) {
	type want struct {
		page  uint64
		spans []span
	}
	var several []want
	low, high := uint64(0), uint64(math.MaxUint64)
	lowPage, highPage := uint64(0), uint64(0)
	for page, p := range h.pages {
		spans := p.fits(found[page], nil)
		if len(spans) == 0 {
			return 0, violated("C1", "page %d holds write %d (0: zeroes), which was never made or has been undone", page, found[page])
		}
		if len(spans) > 1 {
			several = append(several, want{page, spans})
		}
		if s := spans[0]; s.lo > low {
			low, lowPage = s.lo, page
		}
		if s := spans[len(spans)-1]; s.hi < high {
			high, highPage = s.hi, page
		}
	}
	n := min(high, h.top)
	for again := true; again && n >= low; {
		again = false
		for _, w := range several {
			for i := len(w.spans) - 1; i >= 0; i-- {
				s := w.spans[i]
				if n >= s.lo {
					if n > s.hi {
						n, again = s.hi, true
					}
					break
				}
			}
		}
	}
	if n < low || low > high {
		return 0, violated("C1", "page %d holds write %d, but page %d holds write %d, which write %d has replaced", lowPage, found[lowPage], highPage, found[highPage], high+1)
	}
	return n, nil
}

// Decide notes that an attach has served this image, the history up to n: what came after never was, and what there is
// is durable.
func (h *History) Decide(n uint64, read func(page uint64) ([]byte, error)) error {
	found, err := h.stamps(read)
	if err != nil {
		return err
	}
	for page, p := range h.pages {
		m := mark{zero: true}
		for _, x := range p.marks {
			if x.id <= n && (found[page] == 0 && x.zero || found[page] == x.id && !x.zero) {
				m = x
			}
		}
		m.maybe = false
		p.marks = append(p.marks[:0], m)
		p.seen = m.id
	}
	h.voided = 0
	if h.flushed < h.void {
		h.voided = h.void
	}
	h.top, h.acked, h.flushed, h.decided, h.void = n, n, n, n, 0
	return nil
}

// Freeze returns a copy of the history as it is at this moment: what a snapshot taken now is compared with.
func (h *History) Freeze() *History {
	c := &History{Seed: h.Seed, last: h.last, top: h.top, pages: make(map[uint64]*pageHistory, len(h.pages))}
	for page, p := range h.pages {
		c.pages[page] = &pageHistory{marks: slices.Clone(p.marks), seen: p.seen}
	}
	h.frozen = append(h.frozen, c)
	return c
}

// Branch makes of a frozen history that of a clone: what the clone writes itself is numbered from base on, which nobody else uses. Whoever serves
// it first decides what it begins with, which contains write atLeast.
func (h *History) Branch(base, atLeast uint64) *History {
	c := h.Freeze()
	c.last, c.acked, c.flushed = base, atLeast, atLeast
	return c
}

// Return notes that the volume is again what it once was: found says which write each page holds. Numbers go on.
func (h *History) Return(found map[uint64]uint64) {
	for page := range found {
		h.page(page)
	}
	for page, p := range h.pages {
		p.marks = append(p.marks[:0], mark{id: found[page], zero: found[page] == 0})
		p.seen = found[page]
	}
	h.voided, h.void = 0, 0
	h.top, h.acked, h.flushed, h.decided = h.last, h.last, h.last, h.last
}

// Violation is a broken invariant.
type Violation struct {
	Checker string // D1, W1, …
	Err     error
}

func violated(checker, format string, args ...any) error {
	return &Violation{checker, fmt.Errorf(format, args...)}
}

func (v *Violation) Error() string { return v.Checker + ": " + v.Err.Error() }
func (v *Violation) Unwrap() error { return v.Err }

package sim

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/coreos/torus/record"
)

// PageSize is the unit of the history: 4 KiB.
const PageSize = 4096

// History is what was written to a volume, page by page, in the order in which it entered the log, and how much of
// it has been acknowledged and flushed. Every page written is stamped with the number of its write, so that an image
// of the volume says by itself which prefix of the history it is.
//
// It checks C1 (the image is a prefix), D1 (which contains all that was flushed) and, where no power was lost, W1
// (which contains all that was acknowledged).
type History struct {
	Seed    uint64 // tells this volume's stamps from another's
	writes  []uint64
	at      map[uint64][]uint64 // page → the numbers of its writes, ascending
	zero    map[uint64]bool     // writes of zeroes
	acked   uint64
	flushed uint64
}

// NewHistory returns the history of an empty volume.
func NewHistory(seed uint64) *History {
	return &History{Seed: seed, at: map[uint64][]uint64{}, zero: map[uint64]bool{}}
}

// Len is the number of the last write.
func (h *History) Len() uint64 { return uint64(len(h.writes)) }

// Acked and Flushed are the last write known to be acknowledged, or flushed.
func (h *History) Acked() uint64   { return h.acked }
func (h *History) Flushed() uint64 { return h.flushed }

// Write notes that the next write goes to page, and fills b, one page, with its stamp. zero notes that it writes zeroes.
func (h *History) Write(page uint64, b []byte, zero bool) uint64 {
	h.writes = append(h.writes, page)
	n := uint64(len(h.writes))
	h.at[page] = append(h.at[page], n)
	if zero {
		h.zero[n] = true
		return n
	}
	Stamp(b, h.Seed, page, n)
	return n
}

// Ack notes that all writes up to n have been acknowledged, and Flush that they have been flushed.
func (h *History) Ack(n uint64)   { h.acked = max(h.acked, n) }
func (h *History) Flush(n uint64) { h.flushed, h.acked = max(h.flushed, n), max(h.acked, n) }

// Decide notes that an attach has served the history up to n: what came after never was.
func (h *History) Decide(n uint64) {
	for i := uint64(len(h.writes)); i > n; i-- {
		page := h.writes[i-1]
		l := h.at[page]
		h.at[page] = l[:len(l)-1]
		delete(h.zero, i)
	}
	h.writes = h.writes[:n]
	h.acked, h.flushed = n, n
}

// Stamp fills a page with the mark of write n, in every 512-byte sector, so that a torn page shows.
func Stamp(b []byte, seed, page, n uint64) {
	x := seed ^ page*0x9e3779b97f4a7c15 ^ n*0xbf58476d1ce4e5b9
	for i := 0; i < PageSize; i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(b[i:], x)
	}
	for s := 0; s < PageSize; s += 512 {
		binary.LittleEndian.PutUint64(b[s:], seed)
		binary.LittleEndian.PutUint64(b[s+8:], page)
		binary.LittleEndian.PutUint64(b[s+16:], n)
	}
	binary.LittleEndian.PutUint32(b[PageSize-4:], record.Checksum(b[:PageSize-4]))
}

// errTorn: a page that is neither old nor new.
var errTorn = errors.New("torn or foreign page")

// ReadStamp returns the number of the write that a page holds: 0 for zeroes.
func ReadStamp(b []byte, seed, page uint64) (uint64, error) {
	sum := uint64(0)
	for i := 0; i < PageSize; i += 8 {
		sum |= binary.LittleEndian.Uint64(b[i:])
	}
	if sum == 0 {
		return 0, nil
	}
	if record.Checksum(b[:PageSize-4]) != binary.LittleEndian.Uint32(b[PageSize-4:]) {
		return 0, fmt.Errorf("page %d: checksum: %w", page, errTorn)
	}
	if s, p := binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:]); s != seed || p != page {
		return 0, fmt.Errorf("page %d holds page %d of volume %x: %w", page, p, s, errTorn)
	}
	return binary.LittleEndian.Uint64(b[16:]), nil
}

// Check finds the prefix of the history that an image is: read returns the contents of a page. atLeast is the
// write that it must contain (Flushed for D1, Acked for W1). It returns the length of the prefix; where several
// fit, the longest that no unseen write contradicts is not known, so the shortest is.
func (h *History) Check(read func(page uint64) ([]byte, error), atLeast uint64) (uint64, error) {
	low, lowPage := uint64(0), uint64(0)
	high, highPage := h.Len(), uint64(0)
	for page, writes := range h.at {
		b, err := read(page)
		if err != nil {
			return 0, fmt.Errorf("page %d: %w", page, err)
		}
		n, err := ReadStamp(b, h.Seed, page)
		if err != nil {
			return 0, err
		}
		if n == 0 {
			// Zeroes: before the first write, or one of those that wrote zeroes. Each bounds differently; take the
			// newest that the rest allows, later.
			continue
		}
		i := search(writes, n)
		if i < 0 {
			return 0, fmt.Errorf("C1: page %d holds write %d, which was never made or has been undone", page, n)
		}
		if n > low {
			low, lowPage = n, page
		}
		if i+1 < len(writes) && writes[i+1]-1 < high {
			high, highPage = writes[i+1]-1, page
		}
	}
	if low > high {
		return 0, fmt.Errorf("C1: page %d holds write %d, but page %d holds nothing newer than write %d, which write %d has replaced", lowPage, low, highPage, h.last(highPage, high), high+1)
	}
	// Pages of zeroes: some prefix in [low, high] must have zeroes in all of them.
	n := max(low, atLeast)
	for ; n <= high; n++ {
		ok := true
		next := high + 1
		for page, writes := range h.at {
			b, _ := read(page)
			if s, _ := ReadStamp(b, h.Seed, page); s != 0 {
				continue
			}
			w := h.lastOf(writes, n)
			if w != 0 && !h.zero[w] {
				ok = false
				// The next write of zeroes to this page is the earliest that mends it.
				for _, x := range writes {
					if x > n && h.zero[x] {
						next = min(next, x)
						break
					}
				}
			}
		}
		if ok {
			return n, nil
		}
		if next > high {
			break
		}
		n = next - 1
	}
	if high < atLeast {
		return 0, fmt.Errorf("D1/W1: the image ends before write %d (page %d was written again by %d), but %d must be in it", high+1, highPage, high+1, atLeast)
	}
	return 0, fmt.Errorf("D1/C1: no prefix of at least %d writes has the zeroes of the image", atLeast)
}

func (h *History) last(page, n uint64) uint64 { return h.lastOf(h.at[page], n) }

// lastOf is the newest of writes up to n, 0 if there is none.
func (h *History) lastOf(writes []uint64, n uint64) (w uint64) {
	for _, x := range writes {
		if x > n {
			break
		}
		w = x
	}
	return w
}

func search(writes []uint64, n uint64) int {
	for i, x := range writes {
		if x == n {
			return i
		}
	}
	return -1
}

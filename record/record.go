// Package record is the format of what a log appends: one or many writes in one record, which can be
// verified alone and cannot be mistaken for a leftover of its slot's former occupant. A block is a
// run of records from its first byte. docs/format/record.md draws it.
package record

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/coreos/torus"
)

const (
	// HeaderSize is the size of a record's header: one page, so that its data pages stay aligned.
	HeaderSize = torus.PageSize
	// MaxPages bounds the data pages of a record.
	MaxPages = 256
	// MaxExtents bounds its extents.
	MaxExtents = 128
	// MaxSize is the size of the largest record in bytes.
	MaxSize = HeaderSize + MaxPages*torus.PageSize

	magic   = 0x31434552_53524f54 // "TORSREC1", little endian
	version = 1

	offVersion   = 8
	offFlags     = 10
	offCRC       = 12
	offRef       = 16
	offSeq       = 40
	offFlushed   = 48
	offOffset    = 56
	offUsed      = 60
	offExtents   = 62
	offPages     = 64
	offTime      = 72
	fixedSize    = 80
	extentSize   = 16
	scanHeadSize = 8
)

// Kind says what an extent does to its pages.
type Kind uint8

// The kinds of extents.
const (
	Data  Kind = 1 // the next Count data pages of the record are the new contents
	Zero  Kind = 2 // reads as zeroes, counts as allocated; no data
	Trim  Kind = 3 // reads as zeroes, a hole; no data
	Moved Kind = 4 // TypeMoved only: the next Count data pages are contents that lay elsewhere before; never replayed
	Node  Kind = 5 // TypeINode only: metadata pages, found by their place; Page is the class of the node
)

// HasPages reports whether an extent of this kind brings data pages along.
func (k Kind) HasPages() bool { return k == Data || k == Moved || k == Node }

// Extent is a run of pages of the volume.
type Extent struct {
	Page  uint64 // first page number: byte offset / PageSize
	Count uint32 // pages
	Kind  Kind
}

// Header describes one record.
type Header struct {
	Ref torus.BlockRef
	// Seq is the record's place in the volume's history, from 1, without gaps. A record sent again
	// after a replica failed keeps it. 0 outside the log: in blocks of other types than TypeBlock.
	Seq uint64
	// Flushed: every record up to this one was durable on its whole registered set when this one was made.
	Flushed uint64
	// Time is when the record was made by its writer's clock, in microseconds since 1970; along the log it never decreases.
	Time uint64
	// Offset is where the record begins in its block, in bytes.
	Offset  uint32
	Extents []Extent
	CRCs    []uint32 // CRC32C (Castagnoli) of each data page
}

// Pages is the number of data pages.
func (h *Header) Pages() int { return len(h.CRCs) }

// Size is the size of the whole record in bytes.
func (h *Header) Size() int { return HeaderSize + len(h.CRCs)*torus.PageSize }

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Checksum is the CRC32C (RFC 3720, appendix B.4) used throughout.
func Checksum(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

// used is how many bytes of its page the header takes.
func (h *Header) used() int { return fixedSize + extentSize*len(h.Extents) + 4*len(h.CRCs) }

// Encode writes the header to page, which must be HeaderSize long, and zeroes the rest of it.
func (h *Header) Encode(page []byte) {
	if len(h.CRCs) > MaxPages || len(h.Extents) > MaxExtents {
		panic(fmt.Sprintf("record: %d pages, %d extents", len(h.CRCs), len(h.Extents)))
	}
	le := binary.LittleEndian
	_ = page[HeaderSize-1]
	used := h.used()
	le.PutUint64(page, magic)
	le.PutUint16(page[offVersion:], version)
	le.PutUint16(page[offFlags:], 0)
	le.PutUint32(page[offCRC:], 0)
	h.Ref.AppendTo(page[offRef:offRef])
	le.PutUint64(page[offSeq:], h.Seq)
	le.PutUint64(page[offFlushed:], h.Flushed)
	le.PutUint32(page[offOffset:], h.Offset)
	le.PutUint16(page[offUsed:], uint16(used))
	le.PutUint16(page[offExtents:], uint16(len(h.Extents)))
	le.PutUint32(page[offPages:], uint32(len(h.CRCs)))
	le.PutUint32(page[offPages+4:], 0)
	le.PutUint64(page[offTime:], h.Time)
	b := page[fixedSize:]
	for _, x := range h.Extents {
		le.PutUint64(b, x.Page)
		le.PutUint32(b[8:], x.Count)
		le.PutUint32(b[12:], uint32(x.Kind))
		b = b[extentSize:]
	}
	for _, c := range h.CRCs {
		le.PutUint32(b, c)
		b = b[4:]
	}
	clear(page[used:HeaderSize])
	le.PutUint32(page[offCRC:], Checksum(page[:used]))
}

// Decode reads a header from b, which holds at least its used part, and verifies it. It
// reuses the slices of h. The error wraps torus.ErrCorrupt.
func (h *Header) Decode(b []byte) error {
	le := binary.LittleEndian
	if len(b) < fixedSize || le.Uint64(b) != magic {
		return fmt.Errorf("no record here: %w", torus.ErrCorrupt)
	}
	if v := le.Uint16(b[offVersion:]); v != version {
		return fmt.Errorf("record of version %d, not %d: %w", v, version, torus.ErrCorrupt)
	}
	used, ne, np := int(le.Uint16(b[offUsed:])), int(le.Uint16(b[offExtents:])), int(le.Uint32(b[offPages:]))
	if ne > MaxExtents || np > MaxPages || used != fixedSize+extentSize*ne+4*np || used > len(b) {
		return fmt.Errorf("record header with impossible lengths: %w", torus.ErrCorrupt)
	}
	sum := le.Uint32(b[offCRC:])
	crc := crc32.Update(0, castagnoli, b[:offCRC])
	crc = crc32.Update(crc, castagnoli, zero4[:])
	crc = crc32.Update(crc, castagnoli, b[offCRC+4:used])
	if crc != sum {
		return fmt.Errorf("record header: %w", torus.ErrCorrupt)
	}
	h.Ref = torus.BlockRefFromBytes(b[offRef:])
	h.Seq = le.Uint64(b[offSeq:])
	h.Flushed = le.Uint64(b[offFlushed:])
	h.Offset = le.Uint32(b[offOffset:])
	h.Time = le.Uint64(b[offTime:])
	h.Extents, h.CRCs = h.Extents[:0], h.CRCs[:0]
	pages := uint64(0)
	e := b[fixedSize:]
	for range ne {
		x := Extent{le.Uint64(e), le.Uint32(e[8:]), Kind(le.Uint32(e[12:]))}
		if x.Kind.HasPages() {
			pages += uint64(x.Count)
		}
		h.Extents = append(h.Extents, x)
		e = e[extentSize:]
	}
	if pages != uint64(np) {
		return fmt.Errorf("record extents of %d pages, not %d: %w", pages, np, torus.ErrCorrupt)
	}
	for range np {
		h.CRCs = append(h.CRCs, le.Uint32(e))
		e = e[4:]
	}
	return nil
}

var (
	zero4    [4]byte
	zeroPage [HeaderSize]byte
)

// Used is the length of the used part of an encoded header that Decode has accepted.
func Used(b []byte) int { return int(binary.LittleEndian.Uint16(b[offUsed:])) }

// Check verifies the record of block ref that begins at byte off of it and at b[0]: its header, the zeroes after
// it (a torn write may have left something else there, and what is sent again must find the very same bytes), that
// it belongs just there, and each data page. It fills h and returns the record's size. The error wraps
// torus.ErrCorrupt, also where b ends too soon.
func Check(ref torus.BlockRef, off uint32, b []byte, h *Header) (int, error) {
	if len(b) < HeaderSize {
		return 0, fmt.Errorf("record cut short: %w", torus.ErrCorrupt)
	}
	if err := h.Decode(b[:HeaderSize]); err != nil {
		return 0, err
	}
	// Not what b says: another process, whose memory it may be, could have changed that meanwhile.
	if used := h.used(); !bytes.Equal(b[used:HeaderSize], zeroPage[used:]) {
		return 0, fmt.Errorf("record header followed by something: %w", torus.ErrCorrupt)
	}
	if h.Ref != ref || h.Offset != off {
		return 0, fmt.Errorf("record of %v at %d found in %v at %d: %w", h.Ref, h.Offset, ref, off, torus.ErrCorrupt)
	}
	if len(b) < h.Size() {
		return 0, fmt.Errorf("record cut short: %w", torus.ErrCorrupt)
	}
	for i, c := range h.CRCs {
		p := b[HeaderSize+i*torus.PageSize:]
		if Checksum(p[:torus.PageSize]) != c {
			return 0, fmt.Errorf("page %d of the record at %d of %v: %w", i, off, ref, torus.ErrCorrupt)
		}
	}
	return h.Size(), nil
}

// A scan entry is how headers travel without their padding: the record's offset in its block (32 bits), the
// header's used length (16 bits), 16 bits of zero, then so many bytes of header.

// AppendScanEntry appends the entry of the record at off, whose header page is given, to b.
func AppendScanEntry(b []byte, off uint32, page []byte) []byte {
	used := Used(page)
	b = binary.LittleEndian.AppendUint32(b, off)
	b = binary.LittleEndian.AppendUint32(b, uint32(used))
	return append(b, page[:used]...)
}

// ScanEntrySize is the size of that entry.
func ScanEntrySize(page []byte) int { return scanHeadSize + Used(page) }

// NextScanEntry decodes the first entry of b into h and returns the rest of b.
func NextScanEntry(b []byte, h *Header) ([]byte, error) {
	if len(b) < scanHeadSize {
		return nil, fmt.Errorf("scan entry cut short: %w", torus.ErrCorrupt)
	}
	off, used := binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])
	if used > HeaderSize || int(used) > len(b)-scanHeadSize {
		return nil, fmt.Errorf("scan entry of %d bytes: %w", used, torus.ErrCorrupt)
	}
	if err := h.Decode(b[scanHeadSize : scanHeadSize+used]); err != nil {
		return nil, err
	}
	if h.Offset != off {
		return nil, fmt.Errorf("scan entry of another record: %w", torus.ErrCorrupt)
	}
	return b[scanHeadSize+used:], nil
}

package backup

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/klauspost/compress/zstd"

	"github.com/coreos/torus"
)

const (
	pageSize     = torus.PageSize
	sectionPages = 1 << 16 // 256 MiB
	sectionBytes = sectionPages * pageSize
	framePages   = 32 // at most, in one frame

	// maxSection bounds what an object under maps/ unpacks to, 128 bytes for each page.
	maxSection = 8 << 20
)

func sectionsOf(size uint64) uint64 { return (size + sectionBytes - 1) / sectionBytes }

// hash is the first half of a SHA-256: what a page or an object is, as far as anybody can tell.
type hash [16]byte

func hashOf(b []byte) (h hash) {
	s := sha256.Sum256(b)
	copy(h[:], s[:])
	return h
}

var zeroHash = hashOf(make([]byte, pageSize))

// packID names a pack.
type packID [16]byte

func (id packID) String() string { return hex.EncodeToString(id[:]) }

func (id packID) key() string {
	s := id.String()
	return packsDir + s[:2] + "/" + s
}

// frame is where some pages are, compressed together.
type frame struct {
	pack  packID
	off   uint32 // in the pack
	size  uint32 // in the pack
	pages uint8
}

// place is where a page lay in the cluster. The zero place is none.
type place struct {
	block torus.BlockRef
	page  uint32
}

// page is a page of a volume. The zero page is zeroes.
type page struct {
	frame uint32 // index into the section's frames, and 1
	index uint8  // in the frame
	hash  hash
	block uint32 // index into the section's blocks, and 1; 0: it is not known where the page lay
	page  uint32 // in the block
}

// section says where the pages of 256 MiB are.
type section struct {
	frames []frame
	blocks []torus.BlockRef
	pages  [sectionPages]page

	frameAt map[frame]uint32 // while it is made
	blockAt map[torus.BlockRef]uint32
}

func newSection() *section {
	return &section{frameAt: map[frame]uint32{}, blockAt: map[torus.BlockRef]uint32{}}
}

// set says where a page is.
func (s *section) set(i int, f frame, index uint8, h hash, at place) {
	n, ok := s.frameAt[f]
	if !ok {
		s.frames = append(s.frames, f)
		n = uint32(len(s.frames))
		s.frameAt[f] = n
	}
	p := page{frame: n, index: index, hash: h}
	if at != (place{}) {
		if p.block, ok = s.blockAt[at.block]; !ok {
			s.blocks = append(s.blocks, at.block)
			p.block = uint32(len(s.blocks))
			s.blockAt[at.block] = p.block
		}
		p.page = at.page
	}
	s.pages[i] = p
}

// place is where page i lay.
func (s *section) place(i int) place {
	if p := &s.pages[i]; p.block > 0 {
		return place{s.blocks[p.block-1], p.page}
	}
	return place{}
}

var sectionMagic = []byte("TORUSMAP")

// encode returns what is stored: the tables of packs, frames and blocks, then, for the pages that are not zeroes, one column after the other. Numbers are
// varints, and differences from the one before, since what was written in order lies in order.
func (s *section) encode(z *zstd.Encoder) (object []byte, name string) {
	b := append([]byte(nil), sectionMagic...)
	b = append(b, format)
	var packs []packID
	packAt := map[packID]int{}
	for i := range s.frames {
		if _, ok := packAt[s.frames[i].pack]; !ok {
			packAt[s.frames[i].pack] = len(packs)
			packs = append(packs, s.frames[i].pack)
		}
	}
	b = binary.AppendUvarint(b, uint64(len(packs)))
	for _, p := range packs {
		b = append(b, p[:]...)
	}
	b = binary.AppendUvarint(b, uint64(len(s.frames)))
	for _, f := range s.frames {
		b = binary.AppendUvarint(b, uint64(packAt[f.pack]))
		b = binary.AppendUvarint(b, uint64(f.off))
		b = binary.AppendUvarint(b, uint64(f.size))
		b = append(b, f.pages)
	}
	b = binary.AppendUvarint(b, uint64(len(s.blocks)))
	for _, r := range s.blocks {
		b = r.AppendTo(b)
	}
	var at []int
	for i := range s.pages {
		if s.pages[i].frame > 0 {
			at = append(at, i)
		}
	}
	b = binary.AppendUvarint(b, uint64(len(at)))
	column := func(of func(p *page, i int) int64) {
		last := int64(0)
		for _, i := range at {
			now := of(&s.pages[i], i)
			b = binary.AppendVarint(b, now-last)
			last = now
		}
	}
	column(func(_ *page, i int) int64 { return int64(i) })
	column(func(p *page, _ int) int64 { return int64(p.frame) })
	column(func(p *page, _ int) int64 { return int64(p.index) })
	column(func(p *page, _ int) int64 { return int64(p.block) })
	column(func(p *page, _ int) int64 { return int64(p.page) })
	for _, i := range at {
		b = append(b, s.pages[i].hash[:]...)
	}
	object = z.EncodeAll(b, nil)
	h := sha256.Sum256(object)
	return object, hex.EncodeToString(h[:])
}

var errSection = errors.New("it does not say what a section has to say")

// decodeSection is the inverse. Whatever it returns is sound: every index is within its table.
func decodeSection(object []byte, z *zstd.Decoder) (*section, error) {
	b, err := z.DecodeAll(object, nil)
	if err != nil {
		return nil, err
	}
	rest, ok := bytes.CutPrefix(b, append(sectionMagic, format))
	if !ok {
		return nil, errSection
	}
	bad := false
	number := func(limit uint64) uint64 {
		v, n := binary.Uvarint(rest)
		if n <= 0 || v > limit {
			bad = true
			return 0
		}
		rest = rest[n:]
		return v
	}
	take := func(n int) []byte {
		if len(rest) < n {
			bad = true
			return make([]byte, n)
		}
		t := rest[:n]
		rest = rest[n:]
		return t
	}
	s := &section{}
	packs := make([]packID, number(uint64(len(rest)/len(packID{}))))
	for i := range packs {
		copy(packs[i][:], take(len(packID{})))
	}
	s.frames = make([]frame, number(min(sectionPages, uint64(len(rest)/4))))
	for i := range s.frames {
		n := number(uint64(len(packs)))
		f := frame{off: uint32(number(1<<32 - 1)), size: uint32(number(framePages * 2 * pageSize)), pages: take(1)[0]}
		if bad || n == uint64(len(packs)) || f.pages == 0 || f.pages > framePages || f.size == 0 {
			return nil, errSection
		}
		f.pack = packs[n]
		s.frames[i] = f
	}
	s.blocks = make([]torus.BlockRef, number(min(sectionPages, uint64(len(rest)/torus.BlockRefByteSize))))
	for i := range s.blocks {
		s.blocks[i] = torus.BlockRefFromBytes(take(torus.BlockRefByteSize))
	}
	at := make([]int, number(min(sectionPages, uint64(len(rest)))))
	column := func(limit int, set func(k int, v int64) bool) {
		last := int64(0)
		for k := range at {
			v, n := binary.Varint(rest)
			if n <= 0 || bad {
				bad = true
				return
			}
			rest = rest[n:]
			last += v
			if last < 0 || last >= int64(limit) || !set(k, last) {
				bad = true
				return
			}
		}
	}
	column(sectionPages, func(k int, v int64) bool {
		at[k] = int(v)
		return k == 0 || at[k] > at[k-1]
	})
	column(len(s.frames)+1, func(k int, v int64) bool {
		s.pages[at[k]].frame = uint32(v)
		return v > 0
	})
	column(framePages, func(k int, v int64) bool {
		p := &s.pages[at[k]]
		p.index = uint8(v)
		return p.index < s.frames[p.frame-1].pages
	})
	column(len(s.blocks)+1, func(k int, v int64) bool {
		s.pages[at[k]].block = uint32(v)
		return true
	})
	column(torus.MaxBlockSize/pageSize, func(k int, v int64) bool {
		s.pages[at[k]].page = uint32(v)
		return true
	})
	for _, i := range at {
		copy(s.pages[i].hash[:], take(len(hash{})))
	}
	if bad || len(rest) > 0 {
		return nil, errSection
	}
	return s, nil
}

// section reads a section; its name is the hash of the object.
func (r *Repository) section(ctx context.Context, name string, z *zstd.Decoder) (*section, error) {
	key := mapKey(name)
	o, err := r.get(ctx, key)
	if err != nil {
		return nil, err
	}
	if h := sha256.Sum256(o); hex.EncodeToString(h[:]) != name {
		return nil, fmt.Errorf("repository %s: object %s is not what was written: %w", r.where, key, torus.ErrCorrupt)
	}
	s, err := decodeSection(o, z)
	if err != nil {
		return nil, fmt.Errorf("repository %s: object %s: %w: %w", r.where, key, torus.ErrCorrupt, err)
	}
	return s, nil
}

func mapKey(name string) string {
	if len(name) < 2 {
		return mapsDir + name
	}
	return mapsDir + name[:2] + "/" + name
}

// newEncoder and newDecoder are bounded: what is read may be anything.
func newEncoder() *zstd.Encoder {
	z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithLowerEncoderMem(true), zstd.WithEncoderCRC(false)) // the hashes are better
	if err != nil {
		panic(err) // the options are wrong
	}
	return z
}

func newDecoder() *zstd.Decoder {
	z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderMaxMemory(maxSection))
	if err != nil {
		panic(err)
	}
	return z
}

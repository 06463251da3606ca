package file

import (
	"bytes"
	"fmt"

	"github.com/coreos/torus"
	"github.com/coreos/torus/record"
)

// What a check makes of the copies of one block. No I/O here.

// pageBits is a set of pages of a block.
type pageBits []uint64

func newPageBits(pages int) pageBits { return make(pageBits, (pages+63)/64) }

func (b pageBits) has(i int) bool { return i>>6 < len(b) && b[i>>6]>>(i&63)&1 == 1 }
func (b pageBits) set(i int)      { b[i>>6] |= 1 << (i & 63) }
func (b pageBits) flip(i int)     { b[i>>6] ^= 1 << (i & 63) }

// claims is what maps say of one block: which of its pages they point to, and, summed up, what is to be there. A page that is pointed to by
// several maps, or by one that came back to it, is claimed several times: what was claimed first is in sum, and everything in xor, from which the same falls out if it was
// claimed twice. Whoever reads the block's headers can compute both, and they differ if any one claim is wrong. It takes some 300 bytes a block of 4 MiB,
// where the claims themselves would take 8 KiB.
type claims struct {
	ref       torus.BlockRef
	seen, odd pageBits
	sum, xor  uint64
	live      uint32 // how often the newest INode points here
}

func newClaims(ref torus.BlockRef, pages int) *claims {
	return &claims{ref: ref, seen: newPageBits(pages), odd: newPageBits(pages)}
}

// add claims that page pos of the block is a page of the volume, or a node (whose page is 0), with a checksum of which 24 bits are known.
func (c *claims) add(pos uint32, page uint64, crc uint32) {
	h := claimSum(pos, page, crc)
	if !c.seen.has(int(pos)) {
		c.seen.set(int(pos))
		c.sum += h
	}
	c.odd.flip(int(pos))
	c.xor ^= h
}

// claimSum spreads a claim over 64 bits, so that different claims do not add up to the same.
func claimSum(pos uint32, page uint64, crc uint32) uint64 {
	x := (page+1)*0x9e3779b97f4a7c15 ^ (uint64(pos)<<24|uint64(crc&0xffffff))*0xd6e8feb86659fd93
	x ^= x >> 32
	x *= 0xbf58476d1ce4e5b9
	x ^= x >> 29
	x *= 0x94d049bb133111eb
	return x ^ x>>32
}

// blockCopy is a peer's copy of a block, as far as it could be read.
type blockCopy struct {
	peer   torus.PeerID
	home   bool     // the peer is to hold the block
	away   error    // the peer could not be asked
	none   bool     // it has no such block
	data   []byte   // the first have bytes of it are there
	have   uint32   // bytes
	unread pageBits // pages that its medium does not give; nil: none

	// What examine finds.
	wrong pageBits // pages that are not what they should be
	bad   int      // how many
	first int      // the first of them
	why   string   // what is the matter with that
}

// page returns a page of the copy; nil if it is not there.
func (c *blockCopy) page(pos int) []byte {
	if c.none || c.away != nil || (pos+1)*pageSize > int(c.have) || c.unread.has(pos) {
		return nil
	}
	return c.data[pos*pageSize:][:pageSize]
}

func (c *blockCopy) blame(pos int, why string) {
	if c.wrong.has(pos) {
		return
	}
	c.wrong.set(pos)
	if c.bad++; c.bad == 1 {
		c.first, c.why = pos, why
	}
}

// pageID says which page of the volume a page of a block is.
type pageID struct {
	page uint64
	crc  uint32 // its lower 24 bits
	ok   bool   // it is one: not a header, nor beyond the records that could be read
}

// verdict is what the copies of a block come to, all taken together.
type verdict struct {
	lost      pageBits // pages that no copy has
	missing   int      // how many
	headless  bool     // a header is among them: which pages of the volume follow cannot be told
	differ    bool     // copies are intact, and say different things
	differsAt uint32   // byte
	claimed   bool     // what the maps say of the block is what is in it, or that cannot be told
	layout    []pageID // by page, if not claimed
}

// whole reports whether all of the block can be had from its copies.
func (v *verdict) whole() bool { return v.missing == 0 && !v.differ }

// examine verifies the copies of a block of so many bytes against their own checksums, each other, and what maps say of it (nil: nothing).
func examine(ref torus.BlockRef, length uint32, copies []*blockCopy, cl *claims) *verdict {
	pages := int(length / pageSize)
	v := &verdict{lost: newPageBits(pages), claimed: true}
	for _, c := range copies {
		c.wrong, c.bad, c.first, c.why = newPageBits(pages), 0, 0, ""
	}
	lose := func(pos int) {
		v.lost.set(pos)
		v.missing++
	}
	layout := make([]pageID, pages)
	var lead, other record.Header
	for off := uint32(0); off < length; {
		pos := int(off / pageSize)
		var head []byte
		for _, c := range copies {
			if b := c.page(pos); b != nil && soundHeader(ref, off, length, b, &lead) {
				head = b
				break
			}
		}
		for _, c := range copies {
			switch b := c.page(pos); {
			case b == nil:
				c.blame(pos, c.absent(pos))
			case head != nil && bytes.Equal(b, head):
			case !soundHeader(ref, off, length, b, &other):
				c.blame(pos, "there is no intact header of a record")
			case !v.differ:
				v.differ, v.differsAt = true, off
			}
		}
		if head == nil { // look for the next record
			v.headless = true
			lose(pos)
			off += pageSize
			continue
		}
		k := 0
		for _, x := range lead.Extents {
			if !x.Kind.HasPages() {
				continue
			}
			for i := range uint64(x.Count) {
				at := pos + 1 + k
				crc := lead.CRCs[k]
				k++
				layout[at] = pageID{page: x.Page + i, crc: crc & 0xffffff, ok: true}
				if ref.Type == torus.TypeINode {
					layout[at].page = 0 // their extents say what kind of nodes they are, about
				}
				found := false
				for _, c := range copies {
					switch b := c.page(at); {
					case b == nil:
						c.blame(at, c.absent(at))
					case record.Checksum(b) != crc:
						c.blame(at, "checksum mismatch")
					default:
						found = true
					}
				}
				if !found {
					lose(at)
				}
			}
		}
		off += uint32(lead.Size())
	}
	if cl != nil && !v.headless && !v.differ {
		var sum, xor uint64
		for pos, id := range layout {
			if !id.ok || !cl.seen.has(pos) && !cl.odd.has(pos) {
				continue
			}
			h := claimSum(uint32(pos), id.page, id.crc)
			if cl.seen.has(pos) {
				sum += h
			}
			if cl.odd.has(pos) {
				xor ^= h
			}
		}
		if v.claimed = sum == cl.sum && xor == cl.xor; !v.claimed {
			v.layout = layout
		}
	}
	return v
}

// absent says why a page is not there.
func (c *blockCopy) absent(pos int) string {
	if c.unread.has(pos) {
		return "the disk does not give it"
	}
	return fmt.Sprintf("it ends at byte %d", c.have)
}

// soundHeader reports whether the header of the record at byte off of a block of so many bytes is in b, and decodes it into h.
func soundHeader(ref torus.BlockRef, off, length uint32, b []byte, h *record.Header) bool {
	if h.Decode(b) != nil || h.Ref != ref || h.Offset != off || uint64(off)+uint64(h.Size()) > uint64(length) {
		return false
	}
	for _, x := range b[record.Used(b):] {
		if x != 0 {
			return false
		}
	}
	return true
}

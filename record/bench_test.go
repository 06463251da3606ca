package record

import (
	"fmt"
	"testing"

	"github.com/coreos/torus"
)

// What a writer does to a record before it is sent: the checksum of every page, and the header.
func BenchmarkEncode(b *testing.B) {
	for _, pages := range []int{1, 4, MaxPages} {
		b.Run(fmt.Sprintf("pages=%d", pages), func(b *testing.B) {
			h := Header{Ref: torus.BlockRef{Volume: 1, INode: 1}, Seq: 1}
			for i := range min(pages, MaxExtents) { // random writes: hardly any page follows the one before
				h.Extents = append(h.Extents, Extent{Page: uint64(i) * 7919, Count: 1, Kind: Data})
			}
			h.Extents[len(h.Extents)-1].Count += uint32(pages - len(h.Extents))
			r := build(&h, 1)
			b.SetBytes(int64(len(r)))
			b.ReportAllocs()
			for b.Loop() {
				h.CRCs = h.CRCs[:0]
				for data := r[HeaderSize:]; len(data) > 0; data = data[torus.PageSize:] {
					h.CRCs = append(h.CRCs, Checksum(data[:torus.PageSize]))
				}
				h.Encode(r[:HeaderSize])
			}
			if _, err := Check(h.Ref, 0, r, &h); err != nil {
				b.Fatal(err)
			}
		})
	}
}

func BenchmarkDecode(b *testing.B) {
	for _, pages := range []int{1, MaxExtents} {
		b.Run(fmt.Sprintf("pages=%d", pages), func(b *testing.B) {
			h := Header{Ref: torus.BlockRef{Volume: 1, INode: 1}, Seq: 1}
			for i := range pages {
				h.Extents = append(h.Extents, Extent{Page: uint64(i), Count: 1, Kind: Data})
			}
			page := build(&h, 1)[:HeaderSize]
			b.ReportAllocs()
			for b.Loop() {
				if err := h.Decode(page); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkChecksum(b *testing.B) {
	page := make([]byte, torus.PageSize)
	b.SetBytes(torus.PageSize)
	b.ReportAllocs()
	for b.Loop() {
		Checksum(page)
	}
}

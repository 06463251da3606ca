package file

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"github.com/coreos/torus"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/record"
)

// benchPages is the size of the volume whose map is measured: 8 GiB, 16 MiB of leaves, more than the CPU caches.
const benchPages = 8 << 30 / pageSize

// fullMap is the map, and the block table, of a volume that was written at random, all of it.
func fullMap() *File {
	f := &File{}
	f.m.init(benchPages*pageSize, benchPages*8*2, nil, nil)
	f.table.init()
	const perBlock = 4<<20/pageSize - 1
	for slot := range uint32((benchPages + perBlock - 1) / perBlock) {
		f.table.add(torus.BlockRef{Volume: 1, INode: 1, Index: torus.IndexID(slot)}, &models.PlacementSet{RingVersion: 1, Replication: 2}, nil)
	}
	h := record.Header{Extents: []record.Extent{{Count: 1, Kind: record.Data}}, CRCs: []uint32{0}}
	for i, page := range rand.New(rand.NewPCG(1, 1)).Perm(benchPages) {
		h.Extents[0].Page, h.CRCs[0] = uint64(page), uint32(page)
		f.applyExtents(uint32(i/perBlock), uint32(i%perBlock)+1, &h)
	}
	return f
}

// randomPages is more than a benchmark needs to walk over, so that the next page is no guess for the CPU.
func randomPages() []uint64 {
	rng, out := rand.New(rand.NewPCG(2, 2)), make([]uint64, 1<<16)
	for i := range out {
		out[i] = rng.Uint64N(benchPages)
	}
	return out
}

// The lookup of a read.
func BenchmarkMapLookup(b *testing.B) {
	f, random := fullMap(), randomPages()
	for name, page := range map[string]func(i int) uint64{
		"random":     func(i int) uint64 { return random[i%len(random)] },
		"sequential": func(i int) uint64 { return uint64(i) % benchPages },
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				p := page(i)
				if e, ok := f.m.get(p); !ok || e.kind() != entryData || e.crc() != uint32(p)&0xffffff {
					b.Fatalf("page %d: %v, %v", p, e, ok)
				}
				i++
			}
		})
	}
}

// The update by a record, with what it does to the counts of live pages: one page, or a batch of 32 at random.
func BenchmarkMapUpdate(b *testing.B) {
	f, random := fullMap(), randomPages()
	for name, pages := range map[string]int{"pages=1": 1, "pages=32": 32} {
		b.Run(name, func(b *testing.B) {
			h := record.Header{Extents: make([]record.Extent, pages), CRCs: make([]uint32, pages)}
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				for k := range h.Extents {
					h.Extents[k] = record.Extent{Page: random[i%len(random)], Count: 1, Kind: record.Data}
					h.CRCs[k] = uint32(h.Extents[k].Page)
					i++
				}
				f.applyExtents(uint32(i)%uint32(len(f.table.e)), 1, &h)
			}
		})
	}
}

// A lookup whose leaf has to be read first, in a map that may keep only an eighth of them: the map's own part of that.
func BenchmarkMapLoad(b *testing.B) {
	node := make([]byte, nodeSize)
	for i := range fanout {
		binary.LittleEndian.PutUint64(node[8*i:], uint64(dataEntry(1, 1, 1)))
	}
	var m fmap
	m.init(8*minLeaves*leafPages*pageSize, 1, func(_ entry, dst []byte, done func(error)) {
		copy(dst, node)
		done(nil)
	}, func(*[fanout]entry, bool) error { return nil })
	for i := range m.top {
		m.top[i].ptr = dataEntry(1, 1, 1)
	}
	random := randomPages()
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		page := random[i%len(random)] % (8 * minLeaves * leafPages)
		if _, ok := m.get(page); !ok {
			m.load(page, func(err error) {
				if err != nil {
					b.Fatal(err)
				}
			})
		}
		if e, ok := m.get(page); !ok || e.kind() != entryData {
			b.Fatalf("page %d: %v, %v", page, e, ok)
		}
		i++
	}
	if m.leaves > m.maxLeaves {
		b.Fatalf("%d leaves in memory, more than %d", m.leaves, m.maxLeaves)
	}
}

package file

import (
	"math/rand/v2"
	"testing"

	"github.com/coreos/torus/record"
)

// The overlay says of every page what the newest of the records that are still there says, and nothing else.
func TestOverlay(t *testing.T) {
	const pages = 2000
	rng := rand.New(rand.NewPCG(1, 1))
	var o overlay
	var log []*rec
	dropped := 0
	for seq := uint64(1); seq <= 3000; seq++ {
		r := &rec{seq: seq}
		if rng.IntN(20) == 0 {
			n := listPages + 1 + rng.IntN(500)
			r.hdr.Extents = []record.Extent{{Kind: record.Zero, Page: uint64(rng.IntN(pages - n)), Count: uint32(n)}}
		} else {
			for range 1 + rng.IntN(3) {
				n := 1 + rng.IntN(1+rng.IntN(60))
				kind := []record.Kind{record.Data, record.Trim, record.Zero}[rng.IntN(3)]
				r.hdr.Extents = append(r.hdr.Extents, record.Extent{Kind: kind, Page: uint64(rng.IntN(pages - n)), Count: uint32(n)})
			}
		}
		data := 0
		for _, x := range r.hdr.Extents {
			if x.Kind.HasPages() {
				data += int(x.Count)
			}
		}
		r.mem = make([]byte, record.HeaderSize+data*pageSize)
		for i := range data {
			r.page(i)[0] = byte(i)
		}
		o.put(r)
		log = append(log, r)
		for len(log) > 0 && rng.IntN(100) < len(log) {
			o.drop(log[0])
			log = log[1:]
			dropped++
		}
		if seq%10 != 0 {
			continue
		}
		for page := range uint64(pages) {
			data, kind, ok := o.get(page)
			want, i := record.Kind(0), -1
			var by *rec
			for _, r := range log {
				at := 0
				for _, x := range r.hdr.Extents {
					if page >= x.Page && page < x.Page+uint64(x.Count) {
						want, by, i = x.Kind, r, -1
						if x.Kind.HasPages() {
							i = at + int(page-x.Page)
						}
					}
					if x.Kind.HasPages() {
						at += int(x.Count)
					}
				}
			}
			if ok != (by != nil) || kind != want || (data != nil) != (i >= 0) || i >= 0 && &data[0] != &by.page(i)[0] {
				t.Fatalf("after record %d, page %d: kind %v, data %v, listed %v; it should be %v, page %d", seq, page, kind, data != nil, ok, want, i)
			}
		}
	}
	for _, r := range log {
		o.drop(r)
	}
	if !o.empty() || dropped < 1000 {
		t.Errorf("%d groups and %d ranges are left of nothing; %d dropped on the way", len(o.groups), len(o.ranges), dropped)
	}
}

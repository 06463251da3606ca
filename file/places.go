package file

import "github.com/coreos/torus"

// Place is where a page's bytes lie: in a record of a block, which is used for one content only (D2). The zero Place is a page of zeroes.
type Place struct {
	Block torus.BlockRef
	Page  uint32 // within the block, in pages
	Lost  bool   // they are lost: Block is not known
}

// Places finds out where the pages from first on lie, dst[0] the first one's; behind the end there are zeroes. done is called once, on the loop.
func (v *View) Places(first uint64, dst []Place, done func(error)) {
	f := v.f
	if pages := (f.size + pageSize - 1) / pageSize; uint64(len(dst)) > pages-min(pages, first) {
		clear(dst[pages-min(pages, first):])
		dst = dst[:pages-min(pages, first)]
	}
	var next func(err error)
	next = func(err error) {
		for {
			if err == nil {
				err = f.err
			}
			if err != nil || len(dst) == 0 {
				done(err)
				return
			}
			if n := min(f.m.hole(first), uint64(len(dst))); n > 0 {
				clear(dst[:n])
				dst, first = dst[n:], first+n
				continue
			}
			if _, ok := f.m.get(first); !ok {
				f.m.load(first, next)
				return
			}
			n := min(leafPages-int(first%leafPages), len(dst))
			for i := range n {
				switch e, _ := f.m.get(first + uint64(i)); e.kind() {
				case entryData:
					dst[i] = Place{Block: f.table.e[e.slot()].ref, Page: e.page()}
				case entryLost:
					dst[i] = Place{Lost: true}
				default:
					dst[i] = Place{}
				}
			}
			dst, first = dst[n:], first+uint64(n)
		}
	}
	next(nil)
}

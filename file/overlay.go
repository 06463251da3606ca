package file

import "github.com/coreos/torus/record"

// overlay is what acknowledged records above applied say about pages: newer than the map.
type overlay struct {
	pages  map[uint64]place
	ranges []span // large extents without data, oldest first; each the only extent of its record
}

// place is where a page's newest contents are.
type place struct {
	rec  *rec
	page int32 // data page of rec; < 0: zeroes, and -kind
}

// span is an extent without data, too large to list by page.
type span struct {
	seq         uint64
	first, last uint64
	kind        record.Kind
}

// listPages: a larger extent without data is kept as a span.
const listPages = 256

func (o *overlay) put(r *rec) {
	if o.pages == nil {
		o.pages = map[uint64]place{}
	}
	i := int32(0)
	for _, x := range r.hdr.Extents {
		switch {
		case x.Kind.HasPages():
			for k := range uint64(x.Count) {
				o.pages[x.Page+k] = place{r, i}
				i++
			}
		case x.Count > listPages:
			o.ranges = append(o.ranges, span{r.seq, x.Page, x.Page + uint64(x.Count) - 1, x.Kind})
		default:
			for k := range uint64(x.Count) {
				o.pages[x.Page+k] = place{r, -int32(x.Kind)}
			}
		}
	}
}

// drop forgets what r said, unless something newer has been said since.
func (o *overlay) drop(r *rec) {
	for _, x := range r.hdr.Extents {
		if !x.Kind.HasPages() && x.Count > listPages {
			continue
		}
		for k := range uint64(x.Count) {
			if p, ok := o.pages[x.Page+k]; ok && p.rec == r {
				delete(o.pages, x.Page+k)
			}
		}
	}
	for len(o.ranges) > 0 && o.ranges[0].seq <= r.seq {
		o.ranges = o.ranges[1:]
	}
}

// get says what is newest about a page: data is its contents, or nil with the kind of its zeroes; ok is false if the map knows better.
func (o *overlay) get(page uint64) (data []byte, kind record.Kind, ok bool) {
	p, listed := o.pages[page]
	for i := len(o.ranges) - 1; i >= 0; i-- {
		s := &o.ranges[i]
		if listed && s.seq < p.rec.seq {
			break
		}
		if page >= s.first && page <= s.last && (!listed || s.seq > p.rec.seq) {
			return nil, s.kind, true
		}
	}
	switch {
	case !listed:
		return nil, 0, false
	case p.page >= 0:
		return p.rec.page(int(p.page)), record.Data, true
	}
	return nil, record.Kind(-p.page), true
}

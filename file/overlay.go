package file

import "github.com/coreos/torus/record"

// groupPages is how many pages lie together in the overlay: what is large is looked up once for so many.
const groupPages = 16

// overlay is what acknowledged records above applied say about pages: newer than the map.
type overlay struct {
	groups map[uint64]*group // by the first page / groupPages; none is empty
	free   []*group
	ranges []span // large extents without data, oldest first; each the only extent of its record
}

type group struct {
	places [groupPages]place
	n      int // of them that say something
}

// place is where a page's newest contents are.
type place struct {
	rec  *rec  // nil: in the map
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
	i := int32(0)
	for _, x := range r.hdr.Extents {
		if !x.Kind.HasPages() && x.Count > listPages {
			o.ranges = append(o.ranges, span{r.seq, x.Page, x.Page + uint64(x.Count) - 1, x.Kind})
			continue
		}
		o.each(x, true, func(g *group, l []place) {
			for k := range l {
				if l[k].rec == nil {
					g.n++
				}
				if l[k] = (place{r, -int32(x.Kind)}); x.Kind.HasPages() {
					l[k].page = i
					i++
				}
			}
		})
	}
}

// drop forgets what r said, unless something newer has been said since.
func (o *overlay) drop(r *rec) {
	for _, x := range r.hdr.Extents {
		if !x.Kind.HasPages() && x.Count > listPages {
			continue
		}
		o.each(x, false, func(g *group, l []place) {
			for k := range l {
				if l[k].rec == r {
					l[k] = place{}
					g.n--
				}
			}
		})
	}
	for len(o.ranges) > 0 && o.ranges[0].seq <= r.seq {
		o.ranges = o.ranges[1:]
	}
}

// each calls fn with the places of an extent, group by group, in order. Groups that are not there are made if that is wanted; what fn leaves empty
// is taken out.
func (o *overlay) each(x record.Extent, make bool, fn func(*group, []place)) {
	for page, end := x.Page, x.Page+uint64(x.Count); page < end; {
		first := page % groupPages
		n := min(end-page, groupPages-first)
		key := page / groupPages
		page += n
		g := o.groups[key]
		if g == nil {
			if !make {
				continue
			}
			g = o.newGroup()
			o.groups[key] = g
		}
		fn(g, g.places[first:first+n])
		if g.n == 0 {
			delete(o.groups, key)
			o.free = append(o.free, g)
		}
	}
}

func (o *overlay) newGroup() *group {
	if o.groups == nil {
		o.groups = map[uint64]*group{}
	}
	if n := len(o.free); n > 0 {
		g := o.free[n-1]
		o.free = o.free[:n-1]
		return g
	}
	return &group{}
}

// empty reports whether the map knows everything.
func (o *overlay) empty() bool { return len(o.groups) == 0 && len(o.ranges) == 0 }

// get says what is newest about a page: data is its contents, or nil with the kind of its zeroes; ok is false if the map knows better.
func (o *overlay) get(page uint64) (data []byte, kind record.Kind, ok bool) {
	var p place
	if g := o.groups[page/groupPages]; g != nil {
		p = g.places[page%groupPages]
	}
	listed := p.rec != nil
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

package file

import (
	"fmt"
	"slices"

	"github.com/coreos/torus"
)

// maxLost bounds the runs of pages that a finding lists.
const maxLost = 1 << 12

// attribute finds out what of the volume and its snapshots is lost with the blocks of which something is, by looking through their maps once more.
func (c *fsck) attribute() error {
	if len(c.lost) == 0 && len(c.odd) == 0 {
		return nil
	}
	for _, m := range c.moments() {
		if !Settled(c.st.VolumeState, m.at) {
			continue
		}
		if err := c.attributeTo(m); err != nil {
			return err
		}
	}
	for _, b := range c.lost {
		x := b.finding
		if len(x.Lost) > 0 {
			continue
		}
		used := false
		if slot, ok := c.f.table.byRef[x.Ref]; ok && c.claims[slot] != nil {
			for i, w := range c.claims[slot].seen {
				used = used || i < len(b.v.lost) && w&b.v.lost[i] != 0
			}
		}
		switch {
		case used && c.st.KeptFrom > 0 && c.cfg.At == nil:
			x.Lost = append(x.Lost, LostPages{Of: ThePast})
		case !used:
			x.What += "; nothing points to them"
		}
	}
	return nil
}

// attributeTo looks through the map of a moment, as who reads it sees it.
func (c *fsck) attributeTo(m named) error {
	var f *File
	for tries := 0; ; tries++ {
		f = c.reader(m.at.SizeBytes)
		c.deadline = c.cfg.Loop.Now() + fsckPatience
		err := f.loadMoment(c.t, c.vol, c.st.Head, m.at, false)
		if err == nil {
			break
		}
		if stopped := c.stopped(); stopped != nil {
			return stopped
		}
		moved, rerr := c.refresh()
		if rerr != nil {
			return rerr
		}
		if moved && m.at.Base == c.st.Head {
			return nil
		}
		if moved && tries < fsckReloads {
			continue
		}
		said := slices.ContainsFunc(c.report.Findings, func(x *Finding) bool {
			return len(x.Lost) > 0 && x.Lost[0].Of == m.of && (x.Kind == FindLog || x.Kind == FindUnknown && x.Ref == (torus.BlockRef{}))
		})
		if !said && m.of != "" && Kept(c.st.VolumeState, m.at) {
			x := &Finding{Kind: FindUnknown, What: fmt.Sprintf("%s cannot be opened: %v", m.of, err), Lost: []LostPages{{Of: m.of, Count: pagesOf(m.at.SizeBytes)}}}
			for _, b := range c.lost {
				if b.finding.Kind == FindLost {
					x.Kind = FindMoment
				}
			}
			c.add(x)
		}
		return nil
	}
	lost, odd := bySlot(f, c.lost), bySlot(f, c.odd)
	pages := pagesOf(m.at.SizeBytes)
	for page := uint64(0); page < pages; {
		if err := c.stopped(); err != nil {
			return err
		}
		if n := f.m.hole(page); n > 0 {
			page += n
			continue
		}
		at := []uint64{page} // the first pages of leaves; the interior node of the first is read alone
		top := f.m.top[page/innerPages]
		for p := page + leafPages; top.in != nil && p%innerPages != 0 && p < pages && len(at) < nodesAtOnce; p += leafPages {
			if f.m.hole(p) == 0 {
				at = append(at, p)
			}
		}
		page = at[len(at)-1] + leafPages
		errs := make([]error, len(at))
		var hits []hit
		c.deadline = c.cfg.Loop.Now() + fsckPatience
		c.t.All(len(at), func(k int, done func()) {
			f.m.load(at[k], func(err error) {
				if errs[k] = err; err == nil {
					hits = append(hits, hitsIn(f, at[k], lost, odd)...)
				}
				done()
			})
		})
		for k, err := range errs {
			if err == nil {
				continue
			}
			ptr, n := top.ptr, uint64(innerPages)
			if top.in != nil {
				ptr, n = top.in.ptr[at[k]/leafPages%fanout], leafPages
			}
			if b := lost[ptr.slot()]; b != nil && ptr.kind() == entryData {
				b.lose(LostPages{m.of, at[k], n})
			}
			if top.in == nil {
				page = (at[k]/innerPages + 1) * innerPages
			}
		}
		for _, h := range hits {
			if b := lost[h.e.slot()]; b != nil && b.v.lost.has(int(h.e.page())) && c.readPage(f, h.e) != nil {
				b.lose(LostPages{m.of, h.page, 1})
			}
			if b := odd[h.e.slot()]; b != nil {
				b.lose(LostPages{m.of, h.page, 1})
			}
		}
	}
	return nil
}

func (b *lostBlock) lose(x LostPages) {
	if len(b.finding.Lost) < maxLost {
		b.finding.Lost = addLost(b.finding.Lost, x)
	}
}

// bySlot finds blocks in the table of a reader.
func bySlot(f *File, l map[torus.BlockRef]*lostBlock) map[uint32]*lostBlock {
	m := make(map[uint32]*lostBlock, len(l))
	for ref, b := range l {
		if slot, ok := f.table.byRef[ref]; ok {
			m[slot] = b
		}
	}
	return m
}

// hit is a page that is in a block of which something is lost, or where another page is.
type hit struct {
	page uint64
	e    entry
}

// hitsIn lists those of a leaf that is in memory.
func hitsIn(f *File, first uint64, lost, odd map[uint32]*lostBlock) (l []hit) {
	in := f.m.top[first/innerPages].in
	if in == nil || in.leaf[first/leafPages%fanout] == nil {
		return nil
	}
	for i, e := range in.leaf[first/leafPages%fanout].e {
		if e.kind() != entryData {
			continue
		}
		page := first + uint64(i)
		if b := lost[e.slot()]; b != nil && b.v.lost.has(int(e.page())) {
			l = append(l, hit{page, e})
		}
		if b := odd[e.slot()]; b != nil {
			if int(e.page()) >= len(b.v.layout) || b.v.layout[e.page()] != (pageID{page, e.crc(), true}) {
				l = append(l, hit{page, e})
			}
		}
	}
	return l
}

package file

import (
	"cmp"
	"slices"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
)

// A node of the map is written anew when it has changed, and a metadata block is given back when no node in it is the newest any more. A node that never
// changes would keep its block for ever, though it be the only one of a thousand. So when metadata blocks hold little that is alive, what is in the worst of
// them is called changed, and the next checkpoint writes it elsewhere.
const (
	// tidyPart: metadata blocks are to be alive by one part in so many; tidyTight: if somebody has asked for all that can be given back.
	tidyPart, tidyTight = 3, 1.1
	// tidySlack is how many metadata blocks there may be in any case.
	tidySlack = 4
	// tidyPages bounds how many nodes one checkpoint has more to write.
	tidyPages = 4096
)

// untidy returns the metadata blocks whose nodes are to be written anew.
func (f *File) untidy() map[uint32]bool {
	if f.tidied == f.number { // the next checkpoint sees to it
		return nil
	}
	var l []uint32
	live, length := 0.0, 0.0
	keep := newPins(f.state.VolumeState, 0)
	for i := range f.table.e {
		e := &f.table.e[i]
		if e.used && e.live > 0 && e.ref.Type == torus.TypeINode && e.ref.Volume == f.vol && !e.held && !f.meta.at(uint32(i)) &&
			!keep.need(&tableEntry{ref: e.ref, birth: e.birth, death: f.number + 1}) {
			l = append(l, uint32(i))
			live += float64(e.live)
			length += float64(e.length)
		}
	}
	part, slack := float64(tidyPart), tidySlack*int(f.cfg.BlockSize)/pageSize
	if f.tighten > 0 {
		part, slack = tidyTight, 0
	}
	slices.SortFunc(l, func(x, y uint32) int { // the most dead pages for each that must be written
		a, b := &f.table.e[x], &f.table.e[y]
		return cmp.Or(cmp.Compare(uint64(a.live)*uint64(b.length), uint64(b.live)*uint64(a.length)), cmp.Compare(x, y))
	})
	blocks := map[uint32]bool{}
	for pages := uint32(0); len(l) > 0 && length > part*live+float64(slack) && pages < tidyPages; l = l[1:] {
		e := &f.table.e[l[0]]
		blocks[l[0]] = true
		length -= float64(e.length - e.live)
		pages += e.live
	}
	return blocks
}

// tidy calls the nodes in some metadata blocks changed.
func (f *File) tidy(t *loop.Task, blocks map[uint32]bool) error {
	f.tidied = f.number
	in := func(e entry) bool { return e.kind() == entryData && blocks[e.slot()] }
	var roots []uint64
	for i, top := range f.m.top {
		if top.in == nil && top.ptr.kind() == entryData {
			roots = append(roots, uint64(i)*fanout)
		}
	}
	if err := f.eachLeaf(t, roots, func(uint64) {}); err != nil { // of a leaf, but its interior node is there then
		return err
	}
	var leaves []uint64
	for i, top := range f.m.top {
		if top.in == nil {
			continue
		}
		top.in.dirty = top.in.dirty || in(top.ptr)
		for k, e := range top.in.ptr {
			if in(e) {
				leaves = append(leaves, uint64(i*fanout+k))
			}
		}
	}
	err := f.eachLeaf(t, leaves, func(leaf uint64) {
		if l := f.m.writable(leaf * leafPages); l != nil {
			f.m.touch(l)
		}
	})
	for p, x := range f.table.pages {
		if x == nil {
			continue
		}
		if slot, ok := f.table.byRef[pageRef(f.vol, x)]; ok && blocks[slot] {
			f.table.dirty[p] = true
		}
	}
	f.sinceCkpt++ // there is something to commit
	return err
}

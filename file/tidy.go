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
	// tidyPart: metadata blocks are to be alive by one part in so many. If somebody has asked for all that can be given back, each of those there are is to be
	// alive by tidyTight.
	tidyPart, tidyTight = 3, 0.9
	// tidySlack is how many metadata blocks there may be in any case.
	tidySlack = 4
	// tidyBlocks bounds how much more one checkpoint has to write.
	tidyBlocks = 2
)

// untidy returns the metadata blocks whose nodes are to be written anew.
func (f *File) untidy() map[uint32]bool {
	if f.tidied == f.number { // the next checkpoint sees to it
		return nil
	}
	if _, usable := f.dist.Room(); usable < f.repl {
		return nil
	}
	var l []uint32
	live, length := uint64(0), uint64(0)
	keep := newPins(f.state.VolumeState, 0)
	for i := range f.table.e {
		e := &f.table.e[i]
		if e.used && e.live > 0 && e.ref.Type == torus.TypeINode && e.ref.Volume == f.vol && !e.held && !f.meta.at(uint32(i)) && !f.avoids(uint32(i)) &&
			!keep.need(&tableEntry{ref: e.ref, birth: e.birth, death: f.number + 1}) {
			l = append(l, uint32(i))
			live += uint64(e.live)
			length += uint64(e.length)
		}
	}
	most := tidyPart*live + tidySlack*uint64(f.cfg.BlockSize)/pageSize
	if f.tighten > 0 {
		most = 0
		l = slices.DeleteFunc(l, func(i uint32) bool {
			e := &f.table.e[i]
			return e.birth >= f.tighten || float64(e.live) > tidyTight*float64(e.length)
		})
	}
	slices.SortFunc(l, func(x, y uint32) int { // the most dead pages for each that must be written
		a, b := &f.table.e[x], &f.table.e[y]
		return cmp.Or(cmp.Compare(uint64(a.live)*uint64(b.length), uint64(b.live)*uint64(a.length)), cmp.Compare(x, y))
	})
	blocks := map[uint32]bool{}
	for pages := uint32(0); len(l) > 0 && length > most && pages < tidyBlocks*f.cfg.BlockSize/pageSize; l = l[1:] {
		e := &f.table.e[l[0]]
		blocks[l[0]] = true
		length -= uint64(e.length - e.live)
		pages += e.live
	}
	return blocks
}

// tidy calls the nodes in some metadata blocks changed. Blocks of which it finds none, or not all, it leaves alone for a while.
func (f *File) tidy(t *loop.Task, blocks map[uint32]bool) {
	f.tidied = f.number
	left := map[uint32]int{}
	for slot := range blocks {
		left[slot] = int(f.table.e[slot].live)
	}
	in := func(e entry) bool { return e.kind() == entryData && blocks[e.slot()] }
	var roots []uint64
	for i, top := range f.m.top {
		if top.in == nil && top.ptr.kind() == entryData {
			roots = append(roots, uint64(i)*fanout)
		}
	}
	err := f.eachLeaf(t, roots, func(uint64) {}) // of a leaf, but its interior node is there then
	found := 0
	find := func(slot uint32) {
		found++
		left[slot]--
	}
	var leaves []uint64
	for i, top := range f.m.top {
		if top.in == nil {
			continue
		}
		if in(top.ptr) {
			top.in.dirty = true
			find(top.ptr.slot())
		}
		for k, e := range top.in.ptr {
			if in(e) {
				leaves = append(leaves, uint64(i*fanout+k))
			}
		}
	}
	if err == nil && !f.closing {
		err = f.eachLeaf(t, leaves, func(leaf uint64) {
			top := f.m.top[leaf/fanout]
			if l := f.m.writable(leaf * leafPages); l != nil && in(top.in.ptr[leaf%fanout]) {
				f.m.touch(l)
				find(top.in.ptr[leaf%fanout].slot())
			}
		})
	}
	if f.err != nil {
		return
	}
	for p, x := range f.table.pages {
		if x == nil {
			continue
		}
		if slot, ok := f.table.byRef[pageRef(f.vol, x)]; ok && blocks[slot] {
			f.table.dirty[p] = true
			find(slot)
		}
	}
	if f.meta.inodePages > 0 && blocks[f.meta.inodeSlot] { // every checkpoint writes it anew
		left[f.meta.inodeSlot] -= f.meta.inodePages
	}
	if err != nil {
		f.log.Warn("metadata cannot be tidied, trying again later", "err", err)
	}
	for slot, n := range left {
		if n > 0 {
			f.avoided[slot] = avoided{f.table.e[slot].ref, f.loop.Now() + avoidFor}
		}
	}
	if found > 0 {
		f.sinceCkpt++ // there is something to commit
	}
}

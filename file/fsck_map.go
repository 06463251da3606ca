package file

import (
	"errors"
	"fmt"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/distributor"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/record"
)

const (
	// nodesAtOnce is how many nodes of a map are read at a time, and so how much of one is in memory.
	nodesAtOnce = 32
	// fsckRetry is how long it waits before it reads again what could not be read.
	fsckRetry = 300 * time.Millisecond
	// maxBadNodes bounds how many unreadable nodes are remembered.
	maxBadNodes = 1 << 14
)

// ThePast names, in LostPages, what a volume can be rewound to.
const ThePast = "past"

// badNode is a node of a map, an INode or a log that could not be read.
type badNode struct {
	kind FindingKind
	ref  torus.BlockRef
	pos  uint32 // page of the block; 0: not known
	e    entry  // of a node: where it is
	what string
	err  error
	lost LostPages
	log  []torus.BlockRef // of a log: where it is
}

// tree is one map being walked.
type tree struct {
	of     string
	number uint64 // of its INode
	first  bool   // it is the newest
	newest bool   // it was from the beginning: its entries are counted
	tops   []entry
}

// walkAll walks the newest map, then those of all other INodes that are to be readable, from the newest to the oldest; of each only where it
// differs from the one before.
func (c *fsck) walkAll() error {
	c.reckon()
	if at := c.cfg.At; at != nil {
		if at.Base != nil {
			if _, _, err := c.walkInode(at.Base, c.cfg.Of, nil); err != nil {
				return err
			}
		}
		return c.checkLog(named{c.cfg.Of, at})
	}
	tops := c.newestTops()
	c.report.INodes++
	for i := 0; i < len(tops); i++ {
		stale, err := c.walkTop(&tree{number: c.st.Head.Number, first: true, newest: !c.moved, tops: tops}, i, 0)
		for tries := 0; stale && err == nil && tries < fsckReloads; tries++ {
			tops = c.newestTops()
			stale, err = c.walkTop(&tree{number: c.st.Head.Number, first: true, tops: tops}, i, 0)
		}
		if err != nil {
			return err
		}
	}
	c.claimInode(c.st.Head, c.f.table.pages)
	if !c.moved && len(c.bad) == 0 {
		c.checkLive()
	}
	if err := c.walkPast(tops); err != nil {
		return err
	}
	for _, m := range c.moments() {
		if err := c.checkLog(m); err != nil {
			return err
		}
	}
	return nil
}

func (c *fsck) newestTops() []entry {
	tops := make([]entry, 0, len(c.f.m.top))
	for _, t := range c.f.m.top {
		tops = append(tops, t.ptr)
	}
	return tops
}

// walkPast walks the maps of the INodes that snapshots, clones and the rewinding need.
func (c *fsck) walkPast(prev []entry) error {
	names := map[uint64]string{}
	heads := map[uint64]*models.Head{}
	for _, p := range c.st.Pins {
		if b := p.At.GetBase(); b != nil && b.Number != c.st.Head.Number {
			heads[b.Number] = b
			if names[b.Number] == "" {
				names[b.Number] = PinName(p)
			}
		}
	}
	past := func(l []*models.Head) {
		for _, h := range l {
			if c.st.KeptFrom > 0 && h.Number >= c.st.KeptFrom && !c.st.Deleted {
				heads[h.Number] = h
			}
		}
	}
	past(c.f.history)
	for below := c.st.Head.Number; ; {
		var l []*models.Head
		for n, h := range heads {
			if n < below {
				l = append(l, h)
			} else {
				delete(heads, n)
			}
		}
		if len(l) == 0 {
			return nil
		}
		sortHeads(l)
		h := l[0]
		below = h.Number
		n, tops, err := c.walkInode(h, names[h.Number], prev)
		if err != nil {
			return err
		}
		if n != nil {
			prev = tops
			past(n.History)
		}
	}
}

// kept reports whether an INode is to be readable by the present state.
func (c *fsck) kept(number uint64) bool {
	if c.cfg.At != nil {
		return true
	}
	if c.st.KeptFrom > 0 && number >= c.st.KeptFrom && !c.st.Deleted || number == c.st.Head.Number {
		return true
	}
	for _, p := range c.st.Pins {
		if p.At.GetBase().GetNumber() == number {
			return true
		}
	}
	return false
}

// walkInode reads an older INode, and walks its map where it differs from one that was walked already. It is nil if it is not kept any more, or cannot be read.
func (c *fsck) walkInode(h *models.Head, of string, prev []entry) (n *models.INode, tops []entry, err error) {
	if !c.kept(h.Number) { // the state may have been read anew since the INode was found
		return nil, nil, nil
	}
	for tries := 0; tries < 2; tries++ {
		if err := c.stopped(); err != nil {
			return nil, nil, err
		}
		c.deadline = c.cfg.Loop.Now() + fsckPatience
		if n, err = c.f.readInode(c.t, c.vol, h); err == nil {
			break
		}
		if _, rerr := c.refresh(); rerr != nil {
			return nil, nil, rerr
		}
		if !c.kept(h.Number) {
			return nil, nil, nil
		}
	}
	if err != nil {
		if stopped := c.stopped(); stopped != nil {
			return nil, nil, stopped
		}
		x := badNode{kind: FindINode, what: fmt.Sprintf("INode %d cannot be read: %v", h.Number, err), err: err, lost: LostPages{Of: of, Count: pagesOf(h.SizeBytes)}}
		if of == "" {
			x.lost.Of = ThePast
		}
		if checkExtent(h.Inode, c.cfg.BlockSize) == nil {
			x.ref, x.pos = extentRef(c.vol, h.Inode), h.Inode.Offset/pageSize
		}
		c.remember(x)
		return nil, nil, nil
	}
	c.report.INodes++
	c.claimInode(h, n.Table)
	tr := &tree{of: of, number: h.Number, tops: make([]entry, len(n.Top))}
	if of == "" {
		tr.of = ThePast
	}
	for i, x := range n.Top {
		tr.tops[i] = entry(x)
	}
	for i := range tr.tops {
		var before entry
		if i < len(prev) {
			before = prev[i]
		}
		stale, err := c.walkTop(tr, i, before)
		if err != nil {
			return nil, nil, err
		}
		if stale && !c.kept(h.Number) {
			return nil, nil, nil
		}
	}
	return n, tr.tops, nil
}

// claimInode claims what an INode itself consists of.
func (c *fsck) claimInode(h *models.Head, table []*models.TablePage) {
	if _, ok := c.f.table.byRef[extentRef(c.vol, h.Inode)]; !ok {
		c.add(&Finding{Kind: FindINode, Ref: extentRef(c.vol, h.Inode), What: fmt.Sprintf("INode %d is in a block that the block table does not list", h.Number)})
	}
	for i, x := range table {
		ref := pageRef(c.vol, x)
		slot, ok := c.f.table.byRef[ref]
		if !ok || x.Page >= c.f.table.e[slot].length {
			c.add(&Finding{Kind: FindINode, Ref: ref, What: fmt.Sprintf("page %d of the table of INode %d is said to be at page %d of it, which is not listed", i, h.Number, x.Page)})
			continue
		}
		c.claim(slot, x.Page, 0, x.Crc32C&0xffffff)
		if h.Number == c.st.Head.Number {
			c.claims[slot].live++
		}
	}
}

func (c *fsck) claim(slot, pos uint32, page uint64, crc uint32) *claims {
	x := c.claims[slot]
	if x == nil {
		x = newClaims(c.f.table.e[slot].ref, c.blockPages)
		c.claims[slot] = x
	}
	x.add(pos, page, crc)
	return x
}

// walkTop walks what one entry of an INode covers, but for what one that was walked before has as well. stale: what could not be read is not needed any more.
func (c *fsck) walkTop(tr *tree, i int, before entry) (stale bool, err error) {
	top, first := tr.tops[i], uint64(i)*innerPages
	if top == before || !c.checkEntry(tr, top, torus.TypeINode, first, innerPages) {
		return false, nil
	}
	c.claimNode(tr, top)
	var in, old [fanout]entry
	if stale, err := c.readNodes(tr, []entry{top}, []uint64{first}, innerPages, func(_ int, e *[fanout]entry) { in = *e }); stale || err != nil {
		return stale, err
	}
	if before.kind() == entryData { // it was walked, or found to be bad: then nothing is left out
		if b, err := c.node(before); err == nil {
			decodeNode(b, &old)
		}
	}
	var ptrs []entry
	var firsts []uint64
	for j, x := range in {
		at := first + uint64(j)*leafPages
		if x == old[j] || !c.checkEntry(tr, x, torus.TypeINode, at, leafPages) {
			continue
		}
		c.claimNode(tr, x)
		ptrs, firsts = append(ptrs, x), append(firsts, at)
	}
	for len(ptrs) > 0 {
		if err := c.stopped(); err != nil {
			return false, err
		}
		n := min(nodesAtOnce, len(ptrs))
		stale, err := c.readNodes(tr, ptrs[:n], firsts[:n], leafPages, func(k int, e *[fanout]entry) {
			for j, x := range e {
				page := firsts[k] + uint64(j)
				if !c.checkEntry(tr, x, torus.TypeBlock, page, 1) {
					continue
				}
				c.report.Entries++
				if cl := c.claim(x.slot(), x.page(), page, x.crc()); tr.newest {
					cl.live++
				}
			}
		})
		if stale || err != nil {
			return stale, err
		}
		ptrs, firsts = ptrs[n:], firsts[n:]
		c.progress()
	}
	return false, nil
}

func (c *fsck) claimNode(tr *tree, e entry) {
	if cl := c.claim(e.slot(), e.page(), 0, e.crc()); tr.newest {
		cl.live++
	}
}

// checkEntry reports whether an entry points to a page of a block that can be what it should be. What is lost, or points elsewhere, is a finding.
func (c *fsck) checkEntry(tr *tree, e entry, typ torus.BlockType, first, n uint64) bool {
	lost := LostPages{tr.of, first, n}
	switch {
	case e == 0:
		return false
	case e.kind() == entryLost:
		c.addPages(FindLostPages, "the map says that they were lost before: a node of it was damaged on every peer", lost)
		return false
	case e.kind() == entryZero && typ == torus.TypeBlock:
		return false
	case e.kind() == entryData:
		if err := c.f.table.check(e, typ); err == nil && e.page() < c.f.table.e[e.slot()].length {
			return true
		}
	}
	x := &Finding{Kind: FindEntry, What: fmt.Sprintf("the map of INode %d points to what is not in the block table (%v)", tr.number, e), Lost: []LostPages{lost}}
	if s := int(e.slot()); e.kind() == entryData && s < len(c.f.table.e) && c.f.table.e[s].used {
		b := &c.f.table.e[s]
		x.Ref = b.ref
		x.What = fmt.Sprintf("the map of INode %d points to its page %d, of %d", tr.number, e.page(), b.length)
		if e.page() < b.length {
			x.What = fmt.Sprintf("the map of INode %d points there for what such a block does not hold", tr.number)
		}
	}
	c.add(x)
	return false
}

// addPages adds pages to the finding of a kind that the last one is, or makes one.
func (c *fsck) addPages(kind FindingKind, what string, lost LostPages) {
	if k := len(c.report.Findings) - 1; k >= 0 && c.report.Findings[k].Kind == kind && c.report.Findings[k].Ref == (torus.BlockRef{}) {
		x := c.report.Findings[k]
		x.Lost = addLost(x.Lost, lost)
		return
	}
	c.add(&Finding{Kind: kind, What: what, Lost: []LostPages{lost}})
}

// readNodes reads some nodes of a map at once, and calls fn for each that can be. The others are remembered, if they are still needed.
func (c *fsck) readNodes(tr *tree, ptrs []entry, firsts []uint64, covers uint64, fn func(k int, e *[fanout]entry)) (stale bool, err error) {
	got := make([][]byte, len(ptrs))
	errs := make([]error, len(ptrs))
	c.pace(len(ptrs) * pageSize)
	c.t.All(len(ptrs), func(k int, done func()) {
		c.startNode(ptrs[k], func(b []byte, err error) {
			got[k], errs[k] = b, err
			done()
		})
	})
	for k := range ptrs {
		ref := c.f.table.e[ptrs[k].slot()].ref
		if errs[k] != nil && c.badAt[badPlace{ref, ptrs[k].page()}] {
			continue
		}
		if errs[k] != nil { // perhaps a connection was lost
			c.t.Sleep(fsckRetry)
			got[k], errs[k] = c.node(ptrs[k])
		}
		if errs[k] == nil {
			c.report.Nodes++
			if tr.newest {
				c.done += pageSize
			}
			var e [fanout]entry
			decodeNode(got[k], &e)
			fn(k, &e)
			continue
		}
		was := c.f
		_, ok, err := c.still(ref)
		if err != nil {
			return false, err
		}
		moved := c.f != was
		if !ok || !tr.first && !c.kept(tr.number) {
			return true, nil
		}
		c.remember(badNode{
			kind: FindMap, ref: ref, pos: ptrs[k].page(), e: ptrs[k], err: errs[k], lost: LostPages{tr.of, firsts[k], covers},
			what: fmt.Sprintf("a node of the map of INode %d, at its page %d, cannot be read: %v", tr.number, ptrs[k].page(), errs[k]),
		})
		if moved && tr.first { // what else it points to may be gone as well
			return true, nil
		}
	}
	return false, nil
}

// badPlace is where a node that cannot be read is.
type badPlace struct {
	ref torus.BlockRef
	pos uint32
}

func (c *fsck) remember(x badNode) {
	c.badAt[badPlace{x.ref, x.pos}] = true
	if len(c.bad) < maxBadNodes {
		c.bad = append(c.bad, x)
	} else {
		c.report.More++
	}
}

func (c *fsck) node(e entry) (b []byte, err error) {
	c.t.Wait(func(wake func()) {
		c.startNode(e, func(got []byte, e error) {
			b, err = got, e
			wake()
		})
	})
	return b, err
}

// startNode reads a node of a map from whoever has it, and waits for nobody.
func (c *fsck) startNode(e entry, done func([]byte, error)) {
	b := make([]byte, nodeSize)
	x := &c.f.table.e[e.slot()]
	rd := c.cfg.Dist.NewRead()
	rd.Ref, rd.Off, rd.Data, rd.Set = x.ref, e.page()*pageSize, b, x.peers
	rd.Verify = func(rd *distributor.Read) bool { return record.Checksum(rd.Data)&0xffffff == e.crc() }
	rd.Done = func(rd *distributor.Read) {
		err := rd.Err
		rd.Release()
		done(b, err)
	}
	rd.Start()
}

// checkLive compares the live pages that the table counts with those that were found. It stands for nothing but how much space is in use and what is compacted,
// unless it is too low: then a block may be given up that is in use.
func (c *fsck) checkLive() {
	c.report.Counted = true
	for i := range c.f.table.e {
		e := &c.f.table.e[i]
		if !e.used {
			continue
		}
		have := uint32(0)
		if x := c.claims[i]; x != nil {
			have = x.live
		}
		if uint32(i) == c.f.meta.inodeSlot {
			have += uint32(c.f.meta.inodePages)
		}
		if have == e.live {
			continue
		}
		what := fmt.Sprintf("the block table counts %d live pages, and the map points to %d", e.live, have)
		if have > e.live {
			what += ": it may be deleted while it is in use"
		} else {
			what += ": it is kept for longer than it is of use"
		}
		c.add(&Finding{Kind: FindLive, Ref: e.ref, What: what})
	}
}

// checkLog verifies that the records behind the base of a moment are all there.
func (c *fsck) checkLog(m named) error {
	if m.at.Seq == m.at.Base.GetSeq() || !Kept(c.st.VolumeState, m.at) || !Settled(c.st.VolumeState, m.at) {
		return nil
	}
	for tries := 0; ; tries++ {
		found, err := c.f.readLog(c.t, c.f.logBehind(c.vol, m.at), m.at.Base.GetSeq(), m.at.Seq)
		if err == nil {
			for i := range found {
				c.claimRecord(&found[i])
			}
			return nil
		}
		if stopped := c.stopped(); stopped != nil {
			return stopped
		}
		if _, err := c.refresh(); err != nil {
			return err
		}
		if !Kept(c.st.VolumeState, m.at) {
			return nil
		}
		if tries >= copyTries {
			x := badNode{kind: FindLog, what: fmt.Sprintf("the log of %s cannot be read: %v", m.of, err), err: err, lost: LostPages{Of: m.of, Count: pagesOf(m.at.SizeBytes)}}
			for _, b := range c.f.logBehind(c.vol, m.at) {
				x.log = append(x.log, b.ref)
			}
			c.remember(x)
			return nil
		}
		c.t.Sleep(fsckRetry)
	}
}

// claimRecord claims what a record that is replayed holds.
func (c *fsck) claimRecord(r *foundRec) {
	pos, k := r.hdr.Offset/pageSize+1, uint32(0)
	for _, x := range r.hdr.Extents {
		if !x.Kind.HasPages() {
			continue
		}
		for page := x.Page; page < x.Page+uint64(x.Count); page++ {
			c.claim(r.blk.slot, pos+k, page, r.hdr.CRCs[k]&0xffffff)
			k++
		}
	}
}

// judgeBad says what is to be said of what could not be read, now that the copies of all blocks are known.
func (c *fsck) judgeBad(x *badNode) *Finding {
	if b := c.lost[x.ref]; b != nil && b.v.lost.has(int(x.pos)) {
		return nil // that block's finding says it
	}
	f := &Finding{Kind: x.kind, Ref: x.ref, What: x.what, Lost: []LostPages{x.lost}}
	if x.kind == FindLog {
		damaged := errors.Is(x.err, torus.ErrCorrupt)
		for _, ref := range x.log {
			damaged = damaged || c.lost[ref] != nil && c.lost[ref].finding.Kind == FindLost
		}
		if !damaged {
			f.Kind = FindUnknown
		}
		return f
	}
	slot, ok := c.f.table.byRef[x.ref]
	if !ok {
		return f
	}
	for _, p := range c.cfg.Dist.Candidates(x.ref, c.f.table.e[slot].peers) {
		if !c.cfg.Dist.Healthy(p) {
			f.Away = append(f.Away, p)
		}
	}
	if x.e != 0 {
		if err := c.readPage(c.f, x.e); err == nil {
			f.Kind, f.What, f.Lost = FindUnknown, x.what+"; now it can be: what it points to was not checked", nil
			return f
		}
	}
	if len(f.Away) > 0 || unavailable(x.err) {
		f.Kind = FindUnknown
	}
	return f
}

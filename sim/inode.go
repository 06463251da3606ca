package sim

import (
	"encoding/binary"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coreos/torus"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/record"
)

// committed reads what a volume's head says, from the disks of the peers and by the formats as they are drawn in docs/format
// rather than by the code of package file. Every page of every live block must be on every peer of its set (F1, D1).
type committed struct {
	c      *Cluster
	vol    *models.Volume
	inode  *models.INode
	blocks []listed
	// live is what the head or the map point to in each listed block, pages.
	live map[uint32]int
	// now: while the cluster is at work, from whichever peer answers at once.
	now bool
	// head is the INode to read; nil: the volume's newest.
	head *models.Head
}

// listed is an entry of the block table.
type listed struct {
	used   bool
	ref    torus.BlockRef
	live   int // pages
	length uint32
	set    torus.PeerList
	// birth and death are numbers of INodes.
	birth, death uint64
}

// readCommitted loads the INode and the block table of a volume's head; nil if nothing was ever committed.
func (c *Cluster) readCommitted(vol *models.Volume) (*committed, error) {
	x := &committed{c: c, vol: vol, inode: &models.INode{}, live: map[uint32]int{}}
	return x.load()
}

func (x *committed) load() (*committed, error) {
	c, vol := x.c, x.vol
	head := x.head
	if head == nil {
		head = c.MDS.Peek(torus.VolumeID(vol.Id)).GetHead()
	}
	if head == nil {
		return nil, nil
	}
	b, err := x.extent(head.Inode)
	if err != nil {
		return nil, fmt.Errorf("%w (INode %d)", err, head.Number)
	}
	if err := proto.Unmarshal(b, x.inode); err != nil {
		return nil, violated("C1", "INode %d: %w", head.Number, err)
	}
	if x.inode.Number != head.Number || x.inode.Seq != head.Seq {
		return nil, violated("C1", "INode %d up to record %d, its head says %d, %d", x.inode.Number, x.inode.Seq, head.Number, head.Seq)
	}
	for i, page := range x.inode.Table {
		if int(page.Set) >= len(x.inode.Sets) {
			return nil, violated("C1", "block table page %d names set %d of %d", i, page.Set, len(x.inode.Sets))
		}
		b, err := x.extent(&models.Extent{Epoch: page.Epoch, Index: page.Index, Offset: page.Page * 4096, Length: 4096, Crc32C: page.Crc32C, Set: x.inode.Sets[page.Set]})
		if err != nil {
			return nil, fmt.Errorf("%w (block table page %d)", err, i)
		}
		for ; len(b) >= 48; b = b[48:] {
			le := binary.LittleEndian
			e := listed{used: le.Uint16(b[30:]) == 1}
			if e.used {
				set := int(le.Uint16(b[28:]))
				if set >= len(x.inode.Sets) {
					return nil, violated("C1", "block table entry %d names set %d of %d", len(x.blocks), set, len(x.inode.Sets))
				}
				e.ref = torus.BlockRefFromBytes(b)
				e.live, e.length = int(le.Uint16(b[24:])), uint32(le.Uint16(b[26:]))
				e.birth, e.death = le.Uint64(b[32:]), le.Uint64(b[40:])
				e.set = c.placement(e.ref, x.inode.Sets[set])
			}
			x.blocks = append(x.blocks, e)
		}
	}
	return x, nil
}

// extent reads a run of bytes of an INode block, from every replica.
func (x *committed) extent(e *models.Extent) ([]byte, error) {
	ref := torus.BlockRef{Type: torus.TypeINode, Volume: torus.VolumeID(x.vol.Id), INode: torus.INodeID(e.Epoch), Index: torus.IndexID(e.Index)}
	return x.read(ref, e.Offset, int(e.Length), x.c.placement(ref, e.Set), func(b []byte) bool { return record.Checksum(b) == e.Crc32C })
}

// read returns the bytes of a block, which every healthy peer of its set must have, and have alike.
func (x *committed) read(ref torus.BlockRef, off uint32, n int, set torus.PeerList, good func([]byte) bool) (found []byte, err error) {
	if len(set) < x.c.opt.Replication {
		return nil, violated("F1", "%v has %d copies, not %d", ref, len(set), x.c.opt.Replication)
	}
	if x.now {
		for _, p := range x.c.Peers {
			if b, ok := p.peekNow(ref, off, n); ok && good(b) {
				return b, nil
			}
		}
		return nil, errStuck
	}
	if x.c.opt.Repair {
		set = x.c.home(ref, set) // by now everything is where it belongs
	}
	for _, id := range set {
		p := x.c.peerByID(id)
		if p == nil || p.Gone {
			continue
		}
		b, err := p.peek(ref, off, n)
		if err == nil && good(b) {
			found = b
			continue
		}
		if p.Rotten && !x.c.opt.Repair {
			continue
		}
		if err == nil {
			err = torus.ErrCorrupt
		}
		return nil, violated("D1", "%d bytes at %d of %v, which the head lists, at %s of %v: %w", n, off, ref, p.Name, set, err)
	}
	if found == nil {
		return nil, violated("D1", "%d bytes at %d of %v, which the head lists, are nowhere", n, off, ref)
	}
	return found, nil
}

// peek reads from a peer's disk. The peer must be up.
func (p *Peer) peek(ref torus.BlockRef, off uint32, n int) ([]byte, error) {
	q := p.ask(&torus.Request{Op: torus.OpRead, Ref: ref, Off: off, Data: make([]byte, n)})
	return q.Data, q.Err
}

// peekNow is peek without waiting; false if that cannot be.
func (p *Peer) peekNow(ref torus.BlockRef, off uint32, n int) ([]byte, bool) {
	if !p.Up || p.fault != nil {
		return nil, false
	}
	ok := false
	q := &torus.Request{Op: torus.OpRead, Ref: ref, Off: off, Data: make([]byte, n), Done: func(q *torus.Request) { ok = q.Err == nil }}
	p.FS.SetColdReads(0)
	p.Store.Submit(q)
	p.FS.SetColdReads(0.1)
	return q.Data, ok
}

// list returns the tails of a volume's blocks, or of all. The peer must be up.
func (p *Peer) list(volume torus.VolumeID) []torus.Tail {
	return p.ask(&torus.Request{Op: torus.OpList, Ref: torus.BlockRef{Volume: volume}, Len: 1 << 16}).Tails
}

// ask asks a peer's store, beside everything else, and waits.
func (p *Peer) ask(q *torus.Request) *torus.Request {
	p.FS.SetColdReads(0)
	defer p.FS.SetColdReads(0.1)
	done := false
	q.Done = func(*torus.Request) { done = true }
	p.Store.Submit(q)
	if !done && !p.c.V.Run(func() bool { return done }, time.Minute) {
		q.Err = errStuck
	}
	return q
}

// entry is a map entry.
type entry uint64

func (e entry) kind() int    { return int(e>>24) & 3 }
func (e entry) slot() uint32 { return uint32(e >> 40) }

// page reads the page that an entry points to.
func (x *committed) page(e entry) ([]byte, error) {
	if int(e.slot()) >= len(x.blocks) || !x.blocks[e.slot()].used {
		return nil, violated("C1", "a map entry points to block %d, which is not listed", e.slot())
	}
	b := &x.blocks[e.slot()]
	page := uint32(e>>26) & 0x3fff
	if page >= b.length {
		return nil, violated("C1", "a map entry points to page %d of %v, which has %d", page, b.ref, b.length)
	}
	x.live[e.slot()]++
	return x.read(b.ref, page*PageSize, PageSize, b.set, func(b []byte) bool { return record.Checksum(b)&0xffffff == uint32(e&0xffffff) })
}

// each calls fn with the contents of every page of the volume that is mapped to data.
func (x *committed) each(fn func(page uint64, b []byte) error) error {
	var walk func(e entry, page, under uint64) error
	walk = func(e entry, page, under uint64) error {
		if e.kind() != 1 {
			return nil
		}
		b, err := x.page(e)
		if err != nil {
			return fmt.Errorf("%w (map of pages %d to %d)", err, page, page+under-1)
		}
		if under == 1 {
			return fn(page, b)
		}
		under /= 512
		for i := range uint64(512) {
			if err := walk(entry(binary.LittleEndian.Uint64(b[8*i:])), page+i*under, under); err != nil {
				return err
			}
		}
		return nil
	}
	for i, e := range x.inode.Top {
		if err := walk(entry(e), uint64(i)*512*512, 512*512); err != nil {
			return err
		}
	}
	return nil
}

// compare checks that the map is the model: what the head maps is what the history ends with. It also counts again what lives in each block.
func (x *committed) compare(h *History, pages, stride uint64) error {
	img := map[uint64][]byte{}
	if err := x.each(func(page uint64, b []byte) error {
		if page%stride != 0 || page/stride >= pages {
			return violated("C1", "page %d is mapped and was never written", page)
		}
		img[page/stride] = b
		return nil
	}); err != nil {
		return err
	}
	zero := make([]byte, PageSize)
	if _, err := h.Check(func(p uint64) ([]byte, error) {
		if b := img[p]; b != nil {
			return b, nil
		}
		return zero, nil
	}, h.Acked()); err != nil {
		return err
	}
	if err := x.countRoots(); err != nil {
		return err
	}
	for i, b := range x.blocks {
		if err := x.copies(&b); err != nil {
			return err
		}
		if b.used && b.live > 0 && b.death != 0 {
			return violated("C1", "block %v is listed as dead since INode %d, with %d live pages", b.ref, b.death, b.live)
		}
		if b.used && b.live != x.live[uint32(i)] {
			return violated("C1", "block %v is listed with %d live pages, and has %d", b.ref, b.live, x.live[uint32(i)])
		}
	}
	return x.pinned()
}

// countRoots counts the pages of the table and the INode's own as alive.
func (x *committed) countRoots() error {
	slots := map[torus.BlockRef]uint32{}
	for i, b := range x.blocks {
		slots[b.ref] = uint32(i)
	}
	head := x.c.MDS.Peek(torus.VolumeID(x.vol.Id)).GetHead()
	root := func(epoch, index uint64) torus.BlockRef {
		return torus.BlockRef{Type: torus.TypeINode, Volume: torus.VolumeID(x.vol.Id), INode: torus.INodeID(epoch), Index: torus.IndexID(index)}
	}
	for _, p := range x.inode.Table {
		x.live[slots[root(p.Epoch, p.Index)]]++
	}
	// The INode is in a record by itself.
	e := head.Inode
	ref := root(e.Epoch, e.Index)
	var h record.Header
	if _, err := x.read(ref, e.Offset-PageSize, PageSize, x.c.placement(ref, e.Set), func(b []byte) bool { return h.Decode(b) == nil }); err != nil {
		return err
	}
	x.live[slots[ref]] += h.Pages()
	return nil
}

// pinned checks that all that pinned INodes refer to is listed for as long as they need it, and stored in full.
func (x *committed) pinned() error {
	listed := map[torus.BlockRef]*listed{}
	for i := range x.blocks {
		if b := &x.blocks[i]; b.used {
			listed[b.ref] = b
		}
	}
	id := torus.VolumeID(x.vol.Id)
	for _, pin := range x.c.MDS.Peek(id).GetPins() {
		base := pin.At.GetBase()
		if base == nil {
			continue
		}
		for ref := range x.c.Witness.read(id, base).lists {
			b := listed[ref]
			if b == nil || b.birth > base.Number || b.death != 0 && b.death <= base.Number {
				return violated("D3", "INode %d, which is pinned, refers to %v, which INode %d lists as %+v", base.Number, ref, x.inode.Number, b)
			}
			if err := x.replicated(b); err != nil {
				return err
			}
		}
	}
	return nil
}

// copies checks that every peer that is to hold a listed block has all of it, what is dead included: else it would count as short for ever.
func (x *committed) copies(b *listed) error {
	if !b.used || b.live == 0 {
		return nil
	}
	return x.replicated(b)
}

func (x *committed) replicated(b *listed) error {
	set := b.set
	if x.c.opt.Repair {
		set = x.c.home(b.ref, set)
	}
	for _, id := range set {
		p := x.c.peerByID(id)
		if p.Gone || p.Rotten || !p.Up {
			continue
		}
		if t, known := p.tail(b.ref); known && t.Length < b.length*PageSize {
			return violated("F1", "%v is listed with %d bytes, and %s has %d", b.ref, b.length*PageSize, p.Name, t.Length)
		}
	}
	return nil
}

// list adds the blocks of the volume to a set.
func (x *committed) list(known map[torus.BlockRef]bool) {
	for _, b := range x.blocks {
		if b.used {
			known[b.ref] = true
		}
	}
}

// leaked counts the blocks of the volume that a peer stores and the head does not list.
func (x *committed) leaked(known map[torus.BlockRef]bool) (n int) {
	for _, p := range x.c.Peers {
		if !p.Up {
			continue
		}
		for _, t := range p.list(torus.VolumeID(x.vol.Id)) {
			if !known[t.Ref] {
				n++
			}
		}
	}
	return n
}

// CheckBytes reads every block of every peer and compares it, record by record, with what was accepted for that place, or is being appended there (D2). Blocks that
// are not listed may have lost, with power, what was never synced.
func (w *Witness) CheckBytes(listed map[torus.BlockRef]bool) error {
	for _, p := range w.c.Peers {
		if !p.Up || p.Gone || p.Rotten { // what nobody lists is not repaired
			continue
		}
		for _, t := range p.list(0) {
			if p.powers > 0 && !listed[t.Ref] {
				continue
			}
			b, err := p.peek(t.Ref, 0, int(t.Length))
			if err != nil {
				return violated("D2", "%s cannot read the %d bytes it has of %v: %w", p.Name, t.Length, t.Ref, err)
			}
			for off := uint32(0); off < t.Length; {
				n, err := record.Check(t.Ref, off, b[off:], &w.hdr)
				s := w.find(t.Ref, off)
				known := err == nil && (s != nil && s.sum == headerSum(b[off:]) || s == nil && w.offered[offer{t.Ref, off, headerSum(b[off:])}])
				if !known {
					return violated("D2", "%s has at %d of %v not what was accepted there: %v", p.Name, off, t.Ref, err)
				}
				off += uint32(n)
			}
		}
	}
	return nil
}

package file

import (
	"fmt"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/record"
	"google.golang.org/protobuf/proto"
)

// Reading an INode back: everything that names a place is checked before anybody goes there, since a checksum
// only says that these are the bytes that were written.

// loadInode reads an INode of volume vol, and the block table: that of the newest one lists all there is.
func (f *File) loadInode(t *loop.Task, vol torus.VolumeID, h *models.Head) error {
	n, err := f.readInode(t, vol, h)
	if err != nil {
		return err
	}
	if err := f.table.read(t, f, vol, n); err != nil {
		return err
	}
	for i := range f.table.e {
		if !f.table.e[i].used {
			f.table.reuse(uint32(i))
		}
	}
	for _, s := range f.table.adoptSets() {
		if err := f.dist.NeedRing(t, s.RingVersion); err != nil {
			return again(err)
		}
	}
	if err := f.resolve(); err != nil {
		return err
	}
	if err := f.adoptTop(n); err != nil {
		return err
	}
	f.number, f.table.next = h.Number, h.Number+1
	f.history, f.marks = n.History, n.Marks
	f.appliedStamp, f.lastStamp = h.TimeUs, h.TimeUs
	ref := extentRef(vol, h.Inode)
	slot, ok := f.table.byRef[ref]
	if !ok {
		return fmt.Errorf("INode %d does not list its own block: %w", h.Number, torus.ErrCorrupt)
	}
	// Its pages were counted when it was written, padding included; the record says how many.
	f.meta.inodeSlot = slot
	f.meta.inodePages, err = f.inodePages(t, ref, h.Inode)
	return err
}

// readInode reads an INode by itself.
func (f *File) readInode(t *loop.Task, vol torus.VolumeID, h *models.Head) (*models.INode, error) {
	if err := checkExtent(h.Inode, f.cfg.BlockSize); err != nil || h.Inode.Offset < record.HeaderSize {
		return nil, fmt.Errorf("head %d names no INode (%v): %w", h.Number, err, torus.ErrCorrupt)
	}
	b, err := f.readExtent(t, vol, h.Inode)
	if err != nil {
		return nil, fmt.Errorf("INode %d: %w", h.Number, err)
	}
	n, err := parseINode(b, f.cfg.BlockSize)
	if err != nil || n.Volume != uint64(vol) || n.Number != h.Number {
		return nil, fmt.Errorf("INode %d of volume %d is not what its head says (%v): %w", h.Number, vol, err, torus.ErrCorrupt)
	}
	return n, nil
}

// read reads the pages of the table that an INode names.
func (tab *table) read(t *loop.Task, f *File, vol torus.VolumeID, n *models.INode) error {
	for _, x := range n.Table {
		if err := f.dist.NeedRing(t, n.Sets[x.Set].RingVersion); err != nil {
			return again(err)
		}
	}
	tab.sets, tab.pages, tab.dirty = n.Sets, n.Table, make([]bool, len(n.Table))
	pages := make([][]byte, len(n.Table))
	var failed error
	const atOnce = 64
	for i := 0; i < len(pages); i += atOnce {
		t.All(min(atOnce, len(pages)-i), func(k int, done func()) {
			f.startExtent(vol, pageExtent(n, n.Table[i+k]), func(b []byte, err error) {
				pages[i+k] = b
				if err != nil {
					failed = fmt.Errorf("block table page %d: %w", i+k, err)
				}
				done()
			})
		})
		if failed != nil {
			return failed
		}
	}
	for i, b := range pages {
		if err := tab.decodePage(i, b); err != nil {
			return err
		}
	}
	return nil
}

// adoptTop makes the map that of an INode whose blocks the table lists.
func (f *File) adoptTop(n *models.INode) error {
	for i, x := range n.Top {
		e := entry(x)
		if err := f.table.check(e, torus.TypeINode); err != nil {
			return fmt.Errorf("INode %d, map entry %d: %w", n.Number, i, err)
		}
		if i < len(f.m.top) {
			f.m.top[i].ptr = e
		}
	}
	return nil
}

// pageExtent says where a page of an INode's table is.
func pageExtent(n *models.INode, x *models.TablePage) *models.Extent {
	return &models.Extent{Epoch: x.Epoch, Index: x.Index, Offset: x.Page * pageSize, Length: pageSize, Crc32C: x.Crc32C, Set: n.Sets[x.Set]}
}

// pageRef is the block that a page of the table of a volume is in.
func pageRef(vol torus.VolumeID, x *models.TablePage) torus.BlockRef {
	return torus.BlockRef{Type: torus.TypeINode, Volume: vol, INode: torus.INodeID(x.Epoch), Index: torus.IndexID(x.Index)}
}

func extentRef(vol torus.VolumeID, x *models.Extent) torus.BlockRef {
	return torus.BlockRef{Type: torus.TypeINode, Volume: vol, INode: torus.INodeID(x.Epoch), Index: torus.IndexID(x.Index)}
}

// parseINode decodes an INode and checks that what it names can be.
func parseINode(b []byte, blockSize uint32) (*models.INode, error) {
	n := &models.INode{}
	if err := proto.Unmarshal(b, n); err != nil {
		return nil, fmt.Errorf("%v: %w", err, torus.ErrCorrupt)
	}
	if n.Format != 1 {
		return nil, fmt.Errorf("format %d, not 1: %w", n.Format, torus.ErrCorrupt)
	}
	if len(n.Table) > maxTable/tablePageSlots {
		return nil, fmt.Errorf("a block table of %d pages: %w", len(n.Table), torus.ErrCorrupt)
	}
	for i, x := range n.Table {
		if x == nil || x.Page >= blockSize/pageSize || int(x.Set) >= len(n.Sets) {
			return nil, fmt.Errorf("block table page %d cannot be where it is said to be (%v): %w", i, x, torus.ErrCorrupt)
		}
	}
	for i, s := range n.Sets {
		if err := checkSet(s); err != nil {
			return nil, fmt.Errorf("placement set %d: %w", i, err)
		}
	}
	return n, nil
}

func checkExtent(x *models.Extent, blockSize uint32) error {
	switch {
	case x == nil:
		return fmt.Errorf("no extent: %w", torus.ErrCorrupt)
	case x.Length == 0 || uint64(x.Offset)+uint64(x.Length) > uint64(blockSize):
		return fmt.Errorf("extent of %d bytes at %d of a block of %d: %w", x.Length, x.Offset, blockSize, torus.ErrCorrupt)
	}
	return checkSet(x.Set)
}

func checkSet(s *models.PlacementSet) error {
	if s == nil || len(s.Peers) == 0 && s.Replication == 0 {
		return fmt.Errorf("a placement set that names no peers: %w", torus.ErrCorrupt)
	}
	for _, p := range s.Peers {
		if len(p) != len(torus.PeerID{}) {
			return fmt.Errorf("a peer's id of %d bytes: %w", len(p), torus.ErrCorrupt)
		}
	}
	return nil
}

// check says whether an entry of the map, if it points anywhere, points to a page of a listed block of that type.
func (t *table) check(e entry, typ torus.BlockType) error {
	switch e.kind() {
	case entryHole, entryZero, entryLost:
		return nil
	case entryData:
		if s := e.slot(); int(s) < len(t.e) && t.e[s].used && (t.e[s].ref.Type == torus.TypeINode) == (typ == torus.TypeINode) {
			return nil
		}
	}
	return fmt.Errorf("the map points to what is not in the block table (%v): %w", e, torus.ErrCorrupt)
}

// checkNode does so for all entries of a node just read; leaf: they point to data, else to nodes.
func (f *File) checkNode(e *[fanout]entry, leaf bool) error {
	typ := torus.TypeINode
	if leaf {
		typ = torus.TypeBlock
	}
	for _, x := range e {
		if err := f.table.check(x, typ); err != nil {
			return err
		}
	}
	return nil
}

// inodePages is how many pages the record of an INode takes.
func (f *File) inodePages(t *loop.Task, ref torus.BlockRef, x *models.Extent) (int, error) {
	b := make([]byte, record.HeaderSize)
	var h record.Header
	var err error
	t.Wait(func(wake func()) {
		rd := f.dist.NewRead()
		rd.Ref, rd.Off, rd.Data, rd.Set, rd.Wait, rd.Until = ref, x.Offset-record.HeaderSize, b, f.dist.Set(ref, x.Set), true, f.errFn
		rd.Epoch = f.epochFor(ref)
		rd.Verify = func(rd *read) bool { return h.Decode(rd.Data) == nil }
		rd.Done = func(rd *read) {
			err = rd.Err
			rd.Release()
			wake()
		}
		rd.Start()
	})
	if err != nil {
		return 0, fmt.Errorf("header of the INode's record: %w", err)
	}
	return h.Pages(), nil
}

// epochFor is what a read of metadata says who reads, so that one that waits for a peer, of blocks that are gone from all others, ends when a newer attach
// has taken over. Fences are a volume's own.
func (f *File) epochFor(ref torus.BlockRef) uint64 {
	if ref.Volume != f.vol {
		return 0
	}
	return f.epoch
}

// readExtent reads a run of bytes that is found without a map.
func (f *File) readExtent(t *loop.Task, vol torus.VolumeID, x *models.Extent) (b []byte, err error) {
	if err := f.dist.NeedRing(t, x.Set.RingVersion); err != nil {
		return nil, again(err)
	}
	t.Wait(func(wake func()) {
		f.startExtent(vol, x, func(got []byte, e error) {
			b, err = got, e
			wake()
		})
	})
	return b, err
}

func (f *File) startExtent(vol torus.VolumeID, x *models.Extent, done func([]byte, error)) {
	rd := f.dist.NewRead()
	rd.Ref = extentRef(vol, x)
	rd.Off, rd.Data, rd.Set, rd.Wait, rd.Until = x.Offset, make([]byte, x.Length), f.dist.Set(rd.Ref, x.Set), true, f.errFn
	rd.Epoch = f.epochFor(rd.Ref)
	b := rd.Data
	rd.Verify = func(rd *read) bool { return record.Checksum(rd.Data) == x.Crc32C }
	rd.Done = func(rd *read) {
		err := rd.Err
		rd.Release()
		done(b, err)
	}
	rd.Start()
}

package sim

import (
	"encoding/binary"
	"fmt"
	"maps"
	"slices"

	"github.com/coreos/torus"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/place"
	"github.com/coreos/torus/record"
)

// Witness stands between the connections and the stores of all peers and remembers, of every record that any peer has
// accepted, where it is and what it is. Against that are checked:
//
//   - D2: at one place of one block there is never but one record, on any replica, at any time.
//   - F1: when a write is acknowledged every peer of the registered set of one block holds it.
//   - W1: nothing is appended to a block of the log that is not registered.
//   - D1: when a flush is acknowledged, or a head committed, the whole set of some block has made durable each record that it covers; and as long as
//     neither is, the window has each acknowledged record in a block that counts.
//   - D1: what a head lists of moved pages and of its own is durable when it is committed.
//   - D3: no block is to be deleted that a head, a pin or the rewinding of a volume needs, its own or that of a clone.
//   - P1: blocks are on the peers where the ring, as anybody can read it, puts them.
type Witness struct {
	c    *Cluster
	recs map[torus.BlockRef][]*sighting
	page map[pageKey][]pageSighting
	seqs map[seqKey][]*sighting
	// synced is how much of a block each peer has said to be durable, by its index.
	synced map[torus.BlockRef]*[maxPeers]uint32
	acked  map[torus.VolumeID]ackedUpTo
	states map[torus.VolumeID]*models.VolumeState       // as last seen
	heads  map[torus.VolumeID]map[uint64]*committedHead // all that were ever committed, by number
	gone   map[torus.BlockRef]bool                      // some peer was asked to delete them
	// offered are the records that some peer was asked to append, answered or not: one whose disk hangs has them, and has not answered yet.
	offered map[offer]bool
	hdr     record.Header
	fail    func(error)
}

// maxPeers is how many peers a cluster may have in all.
const maxPeers = 32

type offer struct {
	ref torus.BlockRef
	off uint32
	sum uint32
}

type seqKey struct {
	volume torus.VolumeID
	seq    uint64
}

// ackedUpTo is the highest record of an epoch of which a write has been acknowledged.
type ackedUpTo struct{ epoch, seq uint64 }

// sighting is a record that was accepted.
type sighting struct {
	ref          torus.BlockRef
	off, end     uint32
	seq, flushed uint64
	sum          uint32           // of its header, which has those of its pages
	by           uint32           // one bit a peer that has accepted it
	powers       [maxPeers]uint16 // how often each had lost power by then
}

type pageKey struct {
	volume torus.VolumeID
	page   uint64
}

type pageSighting struct {
	crc uint32
	rec *sighting
}

func newWitness(c *Cluster) *Witness {
	return &Witness{
		c: c, recs: map[torus.BlockRef][]*sighting{}, page: map[pageKey][]pageSighting{}, seqs: map[seqKey][]*sighting{},
		synced: map[torus.BlockRef]*[maxPeers]uint32{}, acked: map[torus.VolumeID]ackedUpTo{}, states: map[torus.VolumeID]*models.VolumeState{},
		heads: map[torus.VolumeID]map[uint64]*committedHead{}, gone: map[torus.BlockRef]bool{}, offered: map[offer]bool{},
		fail: func(error) {},
	}
}

// watched is a peer's service under the eyes of the witness.
type watched struct {
	w *Witness
	p *Peer
	place.Store
}

// Submit implements torus.BlockStore.
func (s *watched) Submit(r *torus.Request) {
	switch r.Op {
	case torus.OpDelete:
		s.w.deleting(s.p, r.Ref)
	case torus.OpAppend, torus.OpSync, torus.OpSeal, torus.OpPut:
		if r.Op == torus.OpAppend {
			s.w.offer(r)
		}
		done := r.Done
		r.Done = func(r *torus.Request) {
			r.Done = done
			if r.Err == nil {
				s.w.answered(s.p, r)
			}
			done(r)
		}
	}
	s.Store.Submit(r)
}

// answered takes a success of a peer.
func (w *Witness) answered(p *Peer, r *torus.Request) {
	durable := r.Len
	switch r.Op {
	case torus.OpAppend:
		w.placed(p, r.Ref)
		w.accepted(p, r)
		return
	case torus.OpPut:
		w.accepted(p, r)
		durable = uint32(len(r.Data))
	}
	l := w.synced[r.Ref]
	if l == nil {
		l = new([maxPeers]uint32)
		w.synced[r.Ref] = l
	}
	l[p.index] = max(l[p.index], durable)
}

// committedHead is an INode that was the newest of its volume at some time, and which blocks it refers to, itself among them; nil as long as nobody could read it.
type committedHead struct {
	h     *models.Head
	lists map[torus.BlockRef]bool
	roots map[torus.BlockRef]bool // the INode itself and its table
}

// read reads what an INode refers to.
func (w *Witness) read(volume torus.VolumeID, h *models.Head) *committedHead {
	of := w.heads[volume]
	if of == nil {
		of = map[uint64]*committedHead{}
		w.heads[volume] = of
	}
	x := of[h.Number]
	if x == nil {
		x = &committedHead{h: h}
		of[h.Number] = x
	}
	if x.lists != nil {
		return x
	}
	t := &committed{c: w.c, vol: &models.Volume{Id: uint64(volume)}, inode: &models.INode{}, now: true, head: h}
	if _, err := t.load(); err != nil {
		return x // nobody can say at this moment
	}
	x.lists, x.roots = map[torus.BlockRef]bool{}, map[torus.BlockRef]bool{}
	root := func(epoch, index uint64) {
		ref := torus.BlockRef{Type: torus.TypeINode, Volume: volume, INode: torus.INodeID(epoch), Index: torus.IndexID(index)}
		x.lists[ref], x.roots[ref] = true, true
	}
	root(h.Inode.Epoch, h.Inode.Index)
	for _, e := range t.inode.Table {
		root(e.Epoch, e.Index)
	}
	for _, b := range t.blocks {
		if b.used && b.live > 0 {
			x.lists[b.ref] = true
			if b.ref.Type != torus.TypeBlock && uint64(b.ref.INode) == h.Epoch && b.ref.Volume == volume && !w.stored(&b) {
				w.fail(violated("D1", "INode %d of volume %d refers to %v, of which %d bytes are not durable in %d copies", h.Number, volume, b.ref, b.length*PageSize, w.c.opt.Replication))
			}
		}
	}
	return x
}

// stored reports whether enough peers have said that all of a listed block is durable.
func (w *Witness) stored(b *listed) bool {
	synced := w.synced[b.ref]
	if synced == nil {
		return false
	}
	n := 0
	for _, l := range synced {
		if l >= b.length*PageSize {
			n++
		}
	}
	return n >= w.c.opt.Replication
}

// deleting takes a request to delete: nothing may need the block, as far as anybody can find out without the arithmetic of births and deaths, from the
// INodes that pins name and the records behind them.
func (w *Witness) deleting(p *Peer, ref torus.BlockRef) {
	w.gone[ref] = true
	for _, volume := range slices.Sorted(maps.Keys(w.states)) {
		st := w.c.MDS.Peek(volume)
		if st == nil {
			continue // deleted
		}
		if why := w.needs(volume, st, ref); why != "" {
			w.fail(violated("D3", "%s is asked to delete %v, which %s of volume %d needs", p.Name, ref, why, volume))
		}
	}
}

// needs says what of a volume needs a block; "": nothing.
func (w *Witness) needs(volume torus.VolumeID, st *models.VolumeState, ref torus.BlockRef) string {
	if h := st.Head; h != nil {
		x := w.read(volume, h)
		if st.Deleted && x.roots[ref] || !st.Deleted && x.lists[ref] {
			return fmt.Sprintf("INode %d, the head", h.Number)
		}
	}
	for _, pin := range st.Pins {
		base := pin.At.GetBase()
		if base != nil && w.read(volume, base).lists[ref] {
			return fmt.Sprintf("INode %d, which is pinned (%s, clone %d),", base.Number, pin.Name, pin.Clone)
		}
		if seq := w.onlyCopy(volume, ref, base.GetSeq(), pin.At.Seq); seq > 0 {
			return fmt.Sprintf("a moment behind INode %d, for record %d,", base.GetNumber(), seq)
		}
	}
	if st.KeptFrom == 0 || st.Deleted || st.Head == nil {
		return ""
	}
	for number, x := range w.heads[volume] {
		if number >= st.KeptFrom && x.lists[ref] {
			return fmt.Sprintf("INode %d, which is kept since it is not older than %d,", number, st.KeptFrom)
		}
	}
	if x := w.heads[volume][st.KeptFrom]; x != nil {
		if seq := w.onlyCopy(volume, ref, x.h.Seq, st.Head.Seq); seq > 0 {
			return fmt.Sprintf("rewinding to INode %d or later, for record %d,", st.KeptFrom, seq)
		}
	}
	return ""
}

// onlyCopy returns a record after seq first, up to last, that a block has, and no other block that is stored has whole.
func (w *Witness) onlyCopy(volume torus.VolumeID, ref torus.BlockRef, first, last uint64) uint64 {
	if ref.Type != torus.TypeBlock || ref.Volume != volume {
		return 0
	}
	for _, s := range w.recs[ref] {
		if s.seq > first && s.seq <= last && !slices.ContainsFunc(w.seqs[seqKey{volume, s.seq}], func(x *sighting) bool {
			return x.ref != ref && !w.gone[x.ref] && w.durable(x, nil)
		}) {
			return s.seq
		}
	}
	return 0
}

func (w *Witness) find(ref torus.BlockRef, off uint32) *sighting {
	l := w.recs[ref]
	i, ok := slices.BinarySearchFunc(l, off, func(s *sighting, off uint32) int { return int(s.off) - int(off) })
	if !ok {
		return nil
	}
	return l[i]
}

// accepted notes the records of an append.
func (w *Witness) accepted(p *Peer, r *torus.Request) {
	for at := 0; at < len(r.Data); {
		h := &w.hdr
		if err := h.Decode(r.Data[at:]); err != nil {
			w.fail(violated("D2", "%s accepted an append to %v at %d that is no record: %w", p.Name, r.Ref, r.Off+uint32(at), err))
			return
		}
		off := r.Off + uint32(at)
		sum := headerSum(r.Data[at:])
		s := w.find(r.Ref, off)
		switch {
		case s == nil:
			s = &sighting{ref: r.Ref, off: off, end: off + uint32(h.Size()), seq: h.Seq, flushed: h.Flushed, sum: sum}
			w.insert(s, h)
		case s.sum != sum:
			w.fail(violated("D2", "%s accepted another record at %d of %v than was accepted there before (sequence %d, %d)", p.Name, off, r.Ref, h.Seq, s.seq))
		}
		s.by |= 1 << p.index
		s.powers[p.index] = p.powers
		at += h.Size()
	}
}

// offer notes the records of an append that has been asked for.
func (w *Witness) offer(r *torus.Request) {
	for at := 0; at < len(r.Data) && w.hdr.Decode(r.Data[at:]) == nil; at += w.hdr.Size() {
		w.offered[offer{r.Ref, r.Off + uint32(at), headerSum(r.Data[at:])}] = true
	}
}

func headerSum(header []byte) uint32 { return binary.LittleEndian.Uint32(header[12:]) }

func (w *Witness) insert(s *sighting, h *record.Header) {
	l := w.recs[s.ref]
	i, _ := slices.BinarySearchFunc(l, s.off, func(x *sighting, off uint32) int { return int(x.off) - int(off) })
	if i > 0 && l[i-1].end > s.off || i < len(l) && l[i].off < s.end {
		w.fail(violated("D2", "two records of %v overlap at %d", s.ref, s.off))
	}
	w.recs[s.ref] = slices.Insert(l, i, s)
	if s.ref.Type != torus.TypeBlock {
		return
	}
	w.seqs[seqKey{s.ref.Volume, s.seq}] = append(w.seqs[seqKey{s.ref.Volume, s.seq}], s)
	k := 0
	for _, x := range h.Extents {
		if !x.Kind.HasPages() {
			continue
		}
		for i := range uint64(x.Count) {
			key := pageKey{s.ref.Volume, x.Page + i}
			w.page[key] = append(w.page[key], pageSighting{h.CRCs[k], s})
			k++
		}
	}
}

// registered returns the set of a block of the window, nil if it is not in it.
func (w *Witness) registered(st *models.VolumeState, ref torus.BlockRef) (set torus.PeerList, beyond bool) {
	if st == nil || st.Open == nil || st.Open.Epoch != uint64(ref.INode) || ref.Type != torus.TypeBlock {
		return nil, false
	}
	for _, s := range st.Open.Spans {
		if i := uint64(ref.Index); i >= s.Lo && i < s.Hi {
			if o := s.Overrides[i]; o != nil {
				return w.c.placement(ref, o), false
			}
			return w.c.placement(ref, &models.PlacementSet{RingVersion: s.RingVersion, Replication: s.Replication}), false
		}
	}
	n := len(st.Open.Spans)
	return nil, n > 0 && uint64(ref.Index) >= st.Open.Spans[n-1].Hi
}

// placed checks that a block belongs where it is appended to.
func (w *Witness) placed(p *Peer, ref torus.BlockRef) {
	set, beyond := w.registered(w.c.MDS.Peek(ref.Volume), ref)
	switch {
	case beyond:
		w.fail(violated("W1", "an append to %v, which is not registered", ref))
	case set != nil && !slices.Contains(set, p.ID):
		w.fail(violated("P1", "%s accepted an append to %v, whose registered set is %v", p.Name, ref, set))
	}
}

// Acked checks that a page of a write just acknowledged by epoch is held by the whole registered set of one block.
func (w *Witness) Acked(volume torus.VolumeID, epoch, page uint64, b []byte) error {
	crc := record.Checksum(b)
	st := w.c.MDS.Peek(volume)
	l := w.page[pageKey{volume, page}]
	best, want := 0, 0
	seen := ""
	for i := len(l) - 1; i >= 0; i-- {
		s := l[i].rec
		if l[i].crc != crc || uint64(s.ref.INode) != epoch {
			continue
		}
		set, _ := w.registered(st, s.ref)
		if set == nil && st != nil && st.Open != nil && st.Open.Epoch == epoch {
			continue // below lo: it counts for nothing
		}
		if set == nil && st != nil && st.Epoch > epoch {
			return nil // its window is gone: the attach that follows decides (L1)
		}
		n := 0
		seen += fmt.Sprintf("; record %d at %d of %v", s.seq, s.off, s.ref)
		for _, id := range set {
			p := w.c.peerByID(id)
			switch {
			case p == nil || s.by&(1<<p.index) == 0:
				seen += ", not accepted by " + p.Name
			case !w.holds(p, s):
				seen += ", not held by " + p.Name
			default:
				n++
			}
		}
		if n == len(set) && n > 0 {
			w.acked[volume] = ackedUpTo{epoch, max(s.seq, w.upTo(volume, epoch))}
			return nil
		}
		best, want = max(best, n), len(set)
	}
	return violated("F1", "a write of page %d was acknowledged by epoch %d with %d of %d copies in a block of its window%s", page, epoch, best, want, seen)
}

// holds reports whether a peer has a record that it accepted; one that has lost power since, or rots, is believed.
func (w *Witness) holds(p *Peer, s *sighting) bool {
	if !p.Up || p.Rotten || p.powers != s.powers[p.index] || p.Store.Stats().Failed {
		return true
	}
	t, known := p.tail(s.ref)
	return !known || t.Length >= s.end
}

// upTo is the highest record of epoch that is known to be acknowledged.
func (w *Witness) upTo(volume torus.VolumeID, epoch uint64) uint64 {
	if a := w.acked[volume]; a.epoch == epoch {
		return a.seq
	}
	return 0
}

// whole reports whether every peer of a set, or as many as there must be if that is not known, has a record.
func (w *Witness) whole(s *sighting, set torus.PeerList) bool {
	return w.held(s, set, func(p *Peer) bool { return s.by&(1<<p.index) != 0 })
}

// durable is whole, and each has said that it is durable.
func (w *Witness) durable(s *sighting, set torus.PeerList) bool {
	l := w.synced[s.ref]
	return l != nil && w.held(s, set, func(p *Peer) bool { return l[p.index] >= s.end })
}

// promised is durable at peers that have promised to obey none older than epoch, if the record was found in an older one's block (model rule 6).
func (w *Witness) promised(s *sighting, epoch uint64) bool {
	l := w.synced[s.ref]
	return l != nil && w.held(s, nil, func(p *Peer) bool {
		return l[p.index] >= s.end && (uint64(s.ref.INode) >= epoch || !p.Up || p.Service.Fence(s.ref.Volume) >= epoch)
	})
}

func (w *Witness) held(s *sighting, set torus.PeerList, has func(*Peer) bool) bool {
	n := 0
	for _, p := range w.c.Peers {
		if (set == nil || slices.Contains(set, p.ID)) && has(p) {
			n++
		}
	}
	return n >= w.c.opt.Replication && n >= len(set)
}

// Flushed checks that all records up to seq, which epoch had acknowledged when a flush began, are durable.
func (w *Witness) Flushed(volume torus.VolumeID, epoch, seq uint64) error {
	st := w.c.MDS.Peek(volume)
	if st.GetOpen().GetEpoch() != epoch {
		return nil // its window is gone
	}
	for n := st.GetHead().GetSeq() + 1; n <= seq; n++ {
		if !slices.ContainsFunc(w.seqs[seqKey{volume, n}], func(s *sighting) bool {
			set, _ := w.registered(st, s.ref)
			return set != nil && w.durable(s, set)
		}) {
			return violated("D1", "epoch %d acknowledged a flush, and record %d is not durable on the whole set of any block", epoch, n)
		}
	}
	return nil
}

// Committed looks at a volume's state after a transaction: whether what the head covers is durable, and whether what it does not cover and
// has been acknowledged is still within the window.
func (w *Witness) Committed(volume torus.VolumeID) {
	st := w.c.MDS.Peek(volume)
	old := w.states[volume]
	w.states[volume] = st
	head, number, by := st.GetHead().GetSeq(), st.GetHead().GetNumber(), st.GetHead().GetEpoch()
	if head < old.GetHead().GetSeq() || number < old.GetHead().GetNumber() || st.GetEpoch() < old.GetEpoch() {
		w.fail(violated("L1", "the state of epoch %d goes back from INode %d, record %d, to INode %d, record %d, of epoch %d",
			old.GetEpoch(), old.GetHead().GetNumber(), old.GetHead().GetSeq(), number, head, st.GetEpoch()))
	}
	if a, b := old.GetOpen(), st.GetOpen(); a.GetEpoch() == b.GetEpoch() && hi(b) < hi(a) {
		w.fail(violated("W1", "the window of epoch %d ended at block %d, and now ends at %d", a.GetEpoch(), hi(a), hi(b)))
	}
	for n := old.GetHead().GetSeq() + 1; n <= head; n++ {
		l := w.seqs[seqKey{volume, n}]
		if !slices.ContainsFunc(l, func(s *sighting) bool { return w.durable(s, nil) }) {
			w.fail(violated("D1", "the head of epoch %d covers record %d, which is not durable in %d copies of any block", by, n, w.c.opt.Replication))
		} else if !slices.ContainsFunc(l, func(s *sighting) bool { return w.promised(s, by) }) {
			w.fail(violated("L1", "the head of epoch %d covers record %d, of which peers have copies that have not promised to obey that epoch", by, n))
		}
	}
	if st.GetHead() != nil {
		w.read(volume, st.Head)
	}
	if st.GetOpen() == nil {
		return
	}
	epoch := st.Open.Epoch
	for n := head + 1; n <= w.upTo(volume, epoch); n++ {
		if !slices.ContainsFunc(w.seqs[seqKey{volume, n}], func(s *sighting) bool {
			set, _ := w.registered(st, s.ref)
			return set != nil && w.whole(s, set)
		}) {
			w.fail(violated("W1", "record %d of epoch %d was acknowledged, is not under the head, and in no block of the window %d copies have it", n, epoch, w.c.opt.Replication))
		}
	}
}

// hi is where a window ends.
func hi(w *models.Window) uint64 {
	if n := len(w.GetSpans()); n > 0 {
		return w.Spans[n-1].Hi
	}
	return 0
}

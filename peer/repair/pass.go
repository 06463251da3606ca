package repair

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/loop"
)

// maxPlan bounds how many blocks a pass remembers to mend; the next pass finds those that are left.
const maxPlan = 1 << 16

// listPage is how many of the peer's own tails are asked for at a time.
const listPage = 4096

// statesPage is how many volumes' states are read from the MDS in one request.
const statesPage = 1000

// stale is how old a state may be when a volume is looked through by it; then it is read again. Nothing rests on its being fresh, but that
// the INode it names may be gone.
const stale = 5 * time.Second

// volume is what the last pass knows of a volume.
type volume struct {
	seen           volumeKey
	whole          bool // nothing was amiss: skipped as long as seen is the same
	unknown        bool // its inventory could not be read
	short, corrupt int
	garbage        int // blocks here that are to be deleted
}

// volumeKey is what an inventory, and what is missing of it here or garbage, depends on.
type volumeKey struct {
	headEpoch, head      uint64
	windowEpoch, window  uint64 // and where it begins
	epoch, ring, members uint64
	kept                 uint64 // a digest of what is kept
	here                 uint64 // a digest of the blocks that this peer has
}

// item is a block to be mended, as a pass saw it.
type item struct {
	ref     torus.BlockRef
	volume  torus.VolumeID // whose inventory lists it
	set     torus.PeerList
	length  uint32
	epoch   uint64 // that changes to it carry
	head    uint64
	copies  int  // healthy peers, beside this one, that may have it
	growing bool // the writer may still append to it
	damaged bool
	seal    bool // it is all there, and only has to be sealed
}

// errDeleted: there is no such volume any more. Other things that do not exist, such as a ring, are no proof of that.
var errDeleted = errors.New("the volume was deleted")

// findings are what a pass has found to do.
type findings struct {
	plan    []item
	garbage []garbage
}

// pass looks through every volume. An error means that something could not be found out.
func (r *Repairer) pass(t *loop.Task) (*findings, error) {
	began := r.cfg.Dist.Ring().Version()
	here, err := r.census(t) // before the volumes are listed: what has blocks and is not among them was deleted
	if err != nil {
		return nil, fmt.Errorf("list what is here: %w", err)
	}
	there := map[torus.VolumeID]bool{}
	clones := map[torus.VolumeID]torus.VolumeID{} // and of which volume
	found := &findings{}
	var failed error
	var page torus.VolumeStates
	for after, more := torus.VolumeID(0), true; more; more = page.More {
		if page, err = r.states(t, after); err != nil {
			r.log.Warn("cannot list volumes, nothing more is looked through", "err", err)
			return nil, err
		}
		read := r.cfg.Loop.Now()
		for _, v := range page.List {
			if r.closing {
				return nil, torus.ErrClosed
			}
			after = v.ID
			there[v.ID] = true
			for _, p := range v.GetPins() {
				if p.Clone != 0 {
					clones[torus.VolumeID(p.Clone)] = v.ID
				}
			}
			if err = v.Err; err == nil && r.cfg.Loop.Now() > read+stale {
				v.VolumeState, err = r.state(t, v.ID)
			}
			if err == nil {
				err = r.passVolume(t, v.ID, v.VolumeState, here[v.ID], found)
			}
			switch {
			case err == errDeleted: // the next pass finds it gone
				r.changed = true
				delete(r.volumes, v.ID)
			case err != nil:
				failed = err
				x := r.volume(v.ID)
				if !x.unknown {
					r.log.Warn("cannot look through a volume, trying again", "volume", fmt.Sprintf("%x", uint64(v.ID)), "err", err)
				}
				x.whole, x.unknown = false, true
			}
		}
	}
	r.forget(t, clones, there, page.LastID)
	for id := range r.volumes {
		if !there[id] {
			delete(r.volumes, id)
		}
	}
	for ref := range r.damaged {
		if !there[ref.Volume] {
			delete(r.damaged, ref)
		}
	}
	for id := range here {
		if !there[id] && id <= page.LastID { // else its id is none of this MDS: who knows what happened
			if err := r.orphans(t, id, found); err != nil {
				failed = err
			}
		}
	}
	if failed == nil {
		r.stats.Ring = began
	}
	r.m.set(r.Stats())
	found.plan = mostEndangered(found.plan)
	return found, nil
}

// forget has volumes give up what they keep for clones that were deleted. A clone is there before anything is kept for it, and its id is not given to another: what
// the listing does not have, and could have, is gone.
func (r *Repairer) forget(t *loop.Task, clones map[torus.VolumeID]torus.VolumeID, there map[torus.VolumeID]bool, last torus.VolumeID) {
	for _, clone := range slices.Sorted(maps.Keys(clones)) {
		if r.cfg.Forget == nil || there[clone] || clone > last || r.closing {
			continue
		}
		var err error
		r.call(t, func(ctx context.Context) { err = r.cfg.Forget(ctx, clones[clone], clone) })
		if err != nil {
			r.log.Warn("a volume keeps what a clone needed that is gone, trying again", "volume", fmt.Sprintf("%x", uint64(clones[clone])), "err", err)
		} else {
			r.log.Info("a volume kept what a clone needed that is gone", "volume", fmt.Sprintf("%x", uint64(clones[clone])))
		}
	}
}

// states reads a page of the states of all volumes. It must be those of the cluster that there was at first: of what another MDS
// does not know nothing follows.
func (r *Repairer) states(t *loop.Task, after torus.VolumeID) (page torus.VolumeStates, err error) {
	r.call(t, func(ctx context.Context) { page, err = r.cfg.MDS.VolumeStates(ctx, after, statesPage) })
	switch {
	case err != nil:
		return page, err
	case r.cluster == "":
		r.cluster = page.ClusterID
	case r.cluster != page.ClusterID:
		return page, fmt.Errorf("the metadata service is that of cluster %s, not of %s any more: %w", page.ClusterID, r.cluster, torus.ErrInvalid)
	case page.More && len(page.List) == 0:
		return page, fmt.Errorf("an empty page of volumes: %w", torus.ErrCorrupt)
	}
	return page, nil
}

// mostEndangered sorts a plan: fewest copies first, metadata before data, and cuts it.
func mostEndangered(plan []item) []item {
	slices.SortStableFunc(plan, func(a, b item) int {
		switch {
		case a.seal != b.seal:
			if a.seal {
				return 1
			}
			return -1
		case a.copies != b.copies:
			return cmp.Compare(a.copies, b.copies)
		}
		return cmp.Compare(b.ref.Type, a.ref.Type)
	})
	return plan[:min(len(plan), maxPlan)]
}

func (r *Repairer) call(t *loop.Task, fn func(context.Context)) {
	t.Call(func() {
		ctx, cancel := context.WithTimeout(context.Background(), mdsTimeout)
		defer cancel()
		fn(ctx)
	})
}

func (r *Repairer) volume(id torus.VolumeID) *volume {
	v := r.volumes[id]
	if v == nil {
		v = &volume{}
		r.volumes[id] = v
	}
	return v
}

func (r *Repairer) state(t *loop.Task, id torus.VolumeID) (st torus.VolumeState, err error) {
	r.call(t, func(ctx context.Context) { st, err = r.cfg.MDS.VolumeState(ctx, id) })
	if errors.Is(err, torus.ErrNotExist) {
		err = errDeleted
	}
	return st, err
}

// passVolume looks through one volume, of which this peer has the blocks with the digest here, and adds what is to be done to found.
func (r *Repairer) passVolume(t *loop.Task, id torus.VolumeID, st torus.VolumeState, here uint64, found *findings) error {
	v := r.volume(id)
	if st.Head == nil { // nothing is committed yet
		*v = volume{whole: true}
		return nil
	}
	ring := r.cfg.Dist.Ring()
	key := volumeKey{headEpoch: st.Head.Epoch, head: st.Head.Number, epoch: st.Epoch, ring: ring.Version(), members: uint64(len(ring.Members())), kept: keptDigest(st.VolumeState), here: here}
	if st.Open != nil && len(st.Open.Spans) > 0 {
		key.windowEpoch, key.window = st.Open.Epoch, st.Open.Spans[0].Lo
	}
	if v.whole && v.seen == key && !r.damagedIn(id) {
		return nil
	}
	deadline := r.cfg.Loop.Now() + patience
	inventory, err := file.ReadInventory(t, file.InventoryConfig{Dist: r.cfg.Dist, Volume: id, BlockSize: r.cfg.BlockSize, Until: func() error {
		if r.closing || r.cfg.Loop.Now() >= deadline {
			return fmt.Errorf("peers that hold its INode are not there: %w", torus.ErrBlockUnavailable)
		}
		return nil
	}}, st.VolumeState)
	if err != nil {
		if now, serr := r.state(t, id); serr == nil && (now.Head == nil || now.Head.Number != st.Head.Number) {
			r.changed = true // it has moved on while it was read
		} else if serr == errDeleted {
			return serr
		}
		return err
	}
	tails, err := r.tails(t, id)
	if err != nil {
		return fmt.Errorf("list what is here: %w", err)
	}
	// Of the blocks that the present writer fills beside the log, of metadata and of moved data, the newest listed one may still grow.
	newest := map[torus.BlockType]torus.IndexID{}
	beside := func(b torus.BlockRef) bool { return b.Type != torus.TypeBlock && uint64(b.INode) == st.Epoch }
	for b := range inventory.Needed() {
		if beside(b.Ref) {
			newest[b.Ref.Type] = max(newest[b.Ref.Type], b.Ref.Index)
		}
	}
	todo := 0
	next := volume{seen: key}
	mine := map[torus.BlockRef]bool{} // of those found damaged
	for b := range inventory.Needed() {
		home := r.cfg.Dist.Home(b.Ref, b.Set)
		if len(home) < len(b.Set) && len(home) > 0 && home[0] == r.cfg.ID {
			next.short++ // nobody can hold that copy
		}
		if !home.Has(r.cfg.ID) {
			continue
		}
		it := item{
			ref: b.Ref, volume: id, set: b.Set, length: b.Length, epoch: st.Epoch, head: st.Head.Number,
			growing: beside(b.Ref) && b.Ref.Index == newest[b.Ref.Type],
		}
		_, it.damaged = r.damaged[b.Ref]
		if it.damaged {
			mine[b.Ref] = true
		}
		tail, here := tails[b.Ref]
		window := file.InWindow(st.VolumeState, b.Ref)
		switch {
		case it.damaged:
			next.corrupt++
		case !here || tail.Length < b.Length:
			next.short++
		case tail.Sealed || it.growing || window:
			continue
		default:
			it.seal = true
		}
		if window {
			continue
		}
		for _, p := range r.cfg.Dist.Candidates(b.Ref, b.Set) {
			if p != r.cfg.ID && r.cfg.Dist.Healthy(p) {
				it.copies++
			}
		}
		todo++
		if found.plan = append(found.plan, it); len(found.plan) > 2*maxPlan {
			found.plan = mostEndangered(found.plan)
		}
	}
	for ref, tail := range tails {
		if inventory.Garbage(ref) {
			next.garbage++
			found.discard(tail, st.Epoch)
		}
	}
	// What no INode lists and no writer can add to is nobody's loss.
	for ref := range r.damaged {
		if ref.Volume == id && !mine[ref] && uint64(ref.INode) < st.Epoch && !file.InWindow(st.VolumeState, ref) {
			delete(r.damaged, ref)
		}
	}
	next.whole = next.short == 0 && next.corrupt == 0 && todo == 0 && next.garbage == 0
	*v = next
	return nil
}

func (r *Repairer) damagedIn(id torus.VolumeID) bool {
	for ref := range r.damaged {
		if ref.Volume == id {
			return true
		}
	}
	return false
}

// tails lists what this peer holds of a volume.
func (r *Repairer) tails(t *loop.Task, id torus.VolumeID) (map[torus.BlockRef]torus.Tail, error) {
	all := map[torus.BlockRef]torus.Tail{}
	q := &torus.Request{Op: torus.OpList, Ref: torus.BlockRef{Volume: id}, Len: listPage}
	for {
		if err := r.ask(t, r.cfg.ID, q); err != nil {
			return nil, err
		}
		for _, x := range q.Tails {
			all[x.Ref] = x
		}
		if len(q.Tails) < listPage {
			return all, nil
		}
		q.Ref = q.Tails[len(q.Tails)-1].Ref
	}
}

// tail is what this peer holds of a block.
func (r *Repairer) tail(t *loop.Task, ref torus.BlockRef) (tail torus.Tail, here bool, err error) {
	before := ref
	if before.Index--; ref.Index == 0 {
		before.INode, before.Index = ref.INode-1, math.MaxUint64
	}
	q := &torus.Request{Op: torus.OpList, Ref: before, Len: 1}
	if err := r.ask(t, r.cfg.ID, q); err != nil {
		return tail, false, err
	}
	if len(q.Tails) == 1 && q.Tails[0].Ref == ref {
		return q.Tails[0], true, nil
	}
	return tail, false, nil
}

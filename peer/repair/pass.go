package repair

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/coreos/torus"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/models"
)

// maxPlan bounds how many blocks a pass remembers to mend; the next pass finds those that are left.
const maxPlan = 1 << 16

// listPage is how many of the peer's own tails are asked for at a time.
const listPage = 4096

// volume is what the last pass knows of a volume.
type volume struct {
	seen           volumeKey
	whole          bool // nothing was amiss: skipped as long as seen is the same
	unknown        bool // its inventory could not be read
	short, corrupt int
}

// volumeKey is what an inventory, and what is missing of it here, depends on.
type volumeKey struct {
	headEpoch, head      uint64
	windowEpoch, window  uint64 // and where it begins
	epoch, ring, members uint64
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

// pass looks through every volume. An error means that something could not be found out.
func (r *Repairer) pass(t *loop.Task) ([]item, error) {
	began := r.cfg.Dist.Ring().Version()
	var list []*models.Volume
	var err error
	r.call(t, func(ctx context.Context) { list, err = r.cfg.MDS.Volumes(ctx) })
	if err != nil {
		r.log.Warn("cannot list volumes, nothing is looked through", "err", err)
		return nil, err
	}
	there := make(map[torus.VolumeID]bool, len(list))
	var plan []item
	var failed error
	for _, v := range list {
		if r.closing {
			return nil, torus.ErrClosed
		}
		id := torus.VolumeID(v.Id)
		items, err := r.passVolume(t, id)
		if err == errDeleted {
			continue
		}
		there[id] = true
		if err != nil {
			failed = err
			x := r.volume(id)
			if !x.unknown {
				r.log.Warn("cannot look through a volume, trying again", "volume", v.Name, "err", err)
			}
			x.whole, x.unknown = false, true
			continue
		}
		if plan = append(plan, items...); len(plan) > 2*maxPlan {
			plan = mostEndangered(plan)
		}
	}
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
	if failed == nil {
		r.stats.Ring = began
	}
	r.m.set(r.Stats())
	return mostEndangered(plan), nil
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

// passVolume looks through one volume and returns what is to be done.
func (r *Repairer) passVolume(t *loop.Task, id torus.VolumeID) ([]item, error) {
	st, err := r.state(t, id)
	if err != nil {
		return nil, err
	}
	v := r.volume(id)
	if st.Head == nil { // nothing is committed yet
		*v = volume{whole: true}
		return nil, nil
	}
	ring := r.cfg.Dist.Ring()
	key := volumeKey{headEpoch: st.Head.Epoch, head: st.Head.Number, epoch: st.Epoch, ring: ring.Version(), members: uint64(len(ring.Members()))}
	if st.Open != nil && len(st.Open.Spans) > 0 {
		key.windowEpoch, key.window = st.Open.Epoch, st.Open.Spans[0].Lo
	}
	if v.whole && v.seen == key && !r.damagedIn(id) {
		return nil, nil
	}
	deadline := r.cfg.Loop.Now() + patience
	listed, err := file.Inventory(t, file.InventoryConfig{Dist: r.cfg.Dist, Volume: id, BlockSize: r.cfg.BlockSize, Until: func() error {
		if r.closing || r.cfg.Loop.Now() >= deadline {
			return fmt.Errorf("peers that hold its INode are not there: %w", torus.ErrBlockUnavailable)
		}
		return nil
	}}, st.Head)
	if err != nil {
		if now, serr := r.state(t, id); serr == nil && (now.Head == nil || now.Head.Number != st.Head.Number) {
			r.changed = true // it has moved on while it was read
		} else if serr == errDeleted {
			return nil, serr
		}
		return nil, err
	}
	// The newest metadata block of the present writer may still grow.
	newest, any := torus.IndexID(0), false
	for b := range listed {
		if b.Ref.Type == torus.TypeINode && uint64(b.Ref.INode) == st.Epoch && (!any || b.Ref.Index > newest) {
			newest, any = b.Ref.Index, true
		}
	}
	var plan []item
	next := volume{seen: key}
	tails := map[torus.VolumeID]map[torus.BlockRef]torus.Tail{} // a clone lists blocks of other volumes, too
	mine := map[torus.BlockRef]bool{}                           // of those found damaged
	for b := range listed {
		if tails[b.Ref.Volume] == nil {
			if tails[b.Ref.Volume], err = r.tails(t, b.Ref.Volume); err != nil {
				return nil, fmt.Errorf("list what is here: %w", err)
			}
		}
		home := r.cfg.Dist.Home(b.Ref, b.Set)
		if len(home) < len(b.Set) && len(home) > 0 && home[0] == r.cfg.ID {
			next.short++ // nobody can hold that copy
		}
		if !home.Has(r.cfg.ID) {
			continue
		}
		it := item{
			ref: b.Ref, volume: id, set: b.Set, length: b.Length, epoch: st.Epoch, head: st.Head.Number,
			growing: any && b.Ref.Type == torus.TypeINode && uint64(b.Ref.INode) == st.Epoch && b.Ref.Index == newest,
		}
		_, it.damaged = r.damaged[b.Ref]
		if it.damaged {
			mine[b.Ref] = true
		}
		tail, here := tails[b.Ref.Volume][b.Ref]
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
		if plan = append(plan, it); len(plan) > 2*maxPlan {
			plan = mostEndangered(plan)
		}
	}
	// What no INode lists and no writer can add to is nobody's loss.
	for ref := range r.damaged {
		if ref.Volume == id && !mine[ref] && uint64(ref.INode) < st.Epoch && !file.InWindow(st.VolumeState, ref) {
			delete(r.damaged, ref)
		}
	}
	next.whole = next.short == 0 && next.corrupt == 0 && len(plan) == 0
	*v = next
	return plan, nil
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

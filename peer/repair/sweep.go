package repair

import (
	"cmp"
	"fmt"
	"math"
	"slices"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/models"
)

// maxGarbage bounds how many blocks a pass remembers to delete; the next one finds those that are left.
const maxGarbage = 1 << 16

// censusPage is how many of the peer's own tails a census asks for at a time: few, since the peer serves nobody while it lists them.
const censusPage = 1024

// sweepInFlight is how many deletions are under way at a time.
const sweepInFlight = 32

// garbage is a block here that is proven to be needed by nothing, now or ever (file.Inventory.Garbage), so that it does not matter how
// long ago that was found out.
type garbage struct {
	ref   torus.BlockRef
	bytes uint32
	epoch uint64 // that its deletion carries
}

// discard has a block deleted at the end of the pass.
func (f *findings) discard(tail torus.Tail, epoch uint64) {
	if len(f.garbage) < maxGarbage {
		f.garbage = append(f.garbage, garbage{tail.Ref, tail.Length, epoch})
	}
}

// census digests the blocks that this peer has of each volume.
func (r *Repairer) census(t *loop.Task) (map[torus.VolumeID]uint64, error) {
	here := map[torus.VolumeID]uint64{}
	q := &torus.Request{Op: torus.OpList, Off: torus.ListEveryVolume, Len: censusPage}
	for {
		if r.closing {
			return nil, torus.ErrClosed
		}
		if err := r.ask(t, r.cfg.ID, q); err != nil {
			return nil, err
		}
		for _, x := range q.Tails {
			here[x.Ref.Volume] += digest(uint64(x.Ref.Type), uint64(x.Ref.INode), uint64(x.Ref.Index))
		}
		if len(q.Tails) < censusPage {
			return here, nil
		}
		q.Ref = q.Tails[len(q.Tails)-1].Ref
	}
}

// digest mixes numbers; digests of several things are added, in whatever order.
func digest(numbers ...uint64) uint64 {
	h := uint64(0x9e3779b97f4a7c15)
	for _, n := range numbers {
		h = (h ^ n) * 0xff51afd7ed558ccd
		h ^= h >> 32
	}
	return h
}

// keptDigest tells states apart in which other things are kept.
func keptDigest(s *models.VolumeState) uint64 {
	h := digest(s.KeptFrom)
	if s.Deleted {
		h++
	}
	for _, p := range s.Pins {
		h += digest(p.At.GetBase().GetNumber(), p.At.GetSeq())
	}
	return h
}

// orphans finds what is here of a volume that was deleted: ids are never handed out twice, so that nobody will ever want it. Nobody hands
// out epochs of it any more either: the deletion's is above all.
func (r *Repairer) orphans(t *loop.Task, id torus.VolumeID, found *findings) error {
	v := r.volume(id) // until the next pass
	v.garbage = 0
	q := &torus.Request{Op: torus.OpList, Ref: torus.BlockRef{Volume: id}, Len: listPage}
	for len(found.garbage) < maxGarbage {
		if err := r.ask(t, r.cfg.ID, q); err != nil {
			return fmt.Errorf("list what is here: %w", err)
		}
		v.garbage += len(q.Tails)
		for _, x := range q.Tails {
			found.discard(x, math.MaxUint64)
		}
		if len(q.Tails) < listPage {
			break
		}
		q.Ref = q.Tails[len(q.Tails)-1].Ref
	}
	return nil
}

// sweep deletes garbage, some blocks at a time, since their deletions share a sync, and no faster than it may.
func (r *Repairer) sweep(t *loop.Task, all []garbage) {
	if len(all) == 0 || r.closing {
		return
	}
	slices.SortFunc(all, func(a, b garbage) int { // in an order that does not depend on that of a map
		x, y := a.ref, b.ref
		return cmp.Or(cmp.Compare(x.Volume, y.Volume), cmp.Compare(x.INode, y.INode), cmp.Compare(x.Type, y.Type), cmp.Compare(x.Index, y.Index))
	})
	until := r.cfg.Loop.Now() + r.cfg.Every/2
	next, swept, bytes := 0, 0, uint64(0)
	failed := map[torus.VolumeID]bool{}
	t.All(min(sweepInFlight, len(all)), func(_ int, done func()) {
		loop.Go(r.cfg.Loop, func(t *loop.Task) {
			for next < len(all) && !r.closing && r.cfg.Loop.Now() < until {
				g := all[next]
				next++
				if failed[g.ref.Volume] {
					continue
				}
				r.sleep(t, r.gone.take(r.cfg.Loop.Now(), 1))
				if r.closing {
					break
				}
				if err := r.ask(t, r.cfg.ID, &torus.Request{Op: torus.OpDelete, Ref: g.ref, Epoch: g.epoch}); err != nil {
					failed[g.ref.Volume] = true
					r.m.failures.Inc()
					r.log.Debug("blocks that nothing needs cannot be deleted now", "block", g.ref.String(), "err", err)
					continue
				}
				r.swept(g)
				swept++
				bytes += uint64(g.bytes)
			}
			r.cfg.Loop.Defer(done)
		})
	})
	if swept > 0 {
		r.log.Info("deleted blocks that nothing needs", "blocks", swept, "bytes", bytes, "left", len(all)-swept)
	}
	r.m.set(r.Stats())
	if swept > 0 && (next < len(all) || len(all) == maxGarbage) {
		r.changed = true // there is more
	}
}

// swept accounts for a block that was deleted.
func (r *Repairer) swept(g garbage) {
	delete(r.damaged, g.ref)
	delete(r.told, g.ref)
	if v := r.volumes[g.ref.Volume]; v != nil {
		v.garbage--
	}
	r.stats.Swept++
	r.m.swept.Inc()
	r.m.sweptBytes.Add(float64(g.bytes))
}

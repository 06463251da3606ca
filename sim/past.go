package sim

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coreos/torus"
	"github.com/coreos/torus/block"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/models"
)

// Moments of volumes in a schedule: snapshots, times that a volume can be taken back to, and the clones that begin there. S1: what a moment reads as
// is a prefix of the history that contains all that was flushed before it was asked for, and nothing that was submitted after it was there; and whoever
// looks at it later, however it got there, reads the very same.

// snap is a moment of a volume, and what is known of its contents.
type snap struct {
	v     *volume
	name  string
	at    *models.Moment // nil: has to be located
	us    uint64         // of a time
	then  *History       // as it was when the moment was there
	least uint64         // the write that must be in it
	found map[uint64]uint64
	// alt: the volume may have been taken back to that just before.
	alt *snap
	// gone: it is not kept any more, or nobody promises that it is.
	gone bool
}

// compare checks an image of size pages.
func (x *snap) compare(img []byte) error {
	err := x.fits(img)
	if err != nil && x.found == nil && x.alt != nil && x.alt.compare(img) == nil {
		x.found = x.alt.found
		return nil
	}
	if err != nil {
		return violated("S1", "%s of volume %s: %w", x.name, x.v.info.Name, err)
	}
	return nil
}

func (x *snap) fits(img []byte) error {
	found := map[uint64]uint64{}
	for off := 0; off < len(img); off += PageSize {
		page := uint64(off / PageSize)
		n, err := ReadStamp(img[off:], x.then.Seed, page)
		if err != nil {
			return err
		}
		if n != 0 {
			found[page] = n
		}
	}
	if x.found != nil {
		for _, pages := range []map[uint64]uint64{x.found, found} {
			for page := range pages {
				if found[page] != x.found[page] {
					return fmt.Errorf("page %d holds write %d, and held write %d when somebody looked first", page, found[page], x.found[page])
				}
			}
		}
		return nil
	}
	for page := range found {
		if x.then.pages[page] == nil {
			return fmt.Errorf("page %d holds write %d, which had not been made", page, found[page])
		}
	}
	n, err := x.then.prefix(found)
	if err != nil {
		return err
	}
	if n < x.least {
		return fmt.Errorf("the history up to write %d, and write %d had been flushed before it was asked for", n, x.least)
	}
	x.found = found
	return nil
}

// pages reads an image page by page; beyond its end there are zeroes.
func pages(img []byte) func(page uint64) ([]byte, error) {
	return func(p uint64) ([]byte, error) {
		if p >= uint64(len(img)/PageSize) {
			return make([]byte, PageSize), nil
		}
		return img[p*PageSize:][:PageSize], nil
	}
}

// pinned takes up which snapshots a volume has, after each change of its state.
func (v *volume) pinned() {
	st := v.r.MDS.Peek(torus.VolumeID(v.info.Id))
	for _, p := range st.GetPins() {
		if base := p.At.GetBase(); st.GetHead().GetNumber() == base.GetNumber()+1 && st.Head.Seq < p.At.Seq {
			v.r.fail(violated("S1", "%s of volume %s ends with record %d, and INode %d, which is to list its log, with %d", p.Name, v.info.Name, p.At.Seq, st.Head.Number, st.Head.Seq))
		}
	}
	has := map[string]bool{}
	for _, p := range block.Snapshots(st) {
		has[p.Name] = true
		if !slices.ContainsFunc(v.snaps, func(x *snap) bool { return x.name == p.Name }) {
			x := &snap{v: v, name: p.Name, at: p.At, then: v.h.Freeze(), least: v.asked[p.Name]}
			if v.back != nil {
				x.alt = v.back.to
			}
			if base := p.At.GetBase(); base.GetSeq() > p.At.Seq {
				v.r.fail(violated("S1", "snapshot %s of volume %s ends with record %d, and begins with INode %d, which covers record %d", p.Name, v.info.Name, p.At.Seq, base.Number, base.Seq))
			}
			v.snaps = append(v.snaps, x)
			v.r.Snapshots++
			v.r.say("snapshot %s of %s, INode %d, record %d", x.name, v.info.Name, x.at.GetBase().GetNumber(), x.at.Seq)
		}
	}
	for _, x := range v.snaps {
		if !has[x.name] && x.us == 0 {
			x.gone = true
		}
	}
}

// amend changes a volume's state as an administrator does; whether it was done is seen when it is.
func (v *volume) amend(change func(*models.VolumeState)) {
	id := torus.VolumeID(v.info.Id)
	st, err := v.r.boss.VolumeState(context.Background(), id)
	if err != nil {
		return
	}
	to := proto.CloneOf(st.VolumeState)
	change(to)
	_, err = v.r.boss.Amend(context.Background(), id, st, to)
	v.r.say("amend %s: %v", v.info.Name, err)
}

// snapshot asks for one.
func (v *volume) snapshot() {
	v.r.named++
	name := fmt.Sprint("s", v.r.named)
	v.asked[name] = v.h.Flushed()
	h, err := v.r.boss.Holder(context.Background(), torus.VolumeID(v.info.Id))
	if err != nil {
		return
	}
	v.r.say("ask for %s of %s", name, v.info.Name)
	if h == nil {
		if _, err := block.CreateSnapshot(context.Background(), v.r.boss, v.info.Name, name); !errors.Is(err, block.ErrUnclean) {
			return
		}
	}
	// Whoever has it attached, or attaches it next.
	v.amend(func(s *models.VolumeState) { s.Asks = append(s.Asks, &models.Ask{Snapshot: name}) })
}

// kept lists the moments that have to be there.
func (v *volume) kept() (l []*snap) {
	for _, x := range v.snaps {
		if !x.gone {
			l = append(l, x)
		}
	}
	return l
}

func (v *volume) anyKept() *snap {
	if l := v.kept(); len(l) > 0 {
		return l[v.r.rng.IntN(len(l))]
	}
	return nil
}

// now is the time by the clocks of clients, in microseconds, in schedules in which all of them agree.
func (r *Run) now() uint64 { return uint64(time.Unix(1_700_000_000, 0).Add(r.V.Now()).UnixMicro()) }

// point notes a time at which the volume can be taken back to, from the schedule: half of it now, the rest when the clock has moved on.
func (v *volume) point() {
	r := v.r
	now := r.now()
	if x := v.pointing; x != nil && now > x.us {
		v.pointing = nil
		if v.back == nil {
			v.snaps = append(v.snaps, x)
		}
	}
	if st := r.MDS.Peek(torus.VolumeID(v.info.Id)); v.pointing == nil && st.GetKeptFrom() > 0 && v.serving() && v.back == nil && r.rng.IntN(10) == 0 {
		v.pointing = &snap{v: v, name: fmt.Sprint("time ", now), us: now, least: v.h.Flushed()}
	}
	if x := v.pointing; x != nil {
		x.then = v.h.Freeze()
	}
	for _, x := range v.snaps {
		if x.us > 0 && x.us+uint64(r.p.retain.Microseconds()) <= now {
			x.gone = true
		}
	}
}

// viewer is a client that looks at a moment.
type viewer struct {
	r    *Run
	x    *snap
	cl   *Client
	view *file.View
	busy bool
	over bool
	err  error
}

// look opens a moment from another host.
func (r *Run) look(x *snap) *viewer {
	r.n++
	w := &viewer{r: r, x: x, cl: r.NewClient(fmt.Sprintf("view%d", r.n)), busy: true}
	w.cl.MDS.SetFaults(r.mdsFault)
	if r.mdsSlow != nil {
		w.cl.Loop.SetOffloadDelay(r.mdsSlow)
	}
	r.viewers = append(r.viewers, w)
	r.say("%s opens %s of %s", w.cl.Name, x.name, x.v.info.Name)
	cfg := file.Config{Loop: w.cl.Loop, Dist: w.cl.Dist, MDS: w.cl.MDS, Volume: x.v.info, BlockSize: uint32(r.opt.BlockSize), MapBytes: 1, Log: r.log.With("at", w.cl.Name)}
	open := func(at *models.Moment) {
		file.OpenView(cfg, at, func(v *file.View, err error) {
			if err != nil {
				w.fail(err)
				return
			}
			w.view, w.busy = v, false
			w.read()
		})
	}
	// The rings and the peers have to be known first.
	w.cl.Loop.After(10*time.Millisecond, func() {
		if x.at != nil {
			open(x.at)
			return
		}
		file.Locate(cfg, time.UnixMicro(int64(x.us)), func(at *models.Moment, err error) {
			if err != nil {
				w.fail(err)
				return
			}
			x.at = at
			r.say("%s is INode %d, record %d", x.name, at.GetBase().GetNumber(), at.Seq)
			open(at)
		})
	})
	return w
}

// fail takes an error: one that says that nobody has what is kept is wrong.
func (w *viewer) fail(err error) {
	w.err = err
	w.r.say("%s: %v", w.cl.Name, err)
	if w.x.us > 0 && w.x.us+uint64(w.r.p.retain.Microseconds()) <= w.r.now() {
		w.x.gone = true
	}
	hurt := w.r.victim != nil || w.r.wiped || w.r.Faults["eio-read"] > 0
	if !w.x.gone && (errors.Is(err, torus.ErrNotExist) || errors.Is(err, torus.ErrCorrupt) && !hurt) {
		w.r.fail(violated("S1", "%s of volume %s is kept, and cannot be read: %w", w.x.name, w.x.v.info.Name, err))
	}
	w.end()
}

func (w *viewer) read() {
	if w.busy || w.over {
		return
	}
	w.busy = true
	img := make([]byte, w.view.Size())
	w.view.Submit(&device.Request{Op: device.Read, Len: uint64(len(img)), Data: img, Done: func(q *device.Request) {
		w.busy = false
		if q.Err != nil {
			w.fail(q.Err)
			return
		}
		if err := w.x.compare(img); err != nil {
			w.r.fail(err)
		}
		w.r.Views++
	}})
}

func (w *viewer) end() {
	if !w.over {
		w.over = true
		w.cl.Kill()
	}
}

// examine opens what is kept, when everything is well: it must be there.
func (r *Run) examine(v *volume) error {
	for _, x := range v.kept() {
		var w *viewer
		for try := 0; ; try++ {
			w = r.look(x)
			done := r.runUntil(func() bool { return r.err != nil || w.over || w.view != nil && !w.busy }, time.Minute)
			if r.err != nil {
				return r.err
			}
			w.end()
			if done && w.err == nil {
				break
			}
			if x.gone { // a time that has passed out of what is kept
				break
			}
			if try == 3 {
				return violated("S1", "%s of volume %s cannot be read though everything is well: done %v, %w", x.name, v.info.Name, done, w.err)
			}
			r.V.RunFor(time.Second)
		}
	}
	return nil
}

// clone makes a volume that begins with a moment.
func (r *Run) clone(x *snap) {
	if x.alt != nil && x.found == nil {
		return // nobody knows what it holds
	}
	r.n++
	size := x.at.SizeBytes
	if r.rng.IntN(3) == 0 {
		size += uint64(r.rng.IntN(20)) * PageSize
	}
	info, err := block.Clone(context.Background(), r.admin, x.v.info, x.at, fmt.Sprint("c", r.n), size)
	r.say("clone of %s of %s: %v", x.name, x.v.info.Name, err)
	if err != nil {
		if x.us == 0 && !x.gone {
			r.fail(violated("S1", "%s of volume %s is kept, and cannot be cloned: %w", x.name, x.v.info.Name, err))
		}
		return
	}
	r.Clones++
	v := r.newVolume(info, x.then.Branch(uint64(r.n)<<40, x.least))
	v.from = x
	if x.found != nil {
		v.h.Return(x.found)
	}
}

// newVolume lets the schedule have a volume.
func (r *Run) newVolume(info *models.Volume, h *History) *volume {
	v := &volume{r: r, h: h, info: info, pages: info.SizeBytes / PageSize, asked: map[string]uint64{}}
	r.vols = append(r.vols, v)
	return v
}

// govern does something to a volume that an administrator may do.
func (v *volume) govern() {
	r := v.r
	switch k := r.rng.IntN(24); {
	case v.info.Origin != nil && r.rng.IntN(4) == 0:
		v.flatten()
	case k < 8:
		if len(v.kept()) < 12 {
			v.snapshot()
		}
	case k < 10:
		if x := v.anyKept(); x != nil && x.us == 0 {
			r.say("delete %s of %s", x.name, v.info.Name)
			_ = block.DeleteSnapshot(context.Background(), r.boss, v.info.Name, x.name) // whether it was is seen when it is
		}
	case k < 16:
		if x := v.anyKept(); x != nil && len(r.viewers) < 6 {
			r.look(x)
		}
	case k < 18:
		if x := v.anyKept(); x != nil && x.at != nil && len(r.vols) < 5 && !v.doomed {
			r.clone(x)
		}
	case k < 20:
		if x := v.anyKept(); x != nil && x.at != nil && v.wish == nil && v.back == nil {
			r.say("wish to take %s back to %s", v.info.Name, x.name)
			v.wish = x
			if v.serving() {
				v.cur.close()
			}
		}
	case k == 20:
		v.grow()
	case k == 21:
		if n := len(r.vols); n > 1 && !slices.ContainsFunc(r.vols, func(x *volume) bool { return x.doomed }) {
			r.say("doom %s", v.info.Name)
			v.doomed = true
		}
	default:
		r.MDS.Deliver()
	}
}

func (v *volume) grow() {
	size := v.info.SizeBytes + uint64(1+v.r.rng.IntN(30))*PageSize
	if v.info.SizeBytes > 2<<20 || v.r.admin.UpdateVolume(context.Background(), v.info.Name, func(x *models.Volume) error { x.SizeBytes = size; return nil }) != nil {
		return
	}
	v.refresh()
	v.amend(func(s *models.VolumeState) { s.Asks = append(s.Asks, &models.Ask{SizeBytes: size}) })
}

func (v *volume) refresh() {
	if info, err := v.r.admin.Volume(context.Background(), v.info.Name); err == nil {
		v.info = info
	}
}

// flatten asks for it, or finishes it.
func (v *volume) flatten() {
	if v.info.Origin == nil {
		return
	}
	if !v.r.MDS.Peek(torus.VolumeID(v.info.Id)).GetOwn() {
		v.r.say("flatten %s", v.info.Name)
		v.amend(func(s *models.VolumeState) { s.Asks = append(s.Asks, &models.Ask{Flatten: true}) })
		return
	}
	ok, err := block.Flatten(context.Background(), v.r.admin, v.info.Name)
	v.r.say("%s is flattened: %v, %v", v.info.Name, ok, err)
	if err != nil || !ok {
		v.r.fail(violated("LIVE", "volume %s refers to nothing of its origin, and cannot be set free: %w", v.info.Name, err))
	}
	v.r.Flattened++
	v.refresh()
}

// compact asks for it.
func (v *volume) compact() {
	v.r.say("compact %s", v.info.Name)
	v.amend(func(s *models.VolumeState) { s.Asks = append(s.Asks, &models.Ask{Compact: v.r.rng.Uint64() | 1}) })
}

// bury goes on with the deletion of a volume.
func (v *volume) bury() bool {
	r := v.r
	for _, s := range v.sessions {
		if s.over {
			continue
		}
		if s == v.cur && !s.closing && s.f.Err() == nil && r.rng.IntN(2) == 0 {
			s.close()
		} else if !s.closing || r.rng.IntN(20) == 0 {
			s.end()
		}
		return false
	}
	var err error
	if v.info.Origin != nil && r.p.repair && !slices.ContainsFunc(r.MDS.Peek(torus.VolumeID(v.info.Id)).GetPins(), func(p *models.Pin) bool { return p.Clone != 0 }) && r.rng.IntN(3) == 0 {
		err = r.admin.DeleteVolume(context.Background(), v.info.Name) // and dies before its origin is told
	} else {
		err = block.Delete(context.Background(), r.admin, v.info.Name, true)
	}
	r.say("delete %s: %v", v.info.Name, err)
	switch {
	case errors.Is(err, torus.ErrLocked):
		return false
	case errors.Is(err, block.ErrUnclean): // it has to be attached once more
		v.doomed = false
		return false
	case err != nil:
		r.fail(violated("LIVE", "volume %s cannot be deleted: %w", v.info.Name, err))
		return false
	}
	for _, x := range v.snaps {
		x.gone = true
	}
	r.vols = slices.DeleteFunc(r.vols, func(x *volume) bool { return x == v })
	r.buried = append(r.buried, v)
	return true
}

// follow delivers changes of the volume's state to the process that has it attached, as a watch does: late, and when the metadata service is away
// not before it is back.
func (s *session) follow() {
	r := s.v.r
	told := false // somebody is on the way
	var deliver func()
	deliver = func() {
		st, err := s.cl.MDS.VolumeState(context.Background(), torus.VolumeID(s.v.info.Id))
		if errors.Is(err, torus.ErrMetadataUnavailable) {
			s.cl.Loop.After(time.Second, deliver)
			return
		}
		told = false
		if err == nil && s.f != nil {
			s.f.Observe(st)
		}
	}
	s.cl.MDS.OnChange(func() {
		if told {
			return
		}
		told = true
		d := time.Duration(r.rng.IntN(5000)) * time.Microsecond
		if r.rng.IntN(20) == 0 {
			d = time.Duration(r.rng.IntN(3000)) * time.Millisecond
		}
		s.cl.Loop.Post(func() { s.cl.Loop.After(d, deliver) })
	})
}

// windDown deletes everything but the volumes themselves, and lets them work for a while: what was kept for others goes.
func (r *Run) windDown() error {
	for _, w := range r.viewers {
		w.end()
	}
	for again := true; again; {
		again = false
		for _, v := range slices.Clone(r.vols) {
			if v.info.Origin != nil || v.doomed {
				if len(r.vols) == 1 {
					break
				}
				v.doomed, again = true, true
				for !v.bury() && v.doomed {
					if r.err != nil {
						return r.err
					}
					r.V.RunFor(time.Second)
				}
				if !v.doomed {
					if err := v.finish(); err != nil {
						return err
					}
				}
			}
		}
	}
	forgotten := func() bool {
		return !slices.ContainsFunc(r.vols, func(v *volume) bool {
			return slices.ContainsFunc(r.MDS.Peek(torus.VolumeID(v.info.Id)).GetPins(), func(p *models.Pin) bool { return p.Clone != 0 })
		})
	}
	if !r.runUntil(forgotten, 2*repairEvery+10*time.Second) { // peers see to it where whoever deleted a clone did not
		return violated("LIVE", "a volume keeps what a clone needed that is deleted")
	}
	if r.err != nil {
		return r.err
	}
	for _, v := range r.vols {
		v.amend(func(s *models.VolumeState) {
			s.Pins = slices.DeleteFunc(s.Pins, func(p *models.Pin) bool { return p.Clone == 0 })
			s.RetainMs, s.Asks = 0, nil
		})
		for range 4 {
			if err := v.settle(); err != nil {
				return err
			}
			for range 4 {
				v.cur.w.Write(1, false, false)
			}
			if err := v.settle(); err != nil {
				return err
			}
			r.V.RunFor(r.p.checkpoints + 2*time.Second)
		}
		if err := v.finish(); err != nil {
			return err
		}
		x, err := r.readCommitted(v.info)
		if err != nil {
			return err
		}
		if x == nil {
			continue
		}
		if err := x.compare(v.h, v.pages, 1); err != nil {
			return fmt.Errorf("%w (volume %s, at the end)", err, v.info.Name)
		}
		pins := len(r.MDS.Peek(torus.VolumeID(v.info.Id)).GetPins())
		live, length := 0, 0
		for _, b := range x.blocks {
			if !b.used {
				continue
			}
			if b.death != 0 && pins == 0 {
				return violated("LIVE", "%v, which died with INode %d, is still listed by INode %d though nothing is kept", b.ref, b.death, x.inode.Number)
			}
			if b.ref.Type != torus.TypeINode {
				live, length = live+b.live, length+int(b.length)
			}
		}
		perBlock := int(r.opt.BlockSize) / PageSize
		if most := live*2 + (2+6)*perBlock; pins == 0 && r.p.utilisation > 0 && v.info.Origin == nil && length > most {
			return violated("LIVE", "volume %s stores %d pages for %d that are alive", v.info.Name, length, live)
		}
	}
	return r.err
}

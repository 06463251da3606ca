package block

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/models"
	"google.golang.org/protobuf/proto"
)

// What is done to volumes from outside, whoever has them attached: by amending their state in the MDS, and, where it is the attached
// writer's to do, by asking it there. All functions block until it is done, or ctx ends.

// MaxSnapshots bounds the snapshots of a volume and its clones together, since its state in the MDS lists them.
const MaxSnapshots = 1000

// ErrUnclean: nobody has the volume attached, and it was not released in order, or is a clone that never was attached: an attach has to
// recover it first.
var ErrUnclean = errors.New("not released in order")

// askEvery is how often the state is looked at while a writer is asked for something.
const askEvery = 2 * time.Millisecond

// SplitName takes a name such as VOL@SNAP apart; snap is empty if there is no @.
func SplitName(name string) (vol, snap string) {
	vol, snap, _ = strings.Cut(name, "@")
	return vol, snap
}

// amend changes a volume's state, again if somebody else changes it meanwhile.
func amend(ctx context.Context, mds torus.MetadataService, id torus.VolumeID, change func(*models.VolumeState) error) (torus.VolumeState, error) {
	for {
		st, err := mds.VolumeState(ctx, id)
		if err != nil {
			return st, err
		}
		to := proto.CloneOf(st.VolumeState)
		if err := change(to); err != nil {
			return st, err
		}
		if proto.Equal(to, st.VolumeState) {
			return st, nil
		}
		now, err := mds.Amend(ctx, id, st, to)
		if !errors.Is(err, torus.ErrCompareFailed) {
			return now, err
		}
	}
}

// ask has the attached writer do something, and waits until done says that it is. false: nobody has the volume attached, and
// nothing was asked. What is not done when an error is returned is withdrawn, if the MDS can be reached; else the writer may do it later.
func ask(ctx context.Context, mds torus.MetadataService, id torus.VolumeID, a *models.Ask, done func(s *models.VolumeState, asked bool) bool) (asked bool, err error) {
	defer func() {
		if !asked || err == nil {
			return
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), mdsTimeout)
		defer cancel()
		_, _ = amend(ctx, mds, id, func(s *models.VolumeState) error {
			s.Asks = slices.DeleteFunc(s.Asks, func(x *models.Ask) bool { return proto.Equal(x, a) })
			return nil
		})
	}()
	for {
		st, err := mds.VolumeState(ctx, id)
		if err != nil {
			return asked, err
		}
		if done(st.VolumeState, asked) {
			return true, nil
		}
		h, err := mds.Holder(ctx, id)
		switch {
		case err != nil:
			return asked, err
		case h == nil && asked:
			return true, fmt.Errorf("whoever had the volume attached has released it: %w", torus.ErrAgain)
		case h == nil:
			return false, nil
		case !asked:
			asked = true
			if _, err := amend(ctx, mds, id, func(s *models.VolumeState) error {
				s.Asks = append(s.Asks, a)
				return nil
			}); err != nil {
				return true, err
			}
		}
		select {
		case <-ctx.Done():
			return true, fmt.Errorf("%s has not answered: %w", h.Host, ctx.Err())
		case <-time.After(askEvery):
		}
	}
}

func named(s *models.VolumeState, name string) *models.Pin {
	for _, p := range s.Pins {
		if p.Name == name && p.Clone == 0 {
			return p
		}
	}
	return nil
}

// Snapshots lists the snapshots of a volume, oldest first.
func Snapshots(s *models.VolumeState) (l []*models.Pin) {
	for _, p := range s.GetPins() {
		if p.Clone == 0 {
			l = append(l, p)
		}
	}
	return l
}

// clones lists the ids of the volumes that were cloned from this one.
func clones(s *models.VolumeState) (l []uint64) {
	for _, p := range s.GetPins() {
		if p.Clone != 0 {
			l = append(l, p.Clone)
		}
	}
	return l
}

// CreateSnapshot keeps what has been acknowledged until now under a name. It costs whoever has the volume attached a flush and two
// transactions, however large the volume is. Errors: torus.ErrNotExist, torus.ErrExists, torus.ErrInvalid, ErrUnclean.
func CreateSnapshot(ctx context.Context, mds torus.MetadataService, vol, name string) (*models.Pin, error) {
	fail := func(err error, hint string) error {
		return &torus.Error{Op: "snapshot", Obj: vol + "@" + name, Err: err, Hint: hint}
	}
	if err := CheckName(name); err != nil {
		return nil, fail(err, "Use letters, digits and . _ - (at most 128, beginning with a letter or digit).")
	}
	v, err := mds.Volume(ctx, vol)
	if err != nil {
		return nil, fail(err, "")
	}
	id := torus.VolumeID(v.Id)
	st, err := mds.VolumeState(ctx, id)
	switch {
	case err != nil:
		return nil, fail(err, "")
	case named(st.VolumeState, name) != nil:
		return nil, fail(torus.ErrExists, "Choose another name, or delete it first: torusctl block snapshot delete "+vol+"@"+name)
	case len(st.Pins) >= MaxSnapshots:
		return nil, fail(fmt.Errorf("a volume has at most %d snapshots and clones: %w", MaxSnapshots, torus.ErrInvalid), "Delete some first.")
	}
	var pin *models.Pin
	for {
		asked, err := ask(ctx, mds, id, &models.Ask{Snapshot: name}, func(s *models.VolumeState, _ bool) bool {
			pin = named(s, name)
			return pin != nil
		})
		switch {
		case errors.Is(err, torus.ErrAgain):
			continue
		case err != nil:
			return nil, fail(err, "")
		case asked:
			return pin, nil
		}
		// Nobody has it attached: the head is all there is.
		_, err = amend(ctx, mds, id, func(s *models.VolumeState) error {
			if h, err := mds.Holder(ctx, id); err != nil || h != nil {
				return errors.Join(err, torus.ErrAgain)
			}
			if s.Open != nil || s.Head == nil && v.Origin != nil { // a clone begins with its origin's contents when it is attached first
				return ErrUnclean
			}
			pin = named(s, name)
			if pin == nil {
				now := time.Now()
				// Its time is by the clock of the last writer: by one that is ahead, it would say of what is written later that it had been before.
				at := &models.Moment{Base: s.Head, Seq: s.Head.GetSeq(), TimeUs: s.Head.GetTimeUs(), SizeBytes: v.SizeBytes}
				pin = &models.Pin{Name: name, At: at, CreatedUnixMs: now.UnixMilli()}
				s.Pins = append(s.Pins, pin)
			}
			return nil
		})
		if errors.Is(err, torus.ErrAgain) {
			continue
		}
		if err != nil {
			return nil, fail(err, "")
		}
		return pin, nil
	}
}

// DeleteSnapshot gives a snapshot up; clones of it keep what they need. Errors: torus.ErrNotExist.
func DeleteSnapshot(ctx context.Context, mds torus.MetadataService, vol, name string) error {
	v, err := mds.Volume(ctx, vol)
	if err == nil {
		_, err = amend(ctx, mds, torus.VolumeID(v.Id), func(s *models.VolumeState) error {
			if named(s, name) == nil {
				return torus.ErrNotExist
			}
			s.Pins = slices.DeleteFunc(s.Pins, func(p *models.Pin) bool { return p.Clone == 0 && p.Name == name })
			return nil
		})
	}
	if err != nil {
		return &torus.Error{Op: "delete", Obj: "snapshot " + vol + "@" + name, Err: err}
	}
	return nil
}

// Snapshot finds a snapshot. Errors: torus.ErrNotExist.
func Snapshot(ctx context.Context, mds torus.MetadataService, vol, name string) (*models.Volume, *models.Pin, error) {
	v, err := mds.Volume(ctx, vol)
	if err != nil {
		return nil, nil, err
	}
	st, err := mds.VolumeState(ctx, torus.VolumeID(v.Id))
	if err != nil {
		return nil, nil, err
	}
	p := named(st.VolumeState, name)
	if p == nil {
		return nil, nil, &torus.Error{Op: "open", Obj: "snapshot " + vol + "@" + name, Err: torus.ErrNotExist, Hint: "See: torusctl block snapshot list " + vol}
	}
	return v, p, nil
}

// Clone makes a volume that begins with what parent was at a moment, which must be kept. It costs nothing but what is written to either
// afterwards; the parent keeps what the clone needs of it. size 0: that of the moment. Errors: torus.ErrExists, torus.ErrInvalid,
// torus.ErrNotExist if the moment is not kept.
func Clone(ctx context.Context, mds torus.MetadataService, parent *models.Volume, at *models.Moment, name string, size uint64) (*models.Volume, error) {
	fail := func(err error) error {
		return &torus.Error{Op: "clone", Obj: "volume " + parent.Name + " as " + name, Err: err}
	}
	if err := CheckName(name); err != nil {
		return nil, fail(err)
	}
	if size == 0 {
		size = at.SizeBytes
	}
	gmd, err := mds.GlobalMetadata(ctx)
	if err != nil {
		return nil, fail(err)
	}
	if size < at.SizeBytes || size > file.MaxSize(gmd.BlockSize) {
		return nil, fail(fmt.Errorf("%d bytes for a clone of %d: %w", size, at.SizeBytes, torus.ErrInvalid))
	}
	v := &models.Volume{
		Name: name, Type: parent.Type, SizeBytes: size, BlockSpec: parent.BlockSpec, CreatedUnixMs: time.Now().UnixMilli(),
		Origin: &models.Origin{Volume: parent.Id, At: at},
	}
	if err := mds.CreateVolume(ctx, v); err != nil {
		return nil, fail(err)
	}
	_, err = amend(ctx, mds, torus.VolumeID(parent.Id), func(s *models.VolumeState) error {
		if !file.Kept(s, at) {
			return fmt.Errorf("what it was then is not kept any more: %w", torus.ErrNotExist)
		}
		if len(s.Pins) >= MaxSnapshots {
			return fmt.Errorf("a volume has at most %d snapshots and clones: %w", MaxSnapshots, torus.ErrInvalid)
		}
		s.Pins = append(s.Pins, &models.Pin{Clone: v.Id, At: at, CreatedUnixMs: v.CreatedUnixMs})
		return nil
	})
	if err != nil {
		return nil, errors.Join(fail(err), mds.DeleteVolume(ctx, name))
	}
	return v, nil
}

// Delete deletes a volume: what its clones need of it stays until they are deleted or flattened. With snapshots it is refused unless force.
// Errors: torus.ErrNotExist, torus.ErrLocked, torus.ErrInvalid, ErrUnclean if a clone needs what its last writer left.
func Delete(ctx context.Context, mds torus.MetadataService, name string, force bool) error {
	fail := func(err error, hint string) error {
		return &torus.Error{Op: "delete", Obj: "volume " + name, Err: err, Hint: hint}
	}
	v, err := mds.Volume(ctx, name)
	if err != nil {
		return fail(err, "")
	}
	st, err := mds.VolumeState(ctx, torus.VolumeID(v.Id))
	if err != nil {
		return fail(err, "")
	}
	if n := len(Snapshots(st.VolumeState)); n > 0 && !force {
		return fail(fmt.Errorf("it has %d snapshots: %w", n, torus.ErrInvalid), "Delete them first, or all of it: torusctl volume delete --force "+name)
	}
	if len(clones(st.VolumeState)) == 0 {
		if err := mds.DeleteVolume(ctx, name); err != nil {
			return err
		}
		return release(ctx, mds, v)
	}
	if h, err := mds.Holder(ctx, torus.VolumeID(v.Id)); err != nil || h != nil {
		if err == nil {
			err = fmt.Errorf("attached by %s (pid %d): %w", h.Host, h.Pid, torus.ErrLocked)
		}
		return fail(err, "Detach it first.")
	}
	_, err = amend(ctx, mds, torus.VolumeID(v.Id), func(s *models.VolumeState) error {
		for _, p := range s.Pins {
			if p.Clone != 0 && !file.Settled(s, p.At) { // it is in the log only, which nobody recovers once the volume is deleted
				return ErrUnclean
			}
		}
		s.Deleted, s.RetainMs = true, 0
		s.Asks = nil
		s.Pins = slices.DeleteFunc(s.Pins, func(p *models.Pin) bool { return p.Clone == 0 })
		return nil
	})
	if errors.Is(err, ErrUnclean) {
		return fail(err, "A clone needs what its last writer left: attach and detach it once, or delete the clone.")
	}
	if err != nil {
		return fail(err, "")
	}
	return mds.UpdateVolume(ctx, name, func(v *models.Volume) error {
		v.Name = fmt.Sprintf(".deleted-%d", v.Id)
		return nil
	})
}

// Deleted reports whether a volume is one that is deleted, and listed only for its clones.
func Deleted(v *models.Volume) bool { return strings.HasPrefix(v.Name, ".") }

// release gives up what the origin of a clone keeps for it. A deleted origin that was kept only for that goes as well.
func release(ctx context.Context, mds torus.MetadataService, clone *models.Volume) error {
	if clone.Origin == nil {
		return nil
	}
	st, err := amend(ctx, mds, torus.VolumeID(clone.Origin.Volume), func(s *models.VolumeState) error {
		s.Pins = slices.DeleteFunc(s.Pins, func(p *models.Pin) bool { return p.Clone == clone.Id })
		return nil
	})
	switch {
	case errors.Is(err, torus.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("volume %d keeps what its clone %s needed: %w", clone.Origin.Volume, clone.Name, err)
	case !st.Deleted || len(st.Pins) > 0:
		return nil
	}
	l, err := mds.Volumes(ctx)
	if err != nil {
		return err
	}
	for _, v := range l {
		if v.Id == clone.Origin.Volume && Deleted(v) {
			if err := mds.DeleteVolume(ctx, v.Name); err != nil && !errors.Is(err, torus.ErrNotExist) {
				return err
			}
			return release(ctx, mds, v)
		}
	}
	return nil
}

// Forget gives up what a volume keeps for a clone that has been deleted, in case whoever deleted it did not come to that.
func Forget(ctx context.Context, mds torus.MetadataService, origin, clone torus.VolumeID) error {
	if _, err := mds.VolumeState(ctx, clone); !errors.Is(err, torus.ErrNotExist) {
		return err
	}
	return release(ctx, mds, &models.Volume{Id: uint64(clone), Name: fmt.Sprintf("%x", uint64(clone)), Origin: &models.Origin{Volume: uint64(origin)}})
}

// Flatten has the attached writer copy what a clone has of its origin, and frees the origin of it. It goes on for as long as that takes. false: nobody has
// it attached.
func Flatten(ctx context.Context, mds torus.MetadataService, name string) (bool, error) {
	v, err := mds.Volume(ctx, name)
	if err != nil {
		return false, err
	}
	if v.Origin == nil {
		return true, &torus.Error{Op: "flatten", Obj: "volume " + name, Err: fmt.Errorf("it is not a clone: %w", torus.ErrInvalid)}
	}
	asked, err := ask(ctx, mds, torus.VolumeID(v.Id), &models.Ask{Flatten: true}, func(s *models.VolumeState, _ bool) bool { return s.Own })
	if err != nil || !asked {
		return asked, err
	}
	if err := release(ctx, mds, v); err != nil {
		return true, err
	}
	return true, mds.UpdateVolume(ctx, name, func(v *models.Volume) error {
		v.Origin = nil
		return nil
	})
}

// Compact has the attached writer give back what can be given back, and waits for it. false: nobody has the volume attached.
func Compact(ctx context.Context, mds torus.MetadataService, name string) (bool, error) {
	v, err := mds.Volume(ctx, name)
	if err != nil {
		return false, err
	}
	id := rand.Uint64() | 1
	compact := func(a *models.Ask) bool { return a.Compact == id }
	return ask(ctx, mds, torus.VolumeID(v.Id), &models.Ask{Compact: id}, func(s *models.VolumeState, asked bool) bool {
		return asked && !slices.ContainsFunc(s.Asks, compact)
	})
}

// Grow makes a volume larger, also while it is attached. Errors: torus.ErrInvalid if it is not larger than it was.
func Grow(ctx context.Context, mds torus.MetadataService, name string, size uint64) error {
	gmd, err := mds.GlobalMetadata(ctx)
	if err != nil {
		return err
	}
	most := file.MaxSize(gmd.BlockSize)
	var v *models.Volume
	err = mds.UpdateVolume(ctx, name, func(x *models.Volume) error {
		switch {
		case size < x.SizeBytes:
			return &torus.Error{Op: "resize", Obj: "volume " + name, Err: fmt.Errorf("%d bytes is less than its %d: %w", size, x.SizeBytes, torus.ErrInvalid), Hint: "What lies behind would be lost."}
		case size > most || size%512 != 0:
			return &torus.Error{Op: "resize", Obj: "volume " + name, Err: fmt.Errorf("a size of %d bytes: %w", size, torus.ErrInvalid), Hint: fmt.Sprintf("It must be whole sectors, and at most %d GiB.", most>>30)}
		}
		x.SizeBytes = size
		v = x
		return nil
	})
	if err != nil {
		return err
	}
	for {
		_, err = ask(ctx, mds, torus.VolumeID(v.Id), &models.Ask{SizeBytes: size}, func(s *models.VolumeState, asked bool) bool {
			return asked && !slices.ContainsFunc(s.Asks, func(a *models.Ask) bool { return a.SizeBytes == size })
		})
		if !errors.Is(err, torus.ErrAgain) {
			return err
		}
	}
}

// SetRetention says for how long a volume can be rewound, from now on; 0: not at all.
func SetRetention(ctx context.Context, mds torus.MetadataService, name string, d time.Duration) error {
	v, err := mds.Volume(ctx, name)
	if err != nil {
		return err
	}
	if d < 0 || d > 0 && d < time.Second {
		return &torus.Error{Op: "retain", Obj: "volume " + name, Err: fmt.Errorf("%v: %w", d, torus.ErrInvalid), Hint: "Give a time such as 24h, or 0."}
	}
	_, err = amend(ctx, mds, torus.VolumeID(v.Id), func(s *models.VolumeState) error {
		s.RetainMs = uint64(d.Milliseconds())
		return nil
	})
	return err
}

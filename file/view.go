package file

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/models"
)

// View is what a volume was at a moment, to read. It needs no epoch and fences nobody: any number of clients may have views of
// a volume while another writes to it. A moment that is not kept any more reads as errors, never as something else.
type View struct{ f *File }

// settlePatience is how long the opening of a view waits for the attached writer to commit the log that it needs.
const settlePatience = 10 * time.Second

// OpenView opens a moment of cfg.Volume that is pinned or kept; of cfg only Loop, Dist, MDS, Volume, BlockSize, MapBytes and Log are
// used. done is called once. Errors: torus.ErrAgain if nobody has committed the log up to the moment: the volume was not released in order, and
// an attach must recover it first.
func OpenView(cfg Config, at *models.Moment, done func(*View, error)) {
	cfg.setDefaults()
	loop.Go(cfg.Loop, func(t *loop.Task) {
		v, err := openView(t, cfg, at)
		if err != nil {
			err = fmt.Errorf("open a moment of volume %s: %w", cfg.Volume.Name, err)
		}
		done(v, err)
	})
}

func openView(t *loop.Task, cfg Config, at *models.Moment) (*View, error) {
	for until := cfg.Loop.Now() + settlePatience; ; {
		var st torus.VolumeState
		var err error
		t.Call(func() {
			ctx, cancel := context.WithTimeout(context.Background(), mdsTimeout)
			defer cancel()
			st, err = cfg.MDS.VolumeState(ctx, torus.VolumeID(cfg.Volume.Id))
		})
		switch {
		case err != nil:
			return nil, err
		case !Kept(st.VolumeState, at):
			return nil, fmt.Errorf("it is not kept: %w", torus.ErrNotExist)
		case !Settled(st.VolumeState, at):
			err = fmt.Errorf("%w: %w", torus.ErrAgain, errNotSettled)
		default:
			f := newReader(cfg, at.SizeBytes)
			if err = f.loadMoment(t, f.vol, st.Head, at, false); err == nil {
				return &View{f}, nil
			}
			if errors.Is(err, torus.ErrCorrupt) {
				return nil, err
			}
		}
		// The head that was read may have been replaced meanwhile, and its blocks deleted.
		if cfg.Loop.Now() >= until {
			return nil, err
		}
		t.Sleep(50 * time.Millisecond)
	}
}

// newReader is a File that only reads.
func newReader(cfg Config, size uint64) *File {
	f := &File{cfg: cfg, loop: cfg.Loop, dist: cfg.Dist, log: cfg.Log, vol: torus.VolumeID(cfg.Volume.Id), size: size}
	f.errFn = f.Err
	f.table.init()
	f.m.init(f.size, cfg.MapBytes, f.readNode, f.checkNode)
	return f
}

// Size is the size in bytes at that moment.
func (v *View) Size() uint64 { return v.f.size }

// ReadOnly is true.
func (v *View) ReadOnly() bool { return true }

// Submit starts a request: Read, Status, Prefetch or Flush, which has nothing to do.
func (v *View) Submit(r *device.Request) {
	switch r.Op {
	case device.Read, device.Status, device.Prefetch:
		v.f.Submit(r)
	case device.Flush:
		r.Finish(v.f.err)
	default:
		r.Finish(device.ErrReadOnly)
	}
}

// Close ends the view; requests under way fail.
func (v *View) Close() {
	if v.f.err == nil {
		v.f.err = device.ErrShutdown
	}
	v.f.ahead.clear()
}

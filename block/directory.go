package block

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/blockset"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/distributor"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/models"
	"google.golang.org/protobuf/proto"
)

const (
	leaseTTL   = 10 * time.Second
	renewEvery = 3 * time.Second
	mdsTimeout = 5 * time.Second
)

// Config is what a Directory is made of.
type Config struct {
	Loop loop.Loop
	Dist *distributor.Distributor
	MDS  torus.MetadataService
	// Holder describes this process to whoever finds a volume locked.
	Holder *models.Holder
	// Force takes volumes over from holders whose lease still lives.
	Force bool
	// Only limits the directory to these volumes, each with its snapshots, and to single snapshots (VOL@SNAP); empty: all.
	Only []string
	// RetainBytes and MapBytes bound the memory of each volume; 0: the defaults of package file.
	RetainBytes, MapBytes int
	Utilisation           float64      // see file.Config
	Log                   *slog.Logger // nil: none
}

// Directory serves the volumes of a cluster on one loop. It holds the lease under which they are attached.
type Directory struct {
	cfg       Config
	loop      loop.Loop
	log       *slog.Logger
	blockSize uint32
	stopping  bool
	unclean   error // the first volume that was not released in order since then
	open      map[string]*opened
	views     map[string]*viewed
	ctx       context.Context
	cancel    context.CancelFunc
	wg        sync.WaitGroup

	mu    sync.Mutex
	lease torus.LeaseID
	held  map[torus.VolumeID]*hold // the volumes attached here
}

// hold is how a volume attached here is held.
type hold struct {
	epoch uint64
	lease torus.LeaseID // under which it was last held
}

// opened is a volume in use, or on its way in or out.
type opened struct {
	users   int
	vol     *Volume
	waiters []func(device.Device, error)
	closing bool
	ends    []func() // called when it has been released
	unwatch context.CancelFunc
	cancel  func() // calls the attach off
}

var _ device.Directory = (*Directory)(nil)

// NewDirectory takes a lease from the MDS and keeps it alive. It blocks; not to be called on the loop.
func NewDirectory(ctx context.Context, cfg Config) (*Directory, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	gmd, err := cfg.MDS.GlobalMetadata(ctx)
	if err != nil {
		return nil, err
	}
	lease, err := cfg.MDS.GrantLease(ctx, leaseTTL)
	if err != nil {
		return nil, err
	}
	d := &Directory{
		cfg: cfg, loop: cfg.Loop, log: cfg.Log, blockSize: uint32(gmd.BlockSize),
		open: map[string]*opened{}, views: map[string]*viewed{}, lease: lease, held: map[torus.VolumeID]*hold{},
	}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	d.wg.Go(d.renew)
	return d, nil
}

// renew keeps the lease. If it was lost (the MDS away for long, this process frozen) a new one is taken, and what is still
// attached here is held under that: a lost lease alone ends nothing, only a newer epoch does.
func (d *Directory) renew() {
	tick := time.NewTicker(renewEvery)
	defer tick.Stop()
	for {
		select {
		case <-d.ctx.Done():
			return
		case <-tick.C:
		}
		ctx, cancel := context.WithTimeout(d.ctx, mdsTimeout)
		d.mu.Lock()
		lease := d.lease
		d.mu.Unlock()
		err := d.cfg.MDS.RenewLease(ctx, lease)
		if errors.Is(err, torus.ErrLeaseNotFound) {
			d.log.Warn("the lease on attached volumes was lost, taking a new one")
			if lease, err = d.cfg.MDS.GrantLease(ctx, leaseTTL); err == nil {
				d.mu.Lock()
				d.lease = lease
				d.mu.Unlock()
			}
		}
		if err == nil {
			d.relock(ctx, lease)
		} else if d.ctx.Err() == nil {
			d.log.Warn("cannot renew the lease on attached volumes; their I/O goes on", "err", err)
		}
		cancel()
	}
}

// relock holds what is attached here, but held under a lease that is gone. What fails is tried again after the next renewal.
func (d *Directory) relock(ctx context.Context, lease torus.LeaseID) {
	d.mu.Lock()
	stale := map[torus.VolumeID]*hold{}
	for id, h := range d.held {
		if h.lease != lease {
			stale[id] = h
		}
	}
	d.mu.Unlock()
	for id, h := range stale {
		if err := d.cfg.MDS.Relock(ctx, id, h.epoch, lease, d.holder(h.epoch)); err != nil {
			d.log.Warn("cannot hold an attached volume again", "volume", id, "epoch", h.epoch, "err", err)
			continue
		}
		d.mu.Lock()
		h.lease = lease
		d.mu.Unlock()
	}
}

func (d *Directory) holder(epoch uint64) *models.Holder {
	h := proto.CloneOf(d.cfg.Holder)
	if h == nil {
		h = &models.Holder{}
	}
	h.Epoch = epoch
	return h
}

// call runs work, which may block, and then done on the loop.
func (d *Directory) call(work func(ctx context.Context), done func()) {
	d.loop.Offload(loop.Func(func() {
		ctx, cancel := context.WithTimeout(d.ctx, mdsTimeout)
		defer cancel()
		work(ctx)
	}, done))
}

func (d *Directory) serves(name string) bool {
	vol, _ := SplitName(name)
	return len(d.cfg.Only) == 0 || slices.Contains(d.cfg.Only, name) || slices.Contains(d.cfg.Only, vol)
}

func notServed(name string) error {
	return fmt.Errorf("volume %q is not served here: %w", name, device.ErrNotExist)
}

func info(v *models.Volume) device.Info {
	return device.Info{Name: v.Name, Size: v.SizeBytes, Description: fmt.Sprintf("torus volume %s, id %d, %s", v.Name, v.Id, v.BlockSpec)}
}

func snapshotInfo(v *models.Volume, p *models.Pin) device.Info {
	x := info(v)
	x.Name, x.Size, x.ReadOnly = v.Name+"@"+p.Name, p.At.SizeBytes, true
	return x
}

// List names all volumes, and of the snapshots those that are served singly.
func (d *Directory) List(done func([]device.Info, error)) {
	var l []device.Info
	var err error
	d.call(func(ctx context.Context) {
		var vols []*models.Volume
		if vols, err = d.cfg.MDS.Volumes(ctx); err != nil {
			return
		}
		for _, v := range vols {
			if d.serves(v.Name) && v.Type == VolumeType && !Deleted(v) {
				l = append(l, info(v))
			}
		}
		for _, name := range d.cfg.Only {
			vol, snap := SplitName(name)
			if snap == "" {
				continue
			}
			v, p, e := Snapshot(ctx, d.cfg.MDS, vol, snap)
			switch {
			case e == nil:
				l = append(l, snapshotInfo(v, p))
			case !errors.Is(e, torus.ErrNotExist): // it may have been deleted meanwhile
				err = e
			}
		}
	}, func() { done(l, err) })
}

// find looks a volume up; the error is device.ErrNotExist if there is none.
func (d *Directory) find(name string, done func(*models.Volume, error)) {
	var v *models.Volume
	var err error
	d.call(func(ctx context.Context) { v, err = d.cfg.MDS.Volume(ctx, name) }, func() {
		switch {
		case errors.Is(err, torus.ErrNotExist):
			err = fmt.Errorf("volume %q: %w", name, device.ErrNotExist)
		case err == nil && Deleted(v):
			err = fmt.Errorf("volume %q: %w", name, device.ErrNotExist)
		case err == nil && v.Type != VolumeType:
			err = fmt.Errorf("volume %q is of type %s: %w", name, v.Type, torus.ErrWrongVolumeType)
		}
		done(v, err)
	})
}

// Stat describes a volume without attaching it.
func (d *Directory) Stat(name string, done func(device.Info, error)) {
	if !d.serves(name) {
		done(device.Info{}, notServed(name))
		return
	}
	if o := d.open[name]; o != nil && o.vol != nil {
		x := info(o.vol.info)
		x.Size = o.vol.Size() // it may have grown
		done(x, nil)
		return
	}
	if vol, snap := SplitName(name); snap != "" {
		d.findSnapshot(vol, snap, func(v *models.Volume, p *models.Pin, err error) {
			if err != nil {
				done(device.Info{}, err)
				return
			}
			done(snapshotInfo(v, p), nil)
		})
		return
	}
	d.find(name, func(v *models.Volume, err error) {
		if err != nil {
			done(device.Info{}, err)
			return
		}
		done(info(v), nil)
	})
}

// Open attaches a volume, or shares it if it is attached here. VOL@SNAP opens a snapshot, to read.
func (d *Directory) Open(name string, done func(device.Device, error)) {
	if !d.serves(name) {
		done(nil, notServed(name))
		return
	}
	d.enter(name, done)
}

// enter is Open for what is served or not.
func (d *Directory) enter(name string, done func(device.Device, error)) {
	if d.stopping {
		done(nil, device.ErrShutdown)
		return
	}
	if _, snap := SplitName(name); snap != "" {
		d.openView(name, done)
		return
	}
	o := d.open[name]
	switch {
	case o == nil:
		o = &opened{waiters: []func(device.Device, error){done}}
		d.open[name] = o
		d.attach(name, o)
	case o.closing:
		o.ends = append(o.ends, func() { d.enter(name, done) })
	case o.vol == nil:
		o.waiters = append(o.waiters, done)
	case o.vol.f.Err() != nil:
		done(nil, o.vol.f.Err())
	default:
		o.users++
		done(o.vol, nil)
	}
}

func (d *Directory) attach(name string, o *opened) {
	finish := func(vol *Volume, err error) {
		waiters := o.waiters
		o.waiters = nil
		if err != nil {
			delete(d.open, name)
			if errors.Is(err, torus.ErrLocked) {
				err = fmt.Errorf("%w: %w", device.ErrBusy, err)
			}
			for _, w := range waiters {
				w(nil, err)
			}
			return
		}
		o.vol = vol
		o.users = len(waiters)
		for _, w := range waiters {
			w(vol, nil)
		}
	}
	d.find(name, func(v *models.Volume, err error) {
		if err == nil && d.stopping {
			err = device.ErrShutdown
		}
		if err != nil {
			finish(nil, err)
			return
		}
		if _, err := blockset.Parse(v.BlockSpec); err != nil {
			finish(nil, err)
			return
		}
		vol := &Volume{info: v}
		d.mu.Lock()
		lease := d.lease
		d.mu.Unlock()
		o.cancel = file.Open(file.Config{
			Loop: d.loop, Dist: d.cfg.Dist, MDS: d.cfg.MDS, Volume: v, BlockSize: d.blockSize, Replication: replication(v),
			Lease: lease, Holder: d.holder(0), Force: d.cfg.Force,
			RetainBytes: d.cfg.RetainBytes, MapBytes: d.cfg.MapBytes, Utilisation: d.cfg.Utilisation, Log: d.log,
			OnFail: func(err error) {
				d.release(torus.VolumeID(v.Id))
				if d.open[name] == o && o.vol != nil && !o.closing { // its users keep a dead device; who comes now attaches anew
					o.unwatch()
					delete(d.open, name)
				}
			},
		}, func(f *file.File, err error) {
			if err != nil {
				finish(nil, err)
				return
			}
			vol.f = f
			d.mu.Lock()
			d.held[torus.VolumeID(v.Id)] = &hold{f.Epoch(), lease}
			d.mu.Unlock()
			d.watch(o, vol)
			finish(vol, nil)
		})
	})
}

// replication is how many copies a volume's blocks get: 0 if that is the ring's to say. Its spec was checked when it was created.
func replication(v *models.Volume) int {
	spec, err := blockset.Parse(v.BlockSpec)
	if err != nil {
		return 0
	}
	return spec.Replication()
}

// watch tells the file when somebody else attaches the volume, so that it knows even if it has nothing to write.
func (d *Directory) watch(o *opened, vol *Volume) {
	ctx, cancel := context.WithCancel(d.ctx)
	o.unwatch = cancel
	d.wg.Go(func() {
		for ctx.Err() == nil {
			err := d.cfg.MDS.WatchVolume(ctx, torus.VolumeID(vol.info.Id), func(st torus.VolumeState) {
				d.loop.Post(func() { vol.f.Observe(st) })
			})
			if err != nil && ctx.Err() == nil {
				d.log.Warn("cannot watch a volume, trying again", "volume", vol.info.Name, "err", err)
				select {
				case <-ctx.Done():
				case <-time.After(time.Second):
				}
			}
		}
	})
}

func (d *Directory) release(id torus.VolumeID) {
	d.mu.Lock()
	delete(d.held, id)
	d.mu.Unlock()
}

// Close ends one use of a volume; the last one detaches it.
func (d *Directory) Close(name string, dev device.Device) {
	if d.closeView(name, dev) {
		return
	}
	o := d.open[name]
	if o == nil || o.vol == nil || o.vol != dev {
		return
	}
	if o.users--; o.users > 0 || o.closing {
		return
	}
	d.detach(name, o, func(error) {})
}

func (d *Directory) detach(name string, o *opened, done func(error)) {
	o.closing = true
	o.unwatch()
	gone := func(err error) {
		if err != nil {
			err = fmt.Errorf("volume %s was not released in order, the next attach recovers it: %w", name, err)
			if d.stopping && d.unclean == nil {
				d.unclean = err
			}
		}
		d.release(torus.VolumeID(o.vol.info.Id))
		delete(d.open, name)
		done(err)
		for _, fn := range o.ends {
			fn()
		}
	}
	if err := o.vol.f.Err(); err != nil {
		gone(err)
		return
	}
	o.vol.f.Close(func(err error) {
		if err != nil {
			d.log.Error("volume not released in order; the next attach recovers it", "volume", name, "err", err)
		} else {
			d.log.Info("volume released", "volume", name)
		}
		gone(err)
	})
}

// Each calls fn for every attached volume, sorted by name. On the loop.
func (d *Directory) Each(fn func(*Volume)) {
	names := make([]string, 0, len(d.open))
	for name, o := range d.open {
		if o.vol != nil {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, n := range names {
		fn(d.open[n].vol)
	}
}

// Stop refuses to open volumes from now on, and calls off the attaches under way, which may else wait for peers for as long as
// it takes. It comes before Shutdown where users have to be waited for in between. Call it on the loop.
func (d *Directory) Stop() {
	d.stopping = true
	for _, o := range d.open {
		if o.vol == nil && o.cancel != nil {
			o.cancel()
		}
	}
}

// Shutdown detaches everything, whoever uses it, and gives the lease back; done is called on the loop, with an error if
// a volume was not released in order, since Stop. No
// Open may follow. Call it on the loop.
func (d *Directory) Shutdown(done func(error)) {
	d.Stop()
	var first error
	left := 1
	end := func(err error) {
		if first == nil {
			first = cmp.Or(err, d.unclean)
		}
		if left--; left > 0 {
			return
		}
		d.mu.Lock()
		lease := d.lease
		d.mu.Unlock()
		d.call(func(ctx context.Context) {
			if !errors.Is(first, torus.ErrMetadataUnavailable) {
				_ = d.cfg.MDS.RevokeLease(ctx, lease) // else it expires
			}
			d.cancel()
			d.wg.Wait()
		}, func() { done(first) })
	}
	names := make([]string, 0, len(d.open))
	for name := range d.open {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		o := d.open[name]
		left++
		switch {
		case o.closing:
			o.ends = append(o.ends, func() { end(nil) })
		case o.vol == nil:
			o.waiters = append(o.waiters, func(dev device.Device, err error) {
				if err != nil {
					end(nil)
					return
				}
				d.detach(name, o, end)
			})
		default:
			d.detach(name, o, end)
		}
	}
	end(nil)
}

package block

import (
	"context"
	"errors"
	"fmt"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/models"
)

// viewed is a snapshot in use, VOL@SNAP: any number of users share it, here and elsewhere, whoever has the volume attached.
type viewed struct {
	view    *file.View // nil: it is being opened
	waiters []func(device.Device, error)
	users   int
}

func (d *Directory) findSnapshot(vol, snap string, done func(*models.Volume, *models.Pin, error)) {
	d.find(vol, func(v *models.Volume, err error) {
		if err != nil {
			done(nil, nil, err)
			return
		}
		var p *models.Pin
		d.call(func(ctx context.Context) {
			var st torus.VolumeState
			if st, err = d.cfg.MDS.VolumeState(ctx, torus.VolumeID(v.Id)); err == nil {
				p = named(st.VolumeState, snap)
			}
		}, func() {
			if err == nil && p == nil {
				err = fmt.Errorf("snapshot %q of volume %q: %w", snap, vol, device.ErrNotExist)
			}
			done(v, p, err)
		})
	})
}

func (d *Directory) openView(name string, done func(device.Device, error)) {
	o := d.views[name]
	switch {
	case o == nil:
		o = &viewed{waiters: []func(device.Device, error){done}}
		d.views[name] = o
	case o.view == nil:
		o.waiters = append(o.waiters, done)
		return
	default:
		o.users++
		done(o.view, nil)
		return
	}
	finish := func(v *file.View, err error) {
		waiters := o.waiters
		o.waiters = nil
		if err != nil {
			delete(d.views, name)
			d.log.Error("cannot open a snapshot", "snapshot", name, "err", err)
			for _, w := range waiters {
				w(nil, err)
			}
			return
		}
		o.view, o.users = v, len(waiters)
		for _, w := range waiters {
			w(v, nil)
		}
	}
	vol, snap := SplitName(name)
	recovered := false
	var open func()
	open = func() {
		d.findSnapshot(vol, snap, func(v *models.Volume, p *models.Pin, err error) {
			if err != nil {
				finish(nil, err)
				return
			}
			file.OpenView(d.fileConfig(v), p.At, func(view *file.View, err error) {
				if !errors.Is(err, torus.ErrAgain) || recovered {
					finish(view, err)
					return
				}
				// The volume was not released in order since, and what the snapshot needs of its log has not been committed: an attach does that.
				recovered = true
				d.enter(vol, func(dev device.Device, err error) {
					switch {
					case err == nil:
						d.Close(vol, dev)
					case !errors.Is(err, torus.ErrLocked): // else somebody else does it just now
						finish(nil, err)
						return
					}
					open()
				})
			})
		})
	}
	open()
}

// closeView ends one use of a snapshot; false: name is none that is in use.
func (d *Directory) closeView(name string, dev device.Device) bool {
	o := d.views[name]
	if o == nil || o.view == nil || device.Device(o.view) != dev {
		return false
	}
	if o.users--; o.users == 0 {
		delete(d.views, name)
		o.view.Close()
	}
	return true
}

func (d *Directory) fileConfig(v *models.Volume) file.Config {
	return file.Config{Loop: d.loop, Dist: d.cfg.Dist, MDS: d.cfg.MDS, Volume: v, BlockSize: d.blockSize, MapBytes: d.cfg.MapBytes, Log: d.log}
}

package block

import (
	"context"
	"fmt"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/models"
	"google.golang.org/protobuf/proto"
)

// Restore takes a volume back to what it was when a snapshot was taken. Nobody may have it attached: torus.ErrLocked. What it was
// before stays as long as it is kept by other snapshots, or for rewinding.
func (d *Directory) Restore(vol, snap string, done func(error)) {
	d.takeBack(vol, func(v *models.Volume, found func(*models.Moment, error)) {
		d.findSnapshot(vol, snap, func(_ *models.Volume, p *models.Pin, err error) {
			found(p.GetAt(), err)
		})
	}, done)
}

// Rewind takes a volume back to what it was at a time, as far as its retention reaches. Nobody may have it attached.
func (d *Directory) Rewind(vol string, to time.Time, done func(error)) {
	d.takeBack(vol, func(v *models.Volume, found func(*models.Moment, error)) {
		file.Locate(d.fileConfig(v), to, found)
	}, done)
}

// Locate finds what a volume was at a time; see file.Locate. If nobody has it attached, and it was not released in order, it is recovered first.
func (d *Directory) Locate(vol string, at time.Time, done func(*models.Volume, *models.Moment, error)) {
	d.find(vol, func(v *models.Volume, err error) {
		if err != nil {
			done(nil, nil, err)
			return
		}
		file.Locate(d.fileConfig(v), at, func(m *models.Moment, err error) { done(v, m, err) })
	})
}

// Recover attaches a volume and releases it again.
func (d *Directory) Recover(vol string, done func(error)) {
	d.enter(vol, func(dev device.Device, err error) {
		if err != nil {
			done(err)
			return
		}
		d.open[vol].ends = append(d.open[vol].ends, func() { done(nil) })
		d.Close(vol, dev)
	})
}

// takeBack recovers the volume, so that its head is all there is of it, finds the moment, and begins anew from there.
func (d *Directory) takeBack(vol string, find func(*models.Volume, func(*models.Moment, error)), done func(error)) {
	if d.open[vol] != nil {
		done(fmt.Errorf("volume %s is attached here: %w", vol, torus.ErrLocked))
		return
	}
	d.Recover(vol, func(err error) {
		if err != nil {
			done(err)
			return
		}
		d.find(vol, func(v *models.Volume, err error) {
			if err != nil {
				done(err)
				return
			}
			find(v, func(at *models.Moment, err error) {
				if err != nil {
					done(err)
					return
				}
				d.beAsLarge(v, at.SizeBytes, func(v *models.Volume, err error) {
					if err != nil {
						done(err)
						return
					}
					d.mu.Lock()
					lease := d.lease
					d.mu.Unlock()
					cfg := d.fileConfig(v)
					cfg.To, cfg.Lease, cfg.Holder, cfg.Force = at, lease, d.holder(0), d.cfg.Force
					cfg.Replication = replication(v)
					file.Open(cfg, func(f *file.File, err error) {
						if err != nil {
							done(err)
							return
						}
						f.Close(done)
					})
				})
			})
		})
	})
}

// beAsLarge makes a volume that nobody has attached as large as it was then, if it has been made smaller since.
func (d *Directory) beAsLarge(v *models.Volume, size uint64, done func(*models.Volume, error)) {
	if v.SizeBytes >= size {
		done(v, nil)
		return
	}
	grown := v
	var err error
	d.call(func(ctx context.Context) {
		err = d.cfg.MDS.UpdateVolume(ctx, v.Name, func(now *models.Volume) error {
			now.SizeBytes = max(now.SizeBytes, size)
			grown = proto.CloneOf(now)
			return nil
		})
	}, func() { done(grown, err) })
}

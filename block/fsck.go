package block

import (
	"context"
	"fmt"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/models"
)

// FsckConfig says how a volume is checked; see file.FsckConfig.
type FsckConfig struct {
	Repair   bool
	Rate     uint64 // bytes a second; 0: no bound
	Stop     func() error
	Progress func(done, total uint64)
}

// FsckResult is what a check has found.
type FsckResult struct {
	*file.FsckReport
	Volume *models.Volume
	Holder *models.Holder    // who had the volume attached when the check began; nil: nobody
	Names  map[uint64]string // of the volumes that were cloned from it, by id
	Pin    *models.Pin       // the snapshot that was checked; nil: all of the volume
	Origin bool              // nothing has been written to the clone yet: what was checked is what it has of its origin
}

// Fsck checks a volume, or one of its snapshots (VOL@SNAP), without attaching it. done is called once, on the loop; with an error the result, if there is one, is
// what was found until then.
func (d *Directory) Fsck(name string, cfg FsckConfig, done func(*FsckResult, error)) {
	vol, snap := SplitName(name)
	d.find(vol, func(v *models.Volume, err error) {
		if err != nil {
			done(nil, err)
			return
		}
		r := &FsckResult{Volume: v, Names: map[uint64]string{}}
		var st torus.VolumeState
		d.call(func(ctx context.Context) {
			if st, err = d.cfg.MDS.VolumeState(ctx, torus.VolumeID(v.Id)); err != nil {
				return
			}
			if r.Holder, err = d.cfg.MDS.Holder(ctx, torus.VolumeID(v.Id)); err != nil {
				return
			}
			for _, id := range clones(st.VolumeState) {
				r.Names[id] = ""
			}
			if len(r.Names) == 0 {
				return
			}
			var l []*models.Volume
			l, err = d.cfg.MDS.Volumes(ctx)
			for _, x := range l {
				if _, ok := r.Names[x.Id]; ok {
					r.Names[x.Id] = x.Name
				}
			}
		}, func() {
			if err != nil {
				done(nil, err)
				return
			}
			f := file.FsckConfig{Config: d.fileConfig(v), Repair: cfg.Repair, Rate: cfg.Rate, Stop: cfg.Stop, Progress: cfg.Progress}
			f.Replication = replication(v)
			switch {
			case snap != "":
				if r.Pin = named(st.VolumeState, snap); r.Pin == nil {
					done(nil, fmt.Errorf("snapshot %q of volume %q: %w", snap, vol, device.ErrNotExist))
					return
				}
				f.At, f.Of = r.Pin.At, file.PinName(r.Pin)
			case st.Head == nil && v.Origin != nil:
				r.Origin = true
				f.Volume = &models.Volume{Name: v.Name, Id: v.Origin.Volume}
				f.At = v.Origin.At
			}
			file.Fsck(f, func(report *file.FsckReport, err error) {
				r.FsckReport = report
				done(r, err)
			})
		})
	})
}

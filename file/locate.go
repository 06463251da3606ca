package file

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/models"
)

// Locate finds the moment of a volume at a time: its last record that is not younger. cfg is that of OpenView. done is called once. Errors: torus.ErrNotExist if
// nothing is kept from then, torus.ErrAgain if the log of that time has not been committed yet.
func Locate(cfg Config, at time.Time, done func(*models.Moment, error)) {
	cfg.setDefaults()
	loop.Go(cfg.Loop, func(t *loop.Task) {
		m, err := locate(t, cfg, uint64(max(0, at.UnixMicro())))
		if err != nil {
			err = fmt.Errorf("volume %s at %s: %w", cfg.Volume.Name, at.Format(time.RFC3339Nano), err)
		}
		done(m, err)
	})
}

// locateSize is that of a reader of records only: more than any volume has.
const locateSize = 1 << 45

func locate(t *loop.Task, cfg Config, us uint64) (*models.Moment, error) {
	var st torus.VolumeState
	var err error
	t.Call(func() {
		ctx, cancel := context.WithTimeout(context.Background(), mdsTimeout)
		defer cancel()
		st, err = cfg.MDS.VolumeState(ctx, torus.VolumeID(cfg.Volume.Id))
	})
	if err != nil {
		return nil, err
	}
	if st.KeptFrom == 0 || st.Head == nil {
		return nil, fmt.Errorf("the volume keeps nothing to go back to: %w", torus.ErrNotExist)
	}
	f := newReader(cfg, locateSize) // whatever size it had in between
	// The newest INode that is not younger than that.
	base := st.Head
	for base.TimeUs > us {
		n, err := f.readInode(t, f.vol, base)
		if err != nil {
			return nil, err
		}
		next := (*models.Head)(nil)
		for _, h := range n.History { // as far back as possible, but not beyond
			if h.Number < st.KeptFrom {
				break
			}
			if next == nil || h.TimeUs > us {
				next = h
			}
		}
		if next == nil {
			return nil, fmt.Errorf("it can be taken back to %s: %w", time.UnixMicro(int64(base.TimeUs)).UTC().Format(time.RFC3339), torus.ErrNotExist)
		}
		base = next
	}
	m := &models.Moment{Base: base, Seq: base.Seq, TimeUs: us, SizeBytes: base.SizeBytes}
	if base.Number == st.Head.Number {
		// A moment that was pinned later, and is covered, shows that no record of before is missing.
		covered := slices.ContainsFunc(st.Pins, func(p *models.Pin) bool { return p.At.TimeUs > us && p.At.Seq <= base.Seq })
		if st.Open != nil && !covered {
			return nil, fmt.Errorf("%w: %w", torus.ErrAgain, errNotSettled)
		}
		return m, nil
	}
	if err := f.loadInode(t, f.vol, st.Head); err != nil {
		return nil, err
	}
	found, err := f.readLog(t, f.logBehind(f.vol, m), base.Seq, 0)
	if err != nil {
		return nil, err
	}
	for _, r := range found {
		if r.hdr.Time <= us && (r.hdr.Seq == m.Seq+1 || r.hdr.Seq == m.Seq) {
			m.Seq = r.hdr.Seq
			for _, x := range r.hdr.Extents {
				if end := (x.Page + uint64(x.Count)) * pageSize; end >= m.SizeBytes+pageSize {
					m.SizeBytes = max(end, st.Head.SizeBytes) // the volume had grown since the INode
				}
			}
		}
	}
	return m, nil
}

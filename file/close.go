package file

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/distributor"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/models"
)

type read = distributor.Read

// closePatience is how long a close waits for peers or the MDS before it leaves the rest to the next attach's recovery.
const closePatience = 10 * time.Second

func (f *File) close(t *loop.Task) error {
	if f.closing {
		return torus.ErrClosed
	}
	f.closing, f.closeBy = true, f.loop.Now()+closePatience
	if f.building != nil {
		f.seal()
	}
	for f.err == nil && (f.applied < f.last || f.checkpointing || f.compacting || f.pinning || f.building != nil || len(f.waiting) > 0 || len(f.blocked) > 0 || len(f.locked) > 0) {
		if f.loop.Now() >= f.closeBy {
			break
		}
		if f.held > f.flushed {
			f.startSync()
		}
		f.apply()
		t.Sleep(2 * time.Millisecond)
	}
	err := f.err
	if err == nil && (f.applied < f.last || f.checkpointing || f.compacting || f.pinning || f.building != nil || len(f.locked) > 0) {
		err = fmt.Errorf("records %d to %d could not be flushed: %w", f.flushed+1, f.last, torus.ErrBlockUnavailable)
	}
	if err == nil {
		f.checkpointing = true
		if f.sinceCkpt > 0 || f.state.Head == nil && f.last > 0 {
			err = f.checkpoint(t, func(s *models.VolumeState) error { s.Open = nil; return nil })
		} else {
			f.takeMeta(t)
			err = f.commit(t, func(s *models.VolumeState) error { s.Open = nil; return nil })
			f.releaseMeta()
		}
	}
	if err == nil {
		f.meta.blk, f.moves.blk = nil, nil
		f.sealBlocks(f.next)
	}
	f.stop()
	if f.err == nil {
		f.fail(device.ErrShutdown)
	}
	if errors.Is(err, torus.ErrMetadataUnavailable) {
		return err // its lease ends the holding
	}
	t.Call(func() {
		ctx, cancel := context.WithTimeout(context.Background(), mdsTimeout)
		defer cancel()
		if e := f.cfg.MDS.Unlock(ctx, f.vol, f.epoch); e != nil && err == nil {
			err = e
		}
	})
	return err
}

package distributor

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/models"
)

// Follow keeps d informed of the peers and the ring of the MDS, until ctx ends. It returns a
// function that waits for that. To be called once, from any goroutine.
func Follow(ctx context.Context, mds torus.MetadataService, l loop.Loop, d *Distributor, decode func([]byte) (torus.Ring, error), log *slog.Logger) (wait func()) {
	var wg sync.WaitGroup
	follow := func(what string, watch func() error) {
		wg.Go(func() {
			for ctx.Err() == nil {
				if err := watch(); ctx.Err() == nil && err != nil && !errors.Is(err, context.Canceled) {
					log.Warn("cannot watch, trying again", "what", what, "err", err)
					select {
					case <-ctx.Done():
					case <-time.After(time.Second):
					}
				}
			}
		})
	}
	follow("peers", func() error {
		return mds.WatchPeers(ctx, func(p []*models.Peer) { l.Post(func() { d.SetPeers(p) }) })
	})
	follow("ring", func() error {
		return mds.WatchRing(ctx, func(b []byte) {
			r, err := decode(b)
			if err != nil {
				log.Error("cannot read the ring", "err", err)
				return
			}
			l.Post(func() { d.SetRing(r) })
		})
	})
	return wg.Wait
}

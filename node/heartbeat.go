package node

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/peer/repair"
)

const (
	// leaseTTL is how long a peer counts as alive after its last sign of life.
	leaseTTL = 10 * time.Second
	// heartbeatEvery is how often it gives one.
	heartbeatEvery = 3 * time.Second
	// heartbeatTimeout bounds one.
	heartbeatTimeout = 5 * time.Second
)

// The states a peer gives itself (models.Peer.State).
const (
	StateOK       = "ok"
	StateNearFull = "near-full" // nearFullPercent of its space is used
	StateFull     = "full"      // no room for another block
	StateFailed   = "failed"    // its disk failed
)

const nearFullPercent = 85

func stateOf(s torus.StoreStats) string {
	switch {
	case s.Failed:
		return StateFailed
	case s.Full, s.Used+s.BlockSize > s.Size:
		return StateFull
	case s.Used >= s.Size/100*nearFullPercent:
		return StateNearFull
	}
	return StateOK
}

// heartbeat keeps a peer registered in the MDS: its record, and the lease that says it is alive. A lost
// lease is replaced, however long the MDS was away (coreos/torus 252).
type heartbeat struct {
	mds     torus.MetadataService
	stats   func() torus.StoreStats
	repairs func() repair.Stats
	peer    *models.Peer // the heartbeat's own
	log     *slog.Logger

	lease torus.LeaseID
	alive atomic.Bool // the last sign of life was taken
}

// beat registers the peer once more.
func (h *heartbeat) beat(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, heartbeatTimeout)
	defer cancel()
	if h.lease != 0 {
		err := h.mds.RenewLease(ctx, h.lease)
		if errors.Is(err, torus.ErrLeaseNotFound) {
			h.log.Warn("the lease was lost: registering again", "lease", h.lease)
			h.lease, err = 0, nil
		}
		if err != nil {
			return err
		}
	}
	if h.lease == 0 {
		lease, err := h.mds.GrantLease(ctx, leaseTTL)
		if err != nil {
			return err
		}
		h.lease = lease
	}
	s := h.stats()
	if state := stateOf(s); state != h.peer.State {
		if state != StateOK {
			h.log.Warn("state changed", "state", state, "was", h.peer.State, "used", s.Used, "size", s.Size)
		}
		h.peer.State = state
	}
	h.peer.SizeBytes, h.peer.UsedBytes, h.peer.UpdatedUnixMs = s.Size, s.Used, time.Now().UnixMilli()
	describeRepair(h.peer, h.repairs())
	err := h.mds.PutPeer(ctx, h.lease, h.peer)
	if errors.Is(err, torus.ErrLeaseNotFound) { // it expired in between; the next beat brings another
		h.lease = 0
	}
	return err
}

// run beats until ctx ends. It goes on whatever happens: blocks are served without the MDS.
func (h *heartbeat) run(ctx context.Context) {
	tick := time.NewTicker(heartbeatEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		err := h.beat(ctx)
		if ctx.Err() != nil {
			return
		}
		switch was := h.alive.Swap(err == nil); {
		case err != nil && was:
			h.log.Error("etcd does not take this peer's heartbeat; serving on, trying again", "err", err)
		case err == nil && !was:
			h.log.Info("etcd takes this peer's heartbeat again")
		}
	}
}

// end says that the peer is gone, so that nobody has to wait for its lease to run out.
func (h *heartbeat) end() {
	ctx, cancel := context.WithTimeout(context.Background(), heartbeatTimeout)
	defer cancel()
	if err := h.mds.RevokeLease(ctx, h.lease); err != nil {
		h.log.Warn("the lease could not be given back, it will run out", "err", err)
	}
}

package node

import (
	"context"
	"fmt"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/block"
	"github.com/coreos/torus/distributor"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/peer/repair"
	"github.com/coreos/torus/ring"
	"github.com/coreos/torus/storage"
	"github.com/coreos/torus/transport/sock"
)

// unhurried: nobody waits for a repair, and every peer is connected to every other for it.
var unhurried = pace{ping: time.Second, dead: 3500 * time.Millisecond}

// startRepair has the peer look after its copies, on a loop of its own: going through the inventory of large volumes and verifying
// what is copied must not hold up those whom the peer serves.
func (p *Peer) startRepair(cfg PeerConfig, store *storage.Disk, service torus.BlockStore) error {
	l, err := newLoop(p.log)
	if err != nil {
		return err
	}
	p.stops.push(l.stop)
	dist := distributor.New(distributor.Config{
		Loop: l.Epoll, Dial: dialer(l.Epoll, sock.New(), cfg.Global, "torusd repair", unhurried, nil, p.log),
		LoadRing: ringLoader(cfg.MDS), Log: p.log,
	})
	p.stops.push(func() error {
		l.call(dist.Close)
		return nil
	})
	l.start()
	following, cancel := context.WithCancel(context.Background())
	wait := distributor.Follow(following, cfg.MDS, l.Epoll, dist, ring.Decode, p.log)
	p.stops.push(func() error {
		cancel()
		wait()
		return nil
	})
	var r *repair.Repairer
	l.call(func() {
		r, err = repair.New(repair.Config{
			Loop: l.Epoll, Dist: dist, MDS: cfg.MDS, Local: &bridge{from: l.Epoll, to: p.loop.Epoll, store: service}, ID: p.id,
			BlockSize: uint32(cfg.Global.BlockSize), Log: p.log, Registerer: cfg.Registerer,
			Forget: func(ctx context.Context, origin, clone torus.VolumeID) error {
				return block.Forget(ctx, cfg.MDS, origin, clone)
			},
		})
	})
	if err != nil {
		return fmt.Errorf("repair: %w", err)
	}
	p.stops.push(func() error {
		p.loop.call(func() { store.Damaged(nil) })
		closed := make(chan struct{})
		l.Post(func() { r.Close(func() { close(closed) }) })
		<-closed
		return nil
	})
	p.loop.call(func() {
		store.Damaged(func(ref torus.BlockRef) { l.Post(func() { r.Damaged(ref) }) })
	})
	p.repairs = func() (s repair.Stats) {
		l.call(func() { s = r.Stats() })
		return s
	}
	return nil
}

// bridge leads from one loop to a store that belongs to another.
type bridge struct {
	from, to loop.Loop
	store    torus.BlockStore
}

var _ torus.BlockStore = (*bridge)(nil)

// Submit implements torus.BlockStore, on the loop `from`.
func (b *bridge) Submit(r *torus.Request) {
	done := r.Done
	r.Done = func(r *torus.Request) {
		b.from.Post(func() {
			r.Done = done
			done(r)
		})
	}
	b.to.Post(func() { b.store.Submit(r) })
}

// describeRepair puts what a Repairer says of itself into the peer's record.
func describeRepair(p *models.Peer, s repair.Stats) {
	p.ShortBlocks, p.CorruptBlocks, p.RepairedBlocks, p.CheckedRing, p.UnknownVolumes = s.Short, s.Corrupt, s.Repaired, s.Ring, s.Unknown
}

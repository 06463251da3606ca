package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/coreos/torus"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/peer"
	"github.com/coreos/torus/peer/repair"
	"github.com/coreos/torus/storage"
	"github.com/coreos/torus/transport/sock"
	"github.com/coreos/torus/transport/tdp"
)

// PeerConfig is what a peer is made of.
type PeerConfig struct {
	MDS      torus.MetadataService
	Global   torus.GlobalMetadata
	DataDir  string
	Capacity Capacity
	Address  string // tdp://IP:PORT; port 0: any that is free
	Labels   map[string]string
	AutoJoin bool // put itself into the ring

	Log        *slog.Logger          // nil: none
	Registerer prometheus.Registerer // nil: no metrics
}

// Peer is a running storage node: its store, served over TDP on a loop of its own, and registered in the MDS.
type Peer struct {
	id      torus.PeerID
	log     *slog.Logger
	loop    *eventLoop
	store   torus.Store
	server  *tdp.Server
	address string
	beat    *heartbeat
	record  *models.Peer
	repairs func() repair.Stats
	stops   stack
}

// StartPeer takes the data dir, which is made if it is not there, and serves it. On return the peer is registered in
// the MDS, and in the ring with AutoJoin. It serves on when the MDS goes away, until Close.
func StartPeer(ctx context.Context, cfg PeerConfig) (*Peer, error) {
	dir, err := openDataDir(cfg.DataDir)
	if err != nil {
		return nil, err
	}
	p, err := startPeer(ctx, dir, cfg)
	if err != nil {
		return nil, errors.Join(err, dir.close())
	}
	p.stops = append(stack{dir.close}, p.stops...)
	return p, nil
}

func startPeer(ctx context.Context, dir *dataDir, cfg PeerConfig) (_ *Peer, err error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	host, _, err := parsePeerAddress(cfg.Address)
	if err != nil {
		return nil, err
	}
	identity, err := takeIdentity(dir, cfg.Global)
	if err != nil {
		return nil, err
	}
	p := &Peer{id: identity.Peer, log: cfg.Log.With("peer", identity.Peer.Short())}
	defer func() {
		if err != nil {
			p.stops.run() //nolint:errcheck // the first error is the one that matters
		}
	}()
	if err := refuseTwin(ctx, cfg.MDS, p.id, dir.name); err != nil {
		return nil, err
	}
	free, total, err := dir.fs.Free()
	if err != nil {
		return nil, fmt.Errorf("data dir %s: %w", dir.name, err)
	}
	size, err := cfg.Capacity.resolve(dir.name, free, total, cfg.Global.BlockSize)
	if err != nil {
		return nil, err
	}
	if p.loop, err = newLoop(p.log); err != nil {
		return nil, err
	}
	p.stops.push(p.loop.stop)
	incarnation := rand.Uint64()
	store, service, err := p.serve(dir, cfg, identity, size, incarnation)
	if err != nil {
		return nil, err
	}
	p.loop.start()
	_, port, err := net.SplitHostPort(strings.TrimPrefix(p.server.Addr(), "tcp://"))
	if err != nil {
		return nil, fmt.Errorf("address of the listener: %w", err)
	}
	p.address = addressScheme + net.JoinHostPort(host, port)
	p.record = &models.Peer{
		Uuid: p.id.String(), Address: p.address, Labels: cfg.Labels, Incarnation: incarnation, Version: torus.Version, SizeBytes: size,
	}
	if err := p.startRepair(cfg, store, service); err != nil {
		return nil, err
	}
	if err := p.register(ctx, cfg); err != nil {
		return nil, err
	}
	return p, nil
}

// register makes the peer known, and a member of the ring if it is to be one.
func (p *Peer) register(ctx context.Context, cfg PeerConfig) error {
	p.beat = &heartbeat{mds: cfg.MDS, stats: p.stats, repairs: p.repairs, peer: proto.CloneOf(p.record), log: p.log}
	for {
		err := p.beat.beat(ctx)
		if err == nil {
			break
		}
		if !errors.Is(err, torus.ErrMetadataUnavailable) && !errors.Is(err, context.DeadlineExceeded) {
			return fmt.Errorf("register peer: %w", err)
		}
		p.log.Warn("cannot register yet, trying again", "err", err)
		select {
		case <-time.After(retryEvery):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	p.beat.alive.Store(true)
	beating, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.beat.run(beating)
	}()
	p.stops.push(func() error {
		cancel()
		<-done
		p.beat.end()
		return nil
	})
	if !cfg.AutoJoin {
		return nil
	}
	r, err := AddToRing(ctx, cfg.MDS, []*models.Peer{p.record})
	if err != nil && !errors.Is(err, ErrUnchanged) {
		return fmt.Errorf("join the ring: %w", err)
	}
	p.log.Info("in the ring", "version", r.Version(), "members", len(r.Members()))
	return nil
}

// serve opens the store and begins to listen. The loop does not run yet: opening reads the disk.
func (p *Peer) serve(dir *dataDir, cfg PeerConfig, identity storage.Identity, size, incarnation uint64) (*storage.Disk, *peer.Service, error) {
	store, err := storage.Open(storage.Config{
		Loop: p.loop.Epoll, FS: dir.fs, Identity: identity, SizeBytes: size, Log: p.log, Registerer: cfg.Registerer,
	})
	if err != nil {
		return nil, nil, fmt.Errorf("data dir %s: %w", dir.name, err)
	}
	p.store = store
	p.stops.push(func() (err error) {
		p.loop.call(func() { err = store.Close() })
		return err
	})
	service, err := peer.New(peer.Config{Loop: p.loop.Epoll, Store: store, FS: dir.fs, Log: p.log, Registerer: cfg.Registerer})
	if err != nil {
		return nil, nil, fmt.Errorf("data dir %s: %w", dir.name, err)
	}
	p.stops.push(func() error {
		result := make(chan error, 1)
		p.loop.call(func() { service.Close(func(err error) { result <- err }) })
		if p.loop.done == nil { // nobody has connected yet
			return nil
		}
		return <-result
	})
	p.server, err = tdp.Serve(p.loop.Epoll, sock.New(), cfg.Address, tdp.ServerConfig{
		Hello: tdp.Hello{
			Cluster: cfg.Global.ClusterID, ID: p.id, Incarnation: incarnation, BlockSize: cfg.Global.BlockSize, Name: "torusd",
		},
		Store: service, Log: p.log, Registerer: cfg.Registerer,
	})
	if err != nil {
		return nil, nil, listenError("--peer-address", cfg.Address, err)
	}
	p.stops.push(func() error {
		done := make(chan struct{})
		p.loop.call(func() { p.server.Close(func() { close(done) }) })
		if p.loop.done != nil {
			<-done
		}
		return nil
	})
	return store, service, nil
}

// stats asks the store, on its loop.
func (p *Peer) stats() (s torus.StoreStats) {
	p.loop.call(func() { s = p.store.Stats() })
	return s
}

// ID is the peer's identity.
func (p *Peer) ID() torus.PeerID { return p.id }

// Address is where the peer is reached: tdp://HOST:PORT.
func (p *Peer) Address() string { return p.address }

// Record is the peer as it registered itself at first.
func (p *Peer) Record() *models.Peer { return proto.CloneOf(p.record) }

// Close takes the peer out of service in order: it tells the MDS, answers what is under way, and syncs the store.
func (p *Peer) Close() error { return p.stops.run() }

package node

import (
	"context"
	"errors"
	"log/slog"
	"time"
)

// DaemonConfig is what torusd runs.
type DaemonConfig struct {
	Etcd        Etcd
	EtcdWait    time.Duration // how long to wait for etcd at the start
	EmbedEtcd   bool          // run etcd in this process, at the first of the endpoints
	Peer        PeerConfig    // MDS, Global, Log and Registerer are filled in
	NBD         string        // [HOST]:PORT or unix:PATH to serve volumes at; empty: do not
	CacheSize   uint64        // bytes, of the maps of those volumes
	Utilisation float64       // see ClientConfig
	HTTP        string        // [HOST]:PORT; empty: none
	Log         *slog.Logger
}

// RunDaemon runs a peer, and what it is asked to run beside it, until ctx ends; then it stops in order.
func RunDaemon(ctx context.Context, cfg DaemonConfig) error {
	var stops stack
	err := runDaemon(ctx, cfg, &stops)
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		err = nil // told to stop while it was starting
	}
	return errors.Join(err, stops.run())
}

func runDaemon(ctx context.Context, cfg DaemonConfig, stops *stack) error {
	log := cfg.Log
	if _, _, err := parsePeerAddress(cfg.Peer.Address); err != nil {
		return err
	}
	if cfg.NBD != "" {
		if _, err := listenAddress("--nbd", cfg.NBD); err != nil {
			return err
		}
	}
	ReserveProcs(3)
	stops.push(keepMemory())
	registry := NewRegistry()
	RegisterMetadata(registry)
	ready := newReadiness("waiting for etcd")
	dir, err := openDataDir(cfg.Peer.DataDir)
	if err != nil {
		return err
	}
	stops.push(dir.close)
	if cfg.HTTP != "" {
		h, err := ServeHTTP(cfg.HTTP, registry, ready.check, log)
		if err != nil {
			return err
		}
		stops.push(h.Close)
	}
	cfg.Etcd.Log = log
	var etcdFailed <-chan error
	if cfg.EmbedEtcd {
		server, where, err := startEtcd(ctx, cfg.Etcd, dir.path("etcd"), log)
		if err != nil {
			return err
		}
		stops.push(server.Close)
		cfg.Etcd, etcdFailed = where, server.Err()
	}
	mds, err := cfg.Etcd.WaitConnect(ctx, cfg.EtcdWait, log)
	if err != nil {
		return err
	}
	stops.push(mds.Close)
	ready.set(errors.New("waiting for the cluster to be initialised"))
	global, err := WaitInit(ctx, mds, log)
	if err != nil {
		return err
	}
	ready.set(errors.New("starting"))

	cfg.Peer.MDS, cfg.Peer.Global, cfg.Peer.Log, cfg.Peer.Registerer = mds, global, log, registry
	peer, err := startPeer(ctx, dir, cfg.Peer)
	if err != nil {
		return err
	}
	stops.push(peer.Close)
	if cfg.NBD != "" {
		volumes, err := StartVolumes(ctx, VolumesConfig{
			ClientConfig: ClientConfig{MDS: mds, Global: global, What: "torusd " + peer.ID().String(), Sole: true, CacheSize: cfg.CacheSize, Utilisation: cfg.Utilisation, Log: log, Registerer: registry},
			Listen:       cfg.NBD, Flag: "--nbd",
		})
		if err != nil {
			return err
		}
		stops.push(volumes.Close)
	}
	ready.set(nil)
	log.Info("serving", "peer", peer.ID(), "address", peer.Address(), "cluster", global.ClusterID)
	select {
	case <-ctx.Done():
	case err = <-etcdFailed:
	}
	log.Info("stopping")
	ready.set(errors.New("stopping"))
	return err
}

package node

import (
	"context"
	"errors"
	"log/slog"
	"time"
)

// FrontendConfig is what a client that serves volumes runs.
type FrontendConfig struct {
	Etcd        Etcd
	EtcdWait    time.Duration // how long to wait for etcd at the start
	NBD         string        // [HOST]:PORT or unix:PATH
	Volumes     []string      // names of those to serve; empty: all
	What        string        // the program, for those who find a volume attached
	Force       bool          // take volumes over
	CacheSize   uint64        // bytes, of the map of each volume
	Utilisation float64       // see ClientConfig
	HTTP        string        // [HOST]:PORT; empty: none
	Log         *slog.Logger
}

// RunFrontend serves volumes until ctx ends or use returns; then it flushes and releases them. use is called, with the
// context, once volumes are served; nil waits for the end of ctx.
func RunFrontend(ctx context.Context, cfg FrontendConfig, use func(context.Context, *Volumes) error) error {
	var stops stack
	err := runFrontend(ctx, cfg, &stops, use)
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		err = nil // told to stop while it was starting
	}
	return errors.Join(err, stops.run())
}

func runFrontend(ctx context.Context, cfg FrontendConfig, stops *stack, use func(context.Context, *Volumes) error) error {
	log := cfg.Log
	if _, err := listenAddress("--listen", cfg.NBD); err != nil {
		return err
	}
	ReserveProcs(1)
	stops.push(keepMemory())
	registry := NewRegistry()
	RegisterMetadata(registry)
	ready := newReadiness("waiting for etcd")
	if cfg.HTTP != "" {
		h, err := ServeHTTP(cfg.HTTP, registry, ready.check, log)
		if err != nil {
			return err
		}
		stops.push(h.Close)
	}
	cfg.Etcd.Log = log
	mds, err := cfg.Etcd.WaitConnect(ctx, cfg.EtcdWait, log)
	if err != nil {
		return err
	}
	stops.push(mds.Close)
	global, err := mds.GlobalMetadata(ctx)
	if err != nil {
		return err
	}
	if err := checkVolumes(ctx, mds, cfg.Volumes); err != nil {
		return err
	}
	volumes, err := StartVolumes(ctx, VolumesConfig{
		ClientConfig: ClientConfig{MDS: mds, Global: global, Only: cfg.Volumes, What: cfg.What, Force: cfg.Force, CacheSize: cfg.CacheSize, Utilisation: cfg.Utilisation, Log: log, Registerer: registry},
		Listen:       cfg.NBD, Flag: "--listen",
	})
	if err != nil {
		return err
	}
	stops.push(volumes.Close)
	ready.set(nil)
	log.Info("serving volumes over NBD", "address", volumes.Addr(), "cluster", global.ClusterID)
	if use != nil {
		err = use(ctx, volumes)
	} else {
		<-ctx.Done()
	}
	log.Info("stopping: flushing and releasing volumes")
	ready.set(errors.New("stopping"))
	return err
}

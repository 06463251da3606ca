package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/block"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/nbd"
)

// DefaultCacheSize is the memory for the map of each volume in bytes, unless a user says otherwise: that of 32 GiB
// written at random.
const DefaultCacheSize = 64 << 20

// shutdownTimeout bounds how long stopping waits for volumes to be flushed and released; what is not released
// is recovered by the next attach.
const shutdownTimeout = 30 * time.Second

// VolumesConfig is what it takes to serve volumes.
type VolumesConfig struct {
	ClientConfig
	Listen string // NBD at [HOST]:PORT or unix:PATH
	Flag   string // by which Listen was given, for messages
}

// Volumes serves volumes over NBD, on a loop of its own.
type Volumes struct {
	*Client
	srv  *nbd.Server
	addr string
}

// StartVolumes starts serving.
func StartVolumes(ctx context.Context, cfg VolumesConfig) (_ *Volumes, err error) {
	listen, err := listenAddress(cfg.Flag, cfg.Listen)
	if err != nil {
		return nil, err
	}
	v := &Volumes{}
	if v.Client, err = StartClient(ctx, cfg.ClientConfig); err != nil {
		return nil, err
	}
	v.loop.call(func() {
		v.srv, err = nbd.Serve(v.loop.Epoll, v.network, listen, nbd.Config{Directory: v.dir, Log: cfg.Log, Registerer: cfg.Registerer})
	})
	if err != nil {
		v.stops.run() //nolint:errcheck // the first error is the one that matters
		return nil, listenError(cfg.Flag, cfg.Listen, err)
	}
	v.stops.push(v.disconnect)
	v.addr = strings.TrimPrefix(v.srv.Addr(), "tcp://")
	return v, nil
}

// Addr is where volumes are served: HOST:PORT or unix:PATH.
func (v *Volumes) Addr() string { return v.addr }

// Sessions is the number of clients.
func (v *Volumes) Sessions() (n int) {
	v.loop.call(func() { n = v.srv.Sessions() })
	return n
}

// Stat describes a volume or a snapshot: its size is what it is now.
func (v *Volumes) Stat(ctx context.Context, name string) (device.Info, error) {
	return await(ctx, v.Client, func(done func(device.Info, error)) { v.dir.Stat(name, done) })
}

func (v *Volumes) disconnect() error {
	v.loop.Post(v.dir.Stop) // a client may be waiting for an attach that waits for peers
	return disconnect(v.loop, v.srv, v.log)
}

// disconnect ends a server when it has answered what is under way.
func disconnect(l *eventLoop, srv *nbd.Server, log *slog.Logger) error {
	done := make(chan struct{})
	l.Post(func() { srv.Shutdown(func() { close(done) }) })
	select {
	case <-done:
	case <-time.After(shutdownTimeout):
		log.Error("clients' requests were not answered in time", "timeout", shutdownTimeout)
	}
	return nil
}

// checkVolumes refuses names of volumes, and of snapshots, that do not exist.
func checkVolumes(ctx context.Context, mds torus.MetadataService, names []string) error {
	for _, name := range names {
		if vol, snap := block.SplitName(name); snap != "" {
			if _, _, err := block.Snapshot(ctx, mds, vol, snap); err != nil {
				var told *torus.Error
				if !errors.As(err, &told) || told.Hint == "" {
					err = &torus.Error{Op: "serve", Obj: "snapshot " + name, Err: err, Hint: "`torusctl volume list` shows the volumes there are, `torusctl block snapshot list " + vol + "` its snapshots"}
				}
				return err
			}
			continue
		}
		if _, err := mds.Volume(ctx, name); err != nil {
			e := &torus.Error{Op: "serve", Obj: "volume " + name, Err: err}
			if errors.Is(err, torus.ErrNotExist) {
				e.Hint = "`torusctl volume list` shows the volumes there are; `torusctl volume create-block " + name + " SIZE` makes it"
			}
			return e
		}
	}
	return nil
}

// releaseLeftovers ends the holding of volumes by dead predecessors, for whose leases nobody needs to wait.
func releaseLeftovers(ctx context.Context, mds torus.MetadataService, what string) error {
	volumes, err := mds.Volumes(ctx)
	if err != nil {
		return err
	}
	for _, v := range volumes {
		id := torus.VolumeID(v.Id)
		h, err := mds.Holder(ctx, id)
		if errors.Is(err, torus.ErrNotExist) || err == nil && (h == nil || h.What != what) {
			continue
		}
		if err == nil {
			err = mds.Unlock(ctx, id, h.Epoch)
		}
		if err != nil {
			return fmt.Errorf("release volume %s of a predecessor: %w", v.Name, err)
		}
	}
	return nil
}

package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coreos/torus"
	"github.com/coreos/torus/block"
	"github.com/coreos/torus/distributor"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/nbd"
	"github.com/coreos/torus/ring"
	"github.com/coreos/torus/transport/sock"
	"github.com/coreos/torus/transport/tdp"
)

// DefaultCacheSize is the memory for the map of each volume in bytes, unless a user says otherwise: that of 32 GiB
// written at random.
const DefaultCacheSize = 64 << 20

// shutdownTimeout bounds how long stopping waits for volumes to be flushed and released; what is not released
// is recovered by the next attach.
const shutdownTimeout = 30 * time.Second

// VolumesConfig is what it takes to serve volumes.
type VolumesConfig struct {
	MDS       torus.MetadataService
	Global    torus.GlobalMetadata
	Listen    string   // NBD at [HOST]:PORT or unix:PATH
	Flag      string   // by which Listen was given, for messages
	Only      []string // names of the volumes to serve; empty: all
	What      string   // who attaches them: the program
	Sole      bool     // nobody else alive is called What: what is still attached to it was left by a predecessor that died
	Force     bool     // take them over from others
	CacheSize uint64   // bytes

	Log        *slog.Logger
	Registerer prometheus.Registerer
}

// Volumes serves volumes over NBD, on a loop of its own.
type Volumes struct {
	log   *slog.Logger
	loop  *eventLoop
	srv   *nbd.Server
	dir   *block.Directory
	addr  string
	stops stack
}

// StartVolumes starts serving.
func StartVolumes(ctx context.Context, cfg VolumesConfig) (_ *Volumes, err error) {
	listen, err := listenAddress(cfg.Flag, cfg.Listen)
	if err != nil {
		return nil, err
	}
	v := &Volumes{log: cfg.Log}
	defer func() {
		if err != nil {
			v.stops.run() //nolint:errcheck // the first error is the one that matters
		}
	}()
	if cfg.Sole {
		if err := releaseLeftovers(ctx, cfg.MDS, cfg.What); err != nil {
			return nil, err
		}
	}
	if v.loop, err = newLoop(cfg.Log); err != nil {
		return nil, err
	}
	v.stops.push(v.loop.stop)

	network := sock.New()
	dist := distributor.New(distributor.Config{
		Loop: v.loop.Epoll, Dial: dialer(v.loop.Epoll, network, cfg.Global, cfg.What, cfg.Log), LoadRing: ringLoader(cfg.MDS), Log: cfg.Log, Metrics: cfg.Registerer,
	})
	v.stops.push(func() error {
		v.loop.call(dist.Close)
		return nil
	})
	v.loop.start()
	following, cancel := context.WithCancel(context.Background())
	wait := distributor.Follow(following, cfg.MDS, v.loop.Epoll, dist, ring.Decode, cfg.Log)
	v.stops.push(func() error {
		cancel()
		wait()
		return nil
	})
	v.dir, err = block.NewDirectory(ctx, block.Config{
		Loop: v.loop.Epoll, Dist: dist, MDS: cfg.MDS, Holder: holder(cfg.What), Force: cfg.Force, Only: cfg.Only,
		MapBytes: int(cfg.CacheSize), Log: cfg.Log,
	})
	if err != nil {
		return nil, err
	}
	v.stops.push(v.release)
	v.loop.call(func() {
		v.srv, err = nbd.Serve(v.loop.Epoll, network, listen, nbd.Config{Directory: v.dir, Log: cfg.Log, Registerer: cfg.Registerer})
	})
	if err != nil {
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

// Close answers what is under way, disconnects the clients, flushes and releases the volumes.
func (v *Volumes) Close() error { return v.stops.run() }

func (v *Volumes) disconnect() error {
	done := make(chan struct{})
	v.loop.Post(func() {
		v.dir.Stop() // a client may be waiting for an attach that waits for peers
		v.srv.Shutdown(func() { close(done) })
	})
	select {
	case <-done:
	case <-time.After(shutdownTimeout):
		v.log.Error("clients' requests were not answered in time", "timeout", shutdownTimeout)
	}
	return nil
}

var errNotReleased = errors.New("volumes could not be flushed and released in time: what was flushed is safe, the next attach recovers the rest from the peers")

func (v *Volumes) release() error {
	result := make(chan error, 1)
	v.loop.Post(func() { v.dir.Shutdown(func(err error) { result <- err }) })
	select {
	case err := <-result:
		return err
	case <-time.After(shutdownTimeout):
		return errNotReleased
	}
}

// dialer connects a loop to peers.
func dialer(l loop.Loop, network *sock.Network, global torus.GlobalMetadata, what string, log *slog.Logger) func(torus.PeerID, string, func(), func(error)) distributor.Conn {
	hello := tdp.Hello{
		Cluster: global.ClusterID, ID: torus.NewPeerID(), Incarnation: rand.Uint64(), BlockSize: global.BlockSize, Name: what,
	}
	return func(id torus.PeerID, addr string, up func(), down func(error)) distributor.Conn {
		connected := false
		return tdp.Dial(l, network, tdp.ClientConfig{
			Addr: addr, Hello: hello, Peer: id, Log: log,
			Up: func(tdp.Hello) {
				connected = true
				up()
			},
			// The client reports every failed attempt; the distributor wants to hear of the first.
			Down: func(err error) {
				if connected {
					connected = false
					down(err)
				}
			},
		})
	}
}

// ringLoader fetches earlier versions of the ring.
func ringLoader(mds torus.MetadataService) func(uint64) (torus.Ring, error) {
	return func(version uint64) (torus.Ring, error) {
		ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
		defer cancel()
		b, err := mds.RingAt(ctx, version)
		if err != nil {
			return nil, err
		}
		return ring.Decode(b)
	}
}

// holder describes this process to whoever finds a volume locked.
func holder(what string) *models.Holder {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	return &models.Holder{Host: host, Pid: uint32(os.Getpid()), What: what, SinceUnixMs: time.Now().UnixMilli()}
}

// checkVolumes refuses names of volumes that do not exist.
func checkVolumes(ctx context.Context, mds torus.MetadataService, names []string) error {
	for _, name := range names {
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

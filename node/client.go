package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coreos/torus"
	"github.com/coreos/torus/block"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/distributor"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/ring"
	"github.com/coreos/torus/transport/sock"
	"github.com/coreos/torus/transport/tdp"
)

// ClientConfig is what it takes to use volumes.
type ClientConfig struct {
	MDS       torus.MetadataService
	Global    torus.GlobalMetadata
	Only      []string // names of the volumes to use; empty: all
	What      string   // who attaches them: the program
	Sole      bool     // nobody else alive is called What: what is still attached to it was left by a predecessor that died
	Force     bool     // take them over from others
	CacheSize uint64   // bytes

	// Utilisation is the part of what is stored that compaction keeps alive; 0: the default, negative: no compaction.
	Utilisation float64

	Log        *slog.Logger
	Registerer prometheus.Registerer
}

// Client uses the volumes of a cluster, on a loop of its own.
type Client struct {
	log     *slog.Logger
	loop    *eventLoop
	network *sock.Network
	dir     *block.Directory
	stops   stack
}

// StartClient connects to the cluster.
func StartClient(ctx context.Context, cfg ClientConfig) (_ *Client, err error) {
	c := &Client{log: cfg.Log, network: sock.New()}
	defer func() {
		if err != nil {
			c.stops.run() //nolint:errcheck // the first error is the one that matters
		}
	}()
	if cfg.Sole {
		if err := releaseLeftovers(ctx, cfg.MDS, cfg.What); err != nil {
			return nil, err
		}
	}
	if c.loop, err = newLoop(cfg.Log); err != nil {
		return nil, err
	}
	c.stops.push(c.loop.stop)
	direct := prometheus.NewCounter(prometheus.CounterOpts{
		Name: "torus_distributor_direct_reads_total", Help: "Reads from the file of a peer on this machine, which was not asked for them."})
	if cfg.Registerer != nil {
		if err := cfg.Registerer.Register(direct); err != nil {
			return nil, err
		}
	}
	dist := distributor.New(distributor.Config{
		Loop: c.loop.Epoll, Dial: dialer(c.loop.Epoll, c.network, cfg.Global, cfg.What, pace{}, direct, cfg.Log), LoadRing: ringLoader(cfg.MDS), Log: cfg.Log, Metrics: cfg.Registerer,
	})
	c.stops.push(func() error {
		c.loop.call(dist.Close)
		return nil
	})
	c.loop.start()
	following, cancel := context.WithCancel(context.Background())
	wait := distributor.Follow(following, cfg.MDS, c.loop.Epoll, dist, ring.Decode, cfg.Log)
	c.stops.push(func() error {
		cancel()
		wait()
		return nil
	})
	c.dir, err = block.NewDirectory(ctx, block.Config{
		Loop: c.loop.Epoll, Dist: dist, MDS: cfg.MDS, Holder: holder(cfg.What), Force: cfg.Force, Only: cfg.Only,
		MapBytes: int(cfg.CacheSize), Utilisation: cfg.Utilisation, Log: cfg.Log,
	})
	if err != nil {
		return nil, err
	}
	c.stops.push(c.release)
	if cfg.Registerer != nil {
		if err := cfg.Registerer.Register(volumeMetrics{c}); err != nil {
			return nil, err
		}
		c.stops.push(func() error {
			cfg.Registerer.Unregister(volumeMetrics{c})
			return nil
		})
	}
	return c, nil
}

// Close answers what is under way, flushes and releases the volumes, and disconnects.
func (c *Client) Close() error { return c.stops.run() }

// await runs something on the loop and waits until it is done, or ctx ends; then it goes on by itself.
func await[T any](ctx context.Context, c *Client, start func(done func(T, error))) (T, error) {
	type result struct {
		v   T
		err error
	}
	ended := make(chan result, 1)
	c.loop.Post(func() { start(func(v T, err error) { ended <- result{v, err} }) })
	select {
	case r := <-ended:
		return r.v, r.err
	case <-ctx.Done():
		var none T
		return none, ctx.Err()
	}
}

// awaitErr is await for what has no result.
func awaitErr(ctx context.Context, c *Client, start func(done func(error))) error {
	_, err := await(ctx, c, func(done func(struct{}, error)) { start(func(err error) { done(struct{}{}, err) }) })
	return err
}

// Recover attaches a volume and releases it again, so that its head is all there is of it.
func (c *Client) Recover(ctx context.Context, vol string) error {
	return awaitErr(ctx, c, func(done func(error)) { c.dir.Recover(vol, done) })
}

// Restore is block.Directory.Restore.
func (c *Client) Restore(ctx context.Context, vol, snap string) error {
	return awaitErr(ctx, c, func(done func(error)) { c.dir.Restore(vol, snap, done) })
}

// Rewind is block.Directory.Rewind.
func (c *Client) Rewind(ctx context.Context, vol string, to time.Time) error {
	return awaitErr(ctx, c, func(done func(error)) { c.dir.Rewind(vol, to, done) })
}

// Locate is block.Directory.Locate.
func (c *Client) Locate(ctx context.Context, vol string, at time.Time) (*models.Volume, *models.Moment, error) {
	var v *models.Volume
	m, err := await(ctx, c, func(done func(*models.Moment, error)) {
		c.dir.Locate(vol, at, func(x *models.Volume, m *models.Moment, err error) {
			v = x
			done(m, err)
		})
	})
	return v, m, err
}

// Open attaches a volume, or opens a snapshot (VOL@SNAP), for whoever wants to read and write it without a loop.
func (c *Client) Open(ctx context.Context, name string) (*Disk, error) {
	dev, err := await(ctx, c, func(done func(device.Device, error)) { c.dir.Open(name, done) })
	if err != nil {
		return nil, err
	}
	return &Disk{c: c, name: name, dev: dev}, nil
}

// Disk is a volume or a snapshot in use. Its methods block, and may be called at the same time.
type Disk struct {
	c    *Client
	name string
	dev  device.Device
}

// Size is the size in bytes.
func (d *Disk) Size() uint64 { return d.dev.Size() }

// Do runs a request to its end.
func (d *Disk) Do(r *device.Request) error {
	ended := make(chan struct{})
	r.Done = func(*device.Request) { close(ended) }
	d.c.loop.Post(func() { d.dev.Submit(r) })
	<-ended
	return r.Err
}

// ReadAt reads len(b) bytes at off; it is an io.ReaderAt but for the end, which is an error.
func (d *Disk) ReadAt(b []byte, off int64) (int, error) {
	if err := d.Do(&device.Request{Op: device.Read, Off: uint64(off), Len: uint64(len(b)), Data: b}); err != nil {
		return 0, err
	}
	return len(b), nil
}

// WriteAt writes b at off.
func (d *Disk) WriteAt(b []byte, off int64) (int, error) {
	if err := d.Do(&device.Request{Op: device.Write, Off: uint64(off), Len: uint64(len(b)), Data: b}); err != nil {
		return 0, err
	}
	return len(b), nil
}

// Places finds out where pages of a snapshot lie; see file.View.
func (d *Disk) Places(first uint64, dst []file.Place) error {
	v, ok := d.dev.(*file.View)
	if !ok {
		return fmt.Errorf("%s is no snapshot: %w", d.name, torus.ErrInvalid)
	}
	ended := make(chan error, 1)
	d.c.loop.Post(func() { v.Places(first, dst, func(err error) { ended <- err }) })
	return <-ended
}

// Flush makes durable what has been written.
func (d *Disk) Flush() error { return d.Do(&device.Request{Op: device.Flush}) }

// Close ends the use of the volume; the last one to do so releases it.
func (d *Disk) Close() {
	d.c.loop.call(func() { d.c.dir.Close(d.name, d.dev) })
}

var errNotReleased = errors.New("volumes could not be flushed and released in time: what was flushed is safe, the next attach recovers the rest from the peers")

func (c *Client) release() error {
	result := make(chan error, 1)
	c.loop.Post(func() { c.dir.Shutdown(func(err error) { result <- err }) })
	select {
	case err := <-result:
		return err
	case <-time.After(shutdownTimeout):
		return errNotReleased
	}
}

// pace is how soon it is noticed that a peer does not answer; zero fields are the defaults of tdp.ClientConfig.
type pace struct{ ping, dead time.Duration }

// dialer connects a loop to peers.
func dialer(l loop.Loop, network *sock.Network, global torus.GlobalMetadata, what string, pace pace, direct prometheus.Counter, log *slog.Logger) func(torus.PeerID, string, func(), func(error)) distributor.Conn {
	hello := tdp.Hello{
		Cluster: global.ClusterID, ID: torus.NewPeerID(), Incarnation: rand.Uint64(), BlockSize: global.BlockSize, Name: what,
	}
	return func(id torus.PeerID, addr string, up func(), down func(error)) distributor.Conn {
		connected := false
		return tdp.Dial(l, network, tdp.ClientConfig{
			Addr: addr, Hello: hello, Peer: id, Log: log, PingEvery: pace.ping, DeadAfter: pace.dead, Direct: direct,
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

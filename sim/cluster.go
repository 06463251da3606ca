// Package sim runs a whole cluster in one process on virtual time: the real code of storage, peer, tdp, distributor, file and
// ring over an in-memory network and crashable disks, from one seed. What goes wrong happens again with the same seed.
package sim

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/distributor"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/metadata/temp"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/peer"
	"github.com/coreos/torus/ring"
	"github.com/coreos/torus/storage"
	"github.com/coreos/torus/transport/mem"
	"github.com/coreos/torus/transport/tdp"
	"github.com/coreos/torus/vfs"
)

// Options are the constants of a cluster.
type Options struct {
	Peers       int
	Replication int
	BlockSize   uint64
	PeerBytes   uint64
	Log         *slog.Logger // nil: none
}

// Cluster is a metadata service, peers and clients.
type Cluster struct {
	V       *loop.Virtual
	Net     *mem.Network
	MDS     *temp.Server
	Peers   []*Peer
	Clients []*Client
	opt     Options
	gmd     torus.GlobalMetadata
	admin   torus.MetadataService
	log     *slog.Logger
}

// Peer is a storage node: a disk that outlives its process.
type Peer struct {
	c           *Cluster
	ID          torus.PeerID
	Name        string
	FS          *vfs.Mem
	Loop        *loop.VirtualLoop
	Store       *storage.Disk
	Service     *peer.Service
	server      *tdp.Server
	Up          bool
	incarnation uint64
}

// New makes a cluster with all peers running and in the ring.
func New(seed uint64, opt Options) (*Cluster, error) {
	v := loop.NewVirtual(seed)
	epoch := time.Unix(1_700_000_000, 0)
	c := &Cluster{V: v, Net: mem.NewNetwork(v), opt: opt, log: opt.Log}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	c.MDS = temp.NewServer(func() time.Time { return epoch.Add(v.Now()) })
	c.gmd = torus.GlobalMetadata{ClusterID: "5eed0000-0000-4000-8000-000000000000", BlockSize: opt.BlockSize, DefaultBlockSpec: "crc"}
	c.admin = c.MDS.Client()
	ctx := context.Background()
	if err := c.MDS.Init(c.gmd, nil); err != nil {
		return nil, err
	}
	var members []ring.Member
	for i := range opt.Peers {
		p := &Peer{c: c, Name: fmt.Sprintf("peer%d", i), FS: vfs.NewMem(v.Rand().Uint64())}
		for k := range p.ID {
			p.ID[k] = byte(v.Rand().Uint32())
		}
		if err := storage.Create(p.FS, storage.Identity{Peer: p.ID, ClusterID: c.gmd.ClusterID, BlockSize: opt.BlockSize}); err != nil {
			return nil, err
		}
		c.Peers = append(c.Peers, p)
		if err := p.Start(); err != nil {
			return nil, err
		}
		members = append(members, ring.Member{ID: p.ID, Weight: opt.PeerBytes})
	}
	r, err := ring.NewSlotTable(1, opt.Replication, members, 512)
	if err != nil {
		return nil, err
	}
	b, err := r.Marshal()
	if err != nil {
		return nil, err
	}
	return c, c.admin.SetRing(ctx, 1, b)
}

// CreateVolume makes a volume.
func (c *Cluster) CreateVolume(name string, size uint64) (*models.Volume, error) {
	v := &models.Volume{Name: name, Type: "block", SizeBytes: size, BlockSpec: "crc"}
	if err := c.admin.CreateVolume(context.Background(), v); err != nil {
		return nil, err
	}
	return c.admin.Volume(context.Background(), name)
}

func (p *Peer) addr() string { return "tcp://" + p.Name + ":40000" }

// Start runs the peer's process on its disk as that is.
func (p *Peer) Start() error {
	c := p.c
	p.incarnation++
	p.Loop = c.V.NewLoop(fmt.Sprintf("%s/%d", p.Name, p.incarnation))
	log := c.log.With("at", p.Name)
	var err error
	p.Store, err = storage.Open(storage.Config{
		Loop: p.Loop, FS: p.FS, SizeBytes: c.opt.PeerBytes, SlotsPerFile: 16, Log: log,
		Identity: storage.Identity{Peer: p.ID, ClusterID: c.gmd.ClusterID, BlockSize: c.opt.BlockSize},
	})
	if err != nil {
		return fmt.Errorf("%s: %w", p.Name, err)
	}
	if p.Service, err = peer.New(peer.Config{Loop: p.Loop, Store: p.Store, FS: p.FS, Log: log}); err != nil {
		return fmt.Errorf("%s: %w", p.Name, err)
	}
	p.server, err = tdp.Serve(p.Loop, c.Net.Host(p.Name), p.addr(), tdp.ServerConfig{
		Hello: tdp.Hello{Cluster: c.gmd.ClusterID, ID: p.ID, Incarnation: p.incarnation, BlockSize: c.opt.BlockSize, Name: p.Name},
		Store: p.Service, Log: log,
	})
	if err != nil {
		return fmt.Errorf("%s: %w", p.Name, err)
	}
	p.Up = true
	return c.admin.PutPeer(context.Background(), 0, &models.Peer{Uuid: p.ID.String(), Address: p.addr(), SizeBytes: c.opt.PeerBytes, State: "ok"})
}

// Kill ends the process; what it has written stays in the page cache.
func (p *Peer) Kill() {
	if !p.Up {
		return
	}
	p.Up = false
	p.c.Net.Host(p.Name).Crash()
	p.Loop.Kill()
	p.FS.Kill()
}

// PowerLoss ends the process and takes what was not synced.
func (p *Peer) PowerLoss() {
	up := p.Up
	p.Up = false
	if up {
		p.c.Net.Host(p.Name).Crash()
		p.Loop.Kill()
	}
	p.FS = p.FS.CrashClone(p.c.V.Rand())
}

// Client is a process that attaches volumes.
type Client struct {
	c    *Cluster
	Name string
	Loop *loop.VirtualLoop
	MDS  *temp.Client
	Dist *distributor.Distributor
	dead bool
}

// NewClient starts a client process. It learns of peers by looking, now and every 100 ms.
func (c *Cluster) NewClient(name string) *Client {
	cl := &Client{c: c, Name: name, Loop: c.V.NewLoop(name), MDS: c.MDS.Client()}
	c.Clients = append(c.Clients, cl)
	id := torus.PeerID{}
	for k := range id {
		id[k] = byte(c.V.Rand().Uint32())
	}
	log := c.log.With("at", name)
	decode := func(b []byte, err error) (torus.Ring, error) {
		if err != nil {
			return nil, err
		}
		return ring.Decode(b)
	}
	cl.Dist = distributor.New(distributor.Config{
		Loop: cl.Loop, Log: log,
		Dial: func(p torus.PeerID, addr string, up func(), down func(error)) distributor.Conn {
			return tdp.Dial(cl.Loop, c.Net.Host(name), tdp.ClientConfig{
				Addr: addr, Peer: p, Log: log,
				Hello: tdp.Hello{Cluster: c.gmd.ClusterID, ID: id, Incarnation: 1, BlockSize: c.opt.BlockSize, Name: name},
				Up:    func(tdp.Hello) { up() }, Down: down,
			})
		},
		LoadRing: func(version uint64) (torus.Ring, error) {
			return decode(cl.MDS.RingAt(context.Background(), version))
		},
	})
	version := uint64(0)
	var look func()
	look = func() {
		if r, err := decode(cl.MDS.Ring(context.Background())); err == nil && r.Version() != version {
			version = r.Version()
			cl.Dist.SetRing(r)
		}
		if peers, err := cl.MDS.Peers(context.Background()); err == nil {
			for _, m := range peers {
				for _, p := range c.Peers {
					if p.ID.String() == m.Uuid {
						m.Alive = p.Up
					}
				}
			}
			cl.Dist.SetPeers(peers)
		}
		cl.Loop.After(100*time.Millisecond, look)
	}
	cl.Loop.Post(look)
	return cl
}

// Kill ends the client's process.
func (cl *Client) Kill() {
	cl.dead = true
	cl.c.Net.Host(cl.Name).Crash()
	cl.Loop.Kill()
}

// Attach opens a volume; tune may change the configuration.
func (cl *Client) Attach(v *models.Volume, tune func(*file.Config), done func(*file.File, error)) {
	cl.Loop.Post(func() {
		lease, err := cl.MDS.GrantLease(context.Background(), 10*time.Second)
		if err != nil {
			done(nil, err)
			return
		}
		cfg := file.Config{
			Loop: cl.Loop, Dist: cl.Dist, MDS: cl.MDS, Volume: v, BlockSize: uint32(cl.c.opt.BlockSize),
			Lease: lease, Holder: &models.Holder{Host: cl.Name}, Force: true,
			Log: cl.c.log.With("at", cl.Name), WallClock: func() time.Time { return time.Unix(1_700_000_000, 0).Add(cl.Loop.Now()) },
		}
		if tune != nil {
			tune(&cfg)
		}
		file.Open(cfg, done)
	})
}

// Do runs one request on an attached file to its end, or for at most limit of virtual time.
func (cl *Client) Do(f *file.File, r *device.Request, limit time.Duration) error {
	finished := false
	r.Done = func(*device.Request) { finished = true }
	cl.Loop.Post(func() { f.Submit(r) })
	if !cl.c.V.Run(func() bool { return finished }, limit) {
		return fmt.Errorf("%v at %d: %w", r.Op, r.Off, errStuck)
	}
	return r.Err
}

var errStuck = fmt.Errorf("still not done: %w", context.DeadlineExceeded)

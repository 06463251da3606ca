// Package sim runs a whole cluster in one process on virtual time: the real code of storage, peer, tdp, distributor, file and
// ring over an in-memory network and crashable disks, from one seed. What goes wrong happens again with the same seed.
package sim

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coreos/torus"
	"github.com/coreos/torus/block"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/distributor"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/metadata/temp"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/peer"
	"github.com/coreos/torus/peer/repair"
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
	Slots       int // of the ring; 0: 512
	// SlotsPerFile is how many blocks of a store share a file; 0: 16.
	SlotsPerFile int
	// BulkBytes is that of the stores.
	BulkBytes int
	Repair    bool         // peers repair their copies
	Log       *slog.Logger // nil: none
}

// Cluster is a metadata service, peers and clients.
type Cluster struct {
	V       *loop.Virtual
	Net     *mem.Network
	MDS     *temp.Server
	Peers   []*Peer
	Clients []*Client
	Witness *Witness
	Direct  tally // reads from the file of a peer which was not asked
	// PeerMDS decides about the peers' own requests to the metadata service; nil: all reach it.
	PeerMDS func(context.Context, string) temp.Fault
	opt     Options
	gmd     torus.GlobalMetadata
	admin   torus.MetadataService
	log     *slog.Logger
	rings   map[uint64]torus.Ring
	ring    uint64 // version of the newest
}

// tally is a metric that the simulator looks at.
type tally struct {
	prometheus.Counter // nil: only Inc may be called
	n                  int
}

func (t *tally) Inc() { t.n++ }

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
	Gone        bool // for good, with all it had
	Rotten      bool // some of what it stores has been damaged
	incarnation uint64
	index       int
	powers      uint16             // how often it has lost power
	fault       func(vfs.Op) error // what its disk does; nil: works
	Repair      *repair.Repairer   // nil: none
	mds         *temp.Client
	ailing      bool // its disk could not read everything at some time
	cramped     bool // its disk has no room
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
	if err := c.MDS.Init(c.gmd, nil); err != nil {
		return nil, err
	}
	c.rings = map[uint64]torus.Ring{}
	c.Witness = newWitness(c)
	for range opt.Peers {
		if _, err := c.AddPeer(); err != nil {
			return nil, err
		}
	}
	return c, c.SetRing(c.Peers)
}

// AddPeer starts a peer with an empty disk. It gets no data before it is in the ring.
func (c *Cluster) AddPeer() (*Peer, error) {
	p := &Peer{c: c, index: len(c.Peers), Name: fmt.Sprintf("peer%d", len(c.Peers)), FS: vfs.NewMem(c.V.Rand().Uint64())}
	for k := range p.ID {
		p.ID[k] = byte(c.V.Rand().Uint32())
	}
	if err := storage.Create(p.FS, p.identity()); err != nil {
		return nil, err
	}
	c.Peers = append(c.Peers, p)
	return p, p.Start()
}

// SetRing makes peers, with equal weights, the members of the next version of the ring.
func (c *Cluster) SetRing(peers []*Peer) error {
	var members []ring.Member
	for _, p := range peers {
		members = append(members, ring.Member{ID: p.ID, Weight: c.opt.PeerBytes})
	}
	slots := c.opt.Slots
	if slots == 0 {
		slots = 512
	}
	r, err := ring.NewSlotTable(c.ring+1, c.opt.Replication, members, slots)
	if err != nil {
		return err
	}
	b, err := r.Marshal()
	if err != nil {
		return err
	}
	if err := c.admin.SetRing(context.Background(), r.Version(), b); err != nil {
		return err
	}
	c.ring = r.Version()
	c.rings[c.ring] = r
	return nil
}

// placement is where a block is, by the rings as they were published.
func (c *Cluster) placement(ref torus.BlockRef, s *models.PlacementSet) torus.PeerList {
	if len(s.Peers) > 0 {
		l := make(torus.PeerList, len(s.Peers))
		for i, b := range s.Peers {
			copy(l[i][:], b)
		}
		return l
	}
	if r := c.rings[s.RingVersion]; r != nil {
		return r.GetPeers(ref).Set(int(s.Replication))
	}
	return nil
}

// home is where a block of that registered set is to be under the newest ring: at those of the set that are members, and for each
// that is not, at the next of the ring's permutation.
func (c *Cluster) home(ref torus.BlockRef, registered torus.PeerList) (home torus.PeerList) {
	r := c.rings[c.ring]
	members := r.Members()
	for _, p := range registered {
		if members.Has(p) {
			home = append(home, p)
		}
	}
	for _, l := range []torus.PeerList{r.GetPeers(ref).Peers, members} {
		for _, p := range l {
			if len(home) < len(registered) && !home.Has(p) {
				home = append(home, p)
			}
		}
	}
	return home
}

func (c *Cluster) peerByID(id torus.PeerID) *Peer {
	for _, p := range c.Peers {
		if p.ID == id {
			return p
		}
	}
	return nil
}

func (p *Peer) addr() string { return "tcp://" + p.Name + ":40000" }

func (p *Peer) identity() storage.Identity {
	return storage.Identity{Peer: p.ID, ClusterID: p.c.gmd.ClusterID, BlockSize: p.c.opt.BlockSize}
}

// Start runs the peer's process on its disk as that is.
func (p *Peer) Start() error {
	if err := p.start(); err != nil {
		p.Loop.Kill()
		p.FS.Kill()
		return fmt.Errorf("%s: %w", p.Name, err)
	}
	return nil
}

func (p *Peer) start() error {
	c := p.c
	p.incarnation++
	p.Loop = c.V.NewLoop(fmt.Sprintf("%s/%d", p.Name, p.incarnation))
	log := c.log.With("at", p.Name)
	disk := vfs.NewErrors(p.FS, func(op vfs.Op) error {
		if p.fault != nil {
			return p.fault(op)
		}
		return nil
	})
	slots := c.opt.SlotsPerFile
	if slots == 0 {
		slots = 16
	}
	var err error
	p.Store, err = storage.Open(storage.Config{
		Loop: p.Loop, FS: disk, SizeBytes: c.opt.PeerBytes, SlotsPerFile: slots, BulkBytes: c.opt.BulkBytes, Log: log, Identity: p.identity(),
	})
	if err != nil {
		return err
	}
	if p.Service, err = peer.New(peer.Config{Loop: p.Loop, Store: p.Store, FS: disk, Log: log}); err != nil {
		return err
	}
	watch := &watched{c.Witness, p, p.Service}
	p.server, err = tdp.Serve(p.Loop, c.Net.Host(p.Name), p.addr(), tdp.ServerConfig{
		Hello: tdp.Hello{Cluster: c.gmd.ClusterID, ID: p.ID, Incarnation: p.incarnation, BlockSize: c.opt.BlockSize, Name: p.Name},
		Store: watch, Log: log,
	})
	if err != nil {
		return err
	}
	if c.opt.Repair {
		if err := p.startRepair(watch); err != nil {
			return err
		}
	}
	p.Up = true
	return c.admin.PutPeer(context.Background(), 0, &models.Peer{Uuid: p.ID.String(), Address: p.addr(), SizeBytes: c.opt.PeerBytes, State: "ok"})
}

// repairEvery is how often a peer looks through its copies when nothing happens.
const repairEvery = 10 * time.Second

// startRepair has the peer look after its copies, as package node does.
func (p *Peer) startRepair(local torus.BlockStore) (err error) {
	c := p.c
	if p.mds != nil {
		_ = p.mds.Close()
	}
	p.mds = c.MDS.Client()
	p.mds.SetFaults(func(ctx context.Context, method string) temp.Fault {
		if c.PeerMDS == nil {
			return temp.None
		}
		return c.PeerMDS(ctx, method)
	})
	dist, look := c.follow(p.Loop, p.Name, p.ID, p.mds)
	l := p.Loop
	var tick func()
	tick = func() {
		look(true)
		l.After(time.Second, tick)
	}
	l.Post(tick)
	p.Repair, err = repair.New(repair.Config{
		Loop: l, Dist: dist, MDS: p.mds, Local: local, ID: p.ID, BlockSize: uint32(c.opt.BlockSize),
		Every: repairEvery, ScrubEvery: 15 * time.Second, ScrubRate: 1 << 30, CopyRate: 1 << 30, Log: c.log.With("at", p.Name),
		Forget: func(ctx context.Context, origin, clone torus.VolumeID) error {
			return block.Forget(ctx, p.mds, origin, clone)
		},
	})
	p.Store.Damaged(func(ref torus.BlockRef) { l.Post(func() { p.Repair.Damaged(ref) }) })
	return err
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
	if p.Up {
		p.Up = false
		p.c.Net.Host(p.Name).Crash()
		p.Loop.Kill()
	}
	p.powers++
	p.FS = p.FS.CrashClone(p.c.V.Rand())
}

// tail is what the peer's store says of a block; known is false if it has other things to do first. The peer must be up.
func (p *Peer) tail(ref torus.BlockRef) (t torus.Tail, known bool) {
	before := ref
	if before.Index--; ref.Index == 0 {
		before.INode--
	}
	q := &torus.Request{Op: torus.OpList, Ref: before, Len: 1, Done: func(*torus.Request) { known = true }}
	p.Store.Submit(q)
	if known && len(q.Tails) > 0 && q.Tails[0].Ref == ref {
		t = q.Tails[0]
	}
	return t, known
}

// Client is a process that attaches volumes.
type Client struct {
	c     *Cluster
	Name  string
	Loop  *loop.VirtualLoop
	MDS   *temp.Client
	Dist  *distributor.Distributor
	dead  bool
	lease torus.LeaseID
	skew  time.Duration // of its wall clock
}

// leaseTTL is how long a client holds a volume without renewing.
const leaseTTL = 10 * time.Second

// follow makes a distributor for a process at host name, and keeps it informed of peers and rings as they change. look has it look by itself;
// again even if there is no news, as peers report to the directory now and then.
func (c *Cluster) follow(l *loop.VirtualLoop, name string, id torus.PeerID, mds *temp.Client) (_ *distributor.Distributor, look func(again bool)) {
	log := c.log.With("at", name)
	decode := func(b []byte, err error) (torus.Ring, error) {
		if err != nil {
			return nil, err
		}
		return ring.Decode(b)
	}
	d := distributor.New(distributor.Config{
		Loop: l, Log: log,
		Dial: func(p torus.PeerID, addr string, up func(), down func(error)) distributor.Conn {
			return tdp.Dial(l, c.Net.Host(name), tdp.ClientConfig{
				Addr: addr, Peer: p, Log: log,
				Hello: tdp.Hello{Cluster: c.gmd.ClusterID, ID: id, Incarnation: 1, BlockSize: c.opt.BlockSize, Name: name},
				Up:    func(tdp.Hello) { up() }, Down: down, Direct: &c.Direct,
			})
		},
		LoadRing: func(version uint64) (torus.Ring, error) {
			return decode(mds.RingAt(context.Background(), version))
		},
	})
	var ringSeen []byte
	peersSeen := ""
	look = func(again bool) {
		if b, err := mds.Ring(context.Background()); err == nil && !bytes.Equal(b, ringSeen) {
			if r, err := decode(b, nil); err == nil {
				ringSeen = b
				d.SetRing(r)
			}
		}
		peers, err := mds.Peers(context.Background())
		if err != nil {
			return
		}
		seen := ""
		for _, m := range peers {
			for _, p := range c.Peers {
				if p.ID.String() == m.Uuid {
					m.Alive = p.Up
					if p.Up && p.Store.Stats().Full { // as its heartbeat says
						m.State = "full"
					}
				}
			}
			seen += fmt.Sprint(m.Uuid, m.Address, m.State, m.Alive)
		}
		if news := seen != peersSeen; news || again {
			peersSeen = seen
			d.SetPeers(peers)
		}
	}
	looking := false
	mds.OnChange(func() {
		if !looking {
			looking = true
			l.Post(func() { looking = false; look(false) })
		}
	})
	return d, look
}

// NewClient starts a client process. It learns of peers and rings when they change, and by looking once a second. It keeps its lease alive.
func (c *Cluster) NewClient(name string) *Client {
	cl := &Client{c: c, Name: name, Loop: c.V.NewLoop(name), MDS: c.MDS.Client()}
	c.Clients = append(c.Clients, cl)
	id := torus.PeerID{}
	for k := range id {
		id[k] = byte(c.V.Rand().Uint32())
	}
	dist, look := c.follow(cl.Loop, name, id, cl.MDS)
	cl.Dist = dist
	var tick func()
	tick = func() {
		look(true)
		if cl.lease != 0 {
			_ = cl.MDS.RenewLease(context.Background(), cl.lease) // a lease that is lost ends nothing
		}
		cl.Loop.After(time.Second, tick)
	}
	cl.Loop.Post(tick)
	return cl
}

// Kill ends the client's process.
func (cl *Client) Kill() {
	cl.dead = true
	_ = cl.MDS.Close()
	cl.c.Net.Host(cl.Name).Crash()
	cl.Loop.Kill()
}

// Attach opens a volume, by force; tune may change that and all else.
func (cl *Client) Attach(v *models.Volume, tune func(*file.Config), done func(*file.File, error)) {
	cl.Loop.Post(func() {
		lease, err := cl.MDS.GrantLease(context.Background(), leaseTTL)
		if err != nil {
			done(nil, err)
			return
		}
		cl.lease = lease
		cfg := file.Config{
			Loop: cl.Loop, Dist: cl.Dist, MDS: cl.MDS, Volume: v, BlockSize: uint32(cl.c.opt.BlockSize),
			Lease: lease, Holder: &models.Holder{Host: cl.Name}, Force: true,
			Log: cl.c.log.With("at", cl.Name), WallClock: func() time.Time { return time.Unix(1_700_000_000, 0).Add(cl.Loop.Now() + cl.skew) },
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

package repair_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/distributor"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/metadata/temp"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/peer"
	"github.com/coreos/torus/peer/repair"
	"github.com/coreos/torus/record"
	"github.com/coreos/torus/ring"
	"github.com/coreos/torus/storage"
	"github.com/coreos/torus/transport/mem"
	"github.com/coreos/torus/transport/tdp"
	"github.com/coreos/torus/vfs"
)

const (
	rigBlock   = 256 << 10
	rigSlots   = 96
	rigVolume  = 4 << 20
	rigCluster = "c"
)

// rig is a cluster whose peers repair: real stores, services and TDP on virtual time.
type rig struct {
	t     *testing.T
	v     *loop.Virtual
	net   *mem.Network
	mds   *temp.Server
	admin *temp.Client
	log   *slog.Logger
	nodes []*node
	vol   *models.Volume
	ring  torus.Ring
	n     int // of clients
	tune  func(*repair.Config)
	to    *models.Moment // what clients take the volume back to
}

// node is a peer: a disk that outlives its process.
type node struct {
	r       *rig
	id      torus.PeerID
	name    string
	disk    *vfs.Mem
	fs      vfs.FS // what the process sees of it; nil: disk
	l       *loop.VirtualLoop
	store   *storage.Disk
	service *peer.Service
	rep     *repair.Repairer
	mds     *temp.Client // the repairer's
	up      bool
	lives   uint64
}

func newRig(t *testing.T, seed uint64, peers, repl int) *rig {
	t.Helper()
	r := &rig{t: t, v: loop.NewVirtual(seed), log: slog.New(slog.DiscardHandler)}
	t.Cleanup(r.v.Close)
	t.Cleanup(r.v.Close)
	if os.Getenv("TORUS_LOG") != "" {
		r.log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	r.net = mem.NewNetwork(r.v)
	epoch := time.Unix(1_700_000_000, 0)
	r.mds = temp.NewServer(func() time.Time { return epoch.Add(r.v.Now()) })
	r.admin = r.mds.Client()
	r.must(r.mds.Init(torus.GlobalMetadata{ClusterID: rigCluster, BlockSize: rigBlock, DefaultBlockSpec: "crc"}, nil))
	var members []ring.Member
	for range peers {
		members = append(members, ring.Member{ID: r.addNode().id, Weight: 1})
	}
	var err error
	r.ring, err = ring.NewSlotTable(1, repl, members, 256)
	r.must(err)
	r.publish(r.ring)
	r.must(r.admin.CreateVolume(context.Background(), &models.Volume{Name: "v", Type: "block", SizeBytes: rigVolume, BlockSpec: "crc"}))
	r.vol, err = r.admin.Volume(context.Background(), "v")
	r.must(err)
	return r
}

func (r *rig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) publish(x torus.Ring) {
	r.t.Helper()
	b, err := x.Marshal()
	r.must(err)
	r.must(r.admin.SetRing(context.Background(), x.Version(), b))
	r.ring = x
}

// addNode makes a peer with an empty disk and starts it; it is in no ring.
func (r *rig) addNode() *node {
	r.t.Helper()
	n := &node{r: r, id: torus.PeerID{byte(len(r.nodes) + 1)}, name: fmt.Sprintf("peer%d", len(r.nodes)+1), disk: vfs.NewMem(r.v.Rand().Uint64())}
	r.must(storage.Create(n.disk, n.identity()))
	r.nodes = append(r.nodes, n)
	n.start()
	return n
}

func (n *node) identity() storage.Identity {
	return storage.Identity{Peer: n.id, ClusterID: rigCluster, BlockSize: rigBlock}
}

func (n *node) addr() string { return "tcp://" + n.name + ":40000" }

func (n *node) start() {
	r := n.r
	r.t.Helper()
	n.lives++
	n.l = r.v.NewLoop(fmt.Sprintf("%s/%d", n.name, n.lives))
	log := r.log.With("at", n.name)
	fsys := n.fs
	if fsys == nil {
		fsys = n.disk
	}
	var err error
	n.store, err = storage.Open(storage.Config{Loop: n.l, FS: fsys, SizeBytes: rigSlots * rigBlock, SlotsPerFile: 16, Log: log, Identity: n.identity()})
	r.must(err)
	n.service, err = peer.New(peer.Config{Loop: n.l, Store: n.store, FS: n.disk, Log: log})
	r.must(err)
	hello := tdp.Hello{Cluster: rigCluster, ID: n.id, Incarnation: n.lives, BlockSize: rigBlock, Name: n.name}
	_, err = tdp.Serve(n.l, r.net.Host(n.name), n.addr(), tdp.ServerConfig{Hello: hello, Store: n.service, Log: log})
	r.must(err)
	n.up = true
	r.must(r.admin.PutPeer(context.Background(), 0, &models.Peer{Uuid: n.id.String(), Address: n.addr(), SizeBytes: 1 << 30, State: "ok"}))
	mds := r.mds.Client()
	n.mds = mds
	cfg := repair.Config{
		Loop: n.l, Dist: r.dist(n.l, mds, n.name, hello), MDS: mds, Local: n.service, ID: n.id, BlockSize: rigBlock, Log: log,
		ScrubEvery: 5 * time.Minute, ScrubRate: 1 << 30, CopyRate: 1 << 30,
	}
	if r.tune != nil {
		r.tune(&cfg)
	}
	n.rep, err = repair.New(cfg)
	r.must(err)
	n.store.Damaged(n.rep.Damaged)
}

// dist is a view of the cluster, renewed every 100 ms.
func (r *rig) dist(l *loop.VirtualLoop, mds *temp.Client, name string, hello tdp.Hello) *distributor.Distributor {
	decode := func(b []byte, err error) (torus.Ring, error) {
		if err != nil {
			return nil, err
		}
		return ring.Decode(b)
	}
	d := distributor.New(distributor.Config{
		Loop: l, Log: r.log.With("at", name),
		Dial: func(p torus.PeerID, addr string, up func(), down func(error)) distributor.Conn {
			return tdp.Dial(l, r.net.Host(name), tdp.ClientConfig{
				Addr: addr, Peer: p, Log: r.log.With("at", name), Hello: hello, Up: func(tdp.Hello) { up() }, Down: down,
			})
		},
		LoadRing: func(version uint64) (torus.Ring, error) { return decode(mds.RingAt(context.Background(), version)) },
	})
	version := uint64(0)
	var look func()
	look = func() {
		if x, err := decode(mds.Ring(context.Background())); err == nil && x.Version() != version {
			version = x.Version()
			d.SetRing(x)
		}
		if peers, err := mds.Peers(context.Background()); err == nil {
			for _, m := range peers {
				for _, n := range r.nodes {
					if n.id.String() == m.Uuid {
						m.Alive = n.up
					}
				}
			}
			d.SetPeers(peers)
		}
		l.After(100*time.Millisecond, look)
	}
	l.Post(look)
	return d
}

func (n *node) kill() {
	n.up = false
	n.r.net.Host(n.name).Crash()
	n.l.Kill()
	n.disk.Kill()
}

// remove takes a dead peer out of the ring and forgets it.
func (r *rig) remove(n *node) {
	r.t.Helper()
	x, err := ring.RemovePeers(r.ring, n.id)
	r.must(err)
	r.publish(x)
	r.must(r.admin.DeletePeer(context.Background(), n.id))
}

// join puts a peer into the ring.
func (r *rig) join(n *node) {
	r.t.Helper()
	x, err := ring.AddPeers(r.ring, ring.Member{ID: n.id, Weight: 1})
	r.must(err)
	r.publish(x)
}

// client is a process with the volume attached.
type client struct {
	r    *rig
	l    *loop.VirtualLoop
	dist *distributor.Distributor
	mds  *temp.Client
	f    *file.File
	err  error
	done bool
}

func (r *rig) client() *client {
	r.n++
	name := fmt.Sprintf("client%d", r.n)
	c := &client{r: r, l: r.v.NewLoop(name), mds: r.mds.Client()}
	c.dist = r.dist(c.l, c.mds, name, tdp.Hello{Cluster: rigCluster, ID: torus.PeerID{0xff, byte(r.n)}, Incarnation: 1, BlockSize: rigBlock, Name: name})
	c.l.After(time.Second, func() { // when it is connected to all, blocks go where the ring says
		lease, err := c.mds.GrantLease(context.Background(), 10*time.Second)
		if err != nil {
			c.err, c.done = err, true
			return
		}
		file.Open(file.Config{
			Loop: c.l, Dist: c.dist, MDS: c.mds, Volume: r.vol, BlockSize: rigBlock, Lease: lease, Holder: &models.Holder{Host: name}, Force: true, To: r.to,
			CheckpointEvery: 5 * time.Second, Log: r.log.With("at", name), WallClock: func() time.Time { return time.Unix(0, 0) },
		}, func(f *file.File, err error) { c.f, c.err, c.done = f, err, true })
	})
	return c
}

func (r *rig) attach() *client {
	r.t.Helper()
	c := r.client()
	if !r.v.Run(func() bool { return c.done }, time.Minute) {
		r.t.Fatal("attach is still not done")
	}
	r.must(c.err)
	return c
}

func (c *client) do(q *device.Request) error {
	c.r.t.Helper()
	if q.Len == 0 {
		q.Len = uint64(len(q.Data))
	}
	finished := false
	q.Done = func(*device.Request) { finished = true }
	c.l.Post(func() { c.f.Submit(q) })
	if !c.r.v.Run(func() bool { return finished }, time.Minute) {
		c.r.t.Fatalf("%v at %d is still not done", q.Op, q.Off)
	}
	return q.Err
}

// fill writes n bytes that follow from mark at off, and flushes.
func (c *client) fill(mark byte, off, n uint64) {
	c.r.t.Helper()
	const piece = 64 << 10
	for at := off; at < off+n; at += piece {
		c.r.must(c.do(&device.Request{Op: device.Write, Off: at, Data: contents(mark, at, min(piece, off+n-at))}))
	}
	c.r.must(c.do(&device.Request{Op: device.Flush}))
}

func contents(mark byte, off, n uint64) []byte { // off is a multiple of 8
	b := make([]byte, n)
	for i := range b {
		x := ((off+uint64(i))/8 + uint64(mark)<<40) * 0x9e3779b97f4a7c15
		x ^= x >> 29
		x *= 0xbf58476d1ce4e5b9
		b[i] = byte(x >> (8 * (i % 8)))
	}
	return b
}

// check reads what fill wrote.
func (c *client) check(mark byte, off, n uint64) {
	c.r.t.Helper()
	got := make([]byte, n)
	c.r.must(c.do(&device.Request{Op: device.Read, Off: off, Data: got}))
	if !bytes.Equal(got, contents(mark, off, n)) {
		c.r.t.Fatal("D1: other bytes than were flushed")
	}
}

func (c *client) detach() {
	c.r.t.Helper()
	finished := false
	var err error
	c.l.Post(func() { c.f.Close(func(e error) { err, finished = e, true }) })
	if !c.r.v.Run(func() bool { return finished }, time.Minute) {
		c.r.t.Fatal("close is still not done")
	}
	c.r.must(err)
	c.kill()
}

func (c *client) kill() {
	c.r.net.Host(c.l.Name()).Crash()
	c.l.Kill()
}

// state is what the MDS says of the volume.
func (r *rig) state() torus.VolumeState {
	r.t.Helper()
	st, err := r.admin.VolumeState(context.Background(), torus.VolumeID(r.vol.Id))
	r.must(err)
	return st
}

// listed reads the inventory from outside.
func (r *rig) listed() (all []file.Listed, d *distributor.Distributor) {
	r.t.Helper()
	st := r.state()
	r.n++
	name := fmt.Sprintf("witness%d", r.n)
	l := r.v.NewLoop(name)
	d = r.dist(l, r.mds.Client(), name, tdp.Hello{Cluster: rigCluster, ID: torus.PeerID{0xfe, byte(r.n)}, Incarnation: 1, BlockSize: rigBlock, Name: name})
	over := false
	var err error
	l.After(time.Second, func() {
		loop.Go(l, func(t *loop.Task) {
			limit := l.Now() + 20*time.Second
			v, e := file.ReadInventory(t, file.InventoryConfig{Dist: d, Volume: torus.VolumeID(r.vol.Id), BlockSize: rigBlock, Until: func() error {
				if l.Now() > limit {
					return errors.New("too late")
				}
				return nil
			}}, st.VolumeState)
			if err = e; err == nil {
				for b := range v.Needed() {
					all = append(all, b)
				}
			}
			over = true
		})
	})
	if !r.v.Run(func() bool { return over }, time.Minute) {
		r.t.Fatal("the inventory is still not read")
	}
	r.must(err)
	l.Kill()
	return all, d
}

// blockOf reads the first n bytes of a peer's copy of a block, straight from its store.
func (n *node) blockOf(ref torus.BlockRef, length uint32) ([]byte, error) {
	q := &torus.Request{Op: torus.OpRead, Ref: ref, Len: length, Data: make([]byte, length)}
	finished := false
	q.Done = func(*torus.Request) { finished = true }
	n.l.Post(func() { n.store.Submit(q) })
	if !n.r.v.Run(func() bool { return finished }, time.Minute) {
		return nil, errors.New("never done")
	}
	return q.Data, q.Err
}

// whole compares every copy there must be, byte by byte and with its checksums, and says what is wrong.
func (r *rig) whole() error {
	r.t.Helper()
	all, d := r.listed()
	if len(all) == 0 {
		return errors.New("nothing is listed")
	}
	for _, b := range all {
		var first []byte
		home := d.Home(b.Ref, b.Set)
		if len(home) != len(b.Set) {
			return fmt.Errorf("%v is to be on %d peers", b.Ref, len(home))
		}
		for _, p := range home {
			n := r.node(p)
			got, err := n.blockOf(b.Ref, b.Length)
			if err != nil {
				return fmt.Errorf("%v at %s: %w", b.Ref, n.name, err)
			}
			if !sound(b.Ref, got) {
				return fmt.Errorf("%v at %s is damaged", b.Ref, n.name)
			}
			if first == nil {
				first = got
			}
			if !bytes.Equal(first, got) {
				return fmt.Errorf("D2: %v differs at %s", b.Ref, n.name)
			}
		}
	}
	return nil
}

func sound(ref torus.BlockRef, b []byte) bool {
	var h record.Header
	for at := 0; at < len(b); {
		n, err := record.Check(ref, uint32(at), b[at:], &h)
		if err != nil {
			return false
		}
		at += n
	}
	return true
}

func (r *rig) node(id torus.PeerID) *node {
	for _, n := range r.nodes {
		if n.id == id {
			return n
		}
	}
	r.t.Fatalf("no peer %v", id)
	return nil
}

// settled runs until every peer that is up says that it is whole, and then checks that this is so.
func (r *rig) settled(limit time.Duration) {
	r.t.Helper()
	said := func() bool {
		for _, n := range r.nodes {
			if n.up && r.ring.Members().Has(n.id) && !n.rep.Whole() {
				return false
			}
		}
		return true
	}
	r.v.RunFor(300 * time.Millisecond) // news of the ring
	if !r.v.Run(said, limit) {
		for _, n := range r.nodes {
			r.t.Logf("%s up %v: %+v", n.name, n.up, n.rep.Stats())
		}
		r.t.Fatalf("not whole after %v: %v", limit, r.whole())
	}
	if err := r.whole(); err != nil {
		r.t.Fatalf("every peer says that it is whole: %v", err)
	}
}

// repaired is how many blocks all running peers have made whole.
func (r *rig) repaired() (n uint64) {
	for _, x := range r.nodes {
		n += x.rep.Stats().Repaired
	}
	return n
}

// rot changes a byte of a peer's copy of a block, on the medium and in memory.
func (n *node) rot(ref torus.BlockRef, off uint32) {
	n.r.t.Helper()
	want, err := n.blockOf(ref, off+64)
	n.r.must(err)
	want = want[off : off+64]
	hit := 0
	names, err := n.disk.List(".")
	n.r.must(err)
	for _, name := range names {
		if len(name) < 6 || name[:6] != "slots-" {
			continue
		}
		f, err := n.disk.Open(name)
		n.r.must(err)
		size, err := f.Size()
		n.r.must(err)
		b := make([]byte, size)
		_, err = f.ReadAt(b, 0)
		n.r.must(err)
		for at := int64(off % torus.PageSize); at+64 <= size; at += torus.PageSize {
			if bytes.Equal(b[at:at+64], want) {
				_, err = f.WriteAt([]byte{b[at] ^ 0x80}, at)
				n.r.must(err)
				n.r.must(f.Datasync())
				hit++
			}
		}
		f.Close()
	}
	if hit != 1 {
		n.r.t.Fatalf("%d places look like %v at %d on the disk of %s", hit, ref, off, n.name)
	}
}

type repairConfig = repair.Config

func firstRecord(ref torus.BlockRef, b []byte) int {
	var h record.Header
	n, err := record.Check(ref, 0, b, &h)
	if err != nil {
		panic(err)
	}
	return n
}

// lastRecord is where the last record of a block begins.
func lastRecord(ref torus.BlockRef, b []byte) (last uint32) {
	var h record.Header
	for at := 0; at < len(b); {
		n, err := record.Check(ref, uint32(at), b[at:], &h)
		if err != nil {
			panic(err)
		}
		last = uint32(at)
		at += n
	}
	return last
}

// ask has the peer's store, behind its service, do something.
func (n *node) ask(q *torus.Request) {
	n.r.t.Helper()
	finished := false
	q.Done = func(*torus.Request) { finished = true }
	n.l.Post(func() { n.store.Submit(q) })
	if !n.r.v.Run(func() bool { return finished }, time.Minute) {
		n.r.t.Fatalf("%v of %v is still not done", q.Op, q.Ref)
	}
	n.r.must(q.Err)
}

func (n *node) remove(ref torus.BlockRef) {
	n.r.t.Helper()
	n.ask(&torus.Request{Op: torus.OpDelete, Ref: ref})
}

// replaceBy makes the peer's copy of a block these bytes, open and durable; none: it has no copy.
func (n *node) replaceBy(ref torus.BlockRef, data []byte) {
	n.r.t.Helper()
	n.remove(ref)
	if len(data) > 0 {
		n.ask(&torus.Request{Op: torus.OpAppend, Ref: ref, Len: uint32(len(data)), Data: data})
		n.ask(&torus.Request{Op: torus.OpSync, Ref: ref, Len: uint32(len(data))})
	}
}

func (n *node) fence(vol torus.VolumeID, epoch uint64) {
	n.r.t.Helper()
	q := &torus.Request{Op: torus.OpFence, Ref: torus.BlockRef{Volume: vol}, Epoch: epoch}
	finished := false
	q.Done = func(*torus.Request) { finished = true }
	n.l.Post(func() { n.service.Submit(q) })
	if !n.r.v.Run(func() bool { return finished }, time.Minute) || q.Err != nil {
		n.r.t.Fatal("fence:", q.Err)
	}
}

// failReads has the disk answer with errors where a block lies now.
func (n *node) failReads(ref torus.BlockRef) {
	n.r.t.Helper()
	type place struct {
		name string
		off  int64
	}
	var bad []place
	names, err := n.disk.List(".")
	n.r.must(err)
	var h record.Header
	for _, name := range names {
		if len(name) < 6 || name[:6] != "slots-" {
			continue
		}
		f, err := n.disk.Open(name)
		n.r.must(err)
		size, err := f.Size()
		n.r.must(err)
		b := make([]byte, torus.PageSize)
		for at := int64(0); at+torus.PageSize <= size; at += torus.PageSize {
			if _, err := f.ReadAt(b, at); err == nil && h.Decode(b) == nil && h.Ref == ref && h.Offset == 0 {
				bad = append(bad, place{name, at})
			}
		}
		f.Close()
	}
	if len(bad) == 0 {
		n.r.t.Fatalf("%v is not on the disk of %s", ref, n.name)
	}
	n.fs = vfs.NewErrors(n.disk, func(op vfs.Op) error {
		for _, p := range bad {
			if op.Kind == vfs.OpRead && op.Name == p.name && op.Off < p.off+rigBlock && p.off < op.Off+op.Len {
				return errors.New("input/output error")
			}
		}
		return nil
	})
}

package file_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/buf/buftest"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/distributor"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/metadata/temp"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/record"
	"github.com/coreos/torus/ring"
)

// The rig drives a File against peers that are a map each, without network and disk: for what the log itself
// decides. Package sim has the same with the real ones.

type fakeBlock struct {
	data   []byte // in memory
	synced int    // of it, on the platter
	sealed bool
}

type fakePeer struct {
	id       torus.PeerID
	r        *rig
	blocks   map[torus.BlockRef]*fakeBlock
	fence    map[torus.VolumeID]uint64
	up       bool
	full     bool                       // refuses new blocks
	slots    int                        // takes so many blocks, of which rigKept only with Reserve; 0: any number
	drop     func(*torus.Request) error // a fault: non-nil fails the request
	conns    []*fakeConn
	connects time.Duration                      // how long that takes
	hold     func(*torus.Request) bool          // a request that this holds up is not served as long as it does
	now      func(*torus.Request) bool          // a request that is answered before Submit returns
	answers  func(*torus.Request) (bool, error) // serves some requests in another way
}

type fakeConn struct {
	p    *fakePeer
	l    *loop.VirtualLoop
	up   func()
	down func(error)
	last time.Duration // replies keep their order
	open bool
	live []*flight
}

// flight is a request under way: the same Request may be submitted again as soon as this one is done.
type flight struct {
	*torus.Request
	sum uint32 // of the data of an append
}

func (c *fakeConn) Close() { c.open = false }

func (c *fakeConn) Submit(q *torus.Request) {
	if !c.open {
		q.Finish(torus.ErrNoPeer)
		return
	}
	if c.p.now != nil && c.p.now(q) {
		q.Finish(c.p.serve(q))
		return
	}
	x := &flight{Request: q}
	if q.Op == torus.OpAppend {
		x.sum = record.Checksum(q.Data)
	}
	c.live = append(c.live, x)
	at := max(c.l.Now()+time.Duration(1+c.p.r.rng.IntN(200))*time.Microsecond, c.last+1)
	if q.Op == torus.OpSync { // a disk takes its time, and appends do not wait for it
		at += time.Duration(c.p.r.rng.IntN(3000)) * time.Microsecond
	} else {
		c.last = at
	}
	var serve func()
	serve = func() {
		q := x.Request
		if c.p.hold != nil && (c.p.hold(q) || slices.Index(c.live, x) > slices.IndexFunc(c.live, func(y *flight) bool { return y.Ref == q.Ref })) {
			c.l.After(time.Millisecond, serve)
			return
		}
		if i := slices.Index(c.live, x); i < 0 {
			return // the connection broke
		} else {
			c.live = slices.Delete(c.live, i, i+1)
		}
		if q.Op == torus.OpAppend && x.sum != record.Checksum(q.Data) {
			c.p.r.t.Errorf("the data of an append to %v was changed while it was under way", q.Ref)
		}
		q.Finish(c.p.serve(q))
	}
	c.l.After(at-c.l.Now(), serve)
}

// Replace implements distributor.Replacer.
func (c *fakeConn) Replace(old, with *torus.Request) bool {
	i := slices.IndexFunc(c.live, func(x *flight) bool { return x.Request == old })
	if i >= 0 {
		c.live[i].Request = with
	}
	return i >= 0
}

// crash closes the peer's connections. lose: power is lost as well.
func (p *fakePeer) crash(lose bool) {
	p.up = false
	for _, ref := range slices.SortedFunc(maps.Keys(p.blocks), func(a, b torus.BlockRef) int { return bytes.Compare(a.ToBytes(), b.ToBytes()) }) {
		if b := p.blocks[ref]; lose {
			keep := b.synced + p.r.rng.IntN(len(b.data)-b.synced+1)/4096*4096
			b.data = b.data[:keep]
			b.data = b.data[:validLength(ref, b.data)]
			b.synced = len(b.data)
		}
	}
	for _, c := range p.conns {
		if !c.open {
			continue
		}
		c.open = false
		c.down(torus.ErrBlockUnavailable)
		live := c.live
		c.live = nil
		for _, q := range live {
			if p.r.rng.IntN(2) == 0 {
				p.serveLate(q.Request) // it had arrived
			}
			q.Finish(torus.ErrBlockUnavailable)
		}
	}
}

func (p *fakePeer) serveLate(q *torus.Request) {
	x := *q
	x.Buf = nil // it is still with the one who asks
	_ = p.serve(&x)
}

func (p *fakePeer) restart() {
	p.up = true
	for _, c := range p.conns {
		if !c.l.Dead() && !c.open {
			c.open = true
			c.l.Post(c.up)
		}
	}
}

func validLength(ref torus.BlockRef, b []byte) int {
	var h record.Header
	n := 0
	for n < len(b) {
		k, err := record.Check(ref, uint32(n), b[n:], &h)
		if err != nil {
			break
		}
		n += k
	}
	return n
}

const rigKept = 2

// noRoom reports whether an ordinary block is refused.
func (p *fakePeer) noRoom() bool { return p.full || p.slots > 0 && len(p.blocks) >= p.slots-rigKept }

func (p *fakePeer) serve(q *torus.Request) error {
	if q.Buf != nil {
		buftest.Exchange(&q.Buf, &q.Data) // whatever the answer is
		p.r.exchanged++
	}
	if p.drop != nil {
		if err := p.drop(q); err != nil {
			return err
		}
	}
	v := q.Ref.Volume
	if (q.Op.Mutating() || q.Epoch > 0 && q.Op != torus.OpFence) && q.Epoch < p.fence[v] {
		q.Fence = p.fence[v]
		return torus.ErrFenced
	}
	if p.answers != nil {
		if ok, err := p.answers(q); ok {
			return err
		}
	}
	b := p.blocks[q.Ref]
	switch q.Op {
	case torus.OpAppend:
		if b == nil {
			if p.full || p.noRoom() && !q.Reserve || p.slots > 0 && len(p.blocks) >= p.slots {
				return torus.ErrOutOfSpace
			}
			if q.Off > 0 {
				return torus.ErrGap
			}
			b = &fakeBlock{}
			p.blocks[q.Ref] = b
		}
		switch {
		case b.sealed:
			return torus.ErrSealed
		case int(q.Off) > len(b.data):
			return torus.ErrGap
		case int(q.Off) < len(b.data):
			if int(q.Off+q.Len) > len(b.data) || !bytes.Equal(b.data[q.Off:q.Off+q.Len], q.Data) {
				return torus.ErrInvalid
			}
		default:
			if validLength(q.Ref, append(slices.Clone(b.data), q.Data...)) != len(b.data)+len(q.Data) {
				return torus.ErrCorrupt
			}
			b.data = append(b.data, q.Data...)
		}
		q.Length = uint32(len(b.data))
	case torus.OpSync:
		if b == nil || len(b.data) < int(q.Len) {
			return torus.ErrGap
		}
		b.synced = len(b.data)
	case torus.OpFence:
		if q.Epoch < p.fence[v] {
			q.Fence = p.fence[v]
			return torus.ErrFenced
		}
		p.fence[v] = q.Epoch
		for ref, b := range p.blocks {
			if ref.Type == q.Ref.Type && ref.Volume == v && ref.INode == q.Ref.INode && ref.Index >= q.Ref.Index && ref.Index < q.Ref.Index+torus.IndexID(q.Len) {
				q.Tails = append(q.Tails, torus.Tail{Ref: ref, Length: uint32(len(b.data))})
				for off := 0; off < len(b.data); {
					var h record.Header
					n, err := record.Check(ref, uint32(off), b.data[off:], &h)
					if err != nil {
						return err
					}
					q.Committed = max(q.Committed, h.Flushed)
					off += n
				}
			}
		}
	case torus.OpSeal:
		if b == nil || len(b.data) < int(q.Len) {
			return torus.ErrGap
		}
		b.data, b.synced, b.sealed = b.data[:q.Len], int(q.Len), true
	case torus.OpRead:
		if b == nil {
			return torus.ErrBlockNotExist
		}
		if int(q.Off)+len(q.Data) > len(b.data) {
			return torus.ErrGap
		}
		copy(q.Data, b.data[q.Off:])
	case torus.OpScan:
		if b == nil {
			return torus.ErrBlockNotExist
		}
		q.Data = nil
		for off := int(q.Off); off < len(b.data); {
			var h record.Header
			n, err := record.Check(q.Ref, uint32(off), b.data[off:], &h)
			if err != nil {
				return err
			}
			if len(q.Data) > 0 && len(q.Data)+record.ScanEntrySize(b.data[off:]) > int(q.Len) {
				break
			}
			q.Data = record.AppendScanEntry(q.Data, uint32(off), b.data[off:])
			off += n
		}
	case torus.OpDelete:
		delete(p.blocks, q.Ref)
	}
	return nil
}

type rig struct {
	t     *testing.T
	v     *loop.Virtual
	rng   *rand.Rand
	mds   *temp.Server
	peers []*fakePeer
	ring  torus.Ring
	vol   *models.Volume
	size  uint64
	log   *slog.Logger
	n     int
	now   bool
	// exchanged counts the reads that were given other memory
	exchanged int
	// faulty: transactions fail now and then, before or after they were made, or arrive late
	faulty bool
}

const rigBlock = 256 << 10

func newRig(t *testing.T, seed uint64, peers, repl int, size uint64) *rig {
	r := &rig{now: os.Getenv("TORUS_NOW") != "", t: t, v: loop.NewVirtual(seed), rng: rand.New(rand.NewPCG(seed, 1)), size: size}
	t.Cleanup(r.v.Close) // else tasks that wait for ever would keep all of it in memory
	epoch := time.Unix(1_700_000_000, 0)
	r.mds = temp.NewServer(func() time.Time { return epoch.Add(r.v.Now()) })
	r.log = slog.New(slog.DiscardHandler)
	if testing.Verbose() {
		r.log = slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	if err := r.mds.Init(torus.GlobalMetadata{ClusterID: "c", BlockSize: rigBlock, DefaultBlockSpec: "crc"}, nil); err != nil {
		t.Fatal(err)
	}
	var members []ring.Member
	for i := range peers {
		p := &fakePeer{id: torus.PeerID{byte(i + 1)}, r: r, blocks: map[torus.BlockRef]*fakeBlock{}, fence: map[torus.VolumeID]uint64{}, up: true}
		r.peers = append(r.peers, p)
		members = append(members, ring.Member{ID: p.id, Weight: 1})
	}
	var err error
	if r.ring, err = ring.NewSlotTable(1, repl, members, 256); err != nil {
		t.Fatal(err)
	}
	b, err := r.ring.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	c := r.mds.Client()
	if err := c.SetRing(context.Background(), 1, b); err != nil {
		t.Fatal(err)
	}
	v := &models.Volume{Name: "v", Type: "block", SizeBytes: size, BlockSpec: "crc"}
	if err := c.CreateVolume(context.Background(), v); err != nil {
		t.Fatal(err)
	}
	if r.vol, err = c.Volume(context.Background(), "v"); err != nil {
		t.Fatal(err)
	}
	return r
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Log(string(bytes.TrimSpace(b)))
	return len(b), nil
}

// client is a process with the volume attached.
type client struct {
	r    *rig
	l    *loop.VirtualLoop
	d    *distributor.Distributor
	mds  *temp.Client
	f    *file.File
	err  error
	done bool
	fail error
}

func (r *rig) client(tune func(*file.Config)) *client {
	r.n++
	c := &client{r: r, l: r.v.NewLoop(fmt.Sprintf("client%d", r.n)), mds: r.mds.Client()}
	c.d = distributor.New(distributor.Config{
		Loop: c.l, Log: r.log.With("client", r.n),
		Dial: func(id torus.PeerID, _ string, up func(), down func(error)) distributor.Conn {
			for _, p := range r.peers {
				if p.id == id {
					x := &fakeConn{p: p, l: c.l, up: up, down: down}
					p.conns = append(p.conns, x)
					if p.up {
						x.open = true
						c.l.After(p.connects, up)
					}
					if r.now {
						return nowConn{x}
					}
					return x
				}
			}
			panic("no such peer")
		},
		LoadRing: func(v uint64) (torus.Ring, error) {
			b, err := c.mds.RingAt(context.Background(), v)
			if err != nil {
				return nil, err
			}
			return ring.Decode(b)
		},
	})
	if r.faulty {
		c.mds.SetFaults(func(_ context.Context, method string) temp.Fault {
			if (method == "Commit" || method == "VolumeState") && r.rng.IntN(3) == 0 {
				return temp.Fault(1 + r.rng.IntN(3))
			}
			return temp.None
		})
		var late func()
		late = func() {
			r.mds.Deliver()
			r.v.At(time.Duration(r.rng.IntN(3000))*time.Millisecond, late)
		}
		late()
	}
	c.l.Post(func() {
		c.d.SetRing(r.ring)
		var l []*models.Peer
		for _, p := range r.peers {
			l = append(l, &models.Peer{Uuid: p.id.String(), Address: "x", Alive: p.up})
		}
		c.d.SetPeers(l)
		lease, err := c.mds.GrantLease(context.Background(), 10*time.Second)
		if err != nil {
			r.t.Error(err)
		}
		cfg := file.Config{
			Loop: c.l, Dist: c.d, MDS: c.mds, Volume: r.vol, BlockSize: rigBlock, Lease: lease, Holder: &models.Holder{Host: c.l.Name()},
			Force: true, Log: r.log.With("client", r.n), WallClock: func() time.Time { return time.Unix(0, 0) },
			OnFail: func(err error) { c.fail = err },
		}
		if tune != nil {
			tune(&cfg)
		}
		file.Open(cfg, func(f *file.File, err error) { c.f, c.err, c.done = f, err, true })
	})
	return c
}

// attach waits until the client serves.
func (r *rig) attach(tune func(*file.Config)) *client {
	r.t.Helper()
	c := r.client(tune)
	if !r.v.Run(func() bool { return c.done }, time.Minute) {
		r.t.Fatal("attach is still not done")
	}
	if c.err != nil {
		r.t.Fatal(c.err)
	}
	return c
}

// do runs a request to its end.
func (c *client) do(q *device.Request) error {
	c.r.t.Helper()
	if q.Len == 0 && q.Op != device.Flush {
		q.Len = uint64(len(q.Data))
	}
	finished := false
	q.Done = func(*device.Request) { finished = true }
	if data := q.Data; q.Op == device.Read && len(data) > 0 { // with memory that may be exchanged, as a server does
		q.Buf = buf.Get(len(data))
		q.Data = q.Buf.Bytes()[:len(data)]
		copy(q.Data, data)
		defer func() {
			if &q.Data[0] != &q.Buf.Bytes()[0] || len(q.Data) != len(data) {
				c.r.t.Errorf("%d bytes read, which are not the first of their buffer", len(q.Data))
			}
			copy(data, q.Data)
			q.Buf.Release()
			q.Buf, q.Data = nil, data
		}()
	}
	c.l.Post(func() { c.f.Submit(q) })
	if !c.r.v.Run(func() bool { return finished }, time.Minute) {
		c.r.t.Fatalf("request %d at %d is still not done", q.Op, q.Off)
	}
	return q.Err
}

func (c *client) must(q *device.Request) {
	c.r.t.Helper()
	if err := c.do(q); err != nil {
		c.r.t.Fatalf("request %d at %d: %v", q.Op, q.Off, err)
	}
}

// detach closes the file in order.
func (c *client) detach() {
	c.r.t.Helper()
	if c.f.Pace() > 0 && !c.f.Compacting() {
		c.r.t.Error("there is a pace, and no compaction")
	}
	var err error
	finished := false
	c.l.Post(func() { c.f.Close(func(e error) { err, finished = e, true }) })
	if !c.r.v.Run(func() bool { return finished }, time.Minute) {
		c.r.t.Fatal("close is still not done")
	}
	if err != nil {
		c.r.t.Fatal(err)
	}
}

func (c *client) kill() {
	c.l.Kill()
	for _, p := range c.r.peers {
		for _, x := range p.conns {
			if x.l == c.l {
				live := x.live
				x.open, x.live = false, nil
				for _, q := range live {
					if c.r.rng.IntN(2) == 0 {
						break // the rest never left
					}
					p.serveLate(q.Request)
				}
			}
		}
	}
}

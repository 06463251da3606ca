package sim

import (
	"context"
	"fmt"
	"runtime"
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
	"github.com/coreos/torus/ring"
	"github.com/coreos/torus/storage"
	"github.com/coreos/torus/transport/sock"
	"github.com/coreos/torus/transport/tdp"
	"github.com/coreos/torus/vfs"
)

// What BenchmarkStack measures, as it runs in production: each peer and the client on an event loop of its own, TCP on the loopback, and
// the file system of the temporary directory. Its allocations are those of the daemons, all four together.
func BenchmarkSockets(b *testing.B) {
	for _, c := range stackCells {
		b.Run(c.String(), func(b *testing.B) {
			l, f := startSockets(b)
			newBenchLoad(f, device.Write, 32).runOn(b, l, 3*benchVolume/PageSize)
			newBenchLoad(f, device.Flush, 1).runOn(b, l, 1)
			w := newBenchLoad(f, c.op, c.depth)
			b.SetBytes(PageSize)
			b.ReportAllocs()
			b.ResetTimer()
			w.runOn(b, l, b.N)
			b.StopTimer()
		})
	}
}

// runOn is n requests on a loop that runs.
func (w *benchLoad) runOn(b testing.TB, l *loop.Epoll, n int) {
	b.Helper()
	w.left, w.finished = n, make(chan struct{})
	l.Post(w.start)
	<-w.finished
	if w.err != nil {
		b.Fatal(w.err)
	}
}

// startLoop runs an event loop on a thread of its own until the benchmark ends.
func startLoop(b testing.TB) *loop.Epoll {
	b.Helper()
	l, err := loop.NewEpoll(nil)
	if err != nil {
		b.Fatal(err)
	}
	ended := make(chan error)
	go func() { ended <- l.Run() }()
	b.Cleanup(func() {
		l.Stop()
		if err := <-ended; err != nil {
			b.Error(err)
		}
		if err := l.Close(); err != nil {
			b.Error(err)
		}
	})
	return l
}

// call runs fn on l and waits for it.
func call(l *loop.Epoll, fn func()) {
	done := make(chan struct{})
	l.Post(func() {
		fn()
		close(done)
	})
	<-done
}

// startSockets starts three peers and a client with a volume attached.
func startSockets(b testing.TB) (*loop.Epoll, *file.File) {
	b.Helper()
	procs := runtime.GOMAXPROCS(0)
	runtime.GOMAXPROCS(max(procs, 4+2)) // as node.ReserveProcs does: a loop keeps one busy while it sleeps in the kernel
	b.Cleanup(func() { runtime.GOMAXPROCS(procs) })
	check := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	const cluster = "5eed0000-0000-4000-8000-000000000000"
	ctx := context.Background()
	mds := temp.NewServer(time.Now)
	check(mds.Init(torus.GlobalMetadata{ClusterID: cluster, BlockSize: torus.DefaultBlockSize, DefaultBlockSpec: "crc"}, nil))
	admin := mds.Client()
	var members []ring.Member
	var peers []*models.Peer
	for i := range 3 {
		id := torus.PeerID{byte(i + 1)}
		identity := storage.Identity{Peer: id, ClusterID: cluster, BlockSize: torus.DefaultBlockSize}
		fs := vfs.NewOS(b.TempDir())
		check(storage.Create(fs, identity))
		l := startLoop(b)
		var store *storage.Disk
		var srv *tdp.Server
		var err error
		call(l, func() {
			if store, err = storage.Open(storage.Config{Loop: l, FS: fs, SizeBytes: 512 << 20, SlotsPerFile: 16, Identity: identity}); err != nil {
				return
			}
			var service *peer.Service
			if service, err = peer.New(peer.Config{Loop: l, Store: store, FS: fs}); err != nil {
				return
			}
			srv, err = tdp.Serve(l, sock.New(), "tdp://127.0.0.1:0", tdp.ServerConfig{
				Hello: tdp.Hello{Cluster: cluster, ID: id, Incarnation: 1, BlockSize: torus.DefaultBlockSize}, Store: service,
			})
		})
		check(err)
		b.Cleanup(func() {
			closed := make(chan error)
			l.Post(func() { srv.Close(func() { closed <- store.Close() }) })
			if err := <-closed; err != nil {
				b.Error(err)
			}
		})
		members = append(members, ring.Member{ID: id, Weight: 1})
		peers = append(peers, &models.Peer{Uuid: id.String(), Address: srv.Addr(), Alive: true})
	}
	r, err := ring.NewSlotTable(1, 2, members, 512)
	check(err)
	text, err := r.Marshal()
	check(err)
	check(admin.SetRing(ctx, 1, text))
	check(admin.CreateVolume(ctx, &models.Volume{Name: "v", Type: "block", SizeBytes: benchVolume, BlockSpec: "crc"}))
	volume, err := admin.Volume(ctx, "v")
	check(err)
	lease, err := admin.GrantLease(ctx, time.Hour)
	check(err)

	l := startLoop(b)
	network := sock.New()
	type attached struct {
		f   *file.File
		err error
	}
	result := make(chan attached, 1)
	var dist *distributor.Distributor
	call(l, func() {
		dist = distributor.New(distributor.Config{
			Loop: l,
			Dial: func(p torus.PeerID, addr string, up func(), down func(error)) distributor.Conn {
				return tdp.Dial(l, network, tdp.ClientConfig{
					Addr: addr, Peer: p, Up: func(tdp.Hello) { up() }, Down: down,
					Hello: tdp.Hello{Cluster: cluster, ID: torus.PeerID{0xc}, Incarnation: 1, BlockSize: torus.DefaultBlockSize},
				})
			},
			LoadRing: func(uint64) (torus.Ring, error) { return r, nil },
		})
		dist.SetRing(r)
		dist.SetPeers(peers)
		file.Open(file.Config{
			Loop: l, Dist: dist, MDS: admin, Volume: volume, BlockSize: torus.DefaultBlockSize, Lease: lease, Holder: &models.Holder{Host: "client"},
			CheckpointBytes: 8 << 20, WallClock: time.Now,
			Utilisation: -1, // what compaction costs depends on what was written before
		}, func(f *file.File, err error) { result <- attached{f, err} })
	})
	a := <-result
	check(a.err)
	b.Cleanup(func() {
		closed := make(chan error)
		l.Post(func() { a.f.Close(func(err error) { closed <- err }) })
		if err := <-closed; err != nil {
			b.Error(err)
		}
		call(l, dist.Close)
	})
	return l, a.f
}

// stackCell is a load of both benchmarks.
type stackCell struct {
	name  string
	op    device.Op
	depth int
}

func (c stackCell) String() string { return fmt.Sprintf("%s/depth=%d", c.name, c.depth) }

var stackCells = []stackCell{
	{"write", device.Write, 1}, {"write", device.Write, 32}, {"read", device.Read, 1}, {"read", device.Read, 32},
}

package sim

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
)

const (
	benchVolume = 16 << 20
	benchLimit  = 24 * time.Hour // of virtual time
)

// benchLoad keeps depth requests of a page under way at random places until n are done.
type benchLoad struct {
	f        *file.File
	rng      *rand.Rand
	left     int // to be submitted
	open     int // under way
	err      error
	reqs     []device.Request
	finished chan struct{} // closed at the end
}

func newBenchLoad(f *file.File, op device.Op, depth int) *benchLoad {
	w := &benchLoad{f: f, rng: rand.New(rand.NewPCG(3, 3)), reqs: make([]device.Request, depth)}
	data := make([]byte, depth*PageSize)
	for i := range data {
		data[i] = byte(i * 7)
	}
	for i := range w.reqs {
		w.reqs[i] = device.Request{Op: op, Len: PageSize, Done: w.done, User: data[i*PageSize:][:PageSize]}
	}
	return w
}

// start begins with as many as may be under way; on the loop.
func (w *benchLoad) start() {
	for i := range w.reqs {
		w.next(&w.reqs[i])
	}
}

func (w *benchLoad) next(q *device.Request) {
	if w.left == 0 {
		return
	}
	w.left--
	w.open++
	q.Off = w.rng.Uint64N(benchVolume/PageSize) * PageSize
	q.Data = q.User.([]byte) // a write that had to wait leaves none there
	w.f.Submit(q)
}

func (w *benchLoad) done(q *device.Request) {
	w.open--
	if q.Err != nil {
		w.err, w.left = q.Err, 0
	}
	if w.left == 0 && w.open == 0 {
		close(w.finished)
		return
	}
	w.next(q)
}

// run is n requests on virtual time.
func (w *benchLoad) run(cl *Client, n int) error {
	w.left, w.finished = n, make(chan struct{})
	cl.Loop.Post(w.start)
	if !cl.c.V.Run(func() bool { return w.left == 0 && w.open == 0 }, benchLimit) {
		return errStuck
	}
	return w.err
}

// What a 4 KiB write or read costs in CPU and allocations from the file through distributor, TDP, the peers' fences and the store
// to a disk in memory, two copies on three peers, all in one process. The network and the disks in memory, which production does not
// have, are in the figures; system calls are not.
func BenchmarkStack(b *testing.B) {
	for _, c := range stackCells {
		b.Run(c.String(), func(b *testing.B) {
			cluster, err := New(1, Options{Peers: 3, Replication: 2, BlockSize: torus.DefaultBlockSize, PeerBytes: 512 << 20})
			if err != nil {
				b.Fatal(err)
			}
			defer cluster.V.Close()
			v, err := cluster.CreateVolume("v", benchVolume)
			if err != nil {
				b.Fatal(err)
			}
			cl := cluster.NewClient("client")
			var f *file.File
			over := false
			cl.Attach(v, func(c *file.Config) {
				c.CheckpointBytes, c.RetainBytes = 8<<20, 4<<20
			}, func(got *file.File, e error) { f, err, over = got, e, true })
			if !cluster.V.Run(func() bool { return over }, time.Minute) || err != nil {
				b.Fatalf("attach: %v", err)
			}
			// Pools, map and blocks are then as they stay.
			if err := newBenchLoad(f, device.Write, 32).run(cl, 3*benchVolume/PageSize); err != nil {
				b.Fatal(err)
			}
			if err := cl.Do(f, &device.Request{Op: device.Flush}, time.Minute); err != nil {
				b.Fatal(err)
			}
			w := newBenchLoad(f, c.op, c.depth)
			b.SetBytes(PageSize)
			b.ReportAllocs()
			b.ResetTimer()
			if err := w.run(cl, b.N); err != nil {
				b.Fatal(err)
			}
			b.StopTimer()
		})
	}
}

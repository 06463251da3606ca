package peer

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/storage"
	"github.com/coreos/torus/storage/storetest"
	"github.com/coreos/torus/vfs"
)

// slowStore is a store in which requests take effect a random time after they were submitted, as when they wait for a slot. Those
// to one block keep their order; a Fence overtakes them.
type slowStore struct {
	torus.Store
	l       loop.Loop
	rng     *rand.Rand
	delay   time.Duration // up to that
	until   map[torus.BlockRef]time.Duration
	applied func(r *torus.Request) // called when a change takes effect
}

func (s *slowStore) Submit(r *torus.Request) {
	if s.delay == 0 || r.Op == torus.OpFence {
		s.apply(r)
		return
	}
	at := max(s.until[r.Ref], s.l.Now()+time.Duration(s.rng.Int64N(int64(s.delay))))
	s.until[r.Ref] = at
	s.l.After(at-s.l.Now(), func() { s.apply(r) })
}

func (s *slowStore) apply(r *torus.Request) {
	if s.applied != nil && r.Op.Mutating() {
		s.applied(r)
	}
	s.Store.Submit(r)
}

// node is a peer whose service can be started again and again over the same disk.
type node struct {
	t     testing.TB
	v     *loop.Virtual
	l     *loop.VirtualLoop
	disk  *vfs.Mem
	fault func(vfs.Op) error
	mem   *storage.Memory
	slow  *slowStore
	s     *Service
}

func newNode(t testing.TB, seed uint64) *node {
	v := loop.NewVirtual(seed)
	mem, err := storage.NewMemory(storage.Config{
		Loop:      v.NewLoop("store"),
		Identity:  storage.Identity{Peer: torus.PeerID{1}, ClusterID: "c", BlockSize: 4 << 20},
		SizeBytes: 4 << 30,
	})
	must(t, err)
	n := &node{t: t, v: v, disk: vfs.NewMem(seed), mem: mem}
	n.slow = &slowStore{Store: mem, rng: n.v.Rand()}
	must(t, n.start())
	return n
}

func (n *node) start() error {
	n.l = n.v.NewLoop("peer")
	n.slow.l, n.slow.until = n.l, map[torus.BlockRef]time.Duration{}
	fsys := vfs.NewErrors(n.disk, func(op vfs.Op) error {
		if n.fault != nil {
			return n.fault(op)
		}
		return nil
	})
	var err error
	n.s, err = New(Config{Loop: n.l, Store: n.slow, FS: fsys, Registerer: prometheus.NewRegistry()})
	return err
}

// kill ends the process; powerCut takes what was not synced along. (The blocks are kept: they are another test's.)
func (n *node) kill(powerCut bool) {
	n.l.Kill()
	if powerCut {
		n.disk = n.disk.CrashClone(n.v.Rand())
	} else {
		n.disk.Kill()
	}
}

func (n *node) submit(r *torus.Request) *bool {
	done := new(bool)
	r.Done = func(*torus.Request) {
		if *done {
			n.t.Errorf("Done of %v called twice", r.Op)
		}
		*done = true
	}
	n.l.Post(func() { n.s.Submit(r) })
	return done
}

func (n *node) do(r *torus.Request) *torus.Request {
	n.t.Helper()
	done := n.submit(r)
	if !n.v.Run(func() bool { return *done }, time.Minute) {
		n.t.Fatalf("%v was never done", r.Op)
	}
	return r
}

func block(volume, epoch, index uint64) torus.BlockRef {
	return torus.BlockRef{Volume: torus.VolumeID(volume), INode: torus.INodeID(epoch), Index: torus.IndexID(index)}
}

func appendTo(ref torus.BlockRef, epoch uint64, off uint32) *torus.Request {
	return &torus.Request{Op: torus.OpAppend, Ref: ref, Epoch: epoch, Off: off, Data: storetest.Record(ref, off, 1, 0, 1)}
}

func fence(volume, epoch uint64) *torus.Request {
	return &torus.Request{Op: torus.OpFence, Ref: block(volume, 3, 0), Epoch: epoch, Len: 100}
}

// TestFenceRefuses (L1): below a fence nothing changes, and reads that carry an epoch are refused, too.
func TestFenceRefuses(t *testing.T) {
	n := newNode(t, 1)
	ref := block(1, 3, 5)
	must(t, n.do(appendTo(ref, 3, 0)).Err)
	if r := n.do(fence(1, 4)); r.Err != nil || len(r.Tails) != 1 || r.Tails[0].Ref != ref || r.Tails[0].Length != 8192 || r.Fence != 4 {
		t.Fatal(r.Err, r.Tails, r.Fence)
	}
	for _, r := range []*torus.Request{
		appendTo(ref, 3, 8192),
		{Op: torus.OpSync, Ref: ref, Epoch: 3, Len: 8192},
		{Op: torus.OpSeal, Ref: ref, Epoch: 3, Len: 8192},
		{Op: torus.OpDelete, Ref: ref, Epoch: 3},
		{Op: torus.OpRead, Ref: ref, Epoch: 3, Data: make([]byte, 4096)},
		{Op: torus.OpScan, Ref: ref, Epoch: 3, Len: 8192},
		fence(1, 3),
		{Op: torus.OpAppend, Ref: ref, Off: 8192, Data: appendTo(ref, 3, 8192).Data}, // epoch 0
	} {
		if n.do(r); !errors.Is(r.Err, torus.ErrFenced) || r.Fence != 4 || !strings.Contains(r.Err.Error(), "epoch 4") {
			t.Errorf("%v: %v, fence %d", r.Op, r.Err, r.Fence)
		}
	}
	if r := n.do(fence(1, 4)); r.Err != nil || len(r.Tails) != 1 || r.Tails[0].Length != 8192 {
		t.Fatal("repeated:", r.Err, r.Tails)
	}
	must(t, n.do(&torus.Request{Op: torus.OpRead, Ref: ref, Data: make([]byte, 4096)}).Err) // as they are
	must(t, n.do(&torus.Request{Op: torus.OpScan, Ref: ref, Epoch: 4, Len: 8192}).Err)
	must(t, n.do(appendTo(ref, 4, 8192)).Err)
	must(t, n.do(appendTo(block(2, 1, 0), 1, 0)).Err) // another volume
	if r := n.do(&torus.Request{Op: torus.OpFence, Ref: ref, Len: 1}); !errors.Is(r.Err, torus.ErrInvalid) {
		t.Error("fence without epoch:", r.Err)
	}
	if r := n.do(&torus.Request{Op: 99}); !errors.Is(r.Err, torus.ErrNotSupported) {
		t.Error(r.Err)
	}
	must(t, n.do(&torus.Request{Op: torus.OpPing}).Err)
}

// TestFenceAppendRace (bookkeeper PR4701, L1): an append that was admitted before the fence rose and lands after is waited for,
// and is in the tails; one that comes while the fence is being persisted is refused.
func TestFenceAppendRace(t *testing.T) {
	for seed := range uint64(50) {
		n := newNode(t, seed)
		ref := block(1, 3, 5)
		n.slow.delay = 10 * time.Millisecond
		var landed, answered, refused bool
		n.slow.applied = func(r *torus.Request) {
			landed = true
			if answered {
				t.Errorf("seed %d: an append of epoch %d lands after the fence was answered", seed, r.Epoch)
			}
		}
		early, late, f := appendTo(ref, 3, 0), appendTo(ref, 3, 8192), fence(1, 4)
		early.Done = func(r *torus.Request) {
			if r.Err != nil {
				t.Error(r.Err)
			}
		}
		f.Done = func(r *torus.Request) {
			answered = true
			if r.Err != nil || len(r.Tails) != 1 || r.Tails[0].Length != 8192 || !landed {
				t.Errorf("seed %d: %v %v", seed, r.Err, r.Tails)
			}
		}
		late.Done = func(r *torus.Request) {
			refused = errors.Is(r.Err, torus.ErrFenced) && !answered
		}
		n.l.Post(func() {
			n.s.Submit(early)
			n.s.Submit(f)
			n.s.Submit(late)
		})
		n.v.Run(func() bool { return answered }, time.Minute)
		if !refused || !answered {
			t.Errorf("seed %d: refused %v, answered %v", seed, refused, answered)
		}
	}
}

// TestFencePersists (L1): a fence outlives the process and a power cut, from the moment it was answered.
func TestFencePersists(t *testing.T) {
	for seed := range uint64(100) {
		n := newNode(t, seed)
		rng := n.v.Rand()
		promised := map[uint64]uint64{}
		for range 20 {
			v := uint64(rng.IntN(5))
			e := promised[v] + uint64(rng.IntN(3))
			r := n.do(fence(v, max(e, 1)))
			must(t, r.Err)
			promised[v] = max(e, 1)
			if rng.IntN(3) == 0 {
				n.kill(rng.IntN(2) == 0)
				must(t, n.start())
			}
			for v, e := range promised {
				if r := n.do(appendTo(block(v, 1, 99), e-1, 0)); !errors.Is(r.Err, torus.ErrFenced) {
					t.Fatalf("seed %d: volume %d forgot epoch %d: %v", seed, v, e, r.Err)
				}
			}
		}
	}
}

// TestFencePersistFails: an error for that fence, nothing of a lower epoch admitted in the meantime, and the next try, by
// which the journal has been written anew, holds.
func TestFencePersistFails(t *testing.T) {
	for _, kind := range []vfs.OpKind{vfs.OpWrite, vfs.OpDatasync} {
		n := newNode(t, 1)
		must(t, n.do(fence(1, 2)).Err)
		must(t, n.do(fence(2, 7)).Err)
		n.fault = func(op vfs.Op) error {
			if op.Kind == kind {
				return fmt.Errorf("injected")
			}
			return nil
		}
		for range 2 { // the second one fails in writing the journal anew
			if r := n.do(fence(1, 3)); !errors.Is(r.Err, torus.ErrIO) {
				t.Fatal(r.Err)
			}
			if r := n.do(appendTo(block(1, 1, 1), 2, 0)); !errors.Is(r.Err, torus.ErrFenced) || r.Fence != 3 {
				t.Fatal(r.Err)
			}
		}
		n.fault = nil
		must(t, n.do(fence(1, 3)).Err)
		n.kill(true)
		must(t, n.start())
		if n.s.Fence(1) != 3 || n.s.Fence(2) != 7 {
			t.Fatal(n.s.Fence(1), n.s.Fence(2))
		}
	}
}

// TestGroupCommit: many fences that come together share a few writes.
func TestGroupCommit(t *testing.T) {
	n := newNode(t, 1)
	syncs := 0
	n.fault = func(op vfs.Op) error {
		if op.Kind == vfs.OpDatasync {
			syncs++
		}
		return nil
	}
	left := 500
	n.l.Post(func() {
		for v := range uint64(500) {
			r := fence(v, 1)
			r.Done = func(r *torus.Request) {
				if r.Err != nil {
					t.Error(r.Err)
				}
				left--
			}
			n.s.Submit(r)
		}
	})
	n.v.Run(func() bool { return left == 0 }, time.Minute)
	if left > 0 || syncs != 2 {
		t.Errorf("%d unanswered, %d syncs", left, syncs)
	}
}

// TestOvertaken: of two fences that wait at the same time the lower one is refused, by name of the higher.
func TestOvertaken(t *testing.T) {
	for seed := range uint64(20) {
		n := newNode(t, seed)
		n.slow.delay = time.Millisecond
		a, b := fence(1, 4), fence(1, 5)
		da, db := n.submit(a), n.submit(b)
		n.v.Run(func() bool { return *da && *db }, time.Minute)
		if !errors.Is(a.Err, torus.ErrFenced) || a.Fence != 5 || b.Err != nil {
			t.Fatal(a.Err, b.Err)
		}
	}
}

// TestMissingFences: a peer that holds blocks does not start without its fences.
func TestMissingFences(t *testing.T) {
	n := newNode(t, 1)
	must(t, n.do(appendTo(block(1, 3, 5), 3, 0)).Err)
	n.kill(false)
	must(t, n.disk.Remove(fencesFile))
	if err := n.start(); !errors.Is(err, torus.ErrCorrupt) {
		t.Fatal(err)
	}
}

func TestCloseService(t *testing.T) {
	n := newNode(t, 1)
	n.slow.delay = time.Second
	a, f := n.submit(appendTo(block(1, 3, 5), 3, 0)), n.submit(fence(1, 4))
	closed := false
	n.l.Post(func() {
		n.s.Close(func(err error) {
			closed = true
			if err != nil || !*a || !*f {
				t.Error(err, *a, *f)
			}
		})
	})
	late := appendTo(block(1, 4, 5), 4, 0)
	n.submit(late)
	n.v.Run(func() bool { return closed }, time.Minute)
	if !closed || !errors.Is(late.Err, torus.ErrClosed) {
		t.Fatal(closed, late.Err)
	}
}

// TestL1 lets writers and attaches of all epochs loose on a peer that crashes, loses power and has a disk that
// fails now and then. Once a fence has been answered, no change of a lower epoch takes effect, ever.
func TestL1(t *testing.T) {
	answers, fails, restarts := 0, 0, 0
	for seed := range uint64(200) {
		n := newNode(t, seed)
		rng := n.v.Rand()
		n.slow.delay = 2 * time.Millisecond
		answered := map[torus.VolumeID]uint64{}
		highest := map[torus.VolumeID]uint64{} // ever asked for
		n.slow.applied = func(r *torus.Request) {
			if r.Epoch < answered[r.Ref.Volume] {
				t.Errorf("seed %d: %v of epoch %d takes effect, %d has been answered", seed, r.Op, r.Epoch, answered[r.Ref.Volume])
			}
		}
		n.fault = func(op vfs.Op) error {
			if op.Changes() && rng.IntN(60) == 0 {
				fails++
				return errors.New("injected")
			}
			return nil
		}
		open := 0
		for range 300 {
			vol := uint64(1 + rng.IntN(3))
			top := highest[torus.VolumeID(vol)]
			epoch := top
			if top > 0 {
				epoch = max(1, top-uint64(rng.IntN(3)))
			}
			switch rng.IntN(20) {
			case 0:
				epoch = top + 1
				fallthrough
			case 1:
				highest[torus.VolumeID(vol)] = max(top, epoch)
				r := fence(vol, max(epoch, 1))
				open++
				r.Done = func(r *torus.Request) {
					open--
					switch {
					case r.Err == nil:
						answers++
						if r.Epoch < answered[r.Ref.Volume] {
							t.Errorf("seed %d: fence %d answered after %d", seed, r.Epoch, answered[r.Ref.Volume])
						}
						answered[r.Ref.Volume] = r.Epoch
					case errors.Is(r.Err, torus.ErrFenced):
						if r.Fence <= r.Epoch {
							t.Errorf("seed %d: fenced by %d, asked for %d", seed, r.Fence, r.Epoch)
						}
					case !errors.Is(r.Err, torus.ErrIO):
						t.Error(r.Err)
					}
				}
				n.l.Post(func() { n.s.Submit(r) })
			case 2:
				if rng.IntN(4) > 0 {
					break
				}
				n.kill(rng.IntN(2) == 0)
				open = 0
				restarts++
				for n.start() != nil { // a disk that fails
				}
				for v, e := range answered {
					if n.s.Fence(v) < e {
						t.Errorf("seed %d: volume %d: %d answered, %d after the restart", seed, v, e, n.s.Fence(v))
					}
				}
			default:
				ref := block(vol, 3, uint64(rng.IntN(4)))
				r := appendTo(ref, epoch, 0)
				if rng.IntN(3) == 0 {
					r = &torus.Request{Op: torus.OpSync, Ref: ref, Epoch: epoch, Len: 0}
				}
				open++
				r.Done = func(r *torus.Request) { open-- }
				n.l.Post(func() { n.s.Submit(r) })
			}
			n.v.RunFor(time.Duration(rng.IntN(1000)) * time.Microsecond)
		}
		if !n.v.Run(func() bool { return open == 0 }, time.Minute) {
			t.Errorf("seed %d: %d requests never ended", seed, open)
		}
		if n.s.flights != 0 {
			t.Errorf("seed %d: %d flights left", seed, n.s.flights)
		}
		for _, v := range n.s.volumes {
			if v.first != nil || v.old != 0 || len(v.waiting) > 0 {
				t.Errorf("seed %d: volume %d is not at rest: %+v", seed, v.id, v)
			}
		}
	}
	if answers < 1000 || fails < 50 || restarts < 100 {
		t.Errorf("too tame: %d fences answered, %d failures, %d restarts", answers, fails, restarts)
	}
}

// TestForget: volumes that were never fenced leave nothing behind.
func TestForget(t *testing.T) {
	n := newNode(t, 1)
	for v := range uint64(100) {
		must(t, n.do(appendTo(block(v, 1, 1), 1, 0)).Err)
	}
	if len(n.s.volumes) > 1 { // the last one may be asked for again
		t.Error(len(n.s.volumes))
	}
}

func TestMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	n := newNode(t, 1)
	var err error
	n.s, err = New(Config{Loop: n.l, Store: n.slow, FS: vfs.NewMem(2), Registerer: reg})
	must(t, err)
	n.do(fence(0xab, 3))
	n.do(appendTo(block(0xab, 3, 1), 3, 0))
	n.do(appendTo(block(0xab, 3, 1), 2, 0))
	n.do(&torus.Request{Op: torus.OpRead, Ref: block(0xab, 3, 1), Data: make([]byte, 4096)})
	got := map[string]float64{}
	all, err := reg.Gather()
	must(t, err)
	for _, f := range all {
		for _, m := range f.Metric {
			name := f.GetName()
			for _, l := range m.Label {
				name += " " + l.GetValue()
			}
			if x := m.Counter.GetValue(); x != 0 {
				got[name] = x
			}
		}
	}
	want := map[string]float64{
		"torus_server_ops_total Fence":               1,
		"torus_server_ops_total Append":              2,
		"torus_server_ops_total Read":                1,
		"torus_server_op_failures_total Append":      1,
		"torus_server_fenced_total":                  1,
		"torus_server_fences_total":                  1,
		"torus_server_volume_written_bytes_total ab": 8192,
		"torus_server_volume_read_bytes_total ab":    4096,
	}
	if !maps.Equal(got, want) {
		t.Errorf("got %v", got)
	}
	if _, err := New(Config{Loop: n.l, Store: n.slow, FS: vfs.NewMem(3), Registerer: reg}); err == nil {
		t.Error("two services on one registry")
	}
}

type nullStore struct{ torus.Store }

func (nullStore) Submit(r *torus.Request) { r.Finish(nil) }

// BenchmarkSubmit is what the service adds to each request.
func BenchmarkSubmit(b *testing.B) {
	n := newNode(b, 1)
	n.do(fence(1, 3))
	n.do(fence(2, 3))
	n.s.store = nullStore{}
	for _, volumes := range []uint64{1, 2} {
		b.Run(fmt.Sprintf("volumes=%d", volumes), func(b *testing.B) {
			rs := [2]*torus.Request{}
			for i := range rs {
				rs[i] = appendTo(block(uint64(i)%volumes+1, 3, 1), 3, 0)
				rs[i].Done = func(*torus.Request) {}
			}
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				n.s.Submit(rs[i&1])
				i++
			}
		})
	}
}

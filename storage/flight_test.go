package storage_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/storage"
	"github.com/coreos/torus/storage/storetest"
	"github.com/coreos/torus/vfs"
)

// airport is a store whose large appends are written when the test says so.
type airport struct {
	t     *testing.T
	sim   *loop.Virtual
	l     *loop.VirtualLoop
	d     *storage.Disk
	mem   *vfs.Mem
	fail  error // of the next write
	bulks int
	syncs int // fdatasyncs
	count *offloads

	failSync error // of the next fdatasync
	helping  bool
	onLoop   int // fdatasyncs on the loop
}

func newAirport(t *testing.T, seed uint64) *airport { return newAirportOf(t, seed, identity, 0) }

func newAirportOf(t *testing.T, seed uint64, id storage.Identity, size uint64) *airport {
	a := &airport{t: t, sim: loop.NewVirtual(seed), mem: vfs.NewMem(1)}
	a.mem.SetSlowSyncs(0, 0)
	a.l = a.sim.NewLoop("store")
	a.count = &offloads{Loop: a.l}
	a.sim.SetTrace(func(e loop.Event) { a.helping = e.Kind == loop.KindWork })
	fsys := vfs.NewErrors(a.mem, func(op vfs.Op) error {
		if op.Kind == vfs.OpDatasync {
			a.syncs++
			if !a.helping {
				a.onLoop++
			}
			return a.failSync
		}
		if op.Kind == vfs.OpWrite && op.Len >= 2*torus.PageSize && op.Off > 0 {
			a.bulks++
			return a.fail
		}
		return nil
	})
	if err := storage.Create(fsys, id); err != nil {
		t.Fatal(err)
	}
	cfg := config(a.count, fsys)
	cfg.BulkBytes = 3 * torus.PageSize
	cfg.Identity, cfg.SizeBytes = id, max(size, cfg.SizeBytes)
	var err error
	if a.d, err = storage.Open(cfg); err != nil {
		t.Fatal(err)
	}
	var done *bool
	a.on(func() { done = a.submit(appendOf(torus.BlockRef{Volume: 9, INode: 1}, 0, 0)) }) // there are slots when this is done
	a.wait(done)
	return a
}

// submit starts a request on the loop and does not wait.
func (a *airport) submit(r *torus.Request) *bool {
	done := new(bool)
	r.Done = func(*torus.Request) { *done = true }
	a.d.Submit(r)
	return done
}

func (a *airport) wait(done *bool) {
	a.t.Helper()
	if !a.sim.Run(func() bool { return *done }, time.Minute) {
		a.t.Fatal("never done")
	}
}

// on runs fn on the loop, in one turn.
func (a *airport) on(fn func()) {
	a.t.Helper()
	done := false
	a.l.Post(func() { fn(); done = true })
	a.wait(&done)
}

func appendOf(ref torus.BlockRef, off, pages int) *torus.Request {
	return &torus.Request{Op: torus.OpAppend, Ref: ref, Off: uint32(off), Data: storetest.Record(ref, uint32(off), uint64(off+1), 0, pages)}
}

// While an append is in the air everybody but its sender finds the block as it will be: its tail, its bytes, and the same bytes sent again. What
// is appended behind it is answered after it, and a sync waits for both.
func TestFlight(t *testing.T) {
	a := newAirport(t, 1)
	ref := torus.BlockRef{Volume: 1, INode: 1, Index: 1}
	small, large, last := appendOf(ref, 0, 0), appendOf(ref, 4096, 2), appendOf(ref, 4*4096, 0)
	var order []string
	all := append(append(bytes.Clone(small.Data), large.Data...), last.Data...)
	read := &torus.Request{Op: torus.OpRead, Ref: ref, Off: 0, Data: make([]byte, len(all))}
	part := &torus.Request{Op: torus.OpRead, Ref: ref, Off: 2 * 4096, Data: make([]byte, 2*4096)}
	scan := &torus.Request{Op: torus.OpScan, Ref: ref, Len: 1 << 20}
	again := appendOf(ref, 4096, 2)
	other := appendOf(ref, 4096, 2)
	other.Data = storetest.Record(ref, 4096, 77, 0, 2)
	fence := &torus.Request{Op: torus.OpFence, Ref: ref, Len: 1}
	sync := &torus.Request{Op: torus.OpSync, Ref: ref, Len: uint32(len(all))}
	a.on(func() {
		before := a.bulks
		for _, x := range []struct {
			name string
			r    *torus.Request
		}{{"small", small}, {"large", large}, {"last", last}, {"read", read}, {"part", part}, {"scan", scan}, {"again", again}, {"other", other}, {"fence", fence}, {"sync", sync}} {
			x.r.Done = func(*torus.Request) { order = append(order, x.name) }
			a.d.Submit(x.r)
		}
		if a.bulks != before {
			t.Error("a large append was written on the loop")
		}
	})
	if !a.sim.Run(func() bool { return len(order) == 10 }, time.Minute) {
		t.Fatalf("only %v were answered", order)
	}
	for _, r := range []*torus.Request{small, large, last, read, part, scan, again, fence, sync} {
		if r.Err != nil {
			t.Errorf("%v at %d: %v", r.Op, r.Off, r.Err)
		}
	}
	if !errors.Is(other.Err, torus.ErrInvalid) {
		t.Errorf("other bytes in the place of those in the air: %v", other.Err)
	}
	if !bytes.Equal(read.Data, all) || !bytes.Equal(part.Data, all[2*4096:4*4096]) {
		t.Error("a read found other bytes")
	}
	if len(fence.Tails) != 1 || int(fence.Tails[0].Length) != len(all) {
		t.Errorf("tails of a block of %d bytes: %v", len(all), fence.Tails)
	}
	at := map[string]int{}
	for i, name := range order {
		at[name] = i
	}
	if at["large"] > at["last"] || at["large"] > at["again"] || at["last"] > at["sync"] || at["small"] > at["large"] {
		t.Errorf("answered in the order %v", order)
	}
	// What the sync covers survives a power cut.
	a.mem.Kill()
	l := a.sim.NewLoop("after")
	d, err := storage.Open(config(l, a.mem.CrashClone(rand.New(rand.NewPCG(1, 1)))))
	if err != nil {
		t.Fatal(err)
	}
	a.d, a.l = d, l
	read.Data = make([]byte, len(all))
	var done *bool
	a.on(func() { done = a.submit(read) })
	a.wait(done)
	if read.Err != nil || !bytes.Equal(read.Data, all) {
		t.Errorf("after a power cut: %v", read.Err)
	}
}

// A write that fails ends the store, as nobody can take back what was said of the block meanwhile; nothing is acknowledged that it should have held.
func TestFlightFails(t *testing.T) {
	a := newAirport(t, 1)
	ref := torus.BlockRef{Volume: 1, INode: 1, Index: 1}
	first := appendOf(ref, 0, 0)
	var done *bool
	a.on(func() { done = a.submit(first) })
	a.wait(done)
	sync := &torus.Request{Op: torus.OpSync, Ref: ref, Len: 4096}
	a.on(func() { done = a.submit(sync) })
	a.wait(done)
	a.fail = errors.New("medium error")
	large, last := appendOf(ref, 4096, 2), appendOf(ref, 4*4096, 0)
	sync = &torus.Request{Op: torus.OpSync, Ref: ref, Len: 5 * 4096}
	var dones []*bool
	a.on(func() {
		for _, r := range []*torus.Request{large, last, sync} {
			dones = append(dones, a.submit(r))
		}
	})
	for i, r := range []*torus.Request{large, last, sync} {
		a.wait(dones[i])
		if !errors.Is(r.Err, torus.ErrIO) {
			t.Errorf("%v at %d: %v", r.Op, r.Off, r.Err)
		}
	}
	a.fail = nil
	read := &torus.Request{Op: torus.OpRead, Ref: ref, Data: make([]byte, 4096)}
	a.on(func() { done = a.submit(read) })
	a.wait(done)
	if read.Err != nil || !bytes.Equal(read.Data, first.Data) {
		t.Errorf("what was durable before: %v", read.Err)
	}
	a.on(func() {
		if !a.d.Stats().Failed {
			t.Error("the store does not say that its disk failed")
		}
	})
}

// Close writes what is in the air, and answers it.
func TestFlightClose(t *testing.T) {
	a := newAirport(t, 1)
	ref := torus.BlockRef{Volume: 1, INode: 1, Index: 1}
	large, last := appendOf(ref, 0, 2), appendOf(ref, 3*4096, 0)
	sync := &torus.Request{Op: torus.OpSync, Ref: ref, Len: 4 * 4096}
	a.on(func() {
		dones := []*bool{a.submit(large), a.submit(last), a.submit(sync)}
		if err := a.d.Close(); err != nil {
			t.Error(err)
		}
		for i, r := range []*torus.Request{large, last, sync} {
			if !*dones[i] || r.Err != nil {
				t.Errorf("%v at %d: answered: %v, %v", r.Op, r.Off, *dones[i], r.Err)
			}
		}
	})
	a.sim.RunFor(time.Second) // the helpers that come late
	l := a.sim.NewLoop("after")
	d, err := storage.Open(config(l, a.mem))
	if err != nil {
		t.Fatal(err)
	}
	a.d, a.l = d, l
	list := &torus.Request{Op: torus.OpList, Len: 10}
	var done *bool
	a.on(func() { done = a.submit(list) })
	a.wait(done)
	if len(list.Tails) != 2 || list.Tails[0].Length != 4*4096 {
		t.Errorf("after Close: %v, %v", list.Tails, list.Err)
	}
}

// A sync waits for what it means, not for what is in the air behind that.
func TestSyncBesideFlights(t *testing.T) {
	before := 0
	for seed := range uint64(300) {
		a := newAirport(t, seed)
		ref := torus.BlockRef{Volume: 1, INode: 1, Index: 1}
		var done *bool
		a.on(func() { done = a.submit(appendOf(ref, 0, 0)) })
		a.wait(done)
		large, all := appendOf(ref, 4096, 2), &torus.Request{Op: torus.OpSync, Ref: ref, Len: 4 * 4096}
		var landed, synced, both *bool
		a.on(func() {
			landed = a.submit(large)
			synced = a.submit(&torus.Request{Op: torus.OpSync, Ref: ref, Len: 4096})
			both = a.submit(all)
		})
		a.wait(synced)
		if !*landed {
			before++
			if *both {
				t.Fatal("a sync did not wait for what was in the air of it")
			}
		}
		a.wait(both)
		if !*landed || all.Err != nil {
			t.Fatalf("synced before it was there: %v", all.Err)
		}
	}
	if before == 0 {
		t.Error("syncs always waited for what was in the air behind what they meant")
	}
}

// offloads counts the reads and writes that a store hands to helpers or the kernel.
type offloads struct {
	loop.Loop
	n int
}

func (l *offloads) Offload(j loop.Job) {
	if _, ok := j.(loop.FileIO); ok {
		l.n++
	}
	l.Loop.Offload(j)
}

// The disk is given so much to write at a time, and no more.
func TestFlightsTakeTurns(t *testing.T) {
	a := newAirport(t, 1)
	var dones []*bool
	before := 0
	a.on(func() {
		before = a.count.n
		for i := range 20 {
			dones = append(dones, a.submit(appendOf(torus.BlockRef{Volume: 1, INode: 1, Index: torus.IndexID(i / 4)}, i%4*3*4096, 2)))
		}
		if n := a.count.n - before; n != 4 {
			t.Errorf("%d of 20 appends were begun at once, 4 fill what the disk is given at a time", n)
		}
	})
	for _, done := range dones {
		a.wait(done)
	}
}

// An append that is to be durable is so with its write, if all before it was: no fdatasync follows. Else one does.
func TestDurableAppend(t *testing.T) {
	a := newAirport(t, 1)
	ref := torus.BlockRef{Volume: 1, INode: 1, Index: 1}
	put := func(off int, durable, sync bool) (syncs int) {
		r := appendOf(ref, off, 0)
		r.Durable = durable
		var done *bool
		a.on(func() {
			syncs = a.syncs
			if done = a.submit(r); sync {
				done = a.submit(&torus.Request{Op: torus.OpSync, Ref: ref, Len: uint32(off + 4096)})
			}
		})
		a.wait(done)
		return a.syncs - syncs
	}
	survives := func(pages int) {
		t.Helper()
		for seed := range uint64(20) {
			sim := loop.NewVirtual(seed)
			l := sim.NewLoop("after")
			d, err := storage.Open(config(l, a.mem.CrashClone(rand.New(rand.NewPCG(seed, 1)))))
			if err != nil {
				t.Fatal(err)
			}
			list, done := &torus.Request{Op: torus.OpList, Ref: torus.BlockRef{Volume: 1}, Len: 1}, false
			list.Done = func(*torus.Request) { done = true }
			l.Post(func() { d.Submit(list) })
			if !sim.Run(func() bool { return done }, time.Minute) || len(list.Tails) != 1 || int(list.Tails[0].Length) < pages*4096 {
				t.Fatalf("after a power cut of %d pages that were durable: %v", pages, list.Tails)
			}
		}
	}
	a.sim.RunFor(5 * time.Second) // slots are written through by now
	put(0, false, true)           // now the disk is known to be quick, and the entry of the block durable
	if n := put(4096, true, false); n != 1 {
		t.Errorf("a durable append took %d fdatasyncs, not the one within it", n)
	}
	survives(2)
	if n := put(2*4096, true, true); n != 1 {
		t.Errorf("a durable append and its sync took %d fdatasyncs, not the one within it", n)
	}
	survives(3)
	put(3*4096, false, false)
	if n := put(4*4096, true, false); n != 0 {
		t.Error("an append claims to be durable behind one that is not")
	}
	put(5*4096, true, true)
	survives(6)
}

// Many that are to be durable in one turn share an fdatasync, but for the first.
func TestDurableAppendsShare(t *testing.T) {
	a := newAirport(t, 1)
	a.sim.RunFor(5 * time.Second)
	each := func(off int, durable bool) (syncs int) {
		var dones []*bool
		a.on(func() {
			syncs = a.syncs
			for i := range 4 {
				r := appendOf(torus.BlockRef{Volume: 1, INode: 1, Index: torus.IndexID(i)}, off, 0)
				r.Durable = durable
				a.submit(r)
				dones = append(dones, a.submit(&torus.Request{Op: torus.OpSync, Ref: r.Ref, Len: uint32(off + 4096)}))
			}
		})
		for _, done := range dones {
			a.wait(done)
		}
		return a.syncs - syncs
	}
	each(0, false)
	a.sim.RunFor(time.Second)
	if n := each(4096, true); n != 2 {
		t.Errorf("4 blocks took %d fdatasyncs", n)
	}
}

// Whatever goes wrong while an append is made durable, what else was written to the file may be lost with it, and nobody is told twice: the disk has failed.
func TestDurableAppendFails(t *testing.T) {
	a := newAirport(t, 1)
	a.sim.RunFor(5 * time.Second)
	one, other := torus.BlockRef{Volume: 1, INode: 1, Index: 1}, torus.BlockRef{Volume: 1, INode: 1, Index: 2}
	do := func(r *torus.Request) error {
		var done *bool
		a.on(func() { done = a.submit(r) })
		a.wait(done)
		return r.Err
	}
	for _, ref := range []torus.BlockRef{one, other} {
		if err := errors.Join(do(appendOf(ref, 0, 0)), do(&torus.Request{Op: torus.OpSync, Ref: ref, Len: 4096}), do(appendOf(ref, 4096, 0))); err != nil {
			t.Fatal(err)
		}
	}
	do(&torus.Request{Op: torus.OpSync, Ref: one, Len: 8192})
	do(appendOf(other, 8192, 0))
	a.failSync = fmt.Errorf("quota: %w", vfs.ErrNoSpace)
	r := appendOf(one, 8192, 0)
	r.Durable = true
	if err := do(r); !errors.Is(err, torus.ErrIO) {
		t.Errorf("append: %v", err)
	}
	a.failSync = nil
	if err := do(&torus.Request{Op: torus.OpSync, Ref: other, Len: 3 * 4096}); !errors.Is(err, torus.ErrIO) {
		t.Errorf("sync of what may be lost: %v", err)
	}
}

// A sync of a block that was deleted meanwhile and made again in another file does not wait for what is in the air there.
func TestSyncOfABlockMadeAgain(t *testing.T) {
	for seed := range uint64(40) {
		a := newAirport(t, seed)
		for i := range 4 { // then the first file is full
			var done *bool
			a.on(func() { done = a.submit(appendOf(torus.BlockRef{Volume: 2, INode: 1, Index: torus.IndexID(i)}, 0, 0)) })
			a.wait(done)
		}
		a.sim.RunFor(5 * time.Second)
		ref := torus.BlockRef{Volume: 2, INode: 1, Index: 1}
		var synced, again *bool
		a.on(func() {
			a.submit(appendOf(ref, 4096, 2))
			synced = a.submit(&torus.Request{Op: torus.OpSync, Ref: ref, Len: 4 * 4096})
			a.submit(&torus.Request{Op: torus.OpDelete, Ref: ref})
			a.submit(appendOf(ref, 0, 2))
			again = a.submit(appendOf(ref, 3*4096, 2))
		})
		a.wait(again)
		a.wait(synced)
	}
}

// What is in the air when an fdatasync begins is not forgotten: the next one, which has it all to write, is not made on the loop.
func TestLargeSyncIsNotOnTheLoop(t *testing.T) {
	id := identity
	id.BlockSize = torus.DefaultBlockSize
	a := newAirportOf(t, 1, id, 16*id.BlockSize)
	a.sim.RunFor(time.Minute)
	large, small := torus.BlockRef{Volume: 1, INode: 1, Index: 1}, torus.BlockRef{Volume: 1, INode: 1, Index: 2}
	do := func(rs ...*torus.Request) {
		var dones []*bool
		a.on(func() {
			for _, r := range rs {
				dones = append(dones, a.submit(r))
			}
		})
		for _, done := range dones {
			a.wait(done)
		}
	}
	do(appendOf(small, 0, 0), &torus.Request{Op: torus.OpSync, Ref: small, Len: 4096})
	var flights []*torus.Request
	end := 0
	for range 3 {
		r := appendOf(large, end, 255)
		end += len(r.Data)
		flights = append(flights, r)
	}
	do(append(flights, appendOf(small, 4096, 0), &torus.Request{Op: torus.OpSync, Ref: small, Len: 8192})...)
	a.onLoop = 0
	do(&torus.Request{Op: torus.OpSync, Ref: large, Len: uint32(end)})
	if a.onLoop > 0 {
		t.Error("an fdatasync of 3 MiB was made on the loop")
	}
}

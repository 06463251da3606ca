package storage_test

import (
	"bytes"
	"errors"
	"io/fs"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coreos/torus"
	"github.com/coreos/torus/record"
	"github.com/coreos/torus/storage"
	"github.com/coreos/torus/storage/storetest"
	"github.com/coreos/torus/vfs"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func want(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error %v, want %v", err, want)
	}
}

// bench is a disk over fsys, which it gives an identity if it has none.
func bench(t testing.TB, fsys vfs.FS) *storetest.Bench {
	t.Helper()
	b := storetest.NewBench(t, 1)
	if _, err := storage.ReadIdentity(fsys); err != nil {
		must(t, storage.Create(fsys, identity))
	}
	d, err := storage.Open(config(b.Loop, fsys))
	must(t, err)
	b.Store = d
	return b
}

func TestIdentity(t *testing.T) {
	mem := vfs.NewMem(1)
	_, err := storage.ReadIdentity(mem)
	want(t, err, fs.ErrNotExist)
	_, err = storage.ReadIdentity(vfs.NewOS(t.TempDir() + "/none"))
	want(t, err, fs.ErrNotExist)
	_, err = storage.Open(config(storetest.NewBench(t, 1).Loop, mem))
	want(t, err, fs.ErrNotExist)

	must(t, storage.Create(mem, identity))
	want(t, storage.Create(mem, identity), torus.ErrExists)
	got, err := storage.ReadIdentity(mem)
	if err != nil || got != identity {
		t.Fatalf("%v, %v", got, err)
	}
	for _, bad := range []storage.Identity{
		{}, {Peer: identity.Peer, BlockSize: 4096 * 4}, {Peer: identity.Peer, ClusterID: "c", BlockSize: 1000},
		{Peer: identity.Peer, ClusterID: "c", BlockSize: torus.MaxBlockSize * 2}, {Peer: identity.Peer, ClusterID: strings.Repeat("c", 200), BlockSize: 8192},
	} {
		want(t, storage.Create(vfs.NewMem(1), bad), torus.ErrInvalid)
	}
	b := bench(t, mem)
	b.Sim.RunFor(time.Second)
	b.Store.Close()
	must(t, mem.Remove("identity"))
	if _, err := storage.ReadIdentity(mem); !errors.Is(err, torus.ErrCorrupt) || errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("data without an identity: %v", err)
	}
	want(t, storage.Create(mem, identity), torus.ErrCorrupt)
}

// A directory that is not what is asked for is refused, in words that name both and say what to do.
func TestOpenRefusals(t *testing.T) {
	mem := vfs.NewMem(1)
	b := bench(t, mem)
	open := func(change func(*storage.Config)) error {
		t.Helper()
		cfg := config(b.Loop, mem)
		change(&cfg)
		d, err := storage.Open(cfg)
		if err == nil {
			d.Close()
			t.Fatalf("opened with %+v", cfg)
		}
		return err
	}
	says := func(err, sentinel error, words ...string) {
		t.Helper()
		want(t, err, sentinel)
		var e *torus.Error
		if !errors.As(err, &e) || e.Hint == "" {
			t.Errorf("no hint in %q", err)
		}
		for _, w := range words {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%q does not name %q", err, w)
			}
		}
	}
	says(open(func(*storage.Config) {}), torus.ErrLocked, "another process")
	b.Sim.RunFor(time.Second)
	must(t, b.Store.Close())
	says(open(func(c *storage.Config) { c.Identity.ClusterID = "other" }), torus.ErrWrongCluster, "other", identity.ClusterID)
	says(open(func(c *storage.Config) { c.Identity.Peer[5]++ }), torus.ErrInvalid, identity.Peer.String())
	says(open(func(c *storage.Config) { c.Identity.BlockSize *= 2 }), torus.ErrInvalid, "131072", "262144")
	says(open(func(c *storage.Config) { c.SizeBytes = 0 }), torus.ErrInvalid, "--size")
	says(open(func(c *storage.Config) { c.SizeBytes = storetest.BlockSize - 1 }), torus.ErrInvalid, "--size")
	says(open(func(c *storage.Config) { c.SizeBytes = vfs.DefaultMemCapacity + 1 }), torus.ErrOutOfSpace, "--size")
	want(t, open(func(c *storage.Config) { c.Loop = nil }), torus.ErrInvalid)
	want(t, open(func(c *storage.Config) { c.FS = nil }), torus.ErrInvalid)

	// A file of slots is missing, or damaged.
	must(t, mem.Rename("slots-000000", "kept"))
	says(open(func(*storage.Config) {}), torus.ErrCorrupt, "slots-000000")
	must(t, mem.Rename("kept", "slots-000000"))
	f, err := mem.Open("slots-000000")
	must(t, err)
	page := make([]byte, 4096)
	_, err = f.ReadAt(page, 0)
	must(t, err)
	_, err = f.WriteAt([]byte{page[17] ^ 1}, 17)
	must(t, err)
	says(open(func(*storage.Config) {}), torus.ErrCorrupt, "slots-000000")
	_, err = f.WriteAt(page[:100], 0)
	must(t, err)
	size, _ := f.Size()
	must(t, f.Truncate(size-1))
	says(open(func(*storage.Config) {}), torus.ErrCorrupt, "slots-000000")
	must(t, f.Truncate(size))

	b = bench(t, mem) // all is well again
	must(t, b.Store.Close())
}

// The size may change from one start to the next; so may the number of slots of a file.
func TestSizeChanges(t *testing.T) {
	mem := vfs.NewMem(1)
	b := storetest.NewBench(t, 1)
	must(t, storage.Create(mem, identity))
	index := uint64(0)
	have := map[torus.BlockRef][]byte{}
	for _, c := range []struct{ slots, perFile int }{{3, 2}, {7, 4}, {5, 256}, {8, 1}, {20, 256}} {
		cfg := config(b.Loop, mem)
		cfg.SizeBytes, cfg.SlotsPerFile = uint64(c.slots)*storetest.BlockSize, c.perFile
		ordinary := uint64(c.slots) - map[int]uint64{8: 1, 20: 2}[c.slots]
		d, err := storage.Open(cfg)
		must(t, err)
		b.Store = d
		for ref, data := range have {
			got, err := b.Read(ref, 0, uint32(len(data)))
			if err != nil || !bytes.Equal(got, data) {
				t.Fatalf("%+v: read %v: %v", c, ref, err)
			}
		}
		for {
			index++
			ref := storetest.Ref(index)
			data := storetest.Record(ref, 0, 1, 0, 1)
			if err := b.Append(ref, 0, data); err != nil {
				want(t, err, torus.ErrOutOfSpace)
				break
			}
			have[ref] = data
		}
		if st := d.Stats(); st.Size != ordinary*storetest.BlockSize || len(have) != max(int(ordinary), len(have)) || uint64(len(have))*storetest.BlockSize != d.Stats().Used {
			t.Fatalf("%+v: %d blocks, %+v", c, len(have), d.Stats())
		}
		must(t, d.Close())
	}
	if len(have) != 18 {
		t.Fatalf("%d blocks", len(have))
	}
}

// The store never fills the file system, says why it is full, and goes on once there is space.
func TestReserve(t *testing.T) {
	mem := vfs.NewMem(1)
	const reserve = 1 << 20
	mem.SetCapacity(reserve + (8+8)*storetest.BlockSize) // 8 are the stage
	b := storetest.NewBench(t, 1)
	must(t, storage.Create(mem, identity))
	cfg := config(b.Loop, mem)
	cfg.SizeBytes, cfg.ReserveBytes, cfg.SlotsPerFile = 10*storetest.BlockSize, reserve, 4
	d, err := storage.Open(cfg)
	must(t, err)
	b.Store = d
	n := uint64(0)
	var full error
	for full == nil {
		n++
		full = b.Append(storetest.Ref(n), 0, storetest.Record(storetest.Ref(n), 0, 1, 0, 1))
	}
	want(t, full, torus.ErrOutOfSpace)
	if !strings.Contains(full.Error(), "file system") || n < 5 || n > 7 || !d.Stats().Full {
		t.Fatalf("after %d blocks: %v", n-1, full)
	}
	if free, _, _ := mem.Free(); free < reserve {
		t.Fatalf("%d bytes left, %d reserved", free, reserve)
	}
	ref := storetest.Ref(1)
	must(t, b.Append(ref, 8192, storetest.Record(ref, 8192, 2, 0, 5))) // what is there may grow
	must(t, b.Sync(ref, 8192))
	mem.SetCapacity(1 << 30)
	b.Sim.RunFor(10 * time.Second)
	must(t, b.Append(storetest.Ref(n), 0, storetest.Record(storetest.Ref(n), 0, 1, 0, 1)))
}

// fault injects failures into some calls.
type fault struct {
	vfs.FS
	hit func(op vfs.Op) error
}

func faulty(mem *vfs.Mem) *fault {
	f := &fault{hit: func(vfs.Op) error { return nil }}
	f.FS = vfs.NewErrors(mem, func(op vfs.Op) error { return f.hit(op) })
	return f
}

func on(kind vfs.OpKind, err error) func(vfs.Op) error {
	return func(op vfs.Op) error {
		if op.Kind == kind && strings.HasPrefix(op.Name, "slots-") {
			return err
		}
		return nil
	}
}

// unmapped has appends go through the page cache.
func unmapped(op vfs.Op) error {
	if op.Kind == vfs.OpMap {
		return errors.ErrUnsupported
	}
	return nil
}

// After a failed fdatasync: ErrIO for good for what was unsynced, however often it is tried; what was synced is read (TESTING, trap 2).
func TestFailedSync(t *testing.T) {
	for _, c := range []struct {
		kind   vfs.OpKind
		staged bool
	}{{vfs.OpDatasync, true}, {vfs.OpDatasync, false}, {vfs.OpWrite, true}, {vfs.OpWrite, false}} {
		kind := c.kind
		mem := vfs.NewMem(1)
		f := faulty(mem)
		if !c.staged {
			f.hit = unmapped
		}
		b := bench(t, f)
		b.Sim.RunFor(time.Second)
		synced, dirty, late := storetest.Ref(1), storetest.Ref(2), storetest.Ref(3)
		must(t, b.Append(synced, 0, storetest.Record(synced, 0, 1, 0, 1)))
		must(t, b.Sync(synced, 8192))
		must(t, b.Append(synced, 8192, storetest.Record(synced, 8192, 2, 0, 0)))
		must(t, b.Append(dirty, 0, storetest.Record(dirty, 0, 1, 0, 1)))
		f.hit = on(kind, syscall.EIO)
		if kind == vfs.OpDatasync || c.staged { // what is staged is written when it is synced
			rs := []*torus.Request{{Op: torus.OpSync, Ref: synced, Len: 12288}, {Op: torus.OpSync, Ref: dirty, Len: 8192}, {Op: torus.OpSync, Ref: dirty, Len: 100}}
			b.DoAll(rs...)
			for _, r := range rs {
				want(t, r.Err, torus.ErrIO)
			}
		} else {
			want(t, b.Append(dirty, 8192, storetest.Record(dirty, 8192, 2, 0, 1)), torus.ErrIO)
		}
		f.hit = func(vfs.Op) error { return nil } // the disk pretends that all is well
		for range 3 {
			want(t, b.Sync(dirty, 8192), torus.ErrIO)
			want(t, b.Sync(synced, 12288), torus.ErrIO)
			want(t, b.Append(dirty, 8192, storetest.Record(dirty, 8192, 2, 0, 1)), torus.ErrIO)
			want(t, b.Append(synced, 12288, storetest.Record(synced, 12288, 3, 0, 1)), torus.ErrIO)
			want(t, b.Append(late, 0, storetest.Record(late, 0, 1, 0, 1)), torus.ErrIO)
			want(t, b.Seal(synced, 8192), torus.ErrIO)
			want(t, b.Delete(synced), torus.ErrIO)
		}
		if !b.Store.Stats().Failed {
			t.Error("stats do not say that the disk failed")
		}
		got, err := b.Read(synced, 0, 8192)
		if err != nil || !bytes.Equal(got, storetest.Record(synced, 0, 1, 0, 1)) {
			t.Errorf("what was synced cannot be read: %v", err)
		}
		_, err = b.Read(synced, 0, 12288)
		want(t, err, torus.ErrGap)
		r := b.Do(&torus.Request{Op: torus.OpFence, Ref: storetest.Ref(0), Len: 10})
		must(t, r.Err)
		if len(r.Tails) != 2 || r.Tails[0].Length != 8192 || r.Tails[1].Length != 0 {
			t.Errorf("tails %v: only what was durable may count", r.Tails)
		}
		b.Store.Close()
		// Opened anew and verified: what is on the medium, and everything is accepted again.
		b = bench(t, f)
		if b.Store.Stats().Failed {
			t.Error("still failed")
		}
		tails := b.List(1, 10)
		if len(tails) == 0 || tails[0].Ref != synced || tails[0].Length < 8192 {
			t.Fatalf("after a restart: %v", tails)
		}
		n := tails[0].Length
		must(t, b.Append(synced, n, storetest.Record(synced, n, 9, 0, 1)))
		must(t, b.Sync(synced, n+8192))
	}
}

// A full file system under an append is no failure of the disk: nothing changes, the caller is told.
func TestNoSpaceOnWrite(t *testing.T) {
	f := faulty(vfs.NewMem(1))
	f.hit = unmapped
	b := bench(t, f)
	b.Sim.RunFor(time.Second)
	ref, other := storetest.Ref(1), storetest.Ref(2)
	must(t, b.Append(ref, 0, storetest.Record(ref, 0, 1, 0, 1)))
	f.hit = on(vfs.OpWrite, vfs.ErrNoSpace)
	want(t, b.Append(ref, 8192, storetest.Record(ref, 8192, 2, 0, 1)), torus.ErrOutOfSpace)
	want(t, b.Append(other, 0, storetest.Record(other, 0, 1, 0, 1)), torus.ErrOutOfSpace)
	f.hit = func(vfs.Op) error { return nil }
	must(t, b.Append(ref, 8192, storetest.Record(ref, 8192, 2, 0, 1)))
	must(t, b.Sync(ref, 16384))
	must(t, b.Append(other, 0, storetest.Record(other, 0, 1, 0, 1)))
	if used := b.Store.Stats().Used; used != 2*storetest.BlockSize {
		t.Fatalf("used %d", used)
	}
}

func TestReadErrors(t *testing.T) {
	f := faulty(vfs.NewMem(1))
	b := bench(t, f)
	ref := storetest.Ref(1)
	must(t, b.Append(ref, 0, storetest.Record(ref, 0, 1, 0, 1)))
	must(t, b.Sync(ref, 8192)) // else it is read from the stage
	f.hit = on(vfs.OpRead, syscall.EIO)
	for range 20 {
		_, err := b.Read(ref, 0, 100)
		want(t, err, torus.ErrIO)
		want(t, b.Do(&torus.Request{Op: torus.OpScan, Ref: ref, Len: 4096}).Err, torus.ErrIO)
		want(t, b.Append(ref, 0, storetest.Record(ref, 0, 1, 0, 1)), torus.ErrIO)
	}
	f.hit = func(vfs.Op) error { return nil }
	_, err := b.Read(ref, 0, 100)
	must(t, err)
	fence := &torus.Request{Op: torus.OpFence, Ref: storetest.Ref(0), Len: 10}
	must(t, b.Do(fence).Err)
	if !slices.ContainsFunc(fence.Tails, func(t torus.Tail) bool { return t.Ref == ref && t.Suspect }) {
		t.Errorf("tails %+v", fence.Tails)
	}
	must(t, b.Append(ref, 8192, storetest.Record(ref, 8192, 2, 0, 1))) // a read error is not the end
}

// A block that cannot be read when the store is opened is kept, takes nothing more, and a fence says that others may hold more of it: a
// short answer would count as the whole truth (D3).
func TestUnreadableOpenBlock(t *testing.T) {
	mem := vfs.NewMem(1)
	f := faulty(mem)
	b := bench(t, f)
	ref, other := storetest.Ref(1), torus.BlockRef{Volume: 1, INode: 2}
	var all []byte
	for i := range uint64(3) {
		r := storetest.Record(ref, uint32(len(all)), i+1, i, 4)
		must(t, b.Append(ref, uint32(len(all)), r))
		all = append(all, r...)
	}
	must(t, b.Append(other, 0, storetest.Record(other, 0, 1, 0, 1)))
	must(t, b.Sync(other, 8192))
	must(t, b.Sync(ref, uint32(len(all))))
	b.Sim.RunFor(time.Second)
	b.Store.Close()
	file, err := mem.Open("slots-000000")
	must(t, err)
	head := make([]byte, 1<<20)
	_, _ = file.ReadAt(head, 0)
	bad := int64(bytes.Index(head, all[:4096])) // in whichever slot it is
	f.hit = func(op vfs.Op) error {
		if op.Kind == vfs.OpRead && op.Name != "stage" && op.Off <= bad && op.Off+op.Len > bad && op.Off > 4096*3-1 {
			return syscall.EIO
		}
		return nil
	}
	b = bench(t, f)
	fence := &torus.Request{Op: torus.OpFence, Ref: storetest.Ref(0), Len: 10}
	must(t, b.Do(fence).Err)
	if len(fence.Tails) != 1 || !fence.Tails[0].Suspect || int(fence.Tails[0].Length) >= len(all) {
		t.Errorf("tails %+v", fence.Tails)
	}
	fence = &torus.Request{Op: torus.OpFence, Ref: other, Len: 10}
	must(t, b.Do(fence).Err)
	if len(fence.Tails) != 1 || fence.Tails[0].Suspect {
		t.Errorf("tails %+v", fence.Tails)
	}
	want(t, b.Append(ref, 0, all[:4096*5]), torus.ErrIO)
	want(t, b.Sync(ref, 1), torus.ErrIO)
	want(t, b.Seal(ref, 0), torus.ErrIO)
	if used := b.Store.Stats().Used; used != 2*storetest.BlockSize {
		t.Errorf("used %d", used)
	}
	b.Store.Close()
	f.hit = func(vfs.Op) error { return nil } // it was passing
	b = bench(t, f)
	got, err := b.Read(ref, 0, uint32(len(all)))
	if err != nil || !bytes.Equal(got, all) {
		t.Errorf("once it can be read again: %v", err)
	}
}

// Rot in a data page of an open block. A later record that says the damaged one was flushed proves that it is rot and no torn
// write: the record counts on, and readers find the bad page by its checksum. Without that proof the block is cut there, but
// the slot stays and its bytes can be read (D3); what is known to be flushed is reported, so that a recovery that
// ends too early notices (C1).
func TestRotInOpenBlock(t *testing.T) {
	const size = 3 * 4096 // of each of the four records
	for _, c := range []struct {
		record    int
		length    uint32
		committed uint64
	}{
		{0, 4 * size, 12},
		{1, 4 * size, 12},
		{2, 4 * size, 12}, // seq 12, which the last record says was flushed
		{3, 3 * size, 11}, // the last one: torn or rotten, who knows
	} {
		mem := vfs.NewMem(1)
		b := bench(t, mem)
		ref := storetest.Ref(1)
		var all []byte
		for i := range uint64(4) {
			r := storetest.Record(ref, uint32(len(all)), 10+i, 9+i, 2)
			must(t, b.Append(ref, uint32(len(all)), r))
			all = append(all, r...)
		}
		must(t, b.Sync(ref, uint32(len(all))))
		b.Store.Close()
		file, err := mem.Open("slots-000000")
		must(t, err)
		head := make([]byte, 1<<20)
		_, _ = file.ReadAt(head, 0)
		at := int64(bytes.Index(head, all[:4096]))
		must(t, mem.Remove("stage")) // which would mend it
		bad := int64(c.record*size + 5000)
		_, err = file.WriteAt([]byte{^all[bad]}, at+bad)
		must(t, err)
		b = bench(t, mem)
		fence := b.Do(&torus.Request{Op: torus.OpFence, Ref: ref, Len: 1})
		must(t, fence.Err)
		if len(fence.Tails) != 1 || fence.Tails[0].Length != c.length {
			t.Errorf("rot in record %d: tails %v, want a length of %d", c.record, fence.Tails, c.length)
		}
		if fence.Committed != c.committed {
			t.Errorf("rot in record %d: committed %d, want %d", c.record, fence.Committed, c.committed)
		}
		got, err := b.Read(ref, 0, uint32(len(all)))
		all[bad] = ^all[bad]
		if err != nil || !bytes.Equal(got, all) {
			t.Errorf("rot in record %d: the other pages cannot be read: %v", c.record, err)
		}
	}
}

// Reads of what was never in memory, and of what is, give the same.
func TestColdReads(t *testing.T) {
	for _, cold := range []float64{0, 0.5, 1} {
		mem := vfs.NewMem(1)
		mem.SetColdReads(cold)
		b := bench(t, mem)
		ref := storetest.Ref(1)
		data := storetest.Record(ref, 0, 1, 0, 20)
		must(t, b.Append(ref, 0, data))
		rng := rand.New(rand.NewPCG(1, 1))
		var rs []*torus.Request
		for range 300 {
			off := rng.IntN(len(data))
			rs = append(rs, &torus.Request{Op: torus.OpRead, Ref: ref, Off: uint32(off), Data: make([]byte, rng.IntN(len(data)-off))})
		}
		b.DoAll(rs...)
		for _, r := range rs {
			if r.Err != nil || !bytes.Equal(r.Data, data[r.Off:][:len(r.Data)]) {
				t.Fatalf("read of %d at %d: %v", len(r.Data), r.Off, r.Err)
			}
		}
	}
}

// Close answers everybody, once.
func TestCloseUnderLoad(t *testing.T) {
	for seed := range uint64(30) {
		mem := vfs.NewMem(seed)
		b := bench(t, mem)
		ref := storetest.Ref(1)
		must(t, b.Append(ref, 0, storetest.Record(ref, 0, 1, 0, 1)))
		answered := 0
		submit := func(r *torus.Request) {
			r.Done = func(r *torus.Request) {
				answered++
				if r.Err != nil && !errors.Is(r.Err, torus.ErrClosed) {
					t.Errorf("%v: %v", r.Op, r.Err)
				}
			}
			b.Store.Submit(r)
		}
		b.Loop.Post(func() {
			for i := range uint64(8) {
				x := storetest.Ref(10 + i)
				submit(&torus.Request{Op: torus.OpAppend, Ref: x, Data: storetest.Record(x, 0, 1, 0, 1)})
			}
			submit(&torus.Request{Op: torus.OpRead, Ref: ref, Data: make([]byte, 100)})
			submit(&torus.Request{Op: torus.OpSync, Ref: ref, Len: 8192})
			submit(&torus.Request{Op: torus.OpSeal, Ref: ref, Len: 8192})
			submit(&torus.Request{Op: torus.OpDelete, Ref: storetest.Ref(10)})
		})
		b.Sim.RunFor(time.Duration(seed*17) * time.Microsecond)
		b.Loop.Post(func() { must(t, b.Store.Close()) })
		b.Sim.RunFor(time.Second)
		if answered != 12 {
			t.Fatalf("seed %d: %d of 12 answered", seed, answered)
		}
		// Close has made durable what was appended.
		b.Store = bench(t, mem.CrashClone(rand.New(rand.NewPCG(seed, 1)))).Store
		b = bench(t, mem)
		must(t, b.Sync(ref, 8192))
	}
}

func TestMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	b := storetest.NewBench(t, 1)
	mem := vfs.NewMem(1)
	must(t, storage.Create(mem, identity))
	cfg := config(b.Loop, mem)
	cfg.Registerer = reg
	d, err := storage.Open(cfg)
	must(t, err)
	b.Store = d
	ref := storetest.Ref(1)
	must(t, b.Append(ref, 0, storetest.Record(ref, 0, 1, 0, 1)))
	want(t, b.Append(ref, 0, make([]byte, 4096)), torus.ErrCorrupt)
	must(t, b.Sync(ref, 8192))
	_, err = b.Read(ref, 0, 10)
	must(t, err)
	_, err = b.Read(ref, 8192, 10)
	want(t, err, torus.ErrGap)
	must(t, b.Append(storetest.Ref(2), 0, storetest.Record(storetest.Ref(2), 0, 1, 0, 1)))
	must(t, b.Delete(storetest.Ref(2)))
	names := []string{"torus_storage_blocks", "torus_storage_blocks_total", "torus_storage_read_blocks", "torus_storage_failed_blocks",
		"torus_storage_written_blocks", "torus_storage_failed_written_blocks", "torus_storage_deleted_blocks",
		"torus_storage_failed_deleted_blocks", "torus_storage_flushes", "torus_storage_block_bytes"}
	got := map[string]float64{}
	families, err := reg.Gather()
	must(t, err)
	for _, f := range families {
		m := f.GetMetric()[0]
		got[f.GetName()] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
	}
	for i, v := range []float64{1, storetest.Slots + storetest.Kept, 1, 1, 2, 1, 1, 0, 2, storetest.BlockSize} {
		if x, ok := got[names[i]]; !ok || x != v {
			t.Errorf("%s is %v, want %v", names[i], x, v)
		}
	}
	must(t, d.Close())
	if d, err = storage.Open(cfg); err != nil { // the names are free again
		t.Fatal(err)
	}
	d.Close()
}

// A crash while a file is made leaves nothing behind.
func TestHalfMadeFile(t *testing.T) {
	mem := vfs.NewMem(1)
	b := bench(t, mem)
	b.Sim.RunFor(time.Second)
	b.Store.Close()
	_, err := mem.Create("slots-000007.new")
	must(t, err)
	b = bench(t, mem)
	b.Sim.RunFor(time.Second)
	names, err := mem.List(".")
	must(t, err)
	for _, n := range names {
		if strings.HasSuffix(n, ".new") {
			t.Errorf("%s is still there", n)
		}
	}
}

// Larger than the window that is read at a time: a block of 4 MiB full of records of every size.
func TestLargeOpenBlock(t *testing.T) {
	mem := vfs.NewMem(1)
	id := identity
	id.BlockSize = 4 << 20
	must(t, storage.Create(mem, id))
	cfg := config(nil, mem)
	cfg.Identity, cfg.SizeBytes = id, 4*id.BlockSize
	b := storetest.NewBench(t, 1)
	cfg.Loop = b.Loop
	d, err := storage.Open(cfg)
	must(t, err)
	b.Store = d
	ref := storetest.Ref(1)
	var all []byte
	for i, pages := range []int{0, 256, 1, 255, 3, 200, 17, 256, 5, 11} {
		r := storetest.Record(ref, uint32(len(all)), uint64(i+1), uint64(i), pages)
		if len(all)+len(r) > 4<<20 {
			t.Fatal("too many")
		}
		must(t, b.Append(ref, uint32(len(all)), r))
		all = append(all, r...)
	}
	must(t, b.Append(ref, uint32(len(all)), storetest.Record(ref, uint32(len(all)), 11, 0, (4<<20-len(all))/torus.PageSize-1)))
	must(t, d.Close())
	d, err = storage.Open(cfg)
	must(t, err)
	b.Store = d
	if l := b.List(0, 1); len(l) != 1 || l[0].Length != 4<<20 {
		t.Fatalf("%v", l)
	}
	got, err := b.Read(ref, 0, uint32(len(all)))
	if err != nil || !bytes.Equal(got, all) {
		t.Fatal(err)
	}
	var h record.Header
	r := b.Do(&torus.Request{Op: torus.OpScan, Ref: ref, Len: 1 << 20})
	must(t, r.Err)
	n := 0
	for rest := r.Data; len(rest) > 0; n++ {
		rest, err = record.NextScanEntry(rest, &h)
		must(t, err)
	}
	if n != 11 {
		t.Fatalf("%d records", n)
	}
}

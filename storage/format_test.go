package storage

import (
	"bytes"
	"errors"
	"flag"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/storage/storetest"
	"github.com/coreos/torus/vfs"
)

var update = flag.Bool("update", false, "write the golden files anew: only when a format gets a new version")

var goldenID = Identity{
	Peer:      torus.PeerID{0, 1, 2, 3, 4, 5, 0x46, 7, 0x88, 9, 10, 11, 12, 13, 14, 15},
	ClusterID: "0b2c6d1e-7a55-4f0e-9c1d-3f1f0a5a9b01", BlockSize: 16384,
}

func goldenDir(t *testing.T) vfs.FS {
	mem := vfs.NewMem(1)
	names, err := os.ReadDir("testdata/golden.v1")
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		b, err := os.ReadFile(filepath.Join("testdata/golden.v1", n.Name()))
		if err != nil {
			t.Fatal(err)
		}
		f, err := mem.Create(n.Name())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(b, 0); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	return mem
}

// goldenBlocks fills a store with a block of each kind: open, sealed, deleted.
func goldenBlocks(b *storetest.Bench) {
	for i := range uint64(3) {
		ref := torus.BlockRef{Volume: 0x0102030405, INode: 6, Index: torus.IndexID(i)}
		if err := b.Append(ref, 0, storetest.Record(ref, 0, i+1, i, 1)); err != nil {
			b.TB.Fatal(err)
		}
		var err error
		switch i {
		case 0:
			err = b.Sync(ref, 8192)
		case 1:
			err = b.Seal(ref, 8192)
		case 2:
			err = b.Delete(ref)
		}
		if err != nil {
			b.TB.Fatal(err)
		}
	}
}

// A directory written by every version that ever shipped can be opened.
func TestGoldenDirectory(t *testing.T) {
	if *update {
		if err := os.RemoveAll("testdata/golden.v1"); err != nil {
			t.Fatal(err)
		}
		fsys := vfs.NewOS("testdata/golden.v1")
		b := storetest.NewBench(t, 1)
		if err := Create(fsys, goldenID); err != nil {
			t.Fatal(err)
		}
		d, err := Open(Config{Loop: b.Loop, FS: fsys, Identity: goldenID, SizeBytes: 4 * 16384, SlotsPerFile: 4, ReserveBytes: 1})
		if err != nil {
			t.Fatal(err)
		}
		b.Store = d
		goldenBlocks(b)
		b.Sim.RunFor(time.Second)
		d.Close()
	}
	fsys := goldenDir(t)
	if id, err := ReadIdentity(fsys); err != nil || id != goldenID {
		t.Fatalf("identity %v, %v", id, err)
	}
	b := storetest.NewBench(t, 1)
	d, err := Open(Config{Loop: b.Loop, FS: fsys, Identity: goldenID, SizeBytes: 4 * 16384, ReserveBytes: 1})
	if err != nil {
		t.Fatal(err)
	}
	b.Store = d
	want := []torus.Tail{
		{Ref: torus.BlockRef{Volume: 0x0102030405, INode: 6, Index: 0}, Length: 8192},
		{Ref: torus.BlockRef{Volume: 0x0102030405, INode: 6, Index: 1}, Length: 8192, Sealed: true},
	}
	if got := b.List(0, 10); !slices.Equal(got, want) {
		t.Fatalf("blocks %v, want %v", got, want)
	}
	for i, x := range want {
		got, err := b.Read(x.Ref, 0, 8192)
		if err != nil || !bytes.Equal(got, storetest.Record(x.Ref, 0, uint64(i+1), uint64(i), 1)) {
			t.Fatalf("block %v: %v", x.Ref, err)
		}
	}
	if len(d.files[0].ready) != 2 || len(d.files[0].raw) != 0 {
		t.Fatalf("%d slots ready, %d raw; both should have been written through", len(d.files[0].ready), len(d.files[0].raw))
	}
}

// The encoding is what the drawing says, byte for byte.
func TestGoldenHead(t *testing.T) {
	page := make([]byte, torus.PageSize)
	superblock{id: goldenID, number: 3, slots: 5}.encode(page)
	e := make([]byte, entrySize)
	(&entry{state: sealed, gen: 9, ref: torus.BlockRef{Type: 1, Volume: 2, INode: 3, Index: 4}, length: 8192, flushed: 7, slot: 4, file: 3}).encode(e)
	got := append(slices.Clone(page[:128]), e...)
	file := "testdata/head.v1"
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatal("the format has changed")
	}
}

func TestEveryFlippedBitOfAnEntryIsFound(t *testing.T) {
	want := entry{state: sealed, gen: 9, ref: torus.BlockRef{Type: 1, Volume: 2, INode: 3, Index: 4}, length: 8192, flushed: 7, slot: 4, file: 3}
	b := make([]byte, entrySize)
	want.encode(b)
	var e entry
	if err := e.decodeFor(b, 3, 4, 16384); err != nil || e != want {
		t.Fatalf("%+v, %v", e, err)
	}
	for i := range b {
		for bit := range 8 {
			b[i] ^= 1 << bit
			if e.decode(b) == nil {
				t.Fatalf("bit %d of byte %d flipped, not found", bit, i)
			}
			b[i] ^= 1 << bit
		}
	}
	if e.decodeFor(b, 3, 5, 16384) == nil || e.decodeFor(b, 2, 4, 16384) == nil || e.decodeFor(b, 3, 4, 4096) == nil {
		t.Fatal("an entry was accepted in another's place")
	}
}

func FuzzSuperblock(f *testing.F) {
	page := make([]byte, torus.PageSize)
	superblock{id: goldenID, number: 3, slots: 5}.encode(page)
	f.Add(page)
	f.Add(make([]byte, torus.PageSize))
	f.Add([]byte(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		var s superblock
		if err := s.decode(b); err != nil {
			return
		}
		if s.slots == 0 || s.slots > maxSlotsPerFile || s.id.validate() != nil || s.fileSize() <= 0 {
			t.Fatalf("accepted %+v", s)
		}
		again := make([]byte, torus.PageSize)
		s.encode(again)
		var s2 superblock
		if s2.decode(again) != nil || s2 != s {
			t.Fatalf("%+v is encoded as %+v", s, s2)
		}
	})
}

func FuzzEntry(f *testing.F) {
	b := make([]byte, entrySize)
	(&entry{state: open, gen: 9, ref: torus.BlockRef{Type: 1, Volume: 2, INode: 3, Index: 4}, slot: 4, file: 3}).encode(b)
	f.Add(b)
	f.Add(make([]byte, entrySize))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < entrySize {
			return
		}
		var e, e2 entry
		if e.decodeFor(b[:entrySize], 3, 4, 16384) != nil || e.gen == 0 {
			return
		}
		if e.state > sealed || e.length > 16384 {
			t.Fatalf("accepted %+v", e)
		}
		again := make([]byte, entrySize)
		e.encode(again)
		if e2.decode(again) != nil || e != e2 {
			t.Fatalf("%+v is encoded as %+v", e, e2)
		}
	})
}

func FuzzIdentity(f *testing.F) {
	f.Add([]byte(`{"version":1,"cluster":"c","peer":"00010203-0405-4607-8809-0a0b0c0d0e0f","block_size":16384}`))
	f.Add([]byte(`{"version":2}`))
	f.Add([]byte(`{`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if id, err := parseIdentity(b); err == nil && id.validate() != nil {
			t.Fatalf("accepted %+v", id)
		}
	})
}

// A crash in the middle of a Put leaves a block in two slots: the newer entry counts, and the other slot is free again.
func TestBlockInTwoSlots(t *testing.T) {
	for _, newerFirst := range []bool{false, true} {
		mem := vfs.NewMem(1)
		b := storetest.NewBench(t, 1)
		cfg := Config{Loop: b.Loop, FS: mem, Identity: goldenID, SizeBytes: 4 * 16384, SlotsPerFile: 4, ReserveBytes: 1}
		if err := Create(mem, goldenID); err != nil {
			t.Fatal(err)
		}
		d, err := Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		b.Store = d
		old, next := storetest.Ref(1), storetest.Ref(2)
		for _, ref := range []torus.BlockRef{old, next} {
			if err := b.Append(ref, 0, storetest.Record(ref, 0, 1, 0, 1)); err != nil {
				t.Fatal(err)
			}
			if err := b.Sync(ref, 8192); err != nil {
				t.Fatal(err)
			}
		}
		b.Sim.RunFor(time.Second)
		// Turn the second block into another copy of the first, one record longer.
		s, _ := d.index.find(keyOf(next))
		first, _ := d.index.find(keyOf(old))
		f, place := d.place(s)
		long := storetest.Record(old, 0, 1, 0, 1)
		long = append(long, storetest.Record(old, 8192, 2, 0, 0)...)
		if _, err := f.f.WriteAt(long, place); err != nil {
			t.Fatal(err)
		}
		if newerFirst {
			if err := d.writeEntry(first); err != nil {
				t.Fatal(err)
			}
		}
		e := entry{state: open, gen: d.gen + 1, ref: old, slot: s - f.base, file: f.super.number}
		if newerFirst {
			e.gen = d.gen - 1
		}
		buf := make([]byte, entrySize)
		e.encode(buf)
		for table := range uint8(2) {
			if _, err := f.f.WriteAt(buf, entryPlace(f.super.slots, table, e.slot)); err != nil {
				t.Fatal(err)
			}
		}
		d.Close()
		if d, err = Open(cfg); err != nil {
			t.Fatal(err)
		}
		b.Store = d
		want := uint32(12288)
		if newerFirst {
			want = 8192
		}
		if got := b.List(0, 10); !slices.Equal(got, []torus.Tail{{Ref: old, Length: want}}) {
			t.Fatalf("newer first %v: blocks %v, want %d bytes of %v", newerFirst, got, want, old)
		}
		if used := d.Stats().Used; used != 16384 {
			t.Fatalf("used %d", used)
		}
		d.Close()
	}
}

// The index finds, orders and forgets as a plain map and a sort do.
func TestIndex(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	slots := make([]slot, 5000)
	x := index{slots: &slots}
	have := map[key]uint32{}
	var spare []uint32
	for i := range slots {
		spare = append(spare, uint32(i))
	}
	check := func() {
		var keys []key
		for k := range have {
			keys = append(keys, k)
		}
		slices.SortFunc(keys, key.compare)
		var got []key
		for p, ok := x.from(key{}); ok; p, ok = x.next(p) {
			got = append(got, x.key(x.slot(p)))
		}
		if !slices.Equal(got, keys) || x.n != len(keys) {
			t.Fatalf("%d keys in the index, %d wanted, or in another order", len(got), len(keys))
		}
	}
	for i := range 30_000 {
		k := key{rng.Uint64N(3), rng.Uint64N(20), rng.Uint64N(100)}
		s, ok := x.find(k)
		if w, there := have[k]; there != ok || ok && w != s {
			t.Fatalf("find %v: %d, %v; want %d, %v", k, s, ok, w, there)
		}
		switch grow := i < 15_000; {
		case !ok && (grow || rng.IntN(3) == 0) && len(spare) > 0:
			s, spare = spare[len(spare)-1], spare[:len(spare)-1]
			slots[s].key = k
			x.insert(s)
			have[k] = s
		case ok && (!grow || rng.IntN(3) == 0):
			x.remove(k)
			delete(have, k)
			slots[s].key = key{}
			spare = append(spare, s)
		}
		if i%3000 == 0 {
			check()
		}
	}
	check()
	var sorted []uint32
	for _, s := range have {
		sorted = append(sorted, s)
	}
	slices.SortFunc(sorted, func(a, b uint32) int { return slots[a].key.compare(slots[b].key) })
	x = index{slots: &slots}
	x.build(sorted)
	check()
}

// A slot is not used again while somebody still reads the block that was in it (D2).
func TestSlotIsPinned(t *testing.T) {
	mem := vfs.NewMem(1)
	mem.SetColdReads(1)
	b := storetest.NewBench(t, 1)
	if err := Create(mem, goldenID); err != nil {
		t.Fatal(err)
	}
	d, err := Open(Config{Loop: b.Loop, FS: mem, Identity: goldenID, SizeBytes: 16384, ReserveBytes: 1})
	if err != nil {
		t.Fatal(err)
	}
	b.Store = d
	old, next := storetest.Ref(1), storetest.Ref(2)
	data := storetest.Record(old, 0, 1, 0, 1)
	if err := b.Append(old, 0, data); err != nil {
		t.Fatal(err)
	}
	if err := b.Sync(old, uint32(len(data))); err != nil { // else it is read from the stage
		t.Fatal(err)
	}
	delays := []time.Duration{time.Second, time.Millisecond} // the read takes long
	b.Sim.SetOffloadDelay(func(*rand.Rand) time.Duration {
		x := delays[0]
		if len(delays) > 1 {
			delays = delays[1:]
		}
		return x
	})
	reading := true
	read := &torus.Request{Op: torus.OpRead, Ref: old, Data: make([]byte, len(data)), Done: func(*torus.Request) { reading = false }}
	b.Loop.Post(func() { d.Submit(read) })
	if err := b.Delete(old); err != nil {
		t.Fatal(err)
	}
	if !reading {
		t.Fatal("the read was over before the delete: nothing is tested")
	}
	if err := b.Append(next, 0, storetest.Record(next, 0, 1, 0, 1)); !errors.Is(err, torus.ErrOutOfSpace) {
		t.Fatalf("the slot was used again while being read: %v", err)
	}
	b.Sim.Run(func() bool { return !reading }, time.Minute)
	if read.Err != nil || !bytes.Equal(read.Data, data) {
		t.Fatalf("the read: %v", read.Err)
	}
	if err := b.Append(next, 0, storetest.Record(next, 0, 1, 0, 1)); err != nil {
		t.Fatal(err)
	}
}

// The free entry of a deleted block that was written while an fdatasync ran is durable only after the next one.
func TestDeleteDuringSync(t *testing.T) {
	mem := vfs.NewMem(1)
	b := storetest.NewBench(t, 1)
	syncs := 0
	fsys := vfs.NewErrors(mem, func(op vfs.Op) error {
		if op.Kind == vfs.OpDatasync && strings.HasPrefix(op.Name, slotsPrefix) && !strings.HasSuffix(op.Name, newSuffix) {
			syncs++
		}
		if op.Kind == vfs.OpMap {
			return errors.ErrUnsupported // appends to the page cache, which an fdatasync covers whatever it is for
		}
		return nil
	})
	if err := Create(fsys, goldenID); err != nil {
		t.Fatal(err)
	}
	d, err := Open(Config{Loop: b.Loop, FS: fsys, Identity: goldenID, SizeBytes: 2 * 16384, ReserveBytes: 1})
	if err != nil {
		t.Fatal(err)
	}
	b.Store = d
	b.Sim.RunFor(time.Second)
	d.syncTime = 0 // syncs are for a helper
	ref, other := storetest.Ref(1), storetest.Ref(2)
	if err := b.Append(ref, 0, storetest.Record(ref, 0, 1, 0, 1)); err != nil {
		t.Fatal(err)
	}
	if err := b.Append(other, 0, storetest.Record(other, 0, 1, 0, 1)); err != nil {
		t.Fatal(err)
	}
	syncs = 0
	done := map[torus.Op]int{}
	finish := func(r *torus.Request) {
		if r.Err != nil {
			t.Errorf("%v: %v", r.Op, r.Err)
		}
		done[r.Op] = syncs
		if r.Op == torus.OpSync && d.taken != 2 {
			t.Error("a slot was free before its entry was durable")
		}
	}
	b.Loop.Post(func() { d.Submit(&torus.Request{Op: torus.OpSync, Ref: ref, Len: 8192, Done: finish}) })
	if !b.Sim.Run(func() bool { return d.files[0].sync.running }, time.Second) {
		t.Fatal("no fdatasync began")
	}
	b.Loop.Post(func() {
		d.Submit(&torus.Request{Op: torus.OpDelete, Ref: ref, Done: finish})
		d.Submit(&torus.Request{Op: torus.OpAppend, Ref: other, Off: 8192, Data: storetest.Record(other, 8192, 2, 0, 0), Done: func(r *torus.Request) {
			if r.Err != nil {
				t.Error(r.Err)
			}
			// What is appended while an fdatasync runs is not covered by it, what was there before is.
			d.Submit(&torus.Request{Op: torus.OpSync, Ref: other, Len: 8192, Done: func(*torus.Request) { done[100] = syncs }})
			d.Submit(&torus.Request{Op: torus.OpSync, Ref: other, Len: 12288, Done: func(*torus.Request) { done[101] = syncs }})
		}})
	})
	b.Sim.Run(func() bool { return done[torus.OpDelete] > 0 && done[101] > 0 }, time.Second)
	if done[torus.OpSync] != 1 || done[torus.OpDelete] != 2 || done[100] != 1 || done[101] != 2 {
		t.Errorf("answered after so many fdatasyncs: %v", done)
	}
	if d.taken != 1 {
		t.Errorf("%d slots taken", d.taken)
	}
}

package storage

import (
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/storage/storetest"
	"github.com/coreos/torus/vfs"
)

// growing opens a store of so many slots in one file.
func growing(t *testing.T, slots int) (*storetest.Bench, *Disk) {
	t.Helper()
	fsys := vfs.NewMem(1)
	id := Identity{ClusterID: "c", Peer: torus.PeerID{1}, BlockSize: 4 << 20}
	if err := Create(fsys, id); err != nil {
		t.Fatal(err)
	}
	b := storetest.NewBench(t, 1)
	d, err := Open(Config{Loop: b.Loop, FS: fsys, Identity: id, SizeBytes: uint64(slots) * id.BlockSize, SlotsPerFile: slots, ReserveBytes: 1})
	if err != nil {
		t.Fatal(err)
	}
	b.Store = d
	t.Cleanup(func() { d.Close() })
	return b, d
}

func ready(d *Disk) (n int) {
	for _, f := range d.files {
		n += len(f.ready)
	}
	return n
}

func block(i int) torus.BlockRef {
	return torus.BlockRef{Volume: 1, INode: 1, Index: torus.IndexID(i)}
}

func begin(i int) []byte { return storetest.Record(block(i), 0, uint64(i+1), 0, 1) }

// So many slots are written through as will be needed soon, and no more; when some are taken others follow.
func TestSlotsAheadOfNeed(t *testing.T) {
	b, d := growing(t, 2*prewriteAhead)
	b.Sim.RunFor(time.Minute)
	if n := ready(d); n != prewriteAhead {
		t.Fatalf("%d slots are ready, not %d", n, prewriteAhead)
	}
	for i := range prewriteAhead / 2 {
		if err := b.Append(block(i), 0, begin(i)); err != nil {
			t.Fatal(err)
		}
	}
	b.Sim.RunFor(time.Minute)
	if n := ready(d); n != prewriteAhead {
		t.Errorf("%d slots are ready after some were taken, not %d", n, prewriteAhead)
	}
}

// While others append much nothing is written through; and they get the slot at which that has stopped.
func TestSlotsAheadGiveWay(t *testing.T) {
	b, d := growing(t, 16)
	d.writer.load.rate = 2 * prewriteYield
	busy := true
	var load func()
	load = func() {
		if busy {
			d.appended += 2 * prewriteYield / 100
			b.Loop.After(time.Second/100, load)
		}
	}
	load()
	b.Sim.RunFor(time.Minute)
	if n := ready(d); n > 1 || d.writer.slot == noSlot {
		t.Fatalf("%d slots were written through beside others; now: %d", n, d.writer.slot)
	}
	for i := range 16 {
		began := b.Sim.Now()
		if r := b.Do(&torus.Request{Op: torus.OpAppend, Ref: block(i), Data: begin(i), Reserve: true}); r.Err != nil {
			t.Fatal(r.Err)
		}
		if took := b.Sim.Now() - began; took > prewriteLook/2 {
			t.Errorf("block %d waited %v for its slot", i, took)
		}
	}
	for i := range 16 {
		if got, err := b.Read(block(i), 0, uint32(len(begin(i)))); err != nil || string(got) != string(begin(i)) {
			t.Errorf("block %d: %v", i, err)
		}
	}
	busy = false
	b.Sim.RunFor(time.Minute)
	for i := range 16 {
		if got, err := b.Read(block(i), 0, uint32(len(begin(i)))); err != nil || string(got) != string(begin(i)) {
			t.Errorf("block %d after a minute: %v", i, err)
		}
	}
}

package storage_test

import (
	"bytes"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/record"
	"github.com/coreos/torus/storage"
	"github.com/coreos/torus/storage/storetest"
	"github.com/coreos/torus/vfs"
)

// wrap is a record of ref whose data pages are data: whatever somebody writes to his volume.
func wrap(ref torus.BlockRef, off uint32, seq uint64, data []byte) []byte {
	b := make([]byte, record.HeaderSize+len(data))
	copy(b[record.HeaderSize:], data)
	h := record.Header{Ref: ref, Seq: seq, Offset: off}
	n := len(data) / torus.PageSize
	h.Extents = []record.Extent{{Page: seq, Count: uint32(n), Kind: record.Data}}
	for i := range n {
		h.CRCs = append(h.CRCs, record.Checksum(data[i*torus.PageSize:][:torus.PageSize]))
	}
	h.Encode(b[:record.HeaderSize])
	return b
}

// What a guest writes to its volume may be a record, of any block: a disk of a peer of a cluster inside, a copy of one, or malice. After a crash it must not be taken for what was
// staged of that block.
func TestStageGuestDataIsNoRecord(t *testing.T) {
	for _, c := range []string{"overwrites", "extends"} {
		t.Run(c, func(t *testing.T) {
			mem := vfs.NewMem(1)
			b := bench(t, mem)
			victim, guest := storetest.Ref(1), storetest.Ref(2)
			victim.Volume = 7 // somebody else's
			truth := storetest.Record(victim, 0, 1, 0, 1)
			must(t, b.Append(victim, 0, truth))
			must(t, b.Sync(victim, uint32(len(truth))))
			forged := storetest.Record(victim, 0, 666, 0, 1)
			if c == "extends" {
				forged = storetest.Record(victim, uint32(len(truth)), 666, 0, 1)
			}
			must(t, b.Append(guest, 0, wrap(guest, 0, 1, forged)))
			mem.Kill()
			b = bench(t, mem)
			if got, err := b.Read(victim, 0, uint32(len(truth))); err != nil || !bytes.Equal(got, truth) {
				t.Errorf("synced bytes have changed (%v)", err)
			}
			if tails := b.List(victim.Volume, 10); len(tails) != 1 || int(tails[0].Length) != len(truth) {
				t.Errorf("of %d bytes: %v", len(truth), tails)
			}
		})
	}
}

// A Put's first fdatasync must be one, although all that its file has besides is a chunk: else its entry may be durable, and its bytes not, and the copy that was durable is lost.
func TestStagePutBesideCarriedChunk(t *testing.T) {
	// The chunk is one of the old copy here; one of any other block of the file does it too, if its Sync and the Put wait for the same fdatasync.
	cuts, bad := 0, 0
	mem := vfs.NewMem(1)
	f := faulty(mem)
	b := bench(t, f)
	b.Sim.RunFor(time.Minute) // slots are written through, nothing goes on in the background
	ref := storetest.Ref(1)
	first := storetest.Record(ref, 0, 1, 0, 1)
	must(t, b.Append(ref, 0, first))
	must(t, b.Sync(ref, 8192))
	b.Sim.RunFor(time.Minute)
	all := append(bytes.Clone(first), storetest.Record(ref, 8192, 2, 0, 1)...)
	all = append(all, storetest.Record(ref, 16384, 3, 0, 1)...)
	must(t, b.Append(ref, 8192, all[8192:16384]))
	// The power is cut when the entry of the new copy has been written, and an fdatasync has begun that is to make it durable.
	written, entry := false, false
	f.hit = func(op vfs.Op) error {
		if !strings.HasPrefix(op.Name, "slots-") {
			return nil
		}
		switch {
		case op.Kind == vfs.OpWrite && op.Len == int64(len(all)):
			written = true
		case op.Kind == vfs.OpWrite && op.Len == 64 && written:
			entry = true
		case op.Kind == vfs.OpDatasync && entry && cuts == 0:
			for seed := range uint64(200) {
				cuts++
				after := bench(t, mem.CrashClone(rand.New(rand.NewPCG(seed, 1))))
				if got, err := after.Read(ref, 0, uint32(len(first))); err != nil || !bytes.Equal(got, first) {
					bad++
				}
			}
		}
		return nil
	}
	must(t, b.Do(&torus.Request{Op: torus.OpPut, Ref: ref, Data: all, Len: uint32(len(all))}).Err)
	if cuts == 0 {
		t.Fatal("the power was not cut")
	}
	if bad > 0 {
		t.Errorf("after %d of %d power cuts the synced bytes are gone", bad, cuts)
	}
}

// What could not be read of the stage at one Open is still missing at the next: either it is there then, or the block does not pass for whole.
func TestStageUnreadableOnce(t *testing.T) {
	mem := vfs.NewMem(1)
	f := faulty(mem)
	b := bench(t, f)
	ref, other := storetest.Ref(1), storetest.Ref(2)
	synced := storetest.Record(ref, 0, 1, 0, 1)
	must(t, b.Append(ref, 0, synced))
	must(t, b.Sync(ref, 8192))
	must(t, b.Append(ref, 8192, storetest.Record(ref, 8192, 2, 0, 1))) // acknowledged
	mem.Kill()
	f.hit = func(op vfs.Op) error { return ifStage(op, vfs.OpRead, syscall.EIO) }
	b = bench(t, f)
	for i := range uint64(8) { // the life of others goes on
		other.Index = torus.IndexID(i + 2)
		must(t, b.Append(other, 0, storetest.Record(other, 0, 1, 0, 3)))
	}
	f.hit = func(vfs.Op) error { return nil }
	mem.Kill()
	b = bench(t, f)
	fence := b.Do(&torus.Request{Op: torus.OpFence, Ref: ref, Len: 1})
	must(t, fence.Err)
	if len(fence.Tails) != 1 || fence.Tails[0].Length != 16384 && !fence.Tails[0].Suspect {
		t.Errorf("16384 bytes were acknowledged: %+v", fence.Tails)
	}
	if err := b.Append(ref, 8192, storetest.Record(ref, 8192, 77, 0, 1)); err == nil {
		t.Error("other bytes were taken in the place of acknowledged ones")
	}
}

// What could not be restored at one Open is not taken from the stage.
func TestStageRestoreFailsOnce(t *testing.T) {
	mem := vfs.NewMem(1)
	f := faulty(mem)
	b := bench(t, f)
	ref := storetest.Ref(1)
	must(t, b.Append(ref, 0, storetest.Record(ref, 0, 1, 0, 1)))
	must(t, b.Sync(ref, 8192))
	must(t, b.Append(ref, 8192, storetest.Record(ref, 8192, 2, 0, 1))) // acknowledged
	mem.Kill()
	f.hit = func(op vfs.Op) error {
		if op.Kind == vfs.OpWrite && strings.HasPrefix(op.Name, "slots-") && op.Len == 8192 {
			return vfs.ErrNoSpace
		}
		return nil
	}
	b = bench(t, f)
	f.hit = func(vfs.Op) error { return nil }
	if l := b.List(1, 10); len(l) != 1 || !l[0].Suspect {
		t.Fatalf("%+v", l)
	}
	mem.Kill()
	b = bench(t, f)
	if l := b.List(1, 10); len(l) != 1 || l[0].Length != 16384 && !l[0].Suspect {
		t.Errorf("16384 bytes were acknowledged: %+v", l)
	}
	if err := b.Append(ref, 8192, storetest.Record(ref, 8192, 77, 0, 1)); err == nil {
		t.Error("other bytes were taken in the place of acknowledged ones")
	}
}

// What was deleted, acknowledged, does not come back into a block that is made again.
func TestStageDeletedAndMadeAgain(t *testing.T) {
	mem := vfs.NewMem(1)
	b := bench(t, mem)
	ref := storetest.Ref(1)
	first := storetest.Record(ref, 0, 1, 0, 1)
	must(t, b.Append(ref, 0, first))
	must(t, b.Append(ref, 8192, storetest.Record(ref, 8192, 2, 0, 1)))
	must(t, b.Delete(ref))
	must(t, b.Append(storetest.Ref(2), 0, storetest.Record(storetest.Ref(2), 0, 1, 0, 0))) // takes the chunk
	again := storetest.Record(ref, 0, 3, 0, 1)
	must(t, b.Append(ref, 0, again))
	must(t, b.Sync(ref, 8192))
	mem.Kill()
	b = bench(t, mem)
	l := b.List(1, 10)
	if len(l) != 2 || l[0].Length != 8192 || l[0].Suspect {
		t.Errorf("8192 bytes were appended since it was made again: %+v", l)
	}
	if got, err := b.Read(ref, 0, 8192); err != nil || !bytes.Equal(got, again) {
		t.Errorf("synced bytes changed, %v", err)
	}
}

// onEntry fails the writes of entries.
func onEntry(err error) func(vfs.Op) error {
	write := on(vfs.OpWrite, err)
	return func(op vfs.Op) error {
		if op.Len != 64 {
			return nil
		}
		return write(op)
	}
}

// An append that was refused is not put in the place of one that was acknowledged.
func TestStageRefusedAfterStaging(t *testing.T) {
	mem := vfs.NewMem(1)
	f := faulty(mem)
	b := bench(t, f)
	b.Sim.RunFor(time.Minute)
	ref := storetest.Ref(1)
	f.hit = onEntry(vfs.ErrNoSpace)
	want(t, b.Append(ref, 0, storetest.Record(ref, 0, 1, 0, 1)), torus.ErrOutOfSpace)
	f.hit = func(op vfs.Op) error { return ifStage(op, vfs.OpWrite, syscall.EIO) } // so that this one goes through the page cache; a large one would fly
	truth := storetest.Record(ref, 0, 2, 0, 1)
	must(t, b.Append(ref, 0, truth))
	must(t, b.Sync(ref, 8192))
	f.hit = func(vfs.Op) error { return nil }
	mem.Kill()
	b = bench(t, f)
	if got, err := b.Read(ref, 0, 8192); err != nil || !bytes.Equal(got, truth) {
		t.Errorf("synced bytes changed, %v", err)
	}
}

// BulkBytes that are no whole pages: chunks must begin where the next Open looks for records.
func TestStageUnalignedBulk(t *testing.T) {
	mem := vfs.NewMem(1)
	b := storetest.NewBench(t, 1)
	must(t, storage.Create(mem, identity))
	cfg := config(b.Loop, mem)
	cfg.BulkBytes = 20_000
	d, err := storage.Open(cfg)
	must(t, err)
	b.Store = d
	for i := range uint64(3) {
		must(t, b.Append(storetest.Ref(i), 0, storetest.Record(storetest.Ref(i), 0, 1, 0, 1)))
	}
	mem.Kill()
	b = bench(t, mem)
	if l := b.List(1, 10); len(l) != 3 {
		t.Errorf("of 3 blocks %d are left", len(l))
	}
}

// A header that a power cut left in the stage without its data is not whole, so it is not taken from there; then somebody else's record brings the same data (a record that is sent
// again to another block), and a second power cut the old header back.
func TestStageHalfARecordInTheStage(t *testing.T) {
	mem := vfs.NewMem(1)
	b := bench(t, mem)
	ref, other := storetest.Ref(1), storetest.Ref(2)
	must(t, b.Append(ref, 0, storetest.Record(ref, 0, 1, 0, 1)))
	must(t, b.Sync(ref, 8192))
	must(t, b.Store.Close())
	lost := storetest.Record(ref, 8192, 2, 0, 1) // the first power cut took it, but for its header in the stage
	f, err := mem.Open(stageName)
	must(t, err)
	size, err := f.Size()
	must(t, err)
	_, err = f.WriteAt(make([]byte, size), 0)
	must(t, err)
	_, err = f.WriteAt(lost[:torus.PageSize], 0)
	must(t, err)
	_, err = f.WriteAt(bytes.Repeat([]byte("torn"), torus.PageSize/4), torus.PageSize)
	must(t, err)
	must(t, f.Datasync())
	must(t, f.Close())

	b = bench(t, mem)
	truth := storetest.Record(ref, 8192, 77, 0, 1)
	must(t, b.Append(other, 0, wrap(other, 0, 2, lost[torus.PageSize:])))
	must(t, b.Append(ref, 8192, truth))
	must(t, b.Sync(ref, 16384))
	bad := 0
	for seed := range uint64(300) {
		after := bench(t, mem.CrashClone(rand.New(rand.NewPCG(seed, 1))))
		if got, err := after.Read(ref, 8192, 8192); err != nil || !bytes.Equal(got, truth) {
			bad++
		}
	}
	if bad > 0 {
		t.Errorf("after %d of 300 power cuts synced bytes are others", bad)
	}
}

// onLoopFS counts what is done to slots files on the loop.
type onLoopFS struct {
	vfs.FS
	helping       *bool
	reads, writes *int
	slow          time.Duration
}

type onLoopFile struct {
	vfs.File
	fs *onLoopFS
}

func (o *onLoopFS) Create(name string) (vfs.File, error) { return o.wrap(name, o.FS.Create) }
func (o *onLoopFS) Open(name string) (vfs.File, error)   { return o.wrap(name, o.FS.Open) }

func (o *onLoopFS) wrap(name string, open func(string) (vfs.File, error)) (vfs.File, error) {
	f, err := open(name)
	if err != nil || !strings.HasPrefix(name, "slots-") {
		return f, err
	}
	return onLoopFile{f, o}, nil
}

func (f onLoopFile) ReadAt(b []byte, off int64) (int, error) {
	if !*f.fs.helping {
		*f.fs.reads++
	}
	return f.File.ReadAt(b, off)
}

func (f onLoopFile) WriteThrough(b []byte, off int64) (time.Duration, error) {
	if !*f.fs.helping {
		*f.fs.writes++
	}
	_, err := f.File.WriteThrough(b, off)
	return f.fs.slow, err
}

func onLoopBench(t *testing.T, slow time.Duration) (b *storetest.Bench, o *onLoopFS, mem *vfs.Mem) {
	mem = vfs.NewMem(1)
	mem.SetSlowSyncs(0, 0)
	o = &onLoopFS{FS: mem, helping: new(bool), reads: new(int), writes: new(int), slow: slow}
	b = storetest.NewBench(t, 1)
	b.Sim.SetTrace(func(e loop.Event) { *o.helping = e.Kind == loop.KindWork })
	must(t, storage.Create(o, identity))
	d, err := storage.Open(config(b.Loop, o))
	must(t, err)
	b.Store = d
	b.Sim.RunFor(time.Minute)
	*o.reads, *o.writes = 0, 0
	return b, o, mem
}

// A disk that writes slowly, and has little to do for an fdatasync after that, is not waited for on the loop for ever: how long the writes of chunks took counts too.
func TestStageSlowWritesOnTheLoop(t *testing.T) {
	b, o, _ := onLoopBench(t, 2*time.Millisecond)
	const rounds = 30
	for i := range uint64(rounds) {
		var rs []*torus.Request
		for j := range uint64(4) {
			ref := storetest.Ref(j + 1)
			off := uint32(i * torus.PageSize)
			must(t, b.Append(ref, off, storetest.Record(ref, off, i+1, 0, 0)))
			rs = append(rs, &torus.Request{Op: torus.OpSync, Ref: ref, Len: off + torus.PageSize})
		}
		b.DoAll(rs...)
	}
	if *o.writes > rounds {
		t.Errorf("the loop waited %d times for a write of 2 ms, in %d rounds", *o.writes, rounds)
	}
}

// A read of what is partly in the stage, and partly on the disk only, does not have the loop wait for the disk.
func TestStageReadAcrossTheStage(t *testing.T) {
	b, o, mem := onLoopBench(t, 0)
	ref := storetest.Ref(1)
	all := append(storetest.Record(ref, 0, 1, 0, 1), storetest.Record(ref, 8192, 2, 0, 1)...)
	must(t, b.Append(ref, 0, all[:8192]))
	must(t, b.Sync(ref, 8192))
	must(t, b.Append(ref, 8192, all[8192:]))
	mem.SetColdReads(1) // it went past the page cache
	if got, err := b.Read(ref, 0, uint32(len(all))); err != nil || !bytes.Equal(got, all) {
		t.Fatal(err, "or other bytes")
	}
	if *o.reads > 0 {
		t.Errorf("%d reads of the disk on the loop by a read", *o.reads)
	}
	*o.reads = 0
	must(t, b.Append(ref, 0, all)) // sent again
	if *o.reads > 0 {
		t.Errorf("%d reads of the disk on the loop by an append sent again", *o.reads)
	}
}

// A delete that fails before its entry is written has not happened: what was acknowledged of the block is still there after a restart, or it does not pass for whole.
func TestStageDeleteFails(t *testing.T) {
	mem := vfs.NewMem(1)
	f := faulty(mem)
	b := bench(t, f)
	b.Sim.RunFor(time.Minute)
	ref := storetest.Ref(1)
	must(t, b.Append(ref, 0, storetest.Record(ref, 0, 1, 0, 1)))
	must(t, b.Sync(ref, 8192))
	must(t, b.Append(ref, 8192, storetest.Record(ref, 8192, 2, 0, 1))) // acknowledged
	f.hit = onEntry(syscall.EIO)
	want(t, b.Delete(ref), torus.ErrIO)
	f.hit = func(vfs.Op) error { return nil }
	mem.Kill()
	b = bench(t, f)
	if l := b.List(1, 10); len(l) != 1 || l[0].Length != 16384 && !l[0].Suspect {
		t.Errorf("16384 bytes were acknowledged: %+v", l)
	}
}

// A stage of which only the first page cannot be written to costs time and no more.
func TestStageTableFails(t *testing.T) {
	f := faulty(vfs.NewMem(1))
	b := bench(t, f)
	b.Sim.RunFor(time.Minute)
	ref := storetest.Ref(1)
	must(t, b.Append(ref, 0, storetest.Record(ref, 0, 1, 0, 1)))
	f.hit = func(op vfs.Op) error {
		if op.Kind == vfs.OpWrite && op.Name == stageName && op.Off < torus.PageSize && op.Len < torus.PageSize {
			return syscall.EIO
		}
		return nil
	}
	if err := b.Append(ref, 8192, storetest.Record(ref, 8192, 2, 0, 1)); err != nil {
		t.Errorf("an append: %v", err)
	}
	if b.Store.Stats().Failed {
		t.Error("the disk counts as failed")
	}
}

// Who syncs two blocks at a time, of one of which all is staged, has both durable.
func TestStageBesideWhatHasLanded(t *testing.T) {
	mem := vfs.NewMem(1)
	b := storetest.NewBench(t, 1)
	must(t, storage.Create(mem, identity))
	cfg := config(b.Loop, mem)
	cfg.BulkBytes = 3 * torus.PageSize
	d, err := storage.Open(cfg)
	must(t, err)
	b.Store = d
	b.Sim.RunFor(time.Minute)
	small, large := storetest.Ref(1), storetest.Ref(2)
	for _, ref := range []torus.BlockRef{small, large} {
		must(t, b.Append(ref, 0, storetest.Record(ref, 0, 1, 0, 1)))
		must(t, b.Sync(ref, 8192))
	}
	more := storetest.Record(large, 8192, 2, 0, 2)
	must(t, b.Append(small, 8192, storetest.Record(small, 8192, 2, 0, 1)))
	must(t, b.Append(large, 8192, more))
	rs := []*torus.Request{{Op: torus.OpSync, Ref: small, Len: 16384}, {Op: torus.OpSync, Ref: large, Len: 8192 + uint32(len(more))}}
	b.DoAll(rs...)
	must(t, rs[0].Err)
	must(t, rs[1].Err)
	for seed := range uint64(20) {
		after := bench(t, mem.CrashClone(rand.New(rand.NewPCG(seed, 1))))
		if l := after.List(1, 10); len(l) != 2 || l[0].Length != 16384 || int(l[1].Length) != 8192+len(more) {
			t.Fatalf("after a power cut: %+v", l)
		}
	}
}

package storage_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/storage"
	"github.com/coreos/torus/storage/storetest"
	"github.com/coreos/torus/vfs"
)

const stageName = "stage"

// chunks is how many chunks of the stage have something that has not landed.
func chunks(t *testing.T, mem *vfs.Mem) (n int) {
	t.Helper()
	f, err := mem.Open(stageName)
	must(t, err)
	defer f.Close()
	page := make([]byte, torus.PageSize)
	_, err = f.ReadAt(page, 0)
	must(t, err)
	for at := 64; at < 64+8*32; at += 32 {
		if binary.LittleEndian.Uint32(page[at+28:]) > 0 {
			n++
		}
	}
	return n
}

// What was acknowledged is in the stage alone, and the end of the process does not take it. Without the stage it is gone, so this does test it; and once it has been put where it
// belongs, the stage has nothing of it any more.
func TestStageOutlivesTheProcess(t *testing.T) {
	for _, kept := range []bool{true, false} {
		mem := vfs.NewMem(1)
		b := bench(t, mem)
		ref := storetest.Ref(1)
		first := storetest.Record(ref, 0, 1, 0, 2)
		must(t, b.Append(ref, 0, first))
		must(t, b.Sync(ref, uint32(len(first))))
		second := storetest.Record(ref, uint32(len(first)), 2, 0, 1)
		must(t, b.Append(ref, uint32(len(first)), second))
		mem.Kill()
		if n := chunks(t, mem); n != 1 {
			t.Fatalf("%d chunks", n)
		}
		if !kept {
			must(t, mem.Remove(stageName))
		}
		b = bench(t, mem)
		all := append(bytes.Clone(first), second...)
		got, err := b.Read(ref, 0, uint32(len(all)))
		if !kept {
			want(t, err, torus.ErrGap)
			continue
		}
		if err != nil || !bytes.Equal(got, all) {
			t.Fatalf("after the kill: %v, or other bytes", err)
		}
		if n := chunks(t, mem); n != 0 {
			t.Fatalf("%d chunks are left", n)
		}
	}
}

// After a power cut the stage says nothing: its pages may be of any age, and what fits together by chance was never together.
func TestStageAfterAPowerCut(t *testing.T) {
	mem := vfs.NewMem(1)
	b := bench(t, mem)
	ref := storetest.Ref(1)
	first, second := storetest.Record(ref, 0, 1, 0, 1), storetest.Record(ref, 8192, 2, 0, 1)
	must(t, b.Append(ref, 0, first))
	must(t, b.Sync(ref, 8192))
	must(t, b.Append(ref, 8192, second))
	f, err := mem.Open(stageName)
	must(t, err)
	must(t, f.Datasync())
	mem = mem.CrashClone(rand.New(rand.NewPCG(1, 1)))
	if n := chunks(t, mem); n != 1 {
		t.Fatalf("%d chunks: nothing is tested", n)
	}
	b = bench(t, mem)
	if l := b.List(1, 10); len(l) != 1 || l[0].Length != 8192 || l[0].Suspect {
		t.Fatalf("%+v", l)
	}
	if n := chunks(t, mem); n != 0 {
		t.Fatalf("%d chunks are left", n)
	}
}

// More blocks than there are chunks, and more bytes than they hold: everything is taken, read, and outlives the process; and in a while all of it is in its
// blocks, where others may read it.
func TestStageFull(t *testing.T) {
	for _, idle := range []bool{false, true} {
		mem := vfs.NewMem(1)
		b := bench(t, mem)
		data := map[uint64][]byte{}
		for round := range uint64(6) {
			for i := range uint64(storetest.Slots - 1) {
				r := storetest.Record(storetest.Ref(i), uint32(len(data[i])), round+1, 0, 1)
				must(t, b.Append(storetest.Ref(i), uint32(len(data[i])), r))
				data[i] = append(data[i], r...)
			}
		}
		check := func(when string) {
			t.Helper()
			for i, want := range data {
				if got, err := b.Read(storetest.Ref(i), 0, uint32(len(want))); err != nil || !bytes.Equal(got, want) {
					t.Fatalf("%s: block %d: %v, or other bytes", when, i, err)
				}
			}
		}
		check("at first")
		if idle {
			b.Sim.RunFor(2 * time.Second)
			check("after a while")
			for i, want := range data {
				if l := locate(t, b.Store.(*storage.Disk), storetest.Ref(i)); !bytes.Equal(l.read(t), want) {
					t.Fatalf("block %d has %d bytes of %d in its slot", i, l.Length, len(want))
				}
			}
		}
		mem.Kill()
		if idle {
			must(t, mem.Remove(stageName))
		}
		b = bench(t, mem)
		check("after the kill")
	}
}

// If the stage cannot be read when the store is opened, nobody takes the blocks for whole that something may be missing of (D3).
func TestStageUnreadable(t *testing.T) {
	mem := vfs.NewMem(1)
	f := faulty(mem)
	b := bench(t, f)
	ref, other := storetest.Ref(1), storetest.Ref(2)
	r := storetest.Record(ref, 0, 1, 0, 2)
	must(t, b.Append(ref, 0, r))
	must(t, b.Append(other, 0, storetest.Record(other, 0, 2, 0, 2)))
	must(t, b.Seal(other, uint32(len(r))))
	mem.Kill()
	f.hit = func(op vfs.Op) error { return ifStage(op, vfs.OpRead, syscall.EIO) }
	b = bench(t, f)
	fence := b.Do(&torus.Request{Op: torus.OpFence, Ref: ref, Len: 2})
	must(t, fence.Err)
	if len(fence.Tails) != 2 || !fence.Tails[0].Suspect || fence.Tails[1].Suspect {
		t.Fatalf("tails %+v", fence.Tails)
	}
	want(t, b.Append(ref, 0, r), torus.ErrIO)
}

// A stage that cannot be written to, or not be had, costs time and no more.
func TestStageFails(t *testing.T) {
	for name, hit := range map[string]func(op vfs.Op) error{
		"map":    unmapped,
		"create": func(op vfs.Op) error { return ifStage(op, vfs.OpCreate, vfs.ErrNoSpace) },
		"sync":   func(op vfs.Op) error { return ifStage(op, vfs.OpDatasync, syscall.EIO) },
		"write":  func(op vfs.Op) error { return ifStage(op, vfs.OpWrite, syscall.EIO) },
	} {
		for _, later := range []bool{false, true} { // than the first append
			mem := vfs.NewMem(1)
			f := faulty(mem)
			if !later {
				f.hit = hit
			}
			b := bench(t, f)
			ref := storetest.Ref(1)
			var all []byte
			for i := range uint64(5) {
				r := storetest.Record(ref, uint32(len(all)), i+1, 0, 1)
				if err := b.Append(ref, uint32(len(all)), r); err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				all = append(all, r...)
				f.hit = hit
			}
			mem.Kill()
			b = bench(t, mem)
			if got, err := b.Read(ref, 0, uint32(len(all))); err != nil || !bytes.Equal(got, all) {
				t.Fatalf("%s: after the kill: %v, or other bytes", name, err)
			}
		}
	}
}

func ifStage(op vfs.Op, kind vfs.OpKind, err error) error {
	if op.Kind == kind && op.Name == stageName {
		return err
	}
	return nil
}

// What is staged of a block that is deleted, or cut off, does not come back.
func TestStageOfTheDeleted(t *testing.T) {
	mem := vfs.NewMem(1)
	b := bench(t, mem)
	gone, cut := storetest.Ref(1), storetest.Ref(2)
	head := storetest.Record(cut, 0, 1, 0, 1)
	must(t, b.Append(gone, 0, storetest.Record(gone, 0, 1, 0, 1)))
	must(t, b.Append(cut, 0, head))
	must(t, b.Append(cut, uint32(len(head)), storetest.Record(cut, uint32(len(head)), 2, 0, 1)))
	must(t, b.Delete(gone))
	must(t, b.Seal(cut, uint32(len(head))))
	mem.Kill()
	b = bench(t, mem)
	if _, err := b.Read(gone, 0, 4096); !errors.Is(err, torus.ErrBlockNotExist) {
		t.Errorf("the deleted block: %v", err)
	}
	_, err := b.Read(cut, 0, uint32(len(head))+1)
	want(t, err, torus.ErrGap)
	if got, err := b.Read(cut, 0, uint32(len(head))); err != nil || !bytes.Equal(got, head) {
		t.Errorf("what is left of the other: %v", err)
	}
}

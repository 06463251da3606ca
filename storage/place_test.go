package storage_test

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/place"
	"github.com/coreos/torus/storage"
	"github.com/coreos/torus/storage/storetest"
	"github.com/coreos/torus/vfs"
)

// located is a block as somebody else reads it.
type located struct {
	place.Place
	f vfs.Reader
}

func locate(t *testing.T, d *storage.Disk, ref torus.BlockRef) located {
	t.Helper()
	p, err := d.Locate(ref)
	must(t, err)
	f, err := d.OpenFile(p.File)
	must(t, err)
	t.Cleanup(func() { must(t, f.Close()) })
	return located{p, f}
}

func (l *located) good() bool { return place.Look(l.Page.Bytes(), l.Index) == l.Stamp }

func (l *located) read(t *testing.T) []byte {
	t.Helper()
	b := make([]byte, l.Length)
	_, err := l.f.ReadAt(b, l.Off)
	must(t, err)
	return b
}

// A block is where the store says, as long as the stamp stays, and the stamp changes with whatever makes that untrue.
func TestLocate(t *testing.T) {
	for name, fsys := range map[string]vfs.FS{"mem": vfs.NewMem(1), "os": vfs.NewOS(t.TempDir())} {
		t.Run(name, func(t *testing.T) {
			b := bench(t, fsys)
			d := b.Store.(*storage.Disk)
			_, err := d.Locate(storetest.Ref(1))
			want(t, err, torus.ErrBlockNotExist)
			_, err = d.OpenFile(1000)
			want(t, err, torus.ErrInvalid)
			data := map[uint64][]byte{}
			at := map[uint64]located{}
			for i := range uint64(8) {
				data[i] = storetest.Record(storetest.Ref(i), 0, i+1, 0, 3)
				must(t, b.Append(storetest.Ref(i), 0, data[i]))
				must(t, b.Sync(storetest.Ref(i), uint32(len(data[i]))))
				at[i] = locate(t, d, storetest.Ref(i))
			}
			stays := func(what string, changed ...uint64) {
				t.Helper()
				for i := range uint64(8) {
					l, gone := at[i], false
					for _, c := range changed {
						gone = gone || c == i
					}
					if l.good() == gone {
						t.Errorf("%s: block %d: still good: %v", what, i, l.good())
					}
					if l.good() && !bytes.Equal(l.read(t), data[i]) {
						t.Errorf("%s: block %d: other bytes", what, i)
					}
				}
			}
			stays("at first")
			more := storetest.Record(storetest.Ref(2), uint32(len(data[2])), 20, 0, 2)
			must(t, b.Append(storetest.Ref(2), uint32(len(data[2])), more))
			must(t, b.Sync(storetest.Ref(2), uint32(len(data[2])+len(more))))
			must(t, b.Seal(storetest.Ref(3), uint32(len(data[3]))))
			stays("append, sync, seal")
			if l := locate(t, d, storetest.Ref(2)); !bytes.Equal(l.read(t), append(bytes.Clone(data[2]), more...)) {
				t.Error("what was appended is not there")
			}
			must(t, b.Seal(storetest.Ref(2), uint32(len(data[2])))) // and what was appended is none of it any more
			stays("a tail cut off", 2)
			if l := locate(t, d, storetest.Ref(2)); !bytes.Equal(l.read(t), data[2]) {
				t.Error("not what is left")
			}
			must(t, b.Delete(storetest.Ref(4)))
			stays("delete", 2, 4)
			_, err = d.Locate(storetest.Ref(4))
			want(t, err, torus.ErrBlockNotExist)
			must(t, b.Do(&torus.Request{Op: torus.OpPut, Ref: storetest.Ref(5), Len: uint32(len(data[5])), Data: data[5]}).Err)
			stays("put", 2, 4, 5)
			if l := locate(t, d, storetest.Ref(5)); !bytes.Equal(l.read(t), data[5]) {
				t.Error("not what was put")
			}
			b.Sim.RunFor(time.Second)
			must(t, d.Close())
			stays("close", 0, 1, 2, 3, 4, 5, 6, 7)
			_, err = d.Locate(storetest.Ref(0))
			want(t, err, torus.ErrClosed)
			_, err = d.OpenFile(0)
			want(t, err, torus.ErrClosed)
		})
	}
}

// What is in the air is not in the file yet, and what a failed disk may have lost is not to be read from it.
func TestLocateUnsafe(t *testing.T) {
	failing := false
	fsys := vfs.NewErrors(vfs.NewMem(1), func(op vfs.Op) error {
		if failing && op.Kind == vfs.OpDatasync {
			return errors.New("injected")
		}
		return nil
	})
	b := storetest.NewBench(t, 1)
	must(t, storage.Create(fsys, identity))
	cfg := config(b.Loop, fsys)
	cfg.BulkBytes = 3 * torus.PageSize
	d, err := storage.Open(cfg)
	must(t, err)
	b.Store = d
	ref := storetest.Ref(1)
	small := storetest.Record(ref, 0, 1, 0, 1)
	must(t, b.Append(ref, 0, small))
	must(t, b.Sync(ref, uint32(len(small))))
	large := storetest.Record(ref, uint32(len(small)), 2, 0, 16)
	done := false
	b.Loop.Post(func() {
		d.Submit(&torus.Request{Op: torus.OpAppend, Ref: ref, Off: uint32(len(small)), Data: large, Done: func(*torus.Request) { done = true }})
	})
	b.Sim.RunFor(0)
	if p, err := d.Locate(ref); err != nil || done || p.Length != uint32(len(small)) {
		t.Errorf("landed: %v; %d bytes of it are there: %v", done, p.Length, err)
	}
	b.Sim.RunFor(time.Second)
	l := locate(t, d, ref)
	if !done || !bytes.Equal(l.read(t), append(bytes.Clone(small), large...)) {
		t.Errorf("landed: %v; %d bytes", done, l.Length)
	}
	other := storetest.Ref(2)
	must(t, b.Append(other, 0, storetest.Record(other, 0, 3, 0, 1)))
	failing = true
	want(t, b.Sync(other, 8192), torus.ErrIO)
	if l.good() {
		t.Error("the stamp of a block of which bytes were lost is still the same")
	}
	_, err = d.Locate(ref)
	want(t, err, torus.ErrIO)
}

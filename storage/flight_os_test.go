package storage_test

import (
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/storage"
	"github.com/coreos/torus/storage/storetest"
	"github.com/coreos/torus/vfs"
	"golang.org/x/sys/unix"
)

// Somebody reads a peer's files while large and small appends go to them, as a backup of the machine would: the kernel makes large pages of what it reads
// ahead, and a write past the page cache fails if something in one of its pages changes through the cache meanwhile.
func TestReaderOfTheFiles(t *testing.T) {
	dir := t.TempDir()
	l, err := loop.NewEpoll(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	id := identity
	id.BlockSize = torus.DefaultBlockSize
	if err := storage.Create(vfs.NewOS(dir), id); err != nil {
		t.Fatal(err)
	}
	d, err := storage.Open(storage.Config{Loop: l, FS: vfs.NewOS(dir), Identity: id, SizeBytes: 128 << 20, SlotsPerFile: 32, ReserveBytes: 1})
	if err != nil {
		t.Fatal(err)
	}
	const blocks, rounds, large = 24, 8, 255
	round, syncs := 0, 0
	stop := func(r *torus.Request) bool {
		if r.Err != nil {
			t.Errorf("%v of %v at %d: %v", r.Op, r.Ref, r.Off, r.Err)
			l.Stop()
		}
		return r.Err != nil
	}
	submit := func(r *torus.Request, then func()) {
		r.Done = func(r *torus.Request) {
			if !stop(r) && then != nil {
				then()
			}
		}
		d.Submit(r)
	}
	record := func(ref torus.BlockRef, off uint32, pages int) *torus.Request {
		b := storetest.Record(ref, off, uint64(off)+1, 0, pages)
		mem := buf.Get(len(b)).Bytes()[:len(b)]
		copy(mem, b)
		return &torus.Request{Op: torus.OpAppend, Ref: ref, Off: off, Data: mem}
	}
	var write func(index, off uint32)
	write = func(index, off uint32) {
		ref := torus.BlockRef{Volume: 1, INode: torus.INodeID(round), Index: torus.IndexID(index)}
		if off+(large+3)*torus.PageSize > torus.DefaultBlockSize {
			if index+1 < blocks {
				write(index+1, 0)
				return
			}
			if round++; round == rounds {
				l.Stop()
				return
			}
			left := blocks
			for i := range blocks {
				old := torus.BlockRef{Volume: 1, INode: torus.INodeID(round - 1), Index: torus.IndexID(i)}
				submit(&torus.Request{Op: torus.OpDelete, Ref: old}, func() {
					if left--; left == 0 {
						write(0, 0)
					}
				})
			}
			return
		}
		end := off + (large+2)*torus.PageSize
		left := 2
		landed := func() {
			if left--; left == 0 {
				syncs++
				submit(&torus.Request{Op: torus.OpSync, Ref: ref, Len: end}, func() { l.Post(func() { write(index, end) }) })
			}
		}
		submit(record(ref, off, large), landed)
		l.After(300*time.Microsecond, func() { submit(record(ref, off+(large+1)*torus.PageSize, 0), landed) })
	}
	var end atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		fd, err := unix.Open(filepath.Join(dir, "slots-000000"), unix.O_RDONLY, 0)
		for ; err != nil && !end.Load(); fd, err = unix.Open(filepath.Join(dir, "slots-000000"), unix.O_RDONLY, 0) {
			time.Sleep(time.Millisecond) // until it is made
		}
		if err != nil {
			return
		}
		defer unix.Close(fd)
		b := make([]byte, 64<<10)
		for i := int64(0); !end.Load(); i++ {
			unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED) //nolint:errcheck // it is to be read anew
			for off := int64(0); off < 256<<10; off += int64(len(b)) {
				unix.Pread(fd, b, i%32*torus.DefaultBlockSize+off) //nolint:errcheck // not what is tested
			}
		}
	})
	l.Post(func() { write(0, 0) })
	watchdog := time.AfterFunc(time.Minute, func() { t.Error("not done after a minute"); l.Stop() })
	err = l.Run()
	watchdog.Stop()
	end.Store(true)
	wg.Wait()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	t.Logf("%d syncs", syncs)
}

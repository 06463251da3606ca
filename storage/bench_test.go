package storage_test

import (
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/storage"
	"github.com/coreos/torus/storage/storetest"
	"github.com/coreos/torus/vfs"
)

// onLoop runs fn on a real event loop, over a store on the real file system, until next has been called b.N times.
func onLoop(b *testing.B, fn func(d torus.Store, next func() bool)) {
	l, err := loop.NewEpoll(nil)
	must(b, err)
	defer l.Close()
	fsys := vfs.NewOS(b.TempDir())
	id := identity
	id.BlockSize = torus.DefaultBlockSize
	must(b, storage.Create(fsys, id))
	d, err := storage.Open(storage.Config{Loop: l, FS: fsys, Identity: id, SizeBytes: 256 << 20, SlotsPerFile: 64, ReserveBytes: 1})
	must(b, err)
	n := 0
	b.ReportAllocs()
	l.After(3*time.Second, func() { // the first file is there, and written through
		fn(d, func() bool {
			switch n++; n {
			case 1:
				b.ResetTimer() // what was to be prepared is
			case b.N + 1:
				b.StopTimer()
				l.Stop()
				return false
			}
			return true
		})
	})
	must(b, l.Run())
	must(b, d.Close())
}

// blockOf is a full block of records of 8 KiB.
func blockOf(ref torus.BlockRef) [][]byte {
	var rs [][]byte
	for off := uint32(0); off+8192 <= torus.DefaultBlockSize; off += 8192 {
		rs = append(rs, storetest.Record(ref, off, uint64(off)+1, 0, 1))
	}
	return rs
}

// appends keeps appending 8 KiB records to a block, which is deleted and made again when it is full.
func appends(b *testing.B, sync bool) {
	ref := storetest.Ref(1)
	records := blockOf(ref)
	b.SetBytes(8192)
	onLoop(b, func(d torus.Store, next func() bool) {
		var pending *torus.Request // what to submit next; nil while one is under way
		r := &torus.Request{Ref: ref}
		running := false
		var drive func()
		r.Done = func(*torus.Request) {
			if r.Err != nil {
				b.Error(r.Err)
			}
			switch {
			case r.Op == torus.OpAppend && sync:
				r.Op, r.Len = torus.OpSync, r.Off+8192
			case r.Op == torus.OpDelete:
				r.Op, r.Off = torus.OpAppend, 0
			case r.Off+8192 == torus.DefaultBlockSize:
				r.Op = torus.OpDelete
			default:
				r.Op, r.Off = torus.OpAppend, r.Off+8192
			}
			pending = r
			drive()
		}
		drive = func() { // goes round, not deeper, where requests are done at once
			if running {
				return
			}
			running = true
			for pending != nil {
				if r.Op == torus.OpAppend && !next() {
					return
				}
				pending = nil
				r.Data = records[r.Off/8192]
				d.Submit(r)
			}
			running = false
		}
		r.Op, pending = torus.OpAppend, r
		drive()
	})
}

func BenchmarkAppend8K(b *testing.B)     { appends(b, false) }
func BenchmarkAppend8KSync(b *testing.B) { appends(b, true) }

func BenchmarkReadCached4K(b *testing.B) {
	ref := storetest.Ref(1)
	records := blockOf(ref)
	b.SetBytes(4096)
	onLoop(b, func(d torus.Store, next func() bool) {
		check := func(r *torus.Request) {
			if r.Err != nil {
				b.Error(r.Err)
			}
		}
		read := &torus.Request{Op: torus.OpRead, Ref: ref, Data: make([]byte, 4096), Done: check}
		for i, data := range records {
			a := &torus.Request{Op: torus.OpAppend, Ref: ref, Off: uint32(i) * 8192, Data: data, Done: check}
			d.Submit(a)
		}
		for k := uint32(0); next(); k++ {
			read.Off = k * 4096 % torus.DefaultBlockSize
			d.Submit(read)
		}
	})
}

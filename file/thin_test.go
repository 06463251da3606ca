package file_test

import (
	"bytes"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/record"
)

// forgetful has the peers keep only the headers of the log's records: the pages are all alike. It returns how much memory these take.
func (r *rig) forgetful(page []byte) *uint64 {
	type header struct {
		off  uint32
		page []byte
	}
	sum := record.Checksum(page)
	taken := new(uint64)
	for _, p := range r.peers {
		blocks := map[torus.BlockRef][]header{}
		end := map[torus.BlockRef]uint32{}
		p.answers = func(q *torus.Request) (bool, error) {
			if q.Ref.Type != torus.TypeBlock || q.Op == torus.OpFence {
				return false, nil
			}
			var h record.Header
			switch q.Op {
			case torus.OpAppend:
				if q.Off != end[q.Ref] || h.Decode(q.Data[:record.HeaderSize]) != nil {
					return true, torus.ErrGap
				}
				for _, c := range h.CRCs {
					if c != sum {
						return true, torus.ErrCorrupt
					}
				}
				b := bytes.Clone(q.Data[:record.Used(q.Data)])
				blocks[q.Ref] = append(blocks[q.Ref], header{q.Off, b})
				*taken += uint64(cap(b)) + 64
				end[q.Ref] = q.Off + q.Len
			case torus.OpRead:
				for n := range len(q.Data) / 4096 {
					copy(q.Data[n*4096:], page)
				}
			case torus.OpScan:
				q.Data = nil
				for _, x := range blocks[q.Ref] {
					if x.off >= q.Off {
						var full [record.HeaderSize]byte
						copy(full[:], x.page)
						q.Data = record.AppendScanEntry(q.Data, x.off, full[:])
					}
				}
			case torus.OpDelete:
				delete(blocks, q.Ref)
				delete(end, q.Ref)
			}
			return true, nil
		}
	}
	return taken
}

// A volume of 1 TiB is written to all over: what the writer has in memory stays within what it was given.
func TestThinMemory(t *testing.T) {
	const (
		size   = 1 << 40
		piece  = 1 << 20
		window = 64 << 20 // between two looks
		mapMiB = 16
	)
	written := 2 << 30
	if os.Getenv("TORUS_THIN") != "" {
		written = 64 << 30
	}
	r := newRig(t, 1, 3, 2, size)
	page := make([]byte, 4096)
	for i := range page {
		page[i] = byte(i * i >> 3)
	}
	data := make([]byte, piece)
	for n := range piece / 4096 {
		copy(data[n*4096:], page)
	}
	taken := r.forgetful(page)
	c := r.attach(func(cfg *file.Config) { cfg.BlockSize, cfg.MapBytes = 4<<20, mapMiB<<20 })
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		stored := *taken
		for _, p := range r.peers {
			for _, b := range p.blocks {
				stored += uint64(cap(b.data))
			}
		}
		return m.HeapAlloc - min(m.HeapAlloc, stored)
	}
	before, most, leaves := heap(), uint64(0), 0
	busy, n := 0, 0
	for done := 0; done < written; {
		busy = window / piece
		c.l.Post(func() {
			for range window / piece {
				off, k := r.rng.Uint64N(size/piece)*piece, uint64(piece)
				if n++; n%4 > 0 { // three of four are small: each of them is a leaf
					k = 4096
					off += r.rng.Uint64N(piece/4096) * 4096
				}
				done += int(k)
				q := &device.Request{Op: device.Write, Off: off, Data: data[:k], Len: k}
				q.Done = func(q *device.Request) {
					if q.Err != nil {
						t.Error(q.Err)
					}
					busy--
				}
				c.f.Submit(q)
			}
		})
		if !r.v.Run(func() bool { return busy == 0 }, time.Minute) {
			t.Fatalf("%d writes are never done", busy)
		}
		if n%(40*window/piece) == 0 {
			h := heap()
			most = max(most, h-min(h, before))
			leaves = max(leaves, c.f.Stats().Leaves)
		}
	}
	s := c.f.Stats()
	t.Logf("%d MiB written in %d places, %d checkpoints: %d MiB of heap at most, %d leaves of the map", written>>20, n, s.Checkpoints, most>>20, leaves)
	// While a checkpoint is under way, half as many leaves again are there, and it holds a copy of what it writes. The log retains 32 MiB.
	if limit := mapMiB<<20/4096*3/2 + 1024; leaves > limit {
		t.Errorf("%d leaves are in memory, of %d MiB; at most %d may be", leaves, mapMiB, limit)
	}
	if limit := uint64(3*mapMiB + 2*32 + 32); most>>20 > limit {
		t.Errorf("%d MiB of heap, at most %d may be", most>>20, limit)
	}
	c.detach()
}

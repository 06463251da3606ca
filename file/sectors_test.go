package file_test

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
)

// Writes of single sectors, many in flight at once to the same pages, whose old contents are on the peers: each must
// survive its neighbours.
func TestConcurrentSectors(t *testing.T) {
	for seed := range uint64(10) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			const size = 64 * 4096
			r := newRig(t, seed, 3, 2, size)
			tune := func(c *file.Config) { c.RetainBytes = 64 << 10 }
			c := r.attach(tune)
			model := make([]byte, size)
			for i := range model {
				model[i] = byte(r.rng.Uint32())
			}
			c.must(&device.Request{Op: device.Write, Data: bytes.Clone(model)})
			for range 10 {
				c.detach()
				c = r.attach(tune) // the map is not in memory now
				left := 0
				busy := map[int]bool{}
				for range 200 {
					sector, n := r.rng.IntN(size/512), 1+r.rng.IntN(12)
					free := sector+n <= size/512
					for k := range n {
						free = free && !busy[sector+k]
					}
					if !free {
						continue
					}
					for k := range n {
						busy[sector+k] = true
					}
					b := make([]byte, n*512)
					q := &device.Request{Op: device.Write, Off: uint64(sector) * 512, Len: uint64(len(b)), Data: b}
					switch r.rng.IntN(5) {
					case 0:
						q.Op, q.Data = device.WriteZeroes, nil
					default:
						for i := range b {
							b[i] = byte(r.rng.Uint32())
						}
					}
					copy(model[q.Off:], b)
					left++
					q.Done = func(q *device.Request) {
						if q.Err != nil {
							t.Errorf("write at %d: %v", q.Off, q.Err)
						}
						left--
					}
					c.l.Post(func() { c.f.Submit(q) })
					if r.rng.IntN(4) == 0 {
						r.v.RunFor(time.Duration(r.rng.IntN(400)) * time.Microsecond)
					}
				}
				if !r.v.Run(func() bool { return left == 0 }, time.Minute) {
					t.Fatalf("%d writes are still not done", left)
				}
				all := make([]byte, size)
				c.must(&device.Request{Op: device.Read, Data: all})
				if !bytes.Equal(all, model) {
					for i := range all {
						if all[i] != model[i] {
							t.Fatalf("byte %d (sector %d of page %d) differs", i, i%4096/512, i/4096)
						}
					}
				}
			}
		})
	}
}

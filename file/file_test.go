package file_test

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
)

// A plain array is the model: random reads, writes of any alignment, zeroes, trims, flushes, checkpoints and
// re-attachments, clean and not.
func TestAgainstArray(t *testing.T) {
	for seed := range uint64(20) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			const size = 5<<20 + 512
			r := newRig(t, seed, 3, 2, size)
			tune := func(c *file.Config) { c.CheckpointBytes, c.RetainBytes = 1<<20, 2<<20 }
			c := r.attach(tune)
			model := make([]byte, size)
			for i := range 600 {
				off := uint64(r.rng.IntN(size))
				n := uint64(r.rng.IntN(40000)) + 1
				if r.rng.IntN(3) == 0 {
					off, n = off/4096*4096, (n+4095)/4096*4096
				}
				n = min(n, size-off)
				switch k := r.rng.IntN(20); {
				case k < 9:
					b := make([]byte, n)
					for j := range b {
						b[j] = byte(r.rng.Uint32())
					}
					c.must(&device.Request{Op: device.Write, Off: off, Data: b, Flags: device.Flags(r.rng.IntN(2))})
					copy(model[off:], b)
				case k < 14:
					b := make([]byte, n)
					c.must(&device.Request{Op: device.Read, Off: off, Data: b})
					if !bytes.Equal(b, model[off:off+n]) {
						t.Fatalf("step %d: read of %d at %d differs", i, n, off)
					}
				case k < 15:
					c.must(&device.Request{Op: device.WriteZeroes, Off: off, Len: n, Flags: device.NoHole})
					clear(model[off : off+n])
				case k < 16:
					off, n = off/4096*4096, n/4096*4096
					if n > 0 && off+n <= size {
						c.must(&device.Request{Op: device.Trim, Off: off, Len: n})
						clear(model[off : off+n])
					}
				case k < 18:
					c.must(&device.Request{Op: device.Flush})
				case k < 19:
					c.detach()
					c = r.attach(tune)
				default: // SIGKILL: W1, everything acknowledged is there
					c.kill()
					c = r.attach(tune)
				}
			}
			all := make([]byte, size)
			c.must(&device.Request{Op: device.Read, Data: all})
			if !bytes.Equal(all, model) {
				t.Fatal("the image differs")
			}
			c.detach()
		})
	}
}

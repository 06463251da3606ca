package file_test

import (
	"testing"

	"github.com/coreos/torus/device"
)

// A peer's answer comes in memory of its own where that is all that the read wants, or where the pages have to be picked out of it, and is copied where it is
// a part of what the read wants.
func TestExchange(t *testing.T) {
	r := newRig(t, 1, 3, 2, 1<<20)
	c := r.attach(nil)
	c.writeStamped(0, 16, 1)
	for _, page := range []uint64{32, 37, 33} { // each in a record of its own
		c.writeStamped(page, 1, 1)
	}
	c.detach()
	c = r.attach(nil)
	c.must(&device.Request{Op: device.Read, Off: 64 * 4096, Data: make([]byte, 4096)}) // so that the map is in memory
	for _, x := range []struct {
		what      string
		page, n   uint64
		exchanged int
	}{
		{"all in one run", 0, 16, 1},
		{"a part of a run", 4, 3, 1},
		{"pages that lie near each other", 32, 2, 1},
		{"a run, and pages never written", 14, 4, 0},
	} {
		before := r.exchanged
		b := make([]byte, x.n*4096)
		c.must(&device.Request{Op: device.Read, Off: x.page * 4096, Data: b})
		if n := r.exchanged - before; n != x.exchanged {
			t.Errorf("%s: %d reads were given other memory, not %d", x.what, n, x.exchanged)
		}
	}
	c.readStamped(0, 16, 1)
	c.readStamped(32, 2, 1)
	c.detach()
}

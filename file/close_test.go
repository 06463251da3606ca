package file_test

import (
	"context"
	"testing"
	"time"

	"github.com/coreos/torus/device"
	"github.com/coreos/torus/metadata/temp"
)

// The window is being extended when the MDS goes away: the transaction is made, the answer lost. Close gives up waiting for it,
// and takes it for its own when the MDS answers again: both have the same number.
func TestCloseTakesAnotherCommitForItsOwn(t *testing.T) {
	r := newRig(t, 1, 3, 2, 2<<20)
	c := r.attach(nil)
	c.must(&device.Request{Op: device.Write, Data: pg(1, 16)})
	c.detach()
	c = r.attach(nil)
	commits, reads := 0, 0
	away := true
	c.mds.SetFaults(func(_ context.Context, method string) temp.Fault {
		switch {
		case method == "Commit" && away:
			if commits++; commits == 1 {
				return temp.FailAfter
			}
			return temp.FailBefore
		case method == "VolumeState" && away:
			reads++
			return temp.FailBefore
		}
		return temp.None
	})
	for i := 0; commits == 0 && i < 100; i++ { // until the window is extended
		c.must(&device.Request{Op: device.Write, Off: uint64(i%8) * 192 << 10, Data: pg(byte(i), 48)})
	}
	c.must(&device.Request{Op: device.Write, Data: pg(77, 512), Flags: device.FUA})
	closed := false
	var cerr error
	c.l.Post(func() { c.f.Close(func(err error) { closed, cerr = true, err }) })
	r.v.RunFor(9900 * time.Millisecond)
	// The extension's last attempt before the deadline fails; what comes after it is answered.
	for !closed && r.v.Now() < time.Hour {
		n := reads
		r.v.RunFor(100 * time.Microsecond)
		if reads > n && r.v.Now() > 10*time.Second {
			away = false
		}
		if closed {
			break
		}
	}
	t.Logf("close: %v", cerr)
	r.v.RunFor(time.Second)
	c.kill()
	n := r.client(nil)
	r.v.Run(func() bool { return n.done }, time.Minute)
	if !n.done || n.err != nil {
		t.Fatalf("close said %v; the next attach: done %v, %v", cerr, n.done, n.err)
	}
	b := make([]byte, 4096)
	n.must(&device.Request{Op: device.Read, Data: b})
	if b[0] != 77 {
		t.Fatalf("D1: %d", b[0])
	}
}

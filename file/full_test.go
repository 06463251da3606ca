package file_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
)

const chunk = 64 << 10

func chunkOf(i int) []byte { return bytes.Repeat([]byte{byte(i), byte(i >> 8), 0x5a, 0xa5}, chunk/4) }

// fill writes chunks from a place on, depth of them at a time, until the cluster has no more room; it returns those acknowledged.
func (c *client) fill(depth int) (acked map[int]bool) {
	c.r.t.Helper()
	acked = map[int]bool{}
	full := false
	for i := 0; !full && uint64(i+depth)*chunk <= c.r.size; i += depth {
		left := depth
		c.l.Post(func() {
			for k := i; k < i+depth; k++ {
				c.f.Submit(&device.Request{Op: device.Write, Off: uint64(k) * chunk, Len: chunk, Data: chunkOf(k), Done: func(q *device.Request) {
					left--
					switch {
					case q.Err == nil:
						acked[k] = true
					case errors.Is(q.Err, device.ErrOutOfSpace):
						full = true
					default:
						c.r.t.Errorf("chunk %d: %v", k, q.Err)
					}
				}})
			}
		})
		if !c.r.v.Run(func() bool { return left == 0 }, time.Minute) {
			c.r.t.Fatalf("%d writes from %d are not done", left, i)
		}
	}
	if !full {
		c.r.t.Fatal("the cluster never became full")
	}
	return acked
}

// expect reads what was acknowledged.
func (c *client) expect(acked map[int]bool) {
	c.r.t.Helper()
	b := make([]byte, chunk)
	for i := range acked {
		c.must(&device.Request{Op: device.Read, Off: uint64(i) * chunk, Data: b})
		if !bytes.Equal(b, chunkOf(i)) {
			c.r.t.Fatalf("chunk %d, acknowledged, is not what was written", i)
		}
	}
}

// trim trims the first chunks, and expects that there is room again soon, without anybody adding any.
func (c *client) trim(acked map[int]bool, n int) {
	c.r.t.Helper()
	c.must(&device.Request{Op: device.Trim, Len: uint64(n) * chunk})
	for i := range n {
		delete(acked, i)
	}
	c.must(&device.Request{Op: device.Flush})
	c.r.v.RunFor(5 * time.Second)
	c.directory()
	c.must(&device.Request{Op: device.Write, Data: chunkOf(0), Flags: device.FUA})
	acked[0] = true
	b := make([]byte, chunk)
	c.must(&device.Request{Op: device.Read, Off: chunk, Data: b})
	if !bytes.Equal(b, make([]byte, chunk)) {
		c.r.t.Fatal("a trimmed chunk is not zero")
	}
	c.expect(acked)
}

// The writer dies while the cluster is full. The next attach finds room in the slots that peers keep back, serves all that was
// acknowledged (W1), and can trim, which gives room to write again.
func TestAttachWhenFull(t *testing.T) {
	for seed := range uint64(12) {
		for _, depth := range []int{1, 4, 12} {
			t.Run(fmt.Sprint(seed, "-", depth), func(t *testing.T) {
				r := newRig(t, seed, 3, 2, 64<<20)
				for _, p := range r.peers {
					p.slots = 24
				}
				tune := func(c *file.Config) { c.CheckpointBytes = 1 << 20 }
				c := r.attach(tune)
				acked := c.fill(depth)
				if seed%2 == 0 {
					c.directory()
				}
				c.kill()
				c = r.attach(tune)
				c.directory()
				c.expect(acked)
				c.trim(acked, 32)
				c.detach()
			})
		}
	}
}

// A writer that lives trims while the cluster is full; a flush of what a lost replica held finds room as well; and the volume
// is released in order.
func TestTrimWhenFull(t *testing.T) {
	for seed := range uint64(12) {
		r := newRig(t, seed, 3, 2, 64<<20)
		for _, p := range r.peers {
			p.slots = 24
		}
		c := r.attach(nil)
		acked := c.fill(6)
		c.directory()
		if err := c.do(&device.Request{Op: device.Write, Data: chunkOf(0)}); !errors.Is(err, device.ErrOutOfSpace) {
			t.Fatalf("a write to a full cluster: %v", err)
		}
		c.trim(acked, 48)
		c.detach()
		c = r.attach(nil)
		c.expect(acked)
		c.detach()
	}
}

// Without a single slot an attach ends, says why and what to do, and has harmed nothing: when there is room it works.
func TestAttachWithoutAnyRoom(t *testing.T) {
	r := newRig(t, 1, 3, 2, 64<<20)
	for _, p := range r.peers {
		p.slots = 24
	}
	c := r.attach(nil)
	acked := c.fill(4)
	c.kill()
	for _, p := range r.peers {
		p.full = true
	}
	c = r.client(func(cfg *file.Config) {
		var err error
		if cfg.Lease, err = cfg.MDS.GrantLease(context.Background(), time.Minute); err != nil {
			t.Error(err)
		}
	})
	if !r.v.Run(func() bool { return c.done }, time.Minute) {
		t.Fatal("an attach that finds no room does not end")
	}
	if !errors.Is(c.err, torus.ErrOutOfSpace) || errors.Is(c.err, torus.ErrAgain) || !strings.Contains(c.err.Error(), "--size") {
		t.Fatalf("an attach that finds no room says %v", c.err)
	}
	c.kill()
	for _, p := range r.peers {
		p.full, p.slots = false, 40
	}
	c = r.attach(nil)
	c.expect(acked)
	c.detach()
}

package file_test

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/coreos/torus/device"
	"github.com/coreos/torus/models"
)

// directory tells a client again who there is: what it had learned by itself about full peers is forgotten.
func (c *client) directory() {
	c.l.Post(func() {
		var l []*models.Peer
		for _, p := range c.r.peers {
			m := &models.Peer{Uuid: p.id.String(), Address: "x", Alive: p.up}
			if p.noRoom() {
				m.State = "full"
			}
			l = append(l, m)
		}
		c.d.SetPeers(l)
	})
	c.r.v.RunFor(3 * time.Second)
}

// A cluster without room: writes fail with a clear error and nothing tears; reads and flushes go on; when there is room,
// so do writes (F1).
func TestOutOfSpace(t *testing.T) {
	r := newRig(t, 1, 3, 2, 8<<20)
	c := r.attach(nil)
	page := func(b byte) []byte { return bytes.Repeat([]byte{b}, 64<<10) }
	c.must(&device.Request{Op: device.Write, Data: page(1)})
	for _, p := range r.peers {
		p.full = true
	}
	// What is open takes some more; then there is no block to be had.
	var err error
	n := 0
	for ; err == nil && n < 20; n++ {
		err = c.do(&device.Request{Op: device.Write, Off: uint64(n) << 16, Data: page(2)})
	}
	if !errors.Is(err, device.ErrOutOfSpace) {
		t.Fatalf("write %d to a full cluster: %v", n, err)
	}
	c.must(&device.Request{Op: device.Flush})
	for i := range n - 1 {
		b := make([]byte, 64<<10)
		c.must(&device.Request{Op: device.Read, Off: uint64(i) << 16, Data: b})
		if !bytes.Equal(b, page(2)) {
			t.Fatalf("acknowledged write %d is gone", i)
		}
	}
	if err := c.do(&device.Request{Op: device.Write, Data: page(3)}); !errors.Is(err, device.ErrOutOfSpace) {
		t.Fatalf("write to a full cluster: %v", err)
	}
	c.directory()
	if err := c.do(&device.Request{Op: device.Write, Data: page(3)}); !errors.Is(err, device.ErrOutOfSpace) {
		t.Fatalf("write to a cluster that says it is full: %v", err)
	}
	for _, p := range r.peers {
		p.full = false
	}
	c.directory()
	c.must(&device.Request{Op: device.Write, Data: page(4), Flags: device.FUA})
	b := make([]byte, 64<<10)
	c.must(&device.Request{Op: device.Read, Data: b})
	if !bytes.Equal(b, page(4)) {
		t.Fatal("the write after the shortage is not there")
	}
	c.detach()
}

// Only one peer of three has room: two copies cannot be made, so nothing is acknowledged on one (F1).
func TestTooFewPeers(t *testing.T) {
	r := newRig(t, 1, 3, 2, 8<<20)
	c := r.attach(nil)
	c.must(&device.Request{Op: device.Write, Data: make([]byte, 4096)})
	r.peers[0].crash(false)
	r.peers[1].crash(false)
	q := &device.Request{Op: device.Write, Len: 4096, Data: bytes.Repeat([]byte{7}, 4096), Flags: device.FUA}
	finished := false
	q.Done = func(*device.Request) { finished = true }
	c.l.Post(func() { c.f.Submit(q) })
	if r.v.Run(func() bool { return finished }, 2*time.Minute) {
		t.Fatalf("F1: acknowledged with one healthy peer: %v", q.Err)
	}
	r.peers[1].restart()
	if !r.v.Run(func() bool { return finished }, time.Minute) || q.Err != nil {
		t.Fatalf("not done though two peers are back: %v %v", finished, q.Err)
	}
}

// A write larger than a block is cut to fit.
func TestWriteLargerThanBlock(t *testing.T) {
	r := newRig(t, 1, 3, 2, 8<<20)
	c := r.attach(nil)
	b := bytes.Repeat([]byte{9}, 3<<20)
	c.must(&device.Request{Op: device.Write, Off: 4096, Data: b, Flags: device.FUA})
	got := make([]byte, len(b))
	c.must(&device.Request{Op: device.Read, Off: 4096, Data: got})
	if !bytes.Equal(got, b) {
		t.Fatal("it is not what was written")
	}
	c.detach()
}

// A block table that has grown to what an INode can list: new writes fail with a clear error, and what was written
// is there.
func TestTableFull(t *testing.T) {
	r := newRig(t, 1, 3, 2, 8<<20)
	c := r.attach(nil)
	b := bytes.Repeat([]byte{9}, 4096)
	c.must(&device.Request{Op: device.Write, Data: b, Flags: device.FUA})
	c.l.Post(func() { c.f.FillTable(650_000) })
	var err error
	for i := 0; err == nil && i < 20; i++ {
		err = c.do(&device.Request{Op: device.Write, Off: 4096, Data: make([]byte, 64<<10)})
	}
	if !errors.Is(err, device.ErrOutOfSpace) {
		t.Fatalf("with a full table: %v", err)
	}
	got := make([]byte, 4096)
	c.must(&device.Request{Op: device.Read, Data: got})
	if !bytes.Equal(got, b) {
		t.Fatal("what was written before is gone")
	}
}

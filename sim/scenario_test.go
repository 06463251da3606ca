package sim

import (
	"strings"
	"testing"
	"time"

	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/vfs"
)

// Scenarios are schedules written by hand: mistakes that others have made, and those that schedules have found here.

// scene is a cluster with one volume attached.
type scene struct {
	*Cluster
	t  *testing.T
	cl *Client
	f  *file.File
}

func newScene(t *testing.T, opt Options) *scene {
	t.Helper()
	c, err := New(1, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.V.Close)
	c.Witness.fail = func(err error) { t.Error(err) }
	v, err := c.CreateVolume("v", 16<<20)
	if err != nil {
		t.Fatal(err)
	}
	s := &scene{Cluster: c, t: t, cl: c.NewClient("client")}
	over := false
	s.cl.Attach(v, nil, func(f *file.File, e error) { s.f, err, over = f, e, true })
	if !c.V.Run(func() bool { return over }, time.Minute) || err != nil {
		t.Fatalf("attach: %v", err)
	}
	return s
}

func (s *scene) must(q *device.Request) {
	s.t.Helper()
	if q.Data != nil {
		q.Len = uint64(len(q.Data))
	}
	if err := s.cl.Do(s.f, q, time.Minute); err != nil {
		s.t.Fatal(err)
	}
}

// blocks is how many the peer with most of them stores.
func (s *scene) blocks() (n int) {
	for _, p := range s.Peers {
		if p.Up {
			n = max(n, int(p.Store.Stats().Used/s.opt.BlockSize))
		}
	}
	return n
}

// A peer whose disk has failed refuses every append. The log must not go on and on in blocks of which that peer is a replica:
// each would cost the other replica a slot, and the cluster would be full in seconds.
func TestFailedDiskDoesNotFillTheOthers(t *testing.T) {
	s := newScene(t, Options{Peers: 3, Replication: 2, BlockSize: 256 << 10, PeerBytes: 256 << 20})
	page := make([]byte, PageSize)
	for i := range 20 {
		page[0] = byte(i)
		s.must(&device.Request{Op: device.Write, Data: page, Flags: device.FUA})
	}
	before := s.blocks()
	s.Peers[0].fault = func(op vfs.Op) error {
		if op.Kind == vfs.OpDatasync && strings.HasPrefix(op.Name, "slots-") {
			return errMedium
		}
		return nil
	}
	for i := range 400 {
		page[0] = byte(i)
		s.must(&device.Request{Op: device.Write, Off: uint64(i) * PageSize, Data: page, Flags: device.FUA})
	}
	if !s.Peers[0].Store.Stats().Failed {
		t.Fatal("not the schedule this is about")
	}
	// 400 pages with a header each fill 13 blocks; the directory has news of the peer once a second.
	if n := s.blocks() - before; n > 40 {
		t.Fatalf("400 writes took %d blocks, %d rolls", n, s.f.Stats().Rolls)
	}
}

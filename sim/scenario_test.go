package sim

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coreos/torus"
	"github.com/coreos/torus/block"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/metadata/temp"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/record"
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

// attach attaches the volume by another process.
func (s *scene) attach(name string, force bool) (*Client, *file.File, error) {
	s.t.Helper()
	v, err := s.admin.Volume(s.t.Context(), "v")
	if err != nil {
		s.t.Fatal(err)
	}
	var f *file.File
	over := false
	cl := s.NewClient(name)
	cl.Attach(v, func(c *file.Config) { c.Force = force }, func(got *file.File, e error) { f, err, over = got, e, true })
	if !s.V.Run(func() bool { return over }, time.Minute) {
		s.t.Fatal("attach: still not done")
	}
	return cl, f, err
}

func (s *scene) page(b byte) []byte { return bytes.Repeat([]byte{b}, PageSize) }

// expect reads page 0 through cl.
func (s *scene) expect(cl *Client, f *file.File, want byte) {
	s.t.Helper()
	q := &device.Request{Op: device.Read, Len: PageSize, Data: make([]byte, PageSize)}
	if err := cl.Do(f, q, time.Minute); err != nil || !bytes.Equal(q.Data, s.page(want)) {
		s.t.Fatalf("read %d, want %d: %v", q.Data[0], want, err)
	}
}

// A writer is cut off from the metadata service for so long that its lease expires. Somebody else attaches, without force. From then on
// not one of its writes may be acknowledged, though it reaches every peer, and it must say why (L1; coreos/torus issue 230).
func TestLeaseExpiresUnderPartition(t *testing.T) {
	s := newScene(t, Options{Peers: 3, Replication: 2, BlockSize: 256 << 10, PeerBytes: 64 << 20})
	s.must(&device.Request{Op: device.Write, Data: s.page(1)})
	if _, _, err := s.attach("early", false); !errors.Is(err, torus.ErrLocked) {
		t.Fatalf("attached while the holder lives: %v", err)
	}
	s.cl.MDS.SetFaults(func(context.Context, string) temp.Fault { return temp.FailBefore })
	s.V.RunFor(leaseTTL + time.Second)
	s.must(&device.Request{Op: device.Write, Data: s.page(2)}) // nobody else is there yet
	cl, f, err := s.attach("next", false)
	if err != nil {
		t.Fatal(err)
	}
	s.expect(cl, f, 2)
	err = s.cl.Do(s.f, &device.Request{Op: device.Write, Len: PageSize, Data: s.page(3)}, 2*time.Second)
	if !errors.Is(err, torus.ErrFenced) || !errors.Is(s.f.Err(), torus.ErrFenced) {
		t.Fatalf("L1: a write of the one who was overtaken: %v; it says %v", err, s.f.Err())
	}
	s.expect(cl, f, 2)
}

// Every peer is down: a write waits. It succeeds when they are back, not before (F1; coreos/torus issue 250).
func TestEveryPeerDown(t *testing.T) {
	s := newScene(t, Options{Peers: 3, Replication: 2, BlockSize: 256 << 10, PeerBytes: 64 << 20})
	s.must(&device.Request{Op: device.Write, Data: s.page(1), Flags: device.FUA})
	for _, p := range s.Peers {
		p.PowerLoss()
	}
	done := false
	q := &device.Request{Op: device.Write, Len: PageSize, Data: s.page(2), Done: func(*device.Request) { done = true }}
	s.cl.Loop.Post(func() { s.f.Submit(q) })
	if s.V.Run(func() bool { return done }, 5*time.Minute) {
		t.Fatalf("F1: a write without a single peer is done: %v", q.Err)
	}
	for _, p := range s.Peers {
		if err := p.Start(); err != nil {
			t.Fatal(err)
		}
	}
	if !s.V.Run(func() bool { return done }, 10*time.Second) || q.Err != nil {
		t.Fatalf("the peers are back, and the write is done: %v, %v", done, q.Err)
	}
	s.expect(s.cl, s.f, 2)
}

// A full cluster says so, harms nothing, and goes on when there is room (coreos/torus issue 401).
func TestFullClusterSaysSo(t *testing.T) {
	s := newScene(t, Options{Peers: 2, Replication: 2, BlockSize: 256 << 10, PeerBytes: 64 << 20, SlotsPerFile: 2})
	s.must(&device.Request{Op: device.Write, Data: s.page(1), Flags: device.FUA})
	for _, p := range s.Peers {
		left, size, err := p.FS.Free()
		if err != nil {
			t.Fatal(err)
		}
		p.FS.SetCapacity(size - left)
	}
	var err error
	for i := 0; i < 2000 && err == nil; i++ {
		err = s.cl.Do(s.f, &device.Request{Op: device.Write, Off: PageSize * uint64(1+i), Len: PageSize, Data: s.page(9)}, time.Minute)
	}
	if !errors.Is(err, device.ErrOutOfSpace) {
		t.Fatalf("a full cluster says: %v", err)
	}
	s.expect(s.cl, s.f, 1)
	for _, p := range s.Peers {
		p.FS.SetCapacity(vfs.DefaultMemCapacity)
	}
	s.V.RunFor(10 * time.Second)
	s.must(&device.Request{Op: device.Write, Data: s.page(2), Flags: device.FUA})
	s.expect(s.cl, s.f, 2)
}

// The writer dies while every peer is full. The next attach recovers what was acknowledged in the slots that peers keep back, trims, and the
// room that gives is enough to write again (W1, F1).
func TestFullClusterIsRecoveredAndTrimmed(t *testing.T) {
	s := newScene(t, Options{Peers: 3, Replication: 2, BlockSize: 256 << 10, PeerBytes: 8 << 20, SlotsPerFile: 8})
	chunk := func(i int) []byte { return bytes.Repeat([]byte{byte(i), byte(i >> 8), 1, 2}, 16<<10) }
	const size = 64 << 10
	n := 0
	for ; ; n++ {
		err := s.cl.Do(s.f, &device.Request{Op: device.Write, Off: uint64(n) * size, Len: size, Data: chunk(n)}, time.Minute)
		if errors.Is(err, device.ErrOutOfSpace) {
			break
		}
		if err != nil || n == 250 {
			t.Fatalf("chunk %d: %v", n, err)
		}
	}
	s.cl.Kill()
	var err error
	if s.cl, s.f, err = s.attach("next", true); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, size)
	for i := range n {
		s.must(&device.Request{Op: device.Read, Off: uint64(i) * size, Data: got})
		if !bytes.Equal(got, chunk(i)) {
			t.Fatalf("chunk %d of %d, acknowledged, is gone", i, n)
		}
	}
	half := uint64(n/2) * size
	s.must(&device.Request{Op: device.Trim, Len: half})
	s.must(&device.Request{Op: device.Flush})
	s.V.RunFor(5 * time.Second)
	for i := range n / 4 {
		s.must(&device.Request{Op: device.Write, Off: uint64(i) * size, Data: chunk(i + 1000), Flags: device.FUA})
	}
	for i := range n {
		want := chunk(i)
		switch {
		case i < n/4:
			want = chunk(i + 1000)
		case uint64(i)*size < half:
			want = make([]byte, size)
		}
		s.must(&device.Request{Op: device.Read, Off: uint64(i) * size, Data: got})
		if !bytes.Equal(got, want) {
			t.Fatalf("chunk %d of %d is not what it was made", i, n)
		}
	}
}

// The writer dies, and one of two peers, too; the other is started again and finds rot in the middle of the log. It says so: its short
// answer is not taken for the whole truth as long as the first may come back (D1).
func TestDamagedCopyDoesNotEndTheLog(t *testing.T) {
	s := newScene(t, Options{Peers: 2, Replication: 2, BlockSize: 256 << 10, PeerBytes: 64 << 20})
	for i := range byte(8) {
		s.must(&device.Request{Op: device.Write, Data: s.page(i + 1), Flags: device.FUA})
	}
	s.cl.Kill()
	damaged, away := s.Peers[0], s.Peers[1]
	away.PowerLoss()
	damaged.Kill()
	var h record.Header
	third := func(_ string, _ int64, page []byte) bool {
		return h.Decode(page) == nil && h.Ref.Type == torus.TypeBlock && h.Seq == 3
	}
	for damaged.FS.Rot(s.V.Rand(), third) > 0 { // until it has hit what counts
	}
	if err := damaged.Start(); err != nil {
		t.Fatal(err)
	}
	back := s.V.Now() + 20*time.Second
	s.V.At(back-s.V.Now(), func() {
		if err := away.Start(); err != nil {
			t.Error(err)
		}
	})
	cl, f, err := s.attach("next", true)
	if err != nil {
		t.Fatalf("D1: %v", err)
	}
	if s.V.Now() < back {
		t.Error("attached before anybody knew how the log ends")
	}
	s.expect(cl, f, 8)
}

// The only copy of a record is damaged. If nobody can have flushed it, as the other peer of its block never had it, the log ends before it, and
// the volume is served (C1). If it is known to have been flushed, an attach stops and says so (D1).
func TestOnlyCopyIsDamaged(t *testing.T) {
	for _, flushed := range []bool{false, true} {
		s := newScene(t, Options{Peers: 2, Replication: 2, BlockSize: 256 << 10, PeerBytes: 64 << 20})
		s.must(&device.Request{Op: device.Write, Data: s.page(1), Flags: device.FUA})
		victim, other := s.Peers[0], s.Peers[1]
		if flushed {
			s.must(&device.Request{Op: device.Write, Data: s.page(2), Flags: device.FUA})
			s.must(&device.Request{Op: device.Write, Data: s.page(3), Flags: device.FUA}) // says that the second is
		}
		s.Net.Partition("client", other.Name)
		for i := range byte(3) {
			s.cl.Loop.Post(func() {
				s.f.Submit(&device.Request{Op: device.Write, Len: PageSize, Data: s.page(10 + i), Done: func(*device.Request) {}})
			})
			s.V.RunFor(10 * time.Millisecond)
		}
		s.cl.Kill()
		s.V.RunFor(time.Second)
		victim.Kill() // what it has is durable when it has started again
		if err := victim.Start(); err != nil {
			t.Fatal(err)
		}
		damage := func(p *Peer) {
			n := 0
			second := false
			var h record.Header
			p.FS.Rot(s.V.Rand(), func(_ string, _ int64, page []byte) bool {
				if second {
					second = false
					n++
					return true // the page of data behind the header
				}
				second = h.Decode(page) == nil && h.Ref.Type == torus.TypeBlock && h.Seq == 2
				return false
			})
			if n == 0 {
				t.Fatal("the second record is not where it should be")
			}
		}
		damage(victim)
		if flushed {
			damage(other)
			other.fault = func(op vfs.Op) error { // nor is what it holds made whole in place
				if op.Kind == vfs.OpDatasync && strings.HasPrefix(op.Name, "slots-") {
					return errMedium
				}
				return nil
			}
		}
		cl, f, err := s.attach("next", true)
		switch {
		case flushed && !errors.Is(err, torus.ErrCorrupt):
			t.Errorf("D1: a flushed record is damaged everywhere, and an attach says %v", err)
		case flushed:
		case err != nil:
			t.Errorf("the only copy of what was never acknowledged is damaged: %v", err)
		default:
			s.expect(cl, f, 1)
		}
	}
}

// A peer whose disk was replaced by an empty one must not come back as if nothing had happened: "I have nothing" would then count as
// "there was nothing" (D3; KAFKA-14077).
func TestEmptyDiskIsNotTheOldPeer(t *testing.T) {
	s := newScene(t, Options{Peers: 3, Replication: 2, BlockSize: 256 << 10, PeerBytes: 64 << 20})
	s.must(&device.Request{Op: device.Write, Data: s.page(1), Flags: device.FUA})
	p := s.Peers[0]
	p.PowerLoss()
	p.FS = vfs.NewMem(7)
	if err := p.Start(); err == nil {
		t.Fatal("a peer with an empty disk started under its old identity")
	}
}

// The metadata service is away for a minute: nobody notices; afterwards transactions go on (vitastor issue 20).
func TestMetadataServiceAwayForAMinute(t *testing.T) {
	s := newScene(t, Options{Peers: 3, Replication: 2, BlockSize: 256 << 10, PeerBytes: 64 << 20})
	s.must(&device.Request{Op: device.Write, Data: s.page(1)})
	away := true
	s.cl.MDS.SetFaults(func(context.Context, string) temp.Fault {
		if away {
			return temp.FailBefore
		}
		return temp.None
	})
	checkpoints := s.f.Stats().Checkpoints
	for i := range 60 {
		began := s.V.Now()
		s.must(&device.Request{Op: device.Write, Data: s.page(byte(i)), Flags: device.FUA})
		if took := s.V.Now() - began; took > time.Second {
			t.Fatalf("a write took %v without the metadata service", took)
		}
		s.V.RunFor(time.Second)
	}
	away = false
	s.V.RunFor(time.Minute)
	if s.f.Err() != nil || s.f.Stats().Checkpoints == checkpoints {
		t.Fatalf("no checkpoint since the metadata service is back: %v", s.f.Err())
	}
	s.expect(s.cl, s.f, 59)
}

// A clone that nobody has attached yet has no INode of its own: a snapshot of it must not be one of nothing (S1).
func TestSnapshotOfAnUntouchedClone(t *testing.T) {
	s := newScene(t, Options{Peers: 3, Replication: 2, BlockSize: 256 << 10, PeerBytes: 64 << 20})
	s.must(&device.Request{Op: device.Write, Data: s.page(1)})
	s.release()
	pin, err := block.CreateSnapshot(t.Context(), s.admin, "v", "s")
	if err != nil {
		t.Fatal(err)
	}
	v, err := s.admin.Volume(t.Context(), "v")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := block.Clone(t.Context(), s.admin, v, pin.At, "w", 0); err != nil {
		t.Fatal(err)
	}
	if _, err := block.CreateSnapshot(t.Context(), s.admin, "w", "t"); !errors.Is(err, block.ErrUnclean) {
		t.Fatalf("a snapshot of a clone that was never attached: %v", err)
	}
}

// release detaches the volume.
func (s *scene) release() {
	s.t.Helper()
	err := errStuck
	s.cl.Loop.Post(func() { s.f.Close(func(e error) { err = e }) })
	if !s.V.Run(func() bool { return !errors.Is(err, errStuck) }, time.Minute) || err != nil {
		s.t.Fatalf("detach: %v", err)
	}
}

// A volume that keeps its past grows, and is written behind its old end before the next INode. A time in between is found, and can be looked at (S1).
func TestLocateWhereTheVolumeHadGrown(t *testing.T) {
	s := newScene(t, Options{Peers: 3, Replication: 2, BlockSize: 256 << 10, PeerBytes: 64 << 20})
	id := torus.VolumeID(1)
	const size = 32 << 20
	change := func(fn func(*models.VolumeState)) {
		st, err := s.admin.VolumeState(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		to := proto.CloneOf(st.VolumeState)
		fn(to)
		if st, err = s.admin.Amend(t.Context(), id, st, to); err != nil {
			t.Fatal(err)
		}
		s.cl.Loop.Post(func() { s.f.Observe(st) })
	}
	change(func(st *models.VolumeState) { st.RetainMs = uint64(time.Hour.Milliseconds()) })
	for i := range byte(3) { // INodes to go back to
		s.must(&device.Request{Op: device.Write, Data: s.page(i + 1), Flags: device.FUA})
		s.V.RunFor(40 * time.Second)
	}
	s.must(&device.Request{Op: device.Write, Data: s.page(8), Flags: device.FUA})
	s.V.RunFor(time.Second) // the next INode is half a minute away
	change(func(st *models.VolumeState) { st.Asks = append(st.Asks, &models.Ask{SizeBytes: size}) })
	s.V.RunFor(time.Second)
	s.must(&device.Request{Op: device.Write, Off: size - PageSize, Data: s.page(9), Flags: device.FUA})
	at := time.Unix(1_700_000_000, 0).Add(s.V.Now())
	s.V.RunFor(time.Second)
	s.must(&device.Request{Op: device.Write, Data: s.page(4), Flags: device.FUA}) // the next INode is younger than that time
	s.V.RunFor(40 * time.Second)
	v, err := s.admin.Volume(t.Context(), "v")
	if err != nil {
		t.Fatal(err)
	}
	v.SizeBytes = size
	cl := s.NewClient("viewer")
	cfg := file.Config{Loop: cl.Loop, Dist: cl.Dist, MDS: cl.MDS, Volume: v, BlockSize: 256 << 10}
	got := make([]byte, PageSize)
	over := false
	cl.Loop.After(time.Second, func() {
		file.Locate(cfg, at, func(m *models.Moment, e error) {
			if err, over = e, e != nil; over {
				return
			}
			file.OpenView(cfg, m, func(f *file.View, e error) {
				if err, over = e, e != nil; over {
					return
				}
				f.Submit(&device.Request{Op: device.Read, Off: size - PageSize, Len: PageSize, Data: got, Done: func(q *device.Request) { err, over = q.Err, true }})
			})
		})
	})
	if !s.V.Run(func() bool { return over }, time.Minute) || err != nil || !bytes.Equal(got, s.page(9)) {
		t.Fatalf("S1: the volume as it was at %v: done %v, %v, %d", at, over, err, got[0])
	}
}

// A volume is deleted whose writer has died, and a clone begins with what only its log says. Once deleted nobody would recover that: it has to be
// attached before (S1).
func TestOriginIsRecoveredBeforeItIsDeleted(t *testing.T) {
	s := newScene(t, Options{Peers: 3, Replication: 2, BlockSize: 256 << 10, PeerBytes: 64 << 20})
	s.must(&device.Request{Op: device.Write, Data: s.page(1)})
	st, err := s.admin.VolumeState(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	to := proto.CloneOf(st.VolumeState)
	to.Asks = append(to.Asks, &models.Ask{Snapshot: "s"})
	if st, err = s.admin.Amend(t.Context(), 1, st, to); err != nil {
		t.Fatal(err)
	}
	s.cl.Loop.Post(func() { s.f.Observe(st) })
	taken := func() bool { return len(s.MDS.Peek(1).GetPins()) > 0 }
	if !s.V.Run(taken, time.Minute) {
		t.Fatal("no snapshot is taken")
	}
	s.cl.Kill()
	v, pin, err := block.Snapshot(t.Context(), s.admin, "v", "s")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := block.Clone(t.Context(), s.admin, v, pin.At, "w", 0); err != nil {
		t.Fatal(err)
	}
	s.MDS.Advance(leaseTTL)
	if file.Settled(s.MDS.Peek(1), pin.At) {
		t.Fatal("not the schedule this is about")
	}
	if err := block.Delete(t.Context(), s.admin, "v", true); !errors.Is(err, block.ErrUnclean) {
		t.Fatalf("S1: what a clone needs is in a log that nobody has recovered, and the volume can be deleted: %v", err)
	}
	if s.cl, s.f, err = s.attach("next", true); err != nil {
		t.Fatal(err)
	}
	s.release()
	if err := block.Delete(t.Context(), s.admin, "v", true); err != nil {
		t.Fatal(err)
	}
}

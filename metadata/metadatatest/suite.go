// Package metadatatest is the conformance suite of torus.MetadataService: what it promises, as tests. metadata/temp and
// metadata/etcd both run it, so that whatever is tested or simulated on the one holds on the other.
package metadatatest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coreos/torus"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/ring"
)

// Service is an empty store of its own for one test.
type Service struct {
	// Connect returns a new connection; the suite closes it.
	Connect func(t *testing.T) torus.MetadataService
	Init    func(gmd torus.GlobalMetadata, ring torus.Ring) error
	Wipe    func() error
	// TTL is the shortest lease the service can grant.
	TTL time.Duration
	// Advance lets at least d pass, or does nothing where time passes by itself.
	Advance func(d time.Duration)
}

// patience is how long a test waits for what must happen, before it fails.
const patience = 30 * time.Second

// Run runs the suite; open is called once a test.
func Run(t *testing.T, open func(t *testing.T) *Service) {
	for _, c := range []struct {
		name string
		test func(t *testing.T, e *env)
	}{
		{"Init", testInit},
		{"BeforeInit", testBeforeInit},
		{"Leases", testLeases},
		{"Peers", testPeers},
		{"PeerLiveness", testPeerLiveness},
		{"WatchPeers", testWatchPeers},
		{"Ring", testRing},
		{"RingRace", testRingRace},
		{"WatchRing", testWatchRing},
		{"Volumes", testVolumes},
		{"VolumeIDs", testVolumeIDs},
		{"VolumeStates", testVolumeStates},
		{"CreateRace", testCreateRace},
		{"Attach", testAttach},
		{"AttachRace", testAttachRace},
		{"ForcedAttachRace", testForcedAttachRace},
		{"AttachAfterLeaseEnds", testAttachAfterLeaseEnds},
		{"Commit", testCommit},
		{"CommitRace", testCommitRace},
		{"Amend", testAmend},
		{"UpdateVolume", testUpdateVolume},
		{"LateCommits", testLateCommits},
		{"Relock", testRelock},
		{"Unlock", testUnlock},
		{"WatchVolume", testWatchVolume},
		{"MessagesAreTheCallers", testMessagesAreTheCallers},
		{"Contexts", testContexts},
		{"Close", testClose},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := &env{T: t, s: open(t), ctx: t.Context()}
			e.m = e.connect()
			if c.name != "Init" && c.name != "BeforeInit" {
				e.init()
			}
			c.test(t, e)
		})
	}
}

// env is what a test works with: a service, and one connection to it.
type env struct {
	*testing.T
	s   *Service
	m   torus.MetadataService
	ctx context.Context
}

func (e *env) connect() torus.MetadataService {
	e.Helper()
	m := e.s.Connect(e.T)
	e.Cleanup(func() { m.Close() })
	return m
}

var gmd = torus.GlobalMetadata{ClusterID: "8b0fcf58-6d86-4f0a-a6b0-6f3f0f6a1a11", BlockSize: torus.DefaultBlockSize, DefaultBlockSpec: "crc,rep=2"}

func (e *env) init() {
	e.Helper()
	r, err := ring.NewEmpty(1, 2)
	e.ok(err)
	e.ok(e.s.Init(gmd, r))
}

func (e *env) ok(err error) {
	e.Helper()
	if err != nil {
		e.Fatal(err)
	}
}

func (e *env) is(err, want error) {
	e.Helper()
	if !errors.Is(err, want) {
		e.Fatalf("error %v, want %v", err, want)
	}
}

// eventually lets time pass until cond holds.
func (e *env) eventually(what string, cond func() bool) {
	e.Helper()
	for end := time.Now().Add(patience); !cond(); {
		if time.Now().After(end) {
			e.Fatalf("%s: not within %v", what, patience)
		}
		e.s.Advance(e.s.TTL / 8)
		time.Sleep(5 * time.Millisecond)
	}
}

func (e *env) lease() torus.LeaseID {
	e.Helper()
	id, err := e.m.GrantLease(e.ctx, 10*time.Minute)
	e.ok(err)
	return id
}

func (e *env) volume(name string) torus.VolumeID {
	e.Helper()
	v := &models.Volume{Name: name, Type: "block", SizeBytes: 1 << 30}
	e.ok(e.m.CreateVolume(e.ctx, v))
	return torus.VolumeID(v.Id)
}

func holder(what string) *models.Holder {
	return &models.Holder{Host: "host-" + what, Pid: 42, What: what, SinceUnixMs: 1}
}

// state returns a state under epoch that differs from those of other numbers.
func state(epoch, number uint64) *models.VolumeState {
	return &models.VolumeState{
		Epoch: epoch,
		Head:  &models.Head{Epoch: epoch, Number: number, Seq: number * 10},
		Open:  &models.Window{Epoch: epoch, Spans: []*models.Span{{Lo: number, Hi: number + 32, RingVersion: 1, Replication: 2}}},
	}
}

func (e *env) same(a, b proto.Message) {
	e.Helper()
	if !proto.Equal(a, b) {
		e.Fatalf("%v\nis not\n%v", a, b)
	}
}

func testInit(t *testing.T, e *env) {
	_, err := e.m.GlobalMetadata(e.ctx)
	e.is(err, torus.ErrNoGlobalMetadata)
	e.is(e.s.Init(torus.GlobalMetadata{ClusterID: "x", BlockSize: 1000}, nil), torus.ErrInvalid)
	e.is(e.s.Init(torus.GlobalMetadata{BlockSize: 1 << 20}, nil), torus.ErrInvalid)
	second, err := ring.NewEmpty(2, 2)
	e.ok(err)
	e.is(e.s.Init(gmd, second), torus.ErrNonSequentialRing)

	e.ok(e.s.Init(gmd, nil))
	got, err := e.m.GlobalMetadata(e.ctx)
	e.ok(err)
	if got != gmd {
		t.Fatalf("%+v, want %+v", got, gmd)
	}
	_, err = e.m.Ring(e.ctx)
	e.is(err, torus.ErrNotExist)
	e.is(e.s.Init(gmd, nil), torus.ErrExists)
	e.volume("v")

	e.ok(e.s.Wipe())
	_, err = e.m.GlobalMetadata(e.ctx)
	e.is(err, torus.ErrNoGlobalMetadata)
	_, err = e.m.Volume(e.ctx, "v")
	e.is(err, torus.ErrNotExist)

	// Many at once: one makes the cluster.
	won := e.race(8, func(i int, _ torus.MetadataService) error {
		g := gmd
		g.DefaultBlockSpec = fmt.Sprintf("crc,rep=%d", i+1)
		return e.s.Init(g, nil)
	}, torus.ErrExists)
	if len(won) != 1 {
		t.Fatalf("%d made the cluster", len(won))
	}
	got, err = e.m.GlobalMetadata(e.ctx)
	e.ok(err)
	if want := fmt.Sprintf("crc,rep=%d", won[0]+1); got.DefaultBlockSpec != want {
		t.Fatalf("%s made it, %s is stored", want, got.DefaultBlockSpec)
	}
}

// Nothing of a cluster comes into being without it: a peer that outlives a wipe must not leave traces in the next one.
func testBeforeInit(t *testing.T, e *env) {
	e.is(e.m.PutPeer(e.ctx, 0, &models.Peer{Uuid: torus.NewPeerID().String()}), torus.ErrNoGlobalMetadata)
	e.is(e.m.SetRing(e.ctx, 1, []byte("ring")), torus.ErrNoGlobalMetadata)
	e.is(e.m.CreateVolume(e.ctx, &models.Volume{Name: "v"}), torus.ErrNoGlobalMetadata)
	list, err := e.m.Peers(e.ctx)
	e.ok(err)
	vols, err := e.m.Volumes(e.ctx)
	e.ok(err)
	if len(list)+len(vols) != 0 {
		t.Fatal(list, vols)
	}
}

// race runs f on n connections at once and returns the numbers of those that succeeded, sorted; the
// others must have failed with want.
func (e *env) race(n int, f func(i int, m torus.MetadataService) error, want error) (won []int) {
	e.Helper()
	conns := make([]torus.MetadataService, n)
	for i := range conns {
		conns[i] = e.connect()
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range n {
		wg.Go(func() {
			<-start
			err := f(i, conns[i])
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				won = append(won, i)
			} else if !errors.Is(err, want) {
				e.Errorf("number %d: error %v, want %v", i, err, want)
			}
		})
	}
	close(start)
	wg.Wait()
	sort.Ints(won)
	return won
}

func testLeases(t *testing.T, e *env) {
	_, err := e.m.GrantLease(e.ctx, 0)
	e.is(err, torus.ErrInvalid)
	a, b := e.lease(), e.lease()
	if a == b || a == 0 {
		t.Fatalf("leases %d and %d", a, b)
	}
	e.ok(e.m.RenewLease(e.ctx, a))
	e.ok(e.m.RevokeLease(e.ctx, a))
	e.is(e.m.RenewLease(e.ctx, a), torus.ErrLeaseNotFound)
	e.ok(e.m.RevokeLease(e.ctx, a))
	e.is(e.m.RenewLease(e.ctx, 12345), torus.ErrLeaseNotFound)

	// One that is renewed lives, one that is not ends, seen from any connection.
	kept, err := e.m.GrantLease(e.ctx, e.s.TTL)
	e.ok(err)
	left, err := e.m.GrantLease(e.ctx, e.s.TTL)
	e.ok(err)
	id := torus.NewPeerID()
	e.ok(e.m.PutPeer(e.ctx, left, &models.Peer{Uuid: id.String()}))
	other := e.connect()
	e.eventually("the end of a lease", func() bool {
		e.ok(other.RenewLease(e.ctx, kept))
		list, err := other.Peers(e.ctx)
		e.ok(err)
		return !list[0].Alive
	})
	e.is(e.m.RenewLease(e.ctx, left), torus.ErrLeaseNotFound)
	e.ok(e.m.RenewLease(e.ctx, kept))
}

func testPeers(t *testing.T, e *env) {
	ids := []string{"00000000-0000-4000-8000-000000000003", "00000000-0000-4000-8000-000000000001", "00000000-0000-4000-8000-000000000002"}
	for i, id := range ids {
		e.ok(e.m.PutPeer(e.ctx, 0, &models.Peer{Uuid: id, Address: fmt.Sprint("tdp://h:", i), Labels: map[string]string{"zone": "a"}, Alive: true}))
	}
	e.is(e.m.PutPeer(e.ctx, 0, &models.Peer{Uuid: "nobody"}), torus.ErrInvalid)
	e.is(e.m.PutPeer(e.ctx, 12345, &models.Peer{Uuid: ids[0]}), torus.ErrLeaseNotFound)
	list, err := e.m.Peers(e.ctx)
	e.ok(err)
	if len(list) != 3 || list[0].Uuid != ids[1] || list[1].Uuid != ids[2] || list[2].Uuid != ids[0] {
		t.Fatalf("not all, or not sorted: %v", list)
	}
	e.same(list[2], &models.Peer{Uuid: ids[0], Address: "tdp://h:0", Labels: map[string]string{"zone": "a"}})

	e.ok(e.m.PutPeer(e.ctx, 0, &models.Peer{Uuid: strings.ToUpper(ids[0]), UsedBytes: 5}))
	id, err := torus.ParsePeerID(ids[1])
	e.ok(err)
	e.ok(e.m.DeletePeer(e.ctx, id))
	e.is(e.m.DeletePeer(e.ctx, id), torus.ErrNotExist)
	list, err = e.m.Peers(e.ctx)
	e.ok(err)
	if len(list) != 2 || list[1].UsedBytes != 5 {
		t.Fatal(list)
	}
}

func testPeerLiveness(t *testing.T, e *env) {
	id := torus.NewPeerID()
	alive := func() bool {
		t.Helper()
		list, err := e.m.Peers(e.ctx)
		e.ok(err)
		if len(list) != 1 {
			t.Fatal(list)
		}
		return list[0].Alive
	}
	put := func(lease torus.LeaseID, want bool) {
		t.Helper()
		e.ok(e.m.PutPeer(e.ctx, lease, &models.Peer{Uuid: id.String()}))
		if alive() != want {
			t.Fatalf("alive is %v", !want)
		}
	}
	old, young := e.lease(), e.lease()
	put(0, false)
	put(old, true)
	put(0, true) // a record only, the lease still lives
	put(young, true)
	e.ok(e.m.RevokeLease(e.ctx, old)) // that of the process before a restart
	put(0, true)
	put(young, true)
	e.ok(e.m.RevokeLease(e.ctx, young))
	if alive() {
		t.Fatal("alive without a lease")
	}
	e.is(e.m.PutPeer(e.ctx, young, &models.Peer{Uuid: id.String()}), torus.ErrLeaseNotFound)
	last := e.lease()
	put(last, true)
	e.ok(e.m.DeletePeer(e.ctx, id))
	put(0, false)
}

// follow runs a watch until the test ends or stop is called, and returns what it delivered last, once cond holds of it.
func follow[T any](e *env, watch func(ctx context.Context, fn func(T)) error) (await func(what string, cond func(T) bool) T, stop func() error) {
	ctx, cancel := context.WithCancel(e.ctx)
	var mu sync.Mutex
	var last T
	var calls int
	var running bool
	done := make(chan error, 1)
	go func() {
		done <- watch(ctx, func(v T) {
			mu.Lock()
			if running {
				e.Error("two calls at a time")
			}
			running = true
			last = v
			calls++
			mu.Unlock()
			mu.Lock()
			running = false
			mu.Unlock()
		})
	}()
	await = func(what string, cond func(T) bool) T {
		e.Helper()
		var got T
		e.eventually(what, func() bool {
			mu.Lock()
			defer mu.Unlock()
			got = last
			return calls > 0 && cond(got)
		})
		return got
	}
	stop = func() error {
		e.Helper()
		cancel()
		select {
		case err := <-done:
			return err
		case <-time.After(patience):
			e.Fatal("the watch goes on after its context has ended")
			return nil
		}
	}
	e.Cleanup(cancel)
	return await, stop
}

func testWatchPeers(t *testing.T, e *env) {
	other := e.connect()
	await, stop := follow(e, e.m.WatchPeers)
	await("the empty list", func(l []*models.Peer) bool { return len(l) == 0 })
	a, b := torus.NewPeerID(), torus.NewPeerID()
	lease, err := other.GrantLease(e.ctx, e.s.TTL)
	e.ok(err)
	e.ok(other.PutPeer(e.ctx, lease, &models.Peer{Uuid: a.String()}))
	e.ok(other.PutPeer(e.ctx, 0, &models.Peer{Uuid: b.String()}))
	l := await("two peers", func(l []*models.Peer) bool { return len(l) == 2 })
	if l[0].Uuid > l[1].Uuid {
		t.Fatal("not sorted")
	}
	dead := await("the end of a lease", func(l []*models.Peer) bool { return !l[0].Alive && !l[1].Alive })
	dead[0].Address = "scribbled on by the caller"
	e.ok(other.PutPeer(e.ctx, e.lease(), &models.Peer{Uuid: a.String(), UsedBytes: 7}))
	l = await("a sign of life", func(l []*models.Peer) bool { return l[0].Alive || l[1].Alive })
	if l[0].Address != "" || l[1].Address != "" {
		t.Fatal("what one call got shows in the next")
	}
	e.ok(other.DeletePeer(e.ctx, a))
	await("one peer", func(l []*models.Peer) bool { return len(l) == 1 && l[0].Uuid == b.String() })
	e.is(stop(), context.Canceled)
}

func testRing(t *testing.T, e *env) {
	first, err := e.m.Ring(e.ctx)
	e.ok(err)
	r, err := ring.Decode(first)
	e.ok(err)
	if r.Version() != 1 || r.Type() != torus.RingEmpty {
		t.Fatalf("type %d, version %d", r.Type(), r.Version())
	}
	for _, v := range []uint64{0, 1, 3} {
		e.is(e.m.SetRing(e.ctx, v, []byte("wrong")), torus.ErrNonSequentialRing)
	}
	e.ok(e.m.SetRing(e.ctx, 2, []byte("two")))
	e.is(e.m.SetRing(e.ctx, 2, []byte("two again")), torus.ErrNonSequentialRing)
	e.ok(e.m.SetRing(e.ctx, 3, []byte("three")))
	for v, want := range map[uint64]string{1: string(first), 2: "two", 3: "three"} {
		got, err := e.m.RingAt(e.ctx, v)
		e.ok(err)
		if string(got) != want {
			t.Fatalf("version %d is %q", v, got)
		}
	}
	got, err := e.m.Ring(e.ctx)
	e.ok(err)
	if string(got) != "three" {
		t.Fatalf("the ring is %q", got)
	}
	for _, v := range []uint64{0, 4} {
		_, err = e.m.RingAt(e.ctx, v)
		e.is(err, torus.ErrNotExist)
	}

	// A cluster made without a ring starts at 1.
	e.ok(e.s.Wipe())
	e.ok(e.s.Init(gmd, nil))
	e.is(e.m.SetRing(e.ctx, 2, []byte("wrong")), torus.ErrNonSequentialRing)
	e.ok(e.m.SetRing(e.ctx, 1, []byte("one")))
}

func testRingRace(t *testing.T, e *env) {
	for version := uint64(2); version < 7; version++ {
		won := e.race(6, func(i int, m torus.MetadataService) error {
			return m.SetRing(e.ctx, version, []byte(fmt.Sprint(version, " by ", i)))
		}, torus.ErrNonSequentialRing)
		got, err := e.m.Ring(e.ctx)
		e.ok(err)
		if len(won) != 1 || string(got) != fmt.Sprint(version, " by ", won[0]) {
			t.Fatalf("version %d: %v succeeded, stored is %q", version, won, got)
		}
	}
}

func testWatchRing(t *testing.T, e *env) {
	await, stop := follow(e, e.m.WatchRing)
	first, err := e.m.Ring(e.ctx)
	e.ok(err)
	await("the ring", func(b []byte) bool { return string(b) == string(first) })
	other := e.connect()
	for v := uint64(2); v <= 5; v++ {
		e.ok(other.SetRing(e.ctx, v, fmt.Append(nil, "ring ", v)))
	}
	await("the last ring", func(b []byte) bool { return string(b) == "ring 5" })
	e.is(stop(), context.Canceled)
}

func testVolumes(t *testing.T, e *env) {
	v := &models.Volume{Name: "demo", Type: "block", SizeBytes: 1 << 40, BlockSpec: "crc,rep=3", CreatedUnixMs: 1234}
	e.ok(e.m.CreateVolume(e.ctx, v))
	if v.Id == 0 {
		t.Fatal("no id")
	}
	got, err := e.connect().Volume(e.ctx, "demo")
	e.ok(err)
	e.same(got, v)
	e.is(e.m.CreateVolume(e.ctx, &models.Volume{Name: "demo"}), torus.ErrExists)
	e.is(e.m.CreateVolume(e.ctx, &models.Volume{Name: "a/b"}), torus.ErrInvalid)
	_, err = e.m.Volume(e.ctx, "dem")
	e.is(err, torus.ErrNotExist)
	e.is(e.m.DeleteVolume(e.ctx, "demo2"), torus.ErrNotExist)

	st, err := e.m.VolumeState(e.ctx, torus.VolumeID(v.Id))
	e.ok(err)
	e.same(st.VolumeState, &models.VolumeState{})
	if st.Revision == 0 {
		t.Fatal("no revision")
	}
	for _, name := range []string{"zz", "aa", "demo-2"} {
		e.volume(name)
	}
	list, err := e.m.Volumes(e.ctx)
	e.ok(err)
	var names []string
	for _, v := range list {
		names = append(names, v.Name)
	}
	if got := strings.Join(names, " "); got != "aa demo demo-2 zz" {
		t.Fatal(got)
	}
	e.ok(e.m.DeleteVolume(e.ctx, "demo"))
	_, err = e.m.Volume(e.ctx, "demo")
	e.is(err, torus.ErrNotExist)
	_, err = e.m.VolumeState(e.ctx, torus.VolumeID(v.Id))
	e.is(err, torus.ErrNotExist)
	_, err = e.m.Holder(e.ctx, torus.VolumeID(v.Id))
	e.is(err, torus.ErrNotExist)
	_, err = e.m.Volume(e.ctx, "demo-2")
	e.ok(err)
	_, err = e.m.Attach(e.ctx, torus.VolumeID(v.Id), e.lease(), holder("a"), false)
	e.is(err, torus.ErrNotExist)
	_, err = e.m.Commit(e.ctx, torus.VolumeID(v.Id), st, &models.VolumeState{})
	e.is(err, torus.ErrNotExist)
	e.is(e.m.Relock(e.ctx, torus.VolumeID(v.Id), 1, e.lease(), holder("a")), torus.ErrNotExist)
	e.ok(e.m.Unlock(e.ctx, torus.VolumeID(v.Id), 1))
}

// D2 rests on it: an id is never given twice, whatever has been deleted.
func testVolumeIDs(t *testing.T, e *env) {
	seen := map[torus.VolumeID]bool{0: true}
	for range 5 {
		for _, name := range []string{"a", "b"} {
			id := e.volume(name)
			if seen[id] || id > torus.VolumeMax {
				t.Fatalf("id %x again", id)
			}
			seen[id] = true
		}
		e.ok(e.m.DeleteVolume(e.ctx, "b"))
		e.ok(e.m.DeleteVolume(e.ctx, "a"))
	}
}

// D3 rests on it: what a listing does not have, though its id has been handed out, does not exist.
func testVolumeStates(t *testing.T, e *env) {
	page, err := e.m.VolumeStates(e.ctx, 0, 10)
	e.ok(err)
	if page.ClusterID != gmd.ClusterID || page.LastID != 0 || len(page.List) != 0 || page.More {
		t.Fatalf("without volumes: %+v", page)
	}
	var want []torus.VolumeID
	for i := range 20 { // beyond one hexadecimal digit; names in another order than ids
		want = append(want, e.volume(fmt.Sprintf("v%d", 90-i)))
	}
	last := e.volume("last")
	e.ok(e.m.DeleteVolume(e.ctx, "last"))
	e.ok(e.m.DeleteVolume(e.ctx, "v87"))
	want = append(want[:3], want[4:]...)
	e.ok(e.m.UpdateVolume(e.ctx, "v88", func(v *models.Volume) error { v.Name = ".deleted"; return nil })) // still there
	for i, id := range want {
		if i%3 != 1 { // locks lie between the states
			_, err := e.m.Attach(e.ctx, id, e.lease(), holder("a"), false)
			e.ok(err)
		}
	}
	for _, limit := range []int{1, 2, 3, 7, len(want), 1000} {
		var got []torus.VolumeID
		for after, more := torus.VolumeID(0), true; more; {
			page, err := e.connect().VolumeStates(e.ctx, after, limit)
			e.ok(err)
			if page.ClusterID != gmd.ClusterID || page.LastID != last {
				t.Fatalf("limit %d after %x: cluster %s, last %x", limit, after, page.ClusterID, page.LastID)
			}
			if more = page.More; more && len(page.List) == 0 || len(page.List) > limit {
				t.Fatalf("limit %d after %x: %d states, more %v", limit, after, len(page.List), more)
			}
			for _, x := range page.List {
				one, err := e.m.VolumeState(e.ctx, x.ID)
				e.ok(err)
				e.same(x.VolumeState.VolumeState, one.VolumeState)
				if x.Revision != one.Revision {
					t.Fatalf("volume %x: revision %d, by itself %d", x.ID, x.Revision, one.Revision)
				}
				got = append(got, x.ID)
				after = x.ID
			}
		}
		if !slices.Equal(got, want) {
			t.Fatalf("limit %d: %x, want %x", limit, got, want)
		}
	}
	page, err = e.m.VolumeStates(e.ctx, last, 10)
	e.ok(err)
	if len(page.List) != 0 || page.More {
		t.Fatalf("beyond the last: %+v", page)
	}
	e.ok(e.s.Wipe())
	_, err = e.m.VolumeStates(e.ctx, 0, 10)
	e.is(err, torus.ErrNoGlobalMetadata)
}

func testCreateRace(t *testing.T, e *env) {
	for round := range 3 {
		same := fmt.Sprint("same", round)
		won := e.race(6, func(i int, m torus.MetadataService) error {
			return m.CreateVolume(e.ctx, &models.Volume{Name: same, SizeBytes: uint64(i)})
		}, torus.ErrExists)
		v, err := e.m.Volume(e.ctx, same)
		e.ok(err)
		if len(won) != 1 || v.SizeBytes != uint64(won[0]) {
			t.Fatalf("%v made it, stored is that of %d", won, v.SizeBytes)
		}
		// Different names: all succeed, with ids of their own.
		ids := make([]uint64, 6)
		won = e.race(6, func(i int, m torus.MetadataService) error {
			v := &models.Volume{Name: fmt.Sprint("v", round, "-", i)}
			err := m.CreateVolume(e.ctx, v)
			ids[i] = v.Id
			return err
		}, nil)
		distinct := map[uint64]bool{}
		for _, id := range ids {
			distinct[id] = true
		}
		if len(won) != 6 || len(distinct) != 6 {
			t.Fatalf("%v succeeded, ids %v", won, ids)
		}
	}
}

func testAttach(t *testing.T, e *env) {
	id := e.volume("v")
	h, err := e.m.Holder(e.ctx, id)
	e.ok(err)
	if h != nil {
		t.Fatal(h)
	}
	_, err = e.m.Attach(e.ctx, id, 12345, holder("a"), false)
	e.is(err, torus.ErrLeaseNotFound)
	_, err = e.m.Attach(e.ctx, id, 0, holder("a"), false)
	e.is(err, torus.ErrLeaseNotFound)

	lease := e.lease()
	a, err := e.m.Attach(e.ctx, id, lease, holder("a"), false)
	e.ok(err)
	e.same(a.VolumeState, &models.VolumeState{Epoch: 1})
	read, err := e.m.VolumeState(e.ctx, id)
	e.ok(err)
	e.same(read.VolumeState, a.VolumeState)
	if read.Revision != a.Revision {
		t.Fatalf("revision %d, read %d", a.Revision, read.Revision)
	}
	h, err = e.m.Holder(e.ctx, id)
	e.ok(err)
	want := holder("a")
	want.Epoch = 1
	e.same(h, want)
	a, err = e.m.Commit(e.ctx, id, a, state(1, 1))
	e.ok(err)

	// Another: refused, and told by whom.
	other := e.connect()
	_, err = other.Attach(e.ctx, id, e.lease(), holder("b"), false)
	e.is(err, torus.ErrLocked)
	for _, say := range []string{"host-a", "42", "epoch 1"} {
		if !strings.Contains(err.Error(), say) {
			t.Fatalf("%q does not say %q", err, say)
		}
	}
	err = other.DeleteVolume(e.ctx, "v")
	e.is(err, torus.ErrLocked)
	if !strings.Contains(err.Error(), "host-a") {
		t.Fatalf("%q does not say who", err)
	}
	read, err = e.m.VolumeState(e.ctx, id)
	e.ok(err)
	if read.Revision != a.Revision || read.Epoch != 1 {
		t.Fatal("a refused attach has changed the state")
	}

	// The same lease is the same holder: an attach that failed half-way is begun again.
	again, err := e.m.Attach(e.ctx, id, lease, holder("a"), false)
	e.ok(err)
	wantState := state(1, 1)
	wantState.Epoch, wantState.Txn = 2, a.Txn
	e.same(again.VolumeState, wantState) // head and window as they were

	// By force.
	forced, err := other.Attach(e.ctx, id, e.lease(), holder("b"), true)
	e.ok(err)
	if forced.Epoch != 3 {
		t.Fatalf("epoch %d", forced.Epoch)
	}
	h, err = e.m.Holder(e.ctx, id)
	e.ok(err)
	if h.Host != "host-b" || h.Epoch != 3 {
		t.Fatal(h)
	}
	// The end of the former holder's lease is nothing to the new one.
	e.ok(e.m.RevokeLease(e.ctx, lease))
	h, err = e.m.Holder(e.ctx, id)
	e.ok(err)
	if h.GetHost() != "host-b" {
		t.Fatal(h)
	}
	_, err = e.m.Attach(e.ctx, id, e.lease(), holder("c"), false)
	e.is(err, torus.ErrLocked)
}

// L1: of many that attach at once exactly one gets the volume.
func testAttachRace(t *testing.T, e *env) {
	id := e.volume("v")
	for round := uint64(1); round <= 4; round++ {
		states := make([]torus.VolumeState, 8)
		won := e.race(8, func(i int, m torus.MetadataService) error {
			lease, err := m.GrantLease(e.ctx, 10*time.Minute)
			if err != nil {
				return err
			}
			states[i], err = m.Attach(e.ctx, id, lease, holder(fmt.Sprint(i)), false)
			return err
		}, torus.ErrLocked)
		h, err := e.m.Holder(e.ctx, id)
		e.ok(err)
		if len(won) != 1 || states[won[0]].Epoch != round || h.Epoch != round || h.What != fmt.Sprint(won[0]) {
			t.Fatalf("round %d: %v attached, holder %v", round, won, h)
		}
		e.ok(e.m.Unlock(e.ctx, id, round))
	}
}

// L1: by force all succeed, each under an epoch of its own; the last one holds it, and only it can commit.
func testForcedAttachRace(t *testing.T, e *env) {
	id := e.volume("v")
	states := make([]torus.VolumeState, 6)
	won := e.race(6, func(i int, m torus.MetadataService) error {
		lease, err := m.GrantLease(e.ctx, 10*time.Minute)
		if err != nil {
			return err
		}
		states[i], err = m.Attach(e.ctx, id, lease, holder(fmt.Sprint(i)), true)
		return err
	}, nil)
	epochs := map[uint64]bool{}
	for _, s := range states {
		epochs[s.Epoch] = true
	}
	if len(won) != 6 || len(epochs) != 6 || !epochs[6] {
		t.Fatalf("%v attached, epochs %v", won, epochs)
	}
	committed := e.race(6, func(i int, m torus.MetadataService) error {
		_, err := m.Commit(e.ctx, id, states[i], state(states[i].Epoch, uint64(i)))
		return err
	}, torus.ErrCompareFailed)
	if len(committed) != 1 || states[committed[0]].Epoch != 6 {
		t.Fatalf("%v committed", committed)
	}
	h, err := e.m.Holder(e.ctx, id)
	e.ok(err)
	if h.Epoch != 6 || h.What != fmt.Sprint(committed[0]) {
		t.Fatal(h)
	}
}

func testAttachAfterLeaseEnds(t *testing.T, e *env) {
	id := e.volume("v")
	lease, err := e.m.GrantLease(e.ctx, e.s.TTL)
	e.ok(err)
	_, err = e.m.Attach(e.ctx, id, lease, holder("a"), false)
	e.ok(err)
	other := e.connect()
	mine := e.lease()
	var st torus.VolumeState
	e.eventually("an attach after the holder's lease", func() bool {
		st, err = other.Attach(e.ctx, id, mine, holder("b"), false)
		if err != nil {
			e.is(err, torus.ErrLocked)
		}
		return err == nil
	})
	if st.Epoch != 2 {
		t.Fatalf("epoch %d: a refused attach counts", st.Epoch)
	}
	e.is(e.m.Relock(e.ctx, id, 1, e.lease(), holder("a")), torus.ErrFenced)
}

func testCommit(t *testing.T, e *env) {
	id := e.volume("v")
	s0, err := e.m.Attach(e.ctx, id, e.lease(), holder("a"), false)
	e.ok(err)
	s1, err := e.m.Commit(e.ctx, id, s0, state(1, 1))
	e.ok(err)
	want := state(1, 1)
	want.Txn = 1
	e.same(s1.VolumeState, want)
	if s1.Revision <= s0.Revision {
		t.Fatalf("revision %d after %d", s1.Revision, s0.Revision)
	}
	read, err := e.connect().VolumeState(e.ctx, id)
	e.ok(err)
	e.same(read.VolumeState, want)
	if read.Revision != s1.Revision {
		t.Fatalf("revision %d, read %d", s1.Revision, read.Revision)
	}
	// What was read serves as well as what was returned.
	s2, err := e.m.Commit(e.ctx, id, read, state(1, 2))
	e.ok(err)
	if s2.Txn != 2 {
		t.Fatalf("transaction %d", s2.Txn)
	}
	// The epoch is not a commit's to change.
	_, err = e.m.Commit(e.ctx, id, s2, state(2, 3))
	e.is(err, torus.ErrInvalid)
	read, err = e.m.VolumeState(e.ctx, id)
	e.ok(err)
	if read.Revision != s2.Revision {
		t.Fatal("a refused commit has changed the state")
	}
}

// An amendment changes what is not the writer's; both notice the other by the revision, and the writer's transactions keep their numbers.
func testAmend(t *testing.T, e *env) {
	id := e.volume("v")
	s0, err := e.m.Attach(e.ctx, id, e.lease(), holder("a"), false)
	e.ok(err)
	s1, err := e.m.Commit(e.ctx, id, s0, state(1, 1))
	e.ok(err)
	with := func(s torus.VolumeState, ask string) *models.VolumeState {
		to := proto.CloneOf(s.VolumeState)
		to.Asks = append(to.Asks, &models.Ask{Snapshot: ask})
		return to
	}
	s2, err := e.m.Amend(e.ctx, id, s1, with(s1, "x"))
	e.ok(err)
	if s2.Txn != s1.Txn || s2.Revision <= s1.Revision || len(s2.Asks) != 1 {
		t.Fatalf("amended from %v to %v", s1, s2)
	}
	_, err = e.m.Amend(e.ctx, id, s1, with(s1, "y"))
	e.is(err, torus.ErrCompareFailed)
	_, err = e.m.Commit(e.ctx, id, s1, state(1, 2))
	e.is(err, torus.ErrCompareFailed)
	for name, change := range map[string]func(*models.VolumeState){
		"epoch":  func(s *models.VolumeState) { s.Epoch++ },
		"txn":    func(s *models.VolumeState) { s.Txn++ },
		"head":   func(s *models.VolumeState) { s.Head = &models.Head{Number: 9} },
		"window": func(s *models.VolumeState) { s.Open = nil },
	} {
		to := with(s2, "z")
		change(to)
		if _, err := e.m.Amend(e.ctx, id, s2, to); !errors.Is(err, torus.ErrInvalid) {
			t.Fatalf("amendment of the %s: %v", name, err)
		}
	}
	read, err := e.connect().VolumeState(e.ctx, id)
	e.ok(err)
	e.same(read.VolumeState, s2.VolumeState)
	s3, err := e.m.Commit(e.ctx, id, s2, s2.VolumeState)
	e.ok(err)
	if s3.Txn != s1.Txn+1 || len(s3.Asks) != 1 {
		t.Fatalf("committed %v", s3)
	}
}

func testUpdateVolume(t *testing.T, e *env) {
	id := e.volume("v")
	e.volume("w")
	e.ok(e.m.UpdateVolume(e.ctx, "v", func(v *models.Volume) error { v.SizeBytes = 1 << 30; return nil }))
	v, err := e.m.Volume(e.ctx, "v")
	e.ok(err)
	if v.SizeBytes != 1<<30 || v.Id != uint64(id) {
		t.Fatal(v)
	}
	rename := func(to string) func(*models.Volume) error {
		return func(v *models.Volume) error { v.Name = to; return nil }
	}
	e.is(e.m.UpdateVolume(e.ctx, "nobody", rename("x")), torus.ErrNotExist)
	e.is(e.m.UpdateVolume(e.ctx, "v", rename("w")), torus.ErrExists)
	e.is(e.m.UpdateVolume(e.ctx, "v", rename("a b")), torus.ErrInvalid)
	e.is(e.m.UpdateVolume(e.ctx, "v", func(v *models.Volume) error { v.Id++; return nil }), torus.ErrInvalid)
	e.is(e.m.UpdateVolume(e.ctx, "v", func(*models.Volume) error { return torus.ErrLocked }), torus.ErrLocked)
	e.ok(e.m.UpdateVolume(e.ctx, "v", rename(".v")))
	_, err = e.m.Volume(e.ctx, "v")
	e.is(err, torus.ErrNotExist)
	if v, err = e.m.Volume(e.ctx, ".v"); err != nil || v.Id != uint64(id) || v.SizeBytes != 1<<30 {
		t.Fatal(v, err)
	}
	_, err = e.m.VolumeState(e.ctx, id)
	e.ok(err)
	e.volume("v") // the name is free
	e.ok(e.m.DeleteVolume(e.ctx, ".v"))
	_, err = e.m.VolumeState(e.ctx, id)
	e.is(err, torus.ErrNotExist)
}

// L1: of many commits from the same state exactly one is made.
func testCommitRace(t *testing.T, e *env) {
	id := e.volume("v")
	s, err := e.m.Attach(e.ctx, id, e.lease(), holder("a"), false)
	e.ok(err)
	for round := range uint64(6) {
		results := make([]torus.VolumeState, 8)
		won := e.race(8, func(i int, m torus.MetadataService) (err error) {
			results[i], err = m.Commit(e.ctx, id, s, state(1, 100*round+uint64(i)))
			return err
		}, torus.ErrCompareFailed)
		if len(won) != 1 {
			t.Fatalf("round %d: %v committed", round, won)
		}
		read, err := e.m.VolumeState(e.ctx, id)
		e.ok(err)
		e.same(read.VolumeState, results[won[0]].VolumeState)
		if s = results[won[0]]; s.Revision != read.Revision || s.Txn != round+1 {
			t.Fatalf("round %d: revision %d, transaction %d; read %d", round, s.Revision, s.Txn, read.Revision)
		}
	}
}

// L1, rule 5 of the model: whatever was built on an earlier state fails, of this epoch or an older one, and a duplicate of
// what has been made fails too.
func testLateCommits(t *testing.T, e *env) {
	id := e.volume("v")
	var all []torus.VolumeState
	created, err := e.m.VolumeState(e.ctx, id)
	e.ok(err)
	all = append(all, created)
	var current torus.VolumeState
	for epoch := uint64(1); epoch <= 3; epoch++ {
		current, err = e.m.Attach(e.ctx, id, e.lease(), holder("a"), true)
		e.ok(err)
		for n := range uint64(2) {
			all = append(all, current)
			current, err = e.m.Commit(e.ctx, id, current, state(epoch, n))
			e.ok(err)
		}
		all = append(all, current)
	}
	all = all[:len(all)-1]
	for i, old := range all {
		for n := range uint64(3) {
			_, err := e.m.Commit(e.ctx, id, old, state(old.GetEpoch(), n))
			if !errors.Is(err, torus.ErrCompareFailed) {
				t.Fatalf("state %d (epoch %d, transaction %d), commit %d: %v", i, old.GetEpoch(), old.GetTxn(), n, err)
			}
		}
	}
	read, err := e.m.VolumeState(e.ctx, id)
	e.ok(err)
	e.same(read.VolumeState, current.VolumeState)
	if read.Revision != current.Revision {
		t.Fatal("a late commit has changed the state")
	}
}

func testRelock(t *testing.T, e *env) {
	id := e.volume("v")
	lease := e.lease()
	s, err := e.m.Attach(e.ctx, id, lease, holder("a"), false)
	e.ok(err)
	s, err = e.m.Commit(e.ctx, id, s, state(1, 1))
	e.ok(err)
	e.ok(e.m.RevokeLease(e.ctx, lease))
	h, err := e.m.Holder(e.ctx, id)
	e.ok(err)
	if h != nil {
		t.Fatalf("still held by %v", h)
	}
	e.is(e.m.Relock(e.ctx, id, 1, lease, holder("a")), torus.ErrLeaseNotFound)
	fresh := e.lease()
	e.ok(e.m.Relock(e.ctx, id, 1, fresh, holder("a")))
	e.ok(e.m.Relock(e.ctx, id, 1, fresh, holder("a")))
	h, err = e.m.Holder(e.ctx, id)
	e.ok(err)
	if h.GetHost() != "host-a" || h.Epoch != 1 {
		t.Fatal(h)
	}
	_, err = e.m.Attach(e.ctx, id, e.lease(), holder("b"), false)
	e.is(err, torus.ErrLocked)
	// The state is not touched: the writer goes on from what it has.
	_, err = e.m.Commit(e.ctx, id, s, state(1, 2))
	e.ok(err)

	e.is(e.m.Relock(e.ctx, id, 2, fresh, holder("a")), torus.ErrFenced)
	_, err = e.m.Attach(e.ctx, id, e.lease(), holder("b"), true)
	e.ok(err)
	e.is(e.m.Relock(e.ctx, id, 1, fresh, holder("a")), torus.ErrFenced)
	e.ok(e.m.Unlock(e.ctx, id, 2))
	e.is(e.m.Relock(e.ctx, id, 1, fresh, holder("a")), torus.ErrFenced)
	h, err = e.m.Holder(e.ctx, id)
	e.ok(err)
	if h != nil {
		t.Fatal(h)
	}
}

func testUnlock(t *testing.T, e *env) {
	id := e.volume("v")
	lease := e.lease()
	s, err := e.m.Attach(e.ctx, id, lease, holder("a"), false)
	e.ok(err)
	e.ok(e.m.Unlock(e.ctx, id, 7))
	h, err := e.m.Holder(e.ctx, id)
	e.ok(err)
	if h.GetEpoch() != 1 {
		t.Fatal("unlocked by another epoch")
	}
	e.ok(e.m.Unlock(e.ctx, id, 1))
	e.ok(e.m.Unlock(e.ctx, id, 1))
	h, err = e.m.Holder(e.ctx, id)
	e.ok(err)
	if h != nil {
		t.Fatal(h)
	}
	e.ok(e.m.RenewLease(e.ctx, lease))
	read, err := e.m.VolumeState(e.ctx, id)
	e.ok(err)
	if read.Revision != s.Revision {
		t.Fatal("the state has changed")
	}
	_, err = e.m.Attach(e.ctx, id, e.lease(), holder("b"), false)
	e.ok(err)
	e.ok(e.m.Unlock(e.ctx, id, 2))
	e.ok(e.m.DeleteVolume(e.ctx, "v"))
}

func testWatchVolume(t *testing.T, e *env) {
	e.is(e.m.WatchVolume(e.ctx, 999, func(torus.VolumeState) {}), torus.ErrNotExist)
	id := e.volume("v")
	other := e.connect()
	await, stop := follow(e, func(ctx context.Context, fn func(torus.VolumeState)) error { return e.m.WatchVolume(ctx, id, fn) })
	await("the state", func(s torus.VolumeState) bool { return s.GetEpoch() == 0 })
	s, err := other.Attach(e.ctx, id, e.lease(), holder("a"), false)
	e.ok(err)
	await("the attach", func(s torus.VolumeState) bool { return s.GetEpoch() == 1 })
	for n := range uint64(5) {
		s, err = other.Commit(e.ctx, id, s, state(1, n))
		e.ok(err)
	}
	got := await("the last commit", func(s torus.VolumeState) bool { return s.GetTxn() == 5 })
	e.same(got.VolumeState, s.VolumeState)
	// What a watch delivered can be committed from.
	if got.Revision != s.Revision {
		t.Fatalf("revision %d, want %d", got.Revision, s.Revision)
	}
	e.is(stop(), context.Canceled)

	_, stop = follow(e, func(ctx context.Context, fn func(torus.VolumeState)) error { return e.m.WatchVolume(ctx, id, fn) })
	ended := make(chan error, 1)
	go func() { ended <- other.WatchVolume(e.ctx, id, func(torus.VolumeState) {}) }()
	e.ok(e.m.Unlock(e.ctx, id, 1))
	e.ok(e.m.DeleteVolume(e.ctx, "v"))
	select {
	case err := <-ended:
		e.is(err, torus.ErrNotExist)
	case <-time.After(patience):
		t.Fatal("a watch outlives its volume")
	}
	if err := stop(); !errors.Is(err, torus.ErrNotExist) && !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
}

func testMessagesAreTheCallers(t *testing.T, e *env) {
	v := &models.Volume{Name: "v", Type: "block"}
	e.ok(e.m.CreateVolume(e.ctx, v))
	id := torus.VolumeID(v.Id)
	v.Type = "scribbled"
	h, p, to := holder("a"), &models.Peer{Uuid: torus.NewPeerID().String(), Address: "x"}, state(1, 1)
	s, err := e.m.Attach(e.ctx, id, e.lease(), h, false)
	e.ok(err)
	if h.Epoch != 0 {
		t.Fatal("Attach has changed the caller's holder")
	}
	h.Host = "scribbled"
	e.ok(e.m.PutPeer(e.ctx, 0, p))
	p.Address = "scribbled"
	s, err = e.m.Commit(e.ctx, id, s, to)
	e.ok(err)
	if to.Txn != 0 {
		t.Fatal("Commit has changed the caller's state")
	}
	to.Head.Number = 99
	s.Head.Number = 98
	r := []byte("two")
	e.ok(e.m.SetRing(e.ctx, 2, r))
	r[0] = 'x'
	for range 2 {
		v, err := e.m.Volume(e.ctx, "v")
		e.ok(err)
		h, err := e.m.Holder(e.ctx, id)
		e.ok(err)
		ps, err := e.m.Peers(e.ctx)
		e.ok(err)
		s, err := e.m.VolumeState(e.ctx, id)
		e.ok(err)
		r, err := e.m.Ring(e.ctx)
		e.ok(err)
		if v.Type != "block" || h.Host != "host-a" || ps[0].Address != "x" || s.Head.Number != 1 || string(r) != "two" {
			t.Fatal(v, h, ps, s, string(r))
		}
		v.Type, h.Host, ps[0].Address, s.Head.Number, r[0] = "scribbled", "scribbled", "scribbled", 99, 'x'
	}
}

// A call whose context has ended fails as unavailable, and says why.
func testContexts(t *testing.T, e *env) {
	ctx, cancel := context.WithCancel(e.ctx)
	cancel()
	_, err := e.m.Peers(ctx)
	e.is(err, torus.ErrMetadataUnavailable)
	e.is(err, context.Canceled)
	e.is(e.m.CreateVolume(ctx, &models.Volume{Name: "v"}), torus.ErrMetadataUnavailable)
	e.is(e.m.WatchRing(ctx, func([]byte) {}), context.Canceled)
	_, err = e.m.GrantLease(ctx, time.Minute)
	e.is(err, torus.ErrMetadataUnavailable)
	e.is(e.m.RenewLease(ctx, e.lease()), torus.ErrMetadataUnavailable)
}

func testClose(t *testing.T, e *env) {
	m := e.connect()
	_, err := m.Peers(e.ctx)
	e.ok(err)
	_, stop := follow(e, m.WatchPeers)
	e.ok(m.Close())
	e.ok(m.Close())
	_, err = m.Peers(e.ctx)
	e.is(err, torus.ErrClosed)
	e.is(m.WatchRing(e.ctx, func([]byte) {}), torus.ErrClosed)
	if err := stop(); !errors.Is(err, torus.ErrClosed) && !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	_, err = e.m.Peers(e.ctx) // the others live on
	e.ok(err)
}

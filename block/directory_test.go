package block

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/distributor"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/metadata/temp"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/ring"
	"github.com/coreos/torus/storage"
)

type conn struct {
	l loop.Loop
	m *storage.Memory
}

func (c conn) Submit(r *torus.Request) { c.l.Post(func() { c.m.Submit(r) }) }
func (c conn) Close()                  {}

type cluster struct {
	l   *loop.Epoll
	mds *temp.Server
	c   *temp.Client
	d   *distributor.Distributor
	dir *Directory
}

func newCluster(t *testing.T, up bool) *cluster {
	l, err := loop.NewEpoll(nil)
	if err != nil {
		t.Fatal(err)
	}
	go l.Run()
	k := &cluster{l: l}
	k.mds = temp.NewServer(time.Now)
	if err := k.mds.Init(torus.GlobalMetadata{ClusterID: "c", BlockSize: 4 << 20, DefaultBlockSpec: "crc"}, nil); err != nil {
		t.Fatal(err)
	}
	k.c = k.mds.Client()
	var members []ring.Member
	var peers []*models.Peer
	mems := map[torus.PeerID]*storage.Memory{}
	for i := range 2 {
		id := torus.PeerID{byte(i + 1)}
		m, err := storage.NewMemory(storage.Config{Loop: l, SizeBytes: 1 << 30, Identity: storage.Identity{Peer: id, ClusterID: "c", BlockSize: 4 << 20}})
		if err != nil {
			t.Fatal(err)
		}
		mems[id] = m
		members = append(members, ring.Member{ID: id, Weight: 1})
		peers = append(peers, &models.Peer{Uuid: id.String(), Address: "x", Alive: true})
	}
	r, err := ring.NewSlotTable(1, 2, members, 256)
	if err != nil {
		t.Fatal(err)
	}
	k.d = distributor.New(distributor.Config{Loop: l, Dial: func(id torus.PeerID, _ string, isUp func(), _ func(error)) distributor.Conn {
		if up {
			l.Post(isUp)
		}
		return conn{l, mems[id]}
	}, LoadRing: func(uint64) (torus.Ring, error) { return r, nil }})
	k.do(func() { k.d.SetRing(r); k.d.SetPeers(peers) })
	if _, err := Create(context.Background(), k.c, "v", 1<<20, "crc"); err != nil {
		t.Fatal(err)
	}
	if k.dir, err = NewDirectory(context.Background(), Config{Loop: l, Dist: k.d, MDS: k.c}); err != nil {
		t.Fatal(err)
	}
	return k
}

func (k *cluster) do(fn func()) {
	done := make(chan struct{})
	k.l.Post(func() { fn(); close(done) })
	<-done
}

type opening struct {
	dev device.Device
	err error
}

func (k *cluster) open() chan opening {
	ch := make(chan opening, 1)
	k.l.Post(func() { k.dir.Open("v", func(d device.Device, err error) { ch <- opening{d, err} }) })
	return ch
}

// B1: an Open that waits for the end of a detach goes on after Shutdown began, and nobody releases what it attaches.
func TestOpenDuringShutdown(t *testing.T) {
	k := newCluster(t, true)
	o := <-k.open()
	if o.err != nil {
		t.Fatal(o.err)
	}
	again := make(chan opening, 1)
	shut := make(chan error, 1)
	k.do(func() {
		k.dir.Close("v", o.dev)
		k.dir.Open("v", func(d device.Device, err error) { again <- opening{d, err} })
		k.dir.Shutdown(func(err error) { shut <- err })
	})
	select {
	case <-shut:
	case <-time.After(20 * time.Second):
		t.Fatal("shutdown hangs")
	}
	select {
	case o := <-again:
		if o.err == nil {
			t.Fatal("attached after Shutdown was done")
		}
		t.Log(o.err)
	case <-time.After(10 * time.Second):
		t.Fatal("the second Open is never answered")
	}
	time.Sleep(100 * time.Millisecond)
	k.do(func() {
		if len(k.dir.open) != 0 {
			t.Fatalf("%d volumes are still there after Shutdown", len(k.dir.open))
		}
	})
	if h, _ := k.c.Holder(context.Background(), 1); h != nil {
		t.Fatalf("the volume is still held: %v", h)
	}
}

// B2: Shutdown while an attach waits for peers.
func TestShutdownDuringAttach(t *testing.T) {
	k := newCluster(t, false)
	ch := k.open()
	time.Sleep(300 * time.Millisecond)
	shut := make(chan error, 1)
	k.do(func() { k.dir.Shutdown(func(err error) { shut <- err }) })
	select {
	case <-shut:
	case <-time.After(20 * time.Second):
		t.Fatal("Shutdown waits for ever for an attach that waits for ever for peers")
	}
	<-ch
}

// Stop alone ends an attach that waits for peers, soon: whoever waits for its user to go does not wait for it.
func TestStopEndsAttach(t *testing.T) {
	k := newCluster(t, false)
	ch := k.open()
	time.Sleep(300 * time.Millisecond)
	began := time.Now()
	k.do(k.dir.Stop)
	select {
	case o := <-ch:
		if o.err == nil || time.Since(began) > 2*time.Second {
			t.Fatalf("after %v: %v", time.Since(began), o.err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the attach goes on")
	}
}

// A volume that its last user gives back, and that is not released in order, is told of by Shutdown.
func TestUncleanReleaseIsTold(t *testing.T) {
	k := newCluster(t, true)
	o := <-k.open()
	if o.err != nil {
		t.Fatal(o.err)
	}
	k.c.SetFaults(func(_ context.Context, method string) temp.Fault {
		if method == "Unlock" {
			return temp.FailBefore
		}
		return temp.None
	})
	shut := make(chan error, 1)
	k.do(func() {
		k.dir.Stop()
		k.dir.Close("v", o.dev)
		k.dir.Shutdown(func(err error) { shut <- err })
	})
	if err := <-shut; err == nil || !strings.Contains(err.Error(), "volume v was not released") {
		t.Fatalf("Shutdown says %v", err)
	}
}

// B3: the lease is lost, and the first attempt to hold the volume again fails: it is never tried again.
func TestRelockRetried(t *testing.T) {
	k := newCluster(t, true)
	if o := <-k.open(); o.err != nil {
		t.Fatal(o.err)
	}
	failed := 0
	k.c.SetFaults(func(_ context.Context, method string) temp.Fault {
		if method == "Relock" && failed == 0 {
			failed++
			return temp.FailBefore
		}
		return temp.None
	})
	k.mds.Advance(11 * time.Second)
	deadline := time.Now().Add(13 * time.Second)
	for time.Now().Before(deadline) {
		h, err := k.c.Holder(context.Background(), 1)
		if err == nil && h != nil && failed > 0 {
			return
		}
		time.Sleep(200 * time.Millisecond)
	}
	t.Fatal("four renewals later nobody holds the volume that is attached here: anybody can attach it without --force")
}

// B4: the lease is lost while an attach is under way: the volume is attached under the lease that is gone.
func TestLeaseLostDuringAttach(t *testing.T) {
	k := newCluster(t, true)
	block := make(chan struct{})
	k.c.SetFaults(func(_ context.Context, method string) temp.Fault {
		if method == "Commit" {
			<-block // an attach that takes long (here: its last transaction)
		}
		return temp.None
	})
	ch := k.open()
	time.Sleep(300 * time.Millisecond)
	k.mds.Advance(11 * time.Second)
	time.Sleep(4 * time.Second) // a renewal: a new lease is taken
	close(block)
	o := <-ch
	if o.err != nil {
		t.Fatal(o.err)
	}
	time.Sleep(4 * time.Second)
	if h, err := k.c.Holder(context.Background(), 1); err != nil || h == nil {
		t.Fatal(fmt.Sprint("attached, and nobody holds it: ", h, err))
	}
}

// B5: a fenced volume is opened again.
func TestOpenAfterFence(t *testing.T) {
	k := newCluster(t, true)
	o := <-k.open()
	if o.err != nil {
		t.Fatal(o.err)
	}
	lease, _ := k.c.GrantLease(context.Background(), time.Minute)
	if _, err := k.c.Attach(context.Background(), 1, lease, nil, true); err != nil {
		t.Fatal(err)
	}
	time.Sleep(200 * time.Millisecond)
	_ = k.c.Unlock(context.Background(), 1, 2)
	if x := <-k.open(); x.err == nil {
		t.Log("opened")
	} else {
		t.Log("with a user left: ", x.err)
	}
	k.do(func() { k.dir.Close("v", o.dev) })
	if x := <-k.open(); x.err != nil {
		t.Fatal("after the last user: ", x.err)
	}
}

// A directory that is limited to a snapshot serves that and nothing else, its volume neither, though it may have to recover it.
func TestOnlySnapshot(t *testing.T) {
	k := newCluster(t, true)
	if _, err := CreateSnapshot(context.Background(), k.c, "v", "s"); err != nil {
		t.Fatal(err)
	}
	k.dir.cfg.Only = []string{"v@s"}
	listed := make(chan []device.Info, 1)
	k.do(func() { k.dir.List(func(l []device.Info, err error) { listed <- l }) })
	if l := <-listed; len(l) != 1 || l[0].Name != "v@s" || !l[0].ReadOnly || l[0].Size != 1<<20 {
		t.Errorf("listed: %+v", l)
	}
	open := func(name string) opening {
		ch := make(chan opening, 1)
		k.do(func() { k.dir.Open(name, func(d device.Device, err error) { ch <- opening{d, err} }) })
		return <-ch
	}
	for _, name := range []string{"v", "v@t", "w@s"} {
		if o := open(name); !errors.Is(o.err, device.ErrNotExist) {
			t.Errorf("%s: %v", name, o.err)
		}
		stat := make(chan error, 1)
		k.do(func() { k.dir.Stat(name, func(_ device.Info, err error) { stat <- err }) })
		if err := <-stat; !errors.Is(err, device.ErrNotExist) {
			t.Errorf("stat %s: %v", name, err)
		}
	}
	o := open("v@s")
	if o.err != nil || !o.dev.ReadOnly() || o.dev.Size() != 1<<20 {
		t.Fatal(o.err)
	}
	k.do(func() { k.dir.Close("v@s", o.dev) })
}

// Who asks for the size of a volume that has grown while it is attached is told the new one.
func TestStatGrown(t *testing.T) {
	k := newCluster(t, true)
	o := <-k.open()
	if o.err != nil {
		t.Fatal(o.err)
	}
	if err := Grow(context.Background(), k.c, "v", 2<<20); err != nil {
		t.Fatal(err)
	}
	stat := make(chan device.Info, 1)
	k.do(func() { k.dir.Stat("v", func(i device.Info, _ error) { stat <- i }) })
	if i := <-stat; i.Size != 2<<20 {
		t.Errorf("%d bytes", i.Size)
	}
	k.do(func() { k.dir.Close("v", o.dev) })
}

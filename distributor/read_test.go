package distributor_test

import (
	"bytes"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/distributor"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/ring"
)

// cluster is peers that each hold some blocks, of one byte repeated, and answer after a moment.
type cluster struct {
	t     *testing.T
	v     *loop.Virtual
	l     *loop.VirtualLoop
	d     *distributor.Distributor
	held  map[torus.PeerID]byte // what a peer answers to every read; absent: ErrBlockNotExist
	asked []torus.PeerID
	near  map[torus.PeerID]bool
	fence uint64 // of all peers
	epoch uint64 // of reads
	log   bytes.Buffer
}

type conn struct {
	c  *cluster
	id torus.PeerID
}

func (c *conn) Close() {}

// Near: some peers are on the reader's machine.
func (c *conn) Near() bool { return c.c.near[c.id] }

func (c *conn) Submit(q *torus.Request) {
	c.c.asked = append(c.c.asked, c.id)
	c.c.l.After(time.Millisecond, func() {
		if q.Epoch != 0 && q.Epoch < c.c.fence {
			q.Finish(torus.ErrFenced)
			return
		}
		b, ok := c.c.held[c.id]
		if !ok {
			q.Finish(torus.ErrBlockNotExist)
			return
		}
		for i := range q.Data {
			q.Data[i] = b
		}
		q.Finish(nil)
	})
}

func id(i int) torus.PeerID { return torus.PeerID{byte(i)} }

// newCluster has peers 1 … n in its directory, those in down not connected, and the given ones in the ring.
func newCluster(t *testing.T, n int, members []int, down ...int) *cluster {
	return newClusterNear(t, n, members, nil, down...)
}

func newClusterNear(t *testing.T, n int, members, near []int, down ...int) *cluster {
	c := &cluster{t: t, v: loop.NewVirtual(1), held: map[torus.PeerID]byte{}, near: map[torus.PeerID]bool{}}
	for _, i := range near {
		c.near[id(i)] = true
	}
	c.l = c.v.NewLoop("c")
	c.d = distributor.New(distributor.Config{
		Loop: c.l, Log: slog.New(slog.NewTextHandler(&c.log, nil)),
		Dial: func(p torus.PeerID, _ string, up func(), _ func(error)) distributor.Conn {
			for _, i := range down {
				if p == id(i) {
					return &conn{c, p}
				}
			}
			c.l.Post(up)
			return &conn{c, p}
		},
	})
	var list []*models.Peer
	for i := 1; i <= n; i++ {
		list = append(list, &models.Peer{Uuid: id(i).String(), Address: "x"})
	}
	c.l.Post(func() { c.d.SetPeers(list) })
	c.ring(1, members)
	c.v.RunFor(time.Second)
	return c
}

func (c *cluster) ring(version uint64, members []int) {
	c.t.Helper()
	var l []ring.Member
	for _, i := range members {
		l = append(l, ring.Member{ID: id(i), Weight: 1})
	}
	r, err := ring.NewSlotTable(version, 2, l, 64)
	if err != nil {
		c.t.Fatal(err)
	}
	c.l.Post(func() { c.d.SetRing(r) })
	c.v.RunFor(time.Millisecond)
}

// read reads a block registered at set, whose bytes must be 7.
func (c *cluster) read(set torus.PeerList, wait bool) (err error, done bool) { //nolint:staticcheck // done is the rarer question
	c.asked = nil
	c.l.Post(func() {
		r := c.d.NewRead()
		r.Ref, r.Data, r.Set, r.Wait = torus.BlockRef{Volume: 1, INode: 1}, make([]byte, 16), set, wait
		r.Verify = func(r *distributor.Read) bool { return r.Data[0] == 7 }
		r.Done = func(r *distributor.Read) {
			err, done = r.Err, true
			r.Release()
		}
		r.Epoch = c.epoch
		r.Start()
	})
	c.v.RunFor(10 * time.Second)
	return err, done
}

func TestHome(t *testing.T) {
	c := newCluster(t, 5, []int{1, 2, 3, 4, 5})
	ref := torus.BlockRef{Volume: 1, INode: 1}
	set := torus.PeerList{id(2), id(4)}
	same := func(got, want torus.PeerList) {
		t.Helper()
		if len(got) != len(want) {
			t.Fatalf("%v, want %v", got, want)
		}
		for i := range got {
			if got[i] != want[i] {
				t.Fatalf("%v, want %v", got, want)
			}
		}
	}
	same(c.d.Home(ref, set), set)
	same(c.d.Candidates(ref, set), set)
	c.ring(2, []int{1, 2, 3, 5}) // 4 has left
	home := c.d.Home(ref, set)
	if len(home) != 2 || home[0] != id(2) || home[1] == id(4) || home[1] == id(2) {
		t.Fatalf("home %v", home)
	}
	same(c.d.Candidates(ref, set), torus.PeerList{id(2), id(4), home[1]})
	same(c.d.Home(ref, set), home) // P1: the same whenever asked
	c.ring(3, []int{1})
	same(c.d.Home(ref, set), torus.PeerList{id(1)}) // fewer, and not the same twice (F1)
	same(c.d.Others(torus.PeerList{id(1), id(2)}), torus.PeerList{id(3), id(4), id(5)})
}

// A block is found where it is: at its registered set, at its home, anywhere; in this order.
func TestReadFindsBlock(t *testing.T) {
	set := torus.PeerList{id(1), id(2)}
	c := newCluster(t, 6, []int{1, 3, 4, 5, 6})
	home := c.d.Home(torus.BlockRef{Volume: 1, INode: 1}, set)[1]
	var other torus.PeerID
	for i := 3; i <= 6; i++ {
		if id(i) != home {
			other = id(i)
		}
	}
	for n, at := range []torus.PeerID{id(1), id(2), home, other} {
		c.held = map[torus.PeerID]byte{at: 7}
		if err, done := c.read(set, false); err != nil || !done {
			t.Fatalf("at %v: %v", at, err)
		}
		if want := n + 1; n < 3 && len(c.asked) != want || n == 3 && (len(c.asked) < want || len(c.asked) > 6) {
			t.Fatalf("at %v: asked %v", at, c.asked)
		}
	}
	c.held = nil
	if err, done := c.read(set, true); !done || err == nil {
		t.Fatal("a block that nobody has, and nobody else may have, was waited for")
	}
	if len(c.asked) != 6 {
		t.Fatalf("asked %v", c.asked)
	}
}

// A replica on this machine is asked first, if it is healthy and answers.
func TestReadNear(t *testing.T) {
	set := torus.PeerList{id(1), id(2), id(3)}
	c := newClusterNear(t, 4, []int{1, 2, 3, 4}, []int{2, 3})
	c.held = map[torus.PeerID]byte{id(1): 7, id(2): 7, id(3): 7}
	ask := func(want ...torus.PeerID) {
		t.Helper()
		if err, done := c.read(set, false); err != nil || !done || !slices.Equal(c.asked, want) {
			t.Errorf("%v, done %v; asked %v, want %v", err, done, c.asked, want)
		}
	}
	ask(id(2))
	delete(c.held, id(2))
	ask(id(2), id(3))
	c.l.Post(func() { c.d.Lost(id(2)) })
	c.v.RunFor(0)
	ask(id(3))
	c.l.Post(func() { c.d.Lost(id(3)) })
	c.v.RunFor(0)
	ask(id(1))
}

// Who may come back is waited for, who is not in the directory any more is not.
func TestReadWaits(t *testing.T) {
	c := newCluster(t, 3, []int{1, 2, 3}, 2)
	if _, done := c.read(torus.PeerList{id(1), id(2)}, true); done {
		t.Fatal("a peer that is down was not waited for")
	}
	if n := len(c.asked); n < 100 || n > 130 { // of 100 rounds each asks one, and some ask everybody
		t.Fatalf("%d requests in 10 s", n)
	}
	c = newCluster(t, 3, []int{1, 3})
	if err, done := c.read(torus.PeerList{id(1), id(9)}, true); !done || err == nil {
		t.Fatal("a peer that is gone was waited for")
	}
}

// Who has been overtaken waits for nobody, neither when it begins nor later.
func TestReadOvertaken(t *testing.T) {
	for _, late := range []bool{false, true} {
		c := newCluster(t, 3, []int{1, 2, 3}, 2)
		c.epoch = 4
		if late {
			c.l.After(5*time.Second, func() { c.fence = 5 })
		} else {
			c.fence = 5
		}
		if err, done := c.read(torus.PeerList{id(1), id(2)}, true); !done || !errors.Is(err, torus.ErrFenced) {
			t.Errorf("late %v: done %v, %v", late, done, err)
		}
		if n := len(c.asked); late != (n > 10) {
			t.Errorf("late %v: %d requests", late, n)
		}
	}
}

// One bad replica does not fill the log, and the log says how much it does not say.
func TestComplaints(t *testing.T) {
	c := newCluster(t, 2, []int{1, 2})
	c.held = map[torus.PeerID]byte{id(1): 6, id(2): 7}
	for range 3 {
		for range 50 {
			c.l.Post(func() {
				r := c.d.NewRead()
				r.Ref, r.Data, r.Set = torus.BlockRef{Volume: 1, INode: 1}, make([]byte, 16), torus.PeerList{id(1), id(2)}
				r.Verify = func(r *distributor.Read) bool { return r.Data[0] == 7 }
				r.Done = func(r *distributor.Read) {
					if r.Err != nil {
						t.Error(r.Err)
					}
				}
				r.Start()
			})
		}
		c.v.RunFor(11 * time.Second)
	}
	if n := strings.Count(c.log.String(), "wrong bytes"); n != 3 {
		t.Errorf("%d lines for 150 wrong answers in 33 s", n)
	}
	if n := strings.Count(c.log.String(), "suppressed=49"); n != 2 {
		t.Errorf("%d lines say what was left out:\n%s", n, c.log.String())
	}
}

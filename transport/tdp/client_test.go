package tdp

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/transport/mem"
)

// fakeStore keeps blocks in a map. It answers at once, or after a delay if there is one.
type fakeStore struct {
	l      loop.Loop
	delay  time.Duration
	blocks map[torus.BlockRef][]byte
	fail   error
	seen   []torus.Request // copies, without Data
	held   int
	peak   int
}

func newFakeStore(l loop.Loop) *fakeStore {
	return &fakeStore{l: l, blocks: map[torus.BlockRef][]byte{}}
}

func (s *fakeStore) Submit(r *torus.Request) {
	seen := *r
	seen.Data, seen.Done = nil, nil
	s.seen = append(s.seen, seen)
	if s.delay == 0 {
		s.do(r)
		return
	}
	s.held++
	s.peak = max(s.peak, s.held)
	s.l.After(s.delay, func() {
		s.held--
		s.do(r)
	})
}

func (s *fakeStore) do(r *torus.Request) {
	if s.fail != nil {
		r.Fence = 99
		r.Finish(s.fail)
		return
	}
	b := s.blocks[r.Ref]
	switch r.Op {
	case torus.OpAppend:
		if int(r.Off) != len(b) {
			r.Length = uint32(len(b))
			r.Finish(fmt.Errorf("append at %d of %d: %w", r.Off, len(b), torus.ErrGap))
			return
		}
		s.blocks[r.Ref] = append(b, r.Data...)
		r.Length = uint32(len(b) + len(r.Data))
	case torus.OpSync:
		r.Length = uint32(len(b))
	case torus.OpRead:
		if int(r.Off)+len(r.Data) > len(b) {
			r.Finish(torus.ErrGap)
			return
		}
		copy(r.Data, b[r.Off:])
	case torus.OpScan:
		r.Data = append([]byte(nil), b[:min(len(b), int(r.Len))]...)
	case torus.OpFence, torus.OpList:
		for i := range r.Len {
			ref := r.Ref
			ref.Index += torus.IndexID(i)
			if b, ok := s.blocks[ref]; ok {
				r.Tails = append(r.Tails, torus.Tail{Ref: ref, Length: uint32(len(b)), Sealed: i%2 == 1, Suspect: i%2 == 0})
			}
		}
		r.Committed = 1234
	case torus.OpDelete:
		delete(s.blocks, r.Ref)
	}
	r.Finish(nil)
}

// cluster is a client and a server on a network in memory.
type cluster struct {
	t      testing.TB
	v      *loop.Virtual
	n      *mem.Network
	lc, ls *loop.VirtualLoop
	store  *fakeStore
	srv    *Server
	c      *Client
	ups    []Hello
	downs  []error
	scfg   ServerConfig
	ccfg   ClientConfig

	checks, exchanged int // reads by check, and those that were given other memory
}

func newCluster(t testing.TB, seed uint64) *cluster {
	v := loop.NewVirtual(seed)
	x := &cluster{t: t, v: v, n: mem.NewNetwork(v), lc: v.NewLoop("client"), ls: v.NewLoop("server")}
	x.n.Host("c")
	x.store = newFakeStore(x.ls)
	x.scfg = ServerConfig{Hello: testHello(), Store: x.store}
	hello := testHello()
	hello.ID, hello.Name = torus.PeerID{1}, "a test"
	x.ccfg = ClientConfig{
		Addr: "tdp://s:40000", Hello: hello, Peer: testHello().ID,
		Up:   func(h Hello) { x.ups = append(x.ups, h) },
		Down: func(err error) { x.downs = append(x.downs, err) },
	}
	return x
}

func (x *cluster) serve() *cluster {
	x.t.Helper()
	srv, err := Serve(x.ls, x.n.Host("s"), "tdp://s:40000", x.scfg)
	if err != nil {
		x.t.Fatal(err)
	}
	x.srv = srv
	return x
}

func (x *cluster) dial() *cluster {
	x.lc.Post(func() { x.c = Dial(x.lc, x.n.Host("c"), x.ccfg) })
	x.v.RunFor(0)
	return x
}

// start serves, dials and waits until the client is up.
func (x *cluster) start() *cluster {
	x.t.Helper()
	x.serve().dial()
	x.wait(func() bool { return x.c.Up() })
	return x
}

func (x *cluster) wait(until func() bool) {
	x.t.Helper()
	if !x.v.Run(until, 30*time.Second) {
		x.t.Fatalf("still waiting after 30 s; ups %v, downs %v", x.ups, x.downs)
	}
}

// submit sends r from the client's loop.
func (x *cluster) submit(r *torus.Request) *bool {
	done := new(bool)
	r.Done = func(*torus.Request) {
		if *done {
			x.t.Errorf("Done of %v called twice", r.Op)
		}
		*done = true
	}
	x.lc.Post(func() { x.c.Submit(r) })
	return done
}

// do sends r and waits for its end.
func (x *cluster) do(r *torus.Request) error {
	x.t.Helper()
	done := x.submit(r)
	x.wait(func() bool { return *done })
	return r.Err
}

func pages(n int, fill byte) []byte { return bytes.Repeat([]byte{fill}, n*torus.PageSize) }

// TestEveryOp sends each operation over a network that cuts everything into pieces, and compares what arrives.
func TestEveryOp(t *testing.T) {
	for seed := range uint64(30) {
		x := newCluster(t, seed)
		x.n.Cuts = 0.8
		x.start()
		if len(x.ups) != 1 || x.ups[0].ID != testHello().ID || x.ups[0].Role != RolePeer {
			t.Fatalf("ups: %+v", x.ups)
		}
		ref := torus.BlockRef{Volume: 5, INode: 3, Index: 8}
		if err := x.do(&torus.Request{Op: torus.OpPing}); err != nil {
			t.Fatal(err)
		}
		want := append(pages(2, 7), pages(90, 9)...)
		r := &torus.Request{Op: torus.OpAppend, Ref: ref, Epoch: 3, Data: want[:8192]}
		if err := x.do(r); err != nil || r.Length != 8192 {
			t.Fatal(err, r.Length)
		}
		r = &torus.Request{Op: torus.OpAppend, Ref: ref, Epoch: 3, Off: 8192, Data: want[8192:], Reserve: true, Durable: true}
		if err := x.do(r); err != nil || int(r.Length) != len(want) {
			t.Fatal(err, r.Length)
		}
		if got := x.store.seen[len(x.store.seen)-1]; got.Ref != ref || got.Epoch != 3 || got.Off != 8192 || !got.Reserve || !got.Durable || got.Peer != (torus.PeerID{1}) {
			t.Fatalf("the store saw %+v", got)
		}
		r = &torus.Request{Op: torus.OpAppend, Ref: ref, Epoch: 3, Off: 1 << 30, Data: pages(1, 1)}
		if err := x.do(r); !errors.Is(err, torus.ErrGap) || int(r.Length) != len(want) || !strings.Contains(err.Error(), "append at") {
			t.Fatal(err, r.Length)
		}
		got := make([]byte, len(want)-4096)
		if err := x.do(&torus.Request{Op: torus.OpRead, Ref: ref, Off: 4096, Data: got}); err != nil || !bytes.Equal(got, want[4096:]) {
			t.Fatal(err, "or other bytes")
		}
		if err := x.do(&torus.Request{Op: torus.OpRead, Ref: ref, Data: nil}); err != nil {
			t.Fatal(err)
		}
		r = &torus.Request{Op: torus.OpSync, Ref: ref, Epoch: 3, Len: 8192}
		if err := x.do(r); err != nil || int(r.Length) != len(want) {
			t.Fatal(err, r.Length)
		}
		for _, n := range []uint32{0, 100, 300_000} {
			r = &torus.Request{Op: torus.OpScan, Ref: ref, Len: n}
			if err := x.do(r); err != nil || !bytes.Equal(r.Data, want[:n]) {
				t.Fatal(err, len(r.Data))
			}
		}
		x.store.blocks[torus.BlockRef{Volume: 5, INode: 3, Index: 9}] = pages(1, 1)
		r = &torus.Request{Op: torus.OpFence, Ref: torus.BlockRef{Volume: 5, INode: 3}, Epoch: 4, Len: 32}
		if err := x.do(r); err != nil || r.Committed != 1234 || len(r.Tails) != 2 || r.Tails[0].Ref.Index != 8 || r.Tails[1].Length != 4096 || !r.Tails[1].Sealed || !r.Tails[0].Suspect || r.Tails[1].Suspect {
			t.Fatal(err, r.Tails)
		}
		if err := x.do(&torus.Request{Op: torus.OpSeal, Ref: ref, Epoch: 4, Len: 8192}); err != nil {
			t.Fatal(err)
		}
		if err := x.do(&torus.Request{Op: torus.OpDelete, Ref: ref, Epoch: 4}); err != nil {
			t.Fatal(err)
		}
		r = &torus.Request{Op: torus.OpList, Ref: torus.BlockRef{Volume: 5, INode: 3}, Len: 32}
		if err := x.do(r); err != nil || len(r.Tails) != 1 {
			t.Fatal(err, r.Tails)
		}
		x.store.fail = torus.ErrFenced
		r = &torus.Request{Op: torus.OpSync, Ref: ref, Epoch: 3, Len: 8192}
		if err := x.do(r); !errors.Is(err, torus.ErrFenced) || r.Fence != 99 {
			t.Fatal(err, r.Fence)
		}
		if len(x.downs) > 0 || x.c.Outstanding() != 0 {
			t.Fatal(x.downs, x.c.Outstanding())
		}
	}
}

// TestOrder: requests of one connection reach the store in the order of Submit, whatever their sizes.
func TestOrder(t *testing.T) {
	for seed := range uint64(20) {
		x := newCluster(t, seed)
		x.scfg.MaxOutstanding, x.scfg.MaxBytes = 7, 300<<10
		x.store.delay = time.Millisecond
		x.start()
		const n = 200
		left := n
		x.lc.Post(func() {
			for i := range n {
				r := &torus.Request{Op: torus.OpSync, Epoch: 1, Off: uint32(i), Done: func(*torus.Request) { left-- }}
				switch i % 3 {
				case 0:
					r.Op, r.Data = torus.OpAppend, pages(1+i%60, byte(i))
				case 1:
					r.Op, r.Data = torus.OpRead, make([]byte, 4096*(i%50))
				}
				x.c.Submit(r)
			}
		})
		x.wait(func() bool { return left == 0 })
		for i, r := range x.store.seen {
			if int(r.Off) != i {
				t.Fatalf("seed %d: request %d is the store's %d", seed, r.Off, i)
			}
		}
		if x.store.peak > 7 {
			t.Fatalf("%d requests with the store at once, 7 allowed", x.store.peak)
		}
	}
}

func TestSubmitWithoutConnection(t *testing.T) {
	x := newCluster(t, 1)
	x.n.Host("s")
	x.dial()
	now := false
	x.lc.Post(func() {
		x.c.Submit(&torus.Request{Op: torus.OpSync, Done: func(r *torus.Request) { now = errors.Is(r.Err, torus.ErrNoPeer) }})
		if !now {
			t.Error("not done at once with ErrNoPeer")
		}
	})
	x.v.RunFor(10 * time.Second)
	if n := len(x.downs); n < 8 || n > 20 {
		t.Errorf("%d attempts in 10 s", n)
	}
	if !errors.Is(x.downs[0], mem.ErrRefused) || !strings.Contains(x.downs[0].Error(), "s:40000") {
		t.Errorf("refused dial: %v", x.downs[0])
	}
	x.serve()
	x.wait(func() bool { return x.c.Up() })
	if err := x.do(&torus.Request{Op: torus.OpPing}); err != nil {
		t.Fatal(err)
	}
}

func TestRefusals(t *testing.T) {
	for _, c := range []struct {
		what   string
		change func(*cluster)
		is     error
		says   string
	}{
		{"cluster", func(x *cluster) { x.ccfg.Hello.Cluster = "other" }, torus.ErrWrongCluster, "other"},
		{"peer", func(x *cluster) { x.ccfg.Peer = torus.PeerID{9} }, torus.ErrNoPeer, "was expected"},
		{"block size", func(x *cluster) { x.ccfg.Hello.BlockSize = 1 << 20 }, torus.ErrInvalid, "block size"},
		{"name", func(x *cluster) { x.ccfg.Hello.Name = strings.Repeat("x", 65) }, torus.ErrInvalid, "64 bytes"},
		{"address", func(x *cluster) { x.ccfg.Addr = "carrier pigeon" }, torus.ErrInvalid, "carrier pigeon"},
		{"crowd", func(x *cluster) {
			x.scfg.MaxConns = 1
			x.serve()
			Dial(x.lc, x.n.Host("c"), x.ccfg)
			x.wait(func() bool { return len(x.ups) == 1 })
		}, torus.ErrAgain, "too many"},
	} {
		t.Run(c.what, func(t *testing.T) {
			x := newCluster(t, 1)
			c.change(x)
			if x.srv == nil {
				x.serve()
			}
			x.dial()
			x.wait(func() bool { return len(x.downs) > 0 })
			if err := x.downs[0]; !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v", err)
			}
			if x.c.Up() {
				t.Error("up")
			}
			x.v.RunFor(5 * time.Second)
			if n := x.srv.Conns(); n > 1 {
				t.Errorf("%d connections left", n)
			}
		})
	}
}

// TestSilence: a peer that stops answering, without the connection breaking, is noticed in under a second, idle or not,
// and what was under way fails then and not before.
func TestSilence(t *testing.T) {
	for _, way := range []string{"to", "from", "both"} {
		for _, idle := range []bool{true, false} {
			for seed := range uint64(10) {
				x := newCluster(t, seed).start()
				x.v.RunFor(time.Duration(seed) * 77 * time.Millisecond)
				if way != "from" {
					x.n.Cut("c", "s")
				}
				if way != "to" {
					x.n.Cut("s", "c")
				}
				at := x.v.Now()
				var done *bool
				r := &torus.Request{Op: torus.OpSync}
				if !idle {
					done = x.submit(r)
				}
				x.wait(func() bool { return len(x.downs) > 0 })
				if took := x.v.Now() - at; took > 900*time.Millisecond || took < 400*time.Millisecond {
					t.Errorf("%s, idle %v: noticed after %v", way, idle, took)
				}
				x.v.RunFor(0)
				if !idle && (!*done || !errors.Is(r.Err, torus.ErrBlockUnavailable) || !strings.Contains(r.Err.Error(), "silent")) {
					t.Errorf("%s: the request under way: %v %v", way, *done, r.Err)
				}
				x.n.HealAll()
				x.wait(func() bool { return x.c.Up() })
				if err := x.do(&torus.Request{Op: torus.OpPing}); err != nil {
					t.Error(err)
				}
			}
		}
	}
}

// TestSlowIsNotSilent: a store that takes 3 s for a request, and a connection that is paused because too much is under way,
// are no reason to give the peer up.
func TestSlowIsNotSilent(t *testing.T) {
	x := newCluster(t, 1)
	x.scfg.MaxOutstanding = 2
	x.store.delay = 2 * time.Second
	x.start()
	left := 4
	for range 4 {
		x.submit(&torus.Request{Op: torus.OpSync})
	}
	x.lc.Post(func() {
		for range 4 {
			x.c.Submit(&torus.Request{Op: torus.OpSync, Done: func(r *torus.Request) {
				left--
				if r.Err != nil && !strings.Contains(r.Err.Error(), "no reply to") {
					t.Error(r.Err)
				}
			}})
		}
	})
	x.v.RunFor(4500 * time.Millisecond)
	if len(x.downs) > 0 {
		t.Fatal(x.downs)
	}
	// But 8 requests, two at a time, take 8 s: the last ones run into RequestTimeout.
	x.wait(func() bool { return left == 0 })
	if len(x.downs) != 1 || !strings.Contains(x.downs[0].Error(), "no reply to Sync") {
		t.Fatal(x.downs)
	}
}

// TestSlowLine: a reply, and a request, that take longer than DeadAfter to arrive.
func TestSlowLine(t *testing.T) {
	x := newCluster(t, 1)
	slow := mem.LinkConfig{Delay: time.Millisecond, Bandwidth: 1 << 20}
	x.n.SetLink("c", "s", slow)
	x.n.SetLink("s", "c", slow)
	x.start()
	ref := torus.BlockRef{Volume: 1}
	if err := x.do(&torus.Request{Op: torus.OpAppend, Ref: ref, Data: pages(700, 3)}); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 700*4096)
	if err := x.do(&torus.Request{Op: torus.OpRead, Ref: ref, Data: got}); err != nil || !bytes.Equal(got, pages(700, 3)) {
		t.Fatal(err)
	}
	if len(x.downs) > 0 {
		t.Fatal(x.downs)
	}
}

// TestSuspended: a client that did not run for a while does not take that for the peer's silence.
func TestSuspended(t *testing.T) {
	x := newCluster(t, 1).start()
	x.v.RunFor(333 * time.Millisecond)
	late := &lateLoop{Loop: x.lc}
	_ = late
	x.c.l = late
	late.extra = 3 * time.Second // timers of this loop are late, as after SIGCONT
	x.v.RunFor(time.Second)
	late.extra = 0
	x.v.RunFor(5 * time.Second)
	if len(x.downs) > 0 {
		t.Fatal(x.downs)
	}
}

type lateLoop struct {
	loop.Loop
	extra time.Duration
}

func (l *lateLoop) After(d time.Duration, fn func()) *loop.Timer { return l.Loop.After(d+l.extra, fn) }

func TestConnectionLost(t *testing.T) {
	for _, c := range []struct {
		what string
		do   func(*cluster)
	}{
		{"reset", func(x *cluster) { x.n.Reset("c", "s") }},
		{"crash", func(x *cluster) { x.n.Host("s").Crash() }},
		{"power", func(x *cluster) { x.n.Host("s").PowerOff() }},
	} {
		t.Run(c.what, func(t *testing.T) {
			x := newCluster(t, 3)
			x.store.delay = 10 * time.Second
			x.start()
			var reqs [50]torus.Request
			failed := 0
			x.lc.Post(func() {
				for i := range reqs {
					r := &reqs[i]
					*r = torus.Request{Op: torus.OpAppend, Data: pages(20, 1), Tag: uint64(i), Done: func(r *torus.Request) {
						if !errors.Is(r.Err, torus.ErrBlockUnavailable) || len(x.downs) == 0 {
							t.Errorf("%v, downs %v", r.Err, x.downs)
						}
						if r.Tag != uint64(failed) {
							t.Errorf("request %d fails as number %d", r.Tag, failed)
						}
						failed++
					}}
					x.c.Submit(r)
				}
			})
			x.v.RunFor(3 * time.Millisecond)
			c.do(x)
			x.wait(func() bool { return failed == len(reqs) })
			if x.c.Up() || x.c.Outstanding() != 0 {
				t.Error("still up, or not empty")
			}
			if c.what == "reset" {
				x.wait(func() bool { return x.c.Up() })
			}
			x.v.RunFor(20 * time.Second) // the store answers requests of a connection that is gone
		})
	}
}

func TestCloseClient(t *testing.T) {
	x := newCluster(t, 1)
	x.store.delay = time.Second
	x.start()
	r := &torus.Request{Op: torus.OpSync}
	done := x.submit(r)
	x.v.RunFor(time.Millisecond)
	x.lc.Post(func() { x.c.Close() })
	x.v.RunFor(time.Millisecond)
	if !*done || !errors.Is(r.Err, torus.ErrClosed) || !errors.Is(r.Err, torus.ErrBlockUnavailable) {
		t.Fatal(*done, r.Err)
	}
	r = &torus.Request{Op: torus.OpSync}
	if err := x.do(r); !errors.Is(err, torus.ErrClosed) || !errors.Is(err, torus.ErrNoPeer) {
		t.Fatal(err)
	}
	x.v.RunFor(10 * time.Second)
	if len(x.downs) > 0 || len(x.ups) != 1 || x.srv.Conns() != 0 {
		t.Fatal(x.downs, x.ups, x.srv.Conns())
	}
}

// TestCloseServer: what is with the store is answered first.
func TestCloseServer(t *testing.T) {
	x := newCluster(t, 1)
	x.store.delay = time.Second
	x.start()
	r := &torus.Request{Op: torus.OpSync}
	done := x.submit(r)
	x.v.RunFor(time.Millisecond)
	closed := false
	x.ls.Post(func() { x.srv.Close(func() { closed = true }) })
	x.wait(func() bool { return closed })
	x.wait(func() bool { return *done })
	if r.Err != nil {
		t.Fatal(r.Err)
	}
	x.wait(func() bool { return len(x.downs) > 0 })
	if !strings.Contains(x.downs[0].Error(), "shutting down") {
		t.Error(x.downs[0])
	}

	// And one that takes longer than DrainTimeout: the connection goes, Close waits for the store.
	x = newCluster(t, 2)
	x.store.delay = 4 * time.Second
	x.start()
	done = x.submit(r)
	x.v.RunFor(time.Millisecond)
	at := x.v.Now()
	closed = false
	x.ls.Post(func() { x.srv.Close(func() { closed = true }) })
	x.wait(func() bool { return *done })
	if took := x.v.Now() - at; took > 2100*time.Millisecond || !errors.Is(r.Err, torus.ErrBlockUnavailable) || closed {
		t.Fatal(took, r.Err, closed)
	}
	x.wait(func() bool { return closed })
	if took := x.v.Now() - at; took < 3*time.Second {
		t.Fatal("closed before the store was done:", took)
	}
}

func TestUnsendable(t *testing.T) {
	x := newCluster(t, 1).start()
	for _, r := range []*torus.Request{
		{Op: torus.OpAppend},
		{Op: torus.OpAppend, Data: make([]byte, 100)},
		{Op: torus.OpAppend, Data: make([]byte, MaxPayload+4096)},
		{Op: torus.OpRead, Data: make([]byte, MaxPayload+1)},
		{Op: torus.OpScan, Len: MaxPayload + 1},
		{Op: torus.OpList, Len: MaxTails + 1},
		{Op: 77},
	} {
		if err := x.do(r); err == nil || len(x.downs) > 0 {
			t.Errorf("%v: %v, %v", r.Op, err, x.downs)
		}
	}
	big := make([]byte, MaxPayload)
	if err := x.do(&torus.Request{Op: torus.OpAppend, Data: big}); err != nil {
		t.Error(err)
	}
	if err := x.do(&torus.Request{Op: torus.OpRead, Data: big}); err != nil {
		t.Error(err)
	}
}

// TestChaos: cuts, resets and crashes at random. Every request ends exactly once, and appends that were acknowledged
// are there, in order (D2).
func TestChaos(t *testing.T) {
	for seed := range uint64(60) {
		x := newCluster(t, seed)
		rnd := x.v.Rand()
		x.n.ResetAfter = 3 * time.Second
		x.n.Default.Loss = 0.01
		x.store.delay = 300 * time.Microsecond
		x.start()
		ref := torus.BlockRef{Volume: 1}
		acked, sent, ended := 0, 0, 0
		var write func()
		write = func() {
			i := sent
			sent++
			r := &torus.Request{Op: torus.OpAppend, Ref: ref, Off: uint32(len(x.store.blocks[ref])), Data: pages(1+i%5, byte(i))}
			done := false
			r.Done = func(r *torus.Request) {
				if done {
					t.Errorf("seed %d: request %d done twice", seed, i)
				}
				done = true
				ended++
				if r.Err == nil {
					acked = max(acked, int(r.Length))
				}
				x.lc.After(time.Duration(rnd.IntN(30))*time.Millisecond, write)
			}
			x.c.Submit(r)
		}
		x.lc.Post(write)
		var fault func()
		fault = func() {
			switch rnd.IntN(5) {
			case 0:
				x.n.Cut("c", "s")
			case 1:
				x.n.Cut("s", "c")
			case 2:
				x.n.Reset("c", "s")
			default:
				x.n.HealAll()
			}
			x.v.At(time.Duration(rnd.IntN(1000))*time.Millisecond, fault)
		}
		x.v.At(0, fault)
		x.v.RunFor(10 * time.Second)
		if acked > len(x.store.blocks[ref]) || acked == 0 || sent-ended > 1 {
			t.Errorf("seed %d: %d acknowledged, %d stored, %d sent, %d ended", seed, acked, len(x.store.blocks[ref]), sent, ended)
		}
	}
}

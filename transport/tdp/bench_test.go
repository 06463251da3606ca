package tdp

import (
	"fmt"
	"testing"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/transport"
	"github.com/coreos/torus/transport/sock"
)

// nullStore answers everything at once.
type nullStore struct{}

func (nullStore) Submit(r *torus.Request) { r.Finish(nil) }

func startLoop(t testing.TB) *loop.Epoll {
	t.Helper()
	e, err := loop.NewEpoll(nil)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error)
	go func() { ended <- e.Run() }()
	t.Cleanup(func() {
		e.Stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

// onLoop runs fn on e and waits for it.
func onLoop(e *loop.Epoll, fn func()) {
	done := make(chan struct{})
	e.Post(func() { fn(); close(done) })
	<-done
}

// startSock serves store on a TCP port of its own and connects to it, each on its own thread.
func startSock(t testing.TB, store torus.BlockStore) (*loop.Epoll, *Client) {
	t.Helper()
	ls, lc := startLoop(t), startLoop(t)
	n := sock.New()
	var srv *Server
	var err error
	onLoop(ls, func() { srv, err = Serve(ls, n, "tdp://127.0.0.1:0", ServerConfig{Hello: testHello(), Store: store}) })
	if err != nil {
		t.Fatal(err)
	}
	up := make(chan struct{}, 1)
	hello := testHello()
	hello.ID = torus.PeerID{1}
	var c *Client
	onLoop(lc, func() {
		c = Dial(lc, n, ClientConfig{
			Addr: srv.Addr(), Hello: hello, Peer: testHello().ID,
			Up:   func(Hello) { up <- struct{}{} },
			Down: func(err error) { t.Error(err) },
		})
	})
	<-up
	t.Cleanup(func() {
		onLoop(lc, c.Close)
		closed := make(chan struct{})
		ls.Post(func() { srv.Close(func() { close(closed) }) })
		<-closed
	})
	return lc, c
}

// TestSock: the same over real sockets, with appends and reads of all sizes.
func TestSock(t *testing.T) {
	ls := &fakeStore{blocks: map[torus.BlockRef][]byte{}}
	lc, c := startSock(t, ls)
	do := func(r *torus.Request) {
		t.Helper()
		done := make(chan struct{})
		r.Done = func(*torus.Request) { close(done) }
		lc.Post(func() { c.Submit(r) })
		<-done
		if r.Err != nil {
			t.Fatal(r.Err)
		}
	}
	off := uint32(0)
	for i := 1; i <= MaxPayload/torus.PageSize; i = i*3/2 + 1 {
		do(&torus.Request{Op: torus.OpAppend, Off: off, Data: pages(i, byte(i))})
		got := make([]byte, i*torus.PageSize)
		do(&torus.Request{Op: torus.OpRead, Off: off, Data: got})
		if string(got) != string(pages(i, byte(i))) {
			t.Fatalf("%d pages came back changed", i)
		}
		off += uint32(len(got))
	}
}

// load keeps depth requests under way until n have been answered.
type load struct {
	c    *Client
	left int // to be sent
	open int // under way
	done chan struct{}
}

func (w *load) again(r *torus.Request) {
	if r.Err != nil {
		panic(r.Err)
	}
	w.open--
	if w.left > 0 {
		w.left--
		w.open++
		w.c.Submit(r)
	} else if w.open == 0 {
		close(w.done)
	}
}

func (w *load) run(l loop.Loop, n int, reqs []torus.Request) {
	w.left, w.done = n, make(chan struct{})
	l.Post(func() {
		for i := range reqs {
			if w.left > 0 {
				w.left--
				w.open++
				reqs[i].Done = w.again
				w.c.Submit(&reqs[i])
			}
		}
	})
	<-w.done
}

func BenchmarkRoundTrip(b *testing.B) {
	for _, c := range []struct {
		op   torus.Op
		size int
	}{
		{torus.OpPing, 0},
		{torus.OpAppend, 8 << 10}, {torus.OpAppend, 64 << 10}, {torus.OpAppend, 1 << 20},
		{torus.OpRead, 4 << 10}, {torus.OpRead, 64 << 10}, {torus.OpRead, 1 << 20},
	} {
		for _, depth := range []int{1, 32} {
			b.Run(fmt.Sprintf("%v/%dB/depth=%d", c.op, c.size, depth), func(b *testing.B) {
				lc, client := startSock(b, nullStore{})
				reqs := make([]torus.Request, depth)
				for i := range reqs {
					reqs[i] = torus.Request{Op: c.op, Data: make([]byte, c.size)}
				}
				w := &load{c: client}
				w.run(lc, 100, reqs)
				b.ReportAllocs()
				b.SetBytes(int64(c.size))
				b.ResetTimer()
				w.run(lc, b.N, reqs)
				b.StopTimer()
			})
		}
	}
}

// BenchmarkCodec is what the protocol itself costs both sides for an Append of 8 KiB that is whole in the input buffer: the
// client's Submit, the server's decoding and copy into an aligned buffer, its reply, and the client's decoding of that.
func BenchmarkCodec(b *testing.B) {
	v := loop.NewVirtual(1)
	var toServer, toClient sink
	srv := &Server{l: v.NewLoop("s"), cfg: ServerConfig{Store: nullStore{}, Hello: testHello()}}
	srv.cfg.setDefaults()
	srv.m, _ = newMetrics(nil)
	sc := &conn{srv: srv, s: &toClient, ready: true}
	cl := &Client{l: v.NewLoop("c"), slots: newSlots(), up: true}
	cl.link = &link{c: cl, s: &toServer}
	r := &torus.Request{Op: torus.OpAppend, Data: make([]byte, 8192), Done: func(*torus.Request) {}}
	b.ReportAllocs()
	b.SetBytes(8192)
	for b.Loop() {
		cl.Submit(r)
		sc.Data(nil, toServer.b)
		cl.link.Data(nil, toClient.b)
		toServer.b, toClient.b = toServer.b[:0], toClient.b[:0]
	}
	if cl.slots.n != 0 {
		b.Fatal("not answered")
	}
}

// sink is a stream that keeps what is written.
type sink struct {
	transport.Stream
	b []byte
}

func (s *sink) Write(b []byte)       { s.b = append(s.b, b...) }
func (s *sink) WriteShared(b []byte) { s.b = append(s.b, b...) }
func (s *sink) Queued() int          { return 0 }

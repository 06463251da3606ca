// Package transporttest is what every transport.Network must pass.
package transporttest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/transport"
)

// World is a network to test and what drives it.
type World struct {
	Network transport.Network
	// Server and Client may be one loop. Run drives both.
	Server, Client loop.Loop
	// Addr returns an address to listen on, another one (or one with port 0) each time.
	Addr func() string
	// Nobody returns an address on which nobody listens.
	Nobody func() string
	// Run runs the loops until the condition holds, which it asks between callbacks only, and reports
	// whether it came to hold in reasonable time. With a nil condition it lets things settle.
	Run func(until func() bool) bool
}

// Run runs the suite, in a fresh World for each test.
func Run(t *testing.T, world func(t *testing.T) World) {
	for _, c := range []struct {
		name string
		test func(*testing.T, *suite)
	}{
		{"Hello", testHello},
		{"EchoRandom", testEchoRandom},
		{"Need", testNeed},
		{"NeedLarge", testNeedLarge},
		{"Leftover", testLeftover},
		{"ReadIntoChain", testReadIntoChain},
		{"WriteBeforeOpened", testWriteBeforeOpened},
		{"Order", testOrder},
		{"Pause", testPause},
		{"PauseInData", testPauseInData},
		{"SlowReader", testSlowReader},
		{"CloseLocal", testCloseLocal},
		{"CloseInCallback", testCloseInCallback},
		{"CloseBeforeOpened", testCloseBeforeOpened},
		{"CloseAfterWrite", testCloseAfterWrite},
		{"CloseAfterWriteDespiteInput", testCloseAfterWriteDespiteInput},
		{"LastWords", testLastWords},
		{"UseAfterClose", testUseAfterClose},
		{"Refused", testRefused},
		{"BadAddress", testBadAddress},
		{"AddressInUse", testAddressInUse},
		{"ListenerClose", testListenerClose},
		{"ManyStreams", testManyStreams},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := world(t)
			c.test(t, &suite{World: w, t: t})
		})
	}
}

type suite struct {
	World
	t *testing.T
}

// must runs the loops until the condition holds.
func (w *suite) must(what string, until func() bool) {
	w.t.Helper()
	if !w.Run(until) {
		w.t.Fatalf("waited in vain for %s", what)
	}
}

// on runs fn on l.
func (w *suite) on(l loop.Loop, fn func()) {
	w.t.Helper()
	done := false
	l.Post(func() { fn(); done = true })
	w.must("a callback", func() bool { return done })
}

func (w *suite) listen(accept func(s transport.Stream) transport.Handler) (ln transport.Listener) {
	w.t.Helper()
	w.on(w.Server, func() {
		var err error
		if ln, err = w.Network.Listen(w.Server, w.Addr(), accept); err != nil {
			w.t.Fatal(err)
		}
	})
	w.t.Cleanup(func() { w.on(w.Server, func() { ln.Close() }) })
	return ln
}

func (w *suite) dial(addr string, p *peer) {
	w.t.Helper()
	w.on(w.Client, func() {
		p.s = w.Network.Dial(w.Client, addr, p)
		if p.opened || p.isClosed {
			w.t.Error("Opened or Closed was called before Dial returned")
		}
	})
}

func (w *suite) peer(name string) *peer { return &peer{t: w.t, name: name} }

// pair returns both ends of an open connection; the hooks may be set before and by the callers.
func (w *suite) pair() (client, server *peer) {
	w.t.Helper()
	client, server = w.peer("client"), w.peer("server")
	w.join(client, server)
	return client, server
}

func (w *suite) join(client, server *peer) {
	w.t.Helper()
	ln := w.listen(func(s transport.Stream) transport.Handler { return server })
	w.dial(ln.Addr(), client)
	w.must("the connection", func() bool { return client.opened && server.opened })
	if client.s.RemoteAddr() == "" || server.s.RemoteAddr() == "" {
		w.t.Error("RemoteAddr is empty")
	}
}

func testHello(t *testing.T, w *suite) {
	client, server := w.pair()
	w.on(w.Client, func() { client.s.Write([]byte("hello, ")); client.s.Write([]byte("server")) })
	w.on(w.Server, func() { server.s.Write([]byte("hello, client")) })
	w.must("both greetings", func() bool {
		return string(server.got) == "hello, server" && string(client.got) == "hello, client"
	})
	w.Run(nil)
	if n := client.s.Queued() + server.s.Queued(); n != 0 {
		t.Errorf("%d bytes still queued", n)
	}
}

// Bytes survive any mix of ways to write and to read, of any sizes.
func testEchoRandom(t *testing.T, w *suite) {
	const total = 6 << 20
	const ahead = 1 << 20
	for seed := range uint64(4) {
		r := rand.New(rand.NewPCG(seed, 1))
		size := func() int {
			if r.IntN(4) > 0 {
				return 1 + r.IntN(300)
			}
			return 1 + r.IntN(200<<10)
		}
		client, server := w.peer("client"), w.peer("server")
		sent, echoed, received := 0, 0, 0

		// take returns a Data that consumes at random, or reads a stretch directly, and passes the bytes on.
		take := func(p *peer, pass func(b []byte)) func(b []byte) (int, int) {
			return func(b []byte) (int, int) {
				consumed := len(b)
				if r.IntN(3) == 0 && len(b) < ahead/4 { // else the other side might wait for us
					consumed = r.IntN(len(b) + 1)
				}
				pass(b[:consumed])
				switch r.IntN(4) {
				case 0:
					dst := make([]byte, size())
					p.readInto(dst, func() { pass(dst) })
				case 1:
					if left := len(b) - consumed; left > 0 {
						return consumed, 1 + r.IntN(left)
					}
				}
				return consumed, 0
			}
		}
		write := func(s transport.Stream, off int, n int) {
			b := at(off, make([]byte, n))
			switch r.IntN(3) {
			case 0:
				s.Write(b)
				clear(b) // it is a copy
			case 1:
				s.WriteShared(b)
			case 2:
				bb := buf.Get(n)
				copy(bb.Bytes(), b)
				s.WriteBuf(bb, n)
			}
		}
		fill := func() {
			for !client.isClosed && sent < total+ahead && sent < received+ahead {
				n := size()
				write(client.s, sent, n)
				sent += n
			}
		}
		client.open = fill
		server.data = take(server, func(b []byte) {
			if !is(echoed, b) {
				t.Errorf("seed %d: the server received something else at offset %d", seed, echoed)
				server.s.Close()
				return
			}
			write(server.s, echoed, len(b))
			echoed += len(b)
		})
		client.data = take(client, func(b []byte) {
			if !is(received, b) {
				t.Errorf("seed %d: the client received something else at offset %d", seed, received)
				client.s.Close()
				return
			}
			received += len(b)
			fill()
		})
		w.join(client, server)
		if !w.Run(func() bool { return received >= total || client.isClosed || server.isClosed }) || received < total {
			t.Fatalf("seed %d: sent %d, echoed %d, received %d of %d", seed, sent, echoed, received, total)
		}
		w.on(w.Client, client.s.Close)
		w.must("the end", func() bool { return client.isClosed && server.isClosed })
	}
}

// Data is not called before it has what it says it needs, and sees all frames.
func testNeed(t *testing.T, w *suite) {
	client, server := w.pair()
	r := rand.New(rand.NewPCG(1, 2))
	const frames = 300
	next := 0
	server.data = func(b []byte) (int, int) {
		consumed := 0
		for len(b) >= 4 {
			n := int(binary.LittleEndian.Uint32(b))
			if len(b) < 4+n {
				return consumed, 4 + n
			}
			if !is(next, b[4:4+n]) {
				t.Errorf("frame %d is something else", next)
			}
			next++
			b, consumed = b[4+n:], consumed+4+n
		}
		return consumed, 4
	}
	var stream []byte
	for i := range frames {
		n := r.IntN(3000)
		if i%50 == 0 {
			n = 150 << 10
		}
		stream = binary.LittleEndian.AppendUint32(stream, uint32(n))
		stream = append(stream, at(i, make([]byte, n))...)
	}
	for len(stream) > 0 {
		n := min(1+r.IntN(20000), len(stream))
		w.on(w.Client, func() { client.s.Write(stream[:n]) })
		stream = stream[n:]
	}
	w.must("all frames", func() bool { return next == frames })
	if server.dataCalls > 20*frames {
		t.Errorf("Data was called %d times for %d frames", server.dataCalls, frames)
	}
}

// A need of many times the first buffer is met.
func testNeedLarge(t *testing.T, w *suite) {
	client, server := w.pair()
	const size = 5<<20 + 123
	done := false
	server.data = func(b []byte) (int, int) {
		if len(b) < size {
			return 0, size
		}
		if !is(0, b) {
			t.Error("something else arrived")
		}
		done = true
		return len(b), 0
	}
	w.on(w.Client, func() { client.s.WriteShared(at(0, make([]byte, size))) })
	w.must("5 MiB in one piece", func() bool { return done })
	if server.dataCalls > 2 {
		t.Errorf("Data was called %d times", server.dataCalls)
	}
}

// A handler that consumes in small steps and asks for less than what is left gets on without new input.
func testLeftover(t *testing.T, w *suite) {
	client, server := w.pair()
	off := 0
	server.data = func(b []byte) (int, int) {
		n := min(len(b), 10)
		if !is(off, b[:n]) {
			t.Errorf("something else at %d", off)
		}
		off += n
		return n, 1
	}
	const size = 10000
	w.on(w.Client, func() { client.s.Write(at(0, make([]byte, size))) })
	w.must("all bytes", func() bool { return off == size })
}

// ReadInto from within done, in all sizes, and the bytes behind it go to Data.
func testReadIntoChain(t *testing.T, w *suite) {
	client, server := w.pair()
	sizes := []int{1, 0, 4096, 64 << 10, 64<<10 + 1, 1 << 20, 17, 3 << 20, 100}
	total, off, tail := 5, 0, 0
	for _, n := range sizes {
		total += n
	}
	i := 0
	var step func()
	step = func() {
		if i == len(sizes) {
			return
		}
		dst := make([]byte, sizes[i])
		i++
		server.readInto(dst, func() {
			if !is(off, dst) {
				t.Errorf("piece %d is something else", i)
			}
			off += len(dst)
			step()
		})
	}
	server.data = func(b []byte) (int, int) {
		if i == 0 {
			if len(b) < 5 {
				return 0, 5
			}
			if !is(0, b[:5]) {
				t.Error("the head is something else")
			}
			off = 5
			step()
			return 5, 0
		}
		if i != len(sizes) || !is(off+tail, b) {
			t.Error("the tail is something else")
		}
		tail += len(b)
		return len(b), 0
	}
	w.on(w.Client, func() { client.s.Write(at(0, make([]byte, total+1000))) })
	w.must("the tail", func() bool { return tail == 1000 })
}

func testWriteBeforeOpened(t *testing.T, w *suite) {
	server := w.peer("server")
	client := w.peer("client")
	ln := w.listen(func(transport.Stream) transport.Handler { return server })
	w.on(w.Client, func() {
		client.s = w.Network.Dial(w.Client, ln.Addr(), client)
		client.s.Write([]byte("early "))
	})
	client.open = func() { client.s.Write([]byte("late")) }
	w.must("what was written early", func() bool { return string(server.got) == "early late" })
}

// The three ways to write do not overtake each other.
func testOrder(t *testing.T, w *suite) {
	client, server := w.pair()
	const n = 5000
	w.on(w.Client, func() {
		off := 0
		for i := range n {
			b := at(off, make([]byte, 1+i%97))
			switch i % 7 {
			case 0:
				client.s.WriteShared(b)
			case 3:
				bb := buf.Get(len(b))
				copy(bb.Bytes(), b)
				client.s.WriteBuf(bb, len(b))
			default:
				client.s.Write(b)
			}
			off += len(b)
			client.s.Write(nil)
			client.s.WriteShared(nil)
		}
		if client.s.Queued() != off {
			t.Errorf("%d bytes queued, want %d", client.s.Queued(), off)
		}
	})
	total := 0
	for i := range n {
		total += 1 + i%97
	}
	w.must("all bytes", func() bool { return len(server.got) == total })
	if !is(0, server.got) {
		t.Error("something else arrived")
	}
}

// While paused nothing is delivered; after Resume everything is.
func testPause(t *testing.T, w *suite) {
	client, server := w.pair()
	w.on(w.Server, server.pause)
	w.on(w.Client, func() { client.s.Write([]byte("one ")) })
	w.Run(nil)
	w.on(w.Client, func() { client.s.Write([]byte("two")) })
	w.Run(nil)
	if len(server.got) != 0 {
		t.Error("data while paused")
	}
	w.on(w.Server, server.resume)
	w.must("what was held back", func() bool { return string(server.got) == "one two" })
	w.on(w.Server, func() { server.pause(); server.resume(); server.pause() })
	w.on(w.Client, client.s.Close)
	w.Run(nil)
	w.on(w.Server, func() {
		if !server.isClosed { // it may know while paused
			server.resume()
		}
	})
	w.must("the end of a paused stream", func() bool { return server.isClosed })
}

// A Pause from within Data holds back even what has been read already.
func testPauseInData(t *testing.T, w *suite) {
	client, server := w.pair()
	server.data = func(b []byte) (int, int) {
		server.got = append(server.got, b[0])
		server.pause()
		w.Server.After(10*time.Microsecond, server.resume)
		return 1, 1
	}
	w.on(w.Client, func() { client.s.Write([]byte("abcdefghij")) })
	w.must("one byte at a time", func() bool { return string(server.got) == "abcdefghij" })

	// The same in front of a ReadInto.
	dst := make([]byte, 9)
	full := false
	server.data = func(b []byte) (int, int) {
		server.readInto(dst, func() { full = true })
		server.pause()
		return 0, 0
	}
	w.on(w.Client, func() { client.s.Write([]byte("123456789")) })
	w.Run(nil)
	if full {
		t.Error("ReadInto went on while paused")
	}
	w.on(w.Server, server.resume)
	w.must("ReadInto", func() bool { return full && string(dst) == "123456789" })
}

// Much more than any kernel buffers for a reader that pauses: the queue holds it, and nothing is lost.
func testSlowReader(t *testing.T, w *suite) {
	client, server := w.pair()
	const pieces, size = 400, 100 << 10
	w.on(w.Server, server.pause)
	off := 0
	server.data = func(b []byte) (int, int) {
		if !is(off, b) {
			t.Errorf("something else at %d", off)
		}
		off += len(b)
		if off/(5<<20) != (off-len(b))/(5<<20) {
			server.pause()
			w.Server.After(time.Millisecond, server.resume)
		}
		return len(b), 0
	}
	w.on(w.Client, func() {
		for i := range pieces {
			b := at(i*size, make([]byte, size))
			switch i % 3 {
			case 0:
				client.s.WriteShared(b)
			case 1:
				client.s.Write(b)
			case 2:
				bb := buf.Get(size)
				copy(bb.Bytes(), b)
				client.s.WriteBuf(bb, size)
			}
		}
	})
	w.Run(nil)
	w.on(w.Client, func() {
		client.s.Write(at(pieces*size, make([]byte, 7)))
		if q := client.s.Queued(); q < 1 {
			t.Errorf("%d bytes queued for a reader that does not read", q)
		}
	})
	w.on(w.Server, server.resume)
	w.must("all bytes", func() bool { return off == pieces*size+7 })
	w.must("an empty queue", func() bool { return client.s.Queued() == 0 })
}

func testCloseLocal(t *testing.T, w *suite) {
	client, server := w.pair()
	w.on(w.Client, func() {
		client.s.Close()
		if client.isClosed {
			t.Error("Closed was called from within Close")
		}
		client.s.Close()
	})
	w.must("both ends", func() bool { return client.isClosed && server.isClosed })
	if !errors.Is(client.err, torus.ErrClosed) {
		t.Errorf("Closed with %v after Close, want ErrClosed", client.err)
	}
	if server.err != nil {
		t.Errorf("Closed with %v after the other side closed in order, want nil", server.err)
	}
}

// Close from each callback; the contract checks of peer do the rest.
func testCloseInCallback(t *testing.T, w *suite) {
	dst := make([]byte, 100)
	for _, c := range []struct {
		name string
		set  func(p *peer)
	}{
		{"Opened", func(p *peer) { p.open = func() { p.s.Close() } }},
		{"Data", func(p *peer) { p.data = func(b []byte) (int, int) { p.s.Close(); return 1, 1 } }},
		{"Data, 0", func(p *peer) { p.data = func(b []byte) (int, int) { p.s.Close(); return 0, 1 << 20 } }},
		{"Data after ReadInto", func(p *peer) {
			p.data = func(b []byte) (int, int) {
				p.readInto(dst[:1], func() { t.Error("done after Close") })
				p.s.Close()
				return 0, 0
			}
		}},
		{"done", func(p *peer) {
			p.data = func(b []byte) (int, int) { p.readInto(dst, func() { p.s.Close() }); return 1, 0 }
		}},
		{"done and ReadInto", func(p *peer) {
			p.data = func(b []byte) (int, int) {
				p.readInto(dst[:1], func() { p.s.Close(); p.s.ReadInto(dst, func() { t.Error("done after Close") }) })
				return 0, 0
			}
		}},
		{"Closed", func(p *peer) {
			p.data = func(b []byte) (int, int) { p.s.Close(); return 0, 0 }
			p.closed = func() { p.s.Close(); p.s.Write([]byte("x")) }
		}},
	} {
		for _, side := range []string{"client", "server"} {
			t.Run(c.name+"/"+side, func(t *testing.T) {
				client, server := w.peer("client"), w.peer("server")
				me, other := client, server
				if side == "server" {
					me, other = server, client
				}
				c.set(me)
				open := func(p *peer) {
					first := p.open
					p.open = func() {
						p.s.Write(at(0, make([]byte, 300)))
						if first != nil {
							first()
						}
					}
				}
				open(client)
				open(server)
				ln := w.listen(func(transport.Stream) transport.Handler { return server })
				w.dial(ln.Addr(), client)
				w.must("both ends", func() bool { return client.isClosed && server.isClosed })
				if !errors.Is(me.err, torus.ErrClosed) {
					t.Errorf("Closed with %v after Close", me.err)
				}
				if other.opened && errors.Is(other.err, torus.ErrClosed) {
					t.Errorf("Closed with %v, though the other side closed", other.err)
				}
			})
		}
	}
}

func testCloseBeforeOpened(t *testing.T, w *suite) {
	client := w.peer("client")
	ln := w.listen(func(transport.Stream) transport.Handler { return w.peer("server") })
	w.on(w.Client, func() {
		client.s = w.Network.Dial(w.Client, ln.Addr(), client)
		client.s.Write([]byte("never sent"))
		client.s.Close()
	})
	w.must("Closed", func() bool { return client.isClosed })
	w.Run(nil)
	if client.opened || !errors.Is(client.err, torus.ErrClosed) {
		t.Errorf("opened %v, closed with %v", client.opened, client.err)
	}
}

// CloseAfterWrite delivers everything first.
func testCloseAfterWrite(t *testing.T, w *suite) {
	client, server := w.pair()
	const size = 20 << 20
	w.on(w.Client, func() {
		client.s.WriteShared(at(0, make([]byte, size)))
		client.s.CloseAfterWrite()
		client.s.CloseAfterWrite()
	})
	w.must("both ends", func() bool { return client.isClosed && server.isClosed })
	if len(server.got) != size || !is(0, server.got) {
		t.Errorf("%d bytes arrived, want %d", len(server.got), size)
	}
	if server.err != nil || !errors.Is(client.err, torus.ErrClosed) {
		t.Errorf("the reader's Closed says %v, the writer's %v", server.err, client.err)
	}
}

// The last message (an error, say) reaches a peer that goes on sending: no reset overtakes it.
func testCloseAfterWriteDespiteInput(t *testing.T, w *suite) {
	client, server := w.pair()
	server.data = func(b []byte) (int, int) {
		server.s.Write([]byte("go away"))
		server.s.CloseAfterWrite()
		return 1, 1
	}
	w.on(w.Client, func() {
		client.s.Write(at(0, make([]byte, 300<<10)))
	})
	w.must("the refusal", func() bool { return client.isClosed && server.isClosed })
	if string(client.got) != "go away" || client.err != nil {
		t.Errorf("received %q, closed with %v, want the refusal and nil", client.got, client.err)
	}
	if server.dataCalls != 1 {
		t.Errorf("Data was called %d times, also after CloseAfterWrite", server.dataCalls)
	}
}

// What was sent just before an orderly close is delivered before Closed.
func testLastWords(t *testing.T, w *suite) {
	for range 20 {
		client, server := w.pair()
		w.on(w.Client, func() {
			client.s.Write([]byte("bye"))
			client.s.CloseAfterWrite()
		})
		w.must("the end", func() bool { return server.isClosed })
		if string(server.got) != "bye" || server.err != nil {
			t.Fatalf("received %q, then %v", server.got, server.err)
		}
	}
}

// A stream that is closed swallows whatever is asked of it.
func testUseAfterClose(t *testing.T, w *suite) {
	client, server := w.pair()
	w.on(w.Server, server.s.Close)
	w.must("both ends", func() bool { return client.isClosed && server.isClosed })
	for _, p := range []*peer{client, server} {
		l := w.Client
		if p == server {
			l = w.Server
		}
		w.on(l, func() {
			p.s.Write([]byte("x"))
			p.s.WriteShared([]byte("x"))
			p.s.WriteBuf(buf.Get(1), 1)
			p.s.Pause()
			p.s.Resume()
			p.s.CloseAfterWrite()
			p.s.Close()
			if p.s.Queued() != 0 {
				t.Errorf("a closed stream has %d bytes queued", p.s.Queued())
			}
			_ = p.s.RemoteAddr()
		})
	}
	w.Run(nil)
}

func testRefused(t *testing.T, w *suite) {
	client := w.peer("client")
	w.dial(w.Nobody(), client)
	w.must("Closed", func() bool { return client.isClosed })
	if client.opened || client.err == nil || errors.Is(client.err, torus.ErrClosed) {
		t.Errorf("opened %v, closed with %v", client.opened, client.err)
	}
}

func testBadAddress(t *testing.T, w *suite) {
	for _, addr := range []string{"", "nonsense", "tcp://", "udp://127.0.0.1:1", "tcp://127.0.0.1", "tcp://127.0.0.1:70000", "unix:"} {
		client := w.peer("client")
		w.dial(addr, client)
		w.must("Closed of "+addr, func() bool { return client.isClosed })
		if client.opened || client.err == nil {
			t.Errorf("%q: opened %v, closed with %v", addr, client.opened, client.err)
		}
	}
}

func testAddressInUse(t *testing.T, w *suite) {
	ln := w.listen(func(transport.Stream) transport.Handler { return w.peer("server") })
	w.on(w.Server, func() {
		second, err := w.Network.Listen(w.Server, ln.Addr(), nil)
		if err == nil {
			t.Error("two listeners on one address")
			second.Close()
		}
	})
}

// A closed listener refuses; what it accepted lives on; its address can be taken again.
func testListenerClose(t *testing.T, w *suite) {
	server, client := w.peer("server"), w.peer("client")
	var ln transport.Listener
	listen := func(addr string) {
		w.on(w.Server, func() {
			var err error
			if ln, err = w.Network.Listen(w.Server, addr, func(transport.Stream) transport.Handler { return server }); err != nil {
				t.Fatal(err)
			}
		})
	}
	listen(w.Addr())
	addr := ln.Addr()
	w.dial(addr, client)
	w.must("the connection", func() bool { return server.opened })
	w.on(w.Server, func() {
		if err := ln.Close(); err != nil {
			t.Error(err)
		}
		ln.Close() // harmless
	})
	late := w.peer("late client")
	w.dial(addr, late)
	w.must("the refusal", func() bool { return late.isClosed })
	if late.opened {
		t.Error("a closed listener accepted")
	}
	w.on(w.Client, func() { client.s.Write([]byte("still here")) })
	w.must("the accepted stream", func() bool { return string(server.got) == "still here" })

	server = w.peer("second server")
	listen(addr)
	again := w.peer("second client")
	w.dial(addr, again)
	w.must("the second connection", func() bool { return server.opened && again.opened })
	w.on(w.Server, func() { ln.Close() })
}

// Many streams at once do not get in each other's way.
func testManyStreams(t *testing.T, w *suite) {
	const n, size = 200, 50000
	opened, finished, closed := 0, 0, 0
	ln := w.listen(func(transport.Stream) transport.Handler {
		p := w.peer("server")
		p.open = func() { opened++ }
		p.data = func(b []byte) (int, int) { p.s.Write(b); return len(b), 0 }
		p.closed = func() { closed++ }
		return p
	})
	clients := make([]*peer, n)
	for i := range clients {
		p := w.peer(fmt.Sprint("client ", i))
		clients[i] = p
		got := 0
		p.open = func() {
			p.s.WriteShared(at(i*7, make([]byte, size)))
		}
		p.data = func(b []byte) (int, int) {
			if !is(i*7+got, b) {
				t.Errorf("client %d received something else at %d", i, got)
			}
			if got += len(b); got == size {
				finished++
			}
			return len(b), 0
		}
	}
	w.on(w.Client, func() {
		for _, p := range clients {
			p.s = w.Network.Dial(w.Client, ln.Addr(), p)
		}
	})
	w.must("all echoes", func() bool { return finished == n && opened == n })
	w.on(w.Client, func() {
		for _, p := range clients {
			p.s.Close()
		}
	})
	w.must("all ends", func() bool { return closed == n })
}

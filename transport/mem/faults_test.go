package mem

import (
	"bytes"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/transport"
)

// end is a handler that keeps what it gets.
type end struct {
	s      transport.Stream
	opened bool
	got    []byte
	calls  int
	closed bool
	err    error
	at     time.Duration
	data   func(b []byte)
	v      *loop.Virtual
}

func (e *end) Opened(s transport.Stream) { e.s, e.opened = s, true }
func (e *end) Data(_ transport.Stream, b []byte) (int, int) {
	e.calls++
	e.got = append(e.got, b...)
	if e.data != nil {
		e.data(b)
	}
	return len(b), 0
}
func (e *end) Closed(_ transport.Stream, err error) { e.closed, e.err, e.at = true, err, e.v.Now() }

// pair is a connection from host a to host b.
type pair struct {
	t      *testing.T
	v      *loop.Virtual
	n      *Network
	la, lb *loop.VirtualLoop
	a, b   *end
	ln     transport.Listener
}

func newPair(t *testing.T, seed uint64) *pair {
	v := loop.NewVirtual(seed)
	p := &pair{t: t, v: v, n: NewNetwork(v), la: v.NewLoop("a"), lb: v.NewLoop("b"), a: &end{v: v}, b: &end{v: v}}
	p.listen()
	p.dial(p.a)
	p.wait(func() bool { return p.a.opened && p.b.opened })
	return p
}

func (p *pair) listen() {
	var err error
	p.ln, err = p.n.Host("b").Listen(p.lb, "tcp://b:9", func(transport.Stream) transport.Handler { return p.b })
	if err != nil {
		p.t.Fatal(err)
	}
}

func (p *pair) dial(e *end) {
	p.la.Post(func() { e.s = p.n.Host("a").Dial(p.la, "tcp://b:9", e) })
}

func (p *pair) wait(until func() bool) {
	p.t.Helper()
	if !p.v.Run(until, time.Hour) {
		p.t.Fatal("waited in vain")
	}
}

func (p *pair) say(l *loop.VirtualLoop, e *end, text string) {
	l.Post(func() { e.s.Write([]byte(text)) })
}

// TestCutOneWay: one direction stalls, the other goes on; nothing is lost, and nobody is told.
func TestCutOneWay(t *testing.T) {
	for seed := range uint64(50) {
		p := newPair(t, seed)
		p.n.Cut("a", "b")
		p.say(p.la, p.a, "one")
		p.say(p.lb, p.b, "two")
		p.v.RunFor(10 * time.Minute)
		if len(p.b.got) > 0 || string(p.a.got) != "two" || p.a.closed || p.b.closed {
			t.Fatalf("%q %q %v %v", p.b.got, p.a.got, p.a.closed, p.b.closed)
		}
		p.say(p.la, p.a, " and three")
		p.v.RunFor(time.Second)
		p.n.Heal("a", "b")
		p.wait(func() bool { return string(p.b.got) == "one and three" })
	}
}

// TestCutInFlight: a cut also stops what is already on its way.
func TestCutInFlight(t *testing.T) {
	p := newPair(t, 1)
	p.n.SetLink("a", "b", LinkConfig{Delay: time.Second})
	p.say(p.la, p.a, "one")
	p.v.RunFor(time.Second / 2)
	p.n.Partition("a", "b")
	p.v.RunFor(time.Minute)
	if len(p.b.got) > 0 {
		t.Fatalf("%q", p.b.got)
	}
	p.n.Join("a", "b")
	p.wait(func() bool { return string(p.b.got) == "one" })
}

// TestResetAfter: a sender whose bytes, or their acknowledgements, do not get through gives up in time; the other side does not know.
func TestResetAfter(t *testing.T) {
	for _, cut := range [][2]string{{"a", "b"}, {"b", "a"}} {
		p := newPair(t, 1)
		p.n.ResetAfter = 10 * time.Second
		p.n.Cut(cut[0], cut[1])
		at := p.v.Now()
		p.say(p.la, p.a, "one")
		p.v.RunFor(time.Minute)
		if took := p.a.at - at; !errors.Is(p.a.err, ErrTimedOut) || took < 10*time.Second || took > 11*time.Second {
			t.Errorf("cut %v: %v after %v", cut, p.a.err, took)
		}
		if p.b.closed {
			t.Errorf("cut %v: b was told", cut)
		}
	}
	p := newPair(t, 1) // healed in time
	p.n.ResetAfter = 10 * time.Second
	p.n.Cut("b", "a")
	p.say(p.la, p.a, "one")
	p.v.RunFor(9 * time.Second)
	p.n.Heal("b", "a")
	p.v.RunFor(time.Minute)
	if p.a.closed || string(p.b.got) != "one" {
		t.Error(p.a.err, p.b.got)
	}
}

// TestCrash: the end of a process is told to the other side, behind what it had sent.
func TestCrash(t *testing.T) {
	p := newPair(t, 1)
	p.say(p.lb, p.b, "last words")
	p.v.RunFor(0)
	p.n.Host("b").Crash()
	p.lb.Kill()
	p.wait(func() bool { return p.a.closed })
	if p.a.err != nil || string(p.a.got) != "last words" || p.b.closed {
		t.Fatal(p.a.err, p.a.got, p.b.closed)
	}
	c := &end{v: p.v}
	p.dial(c)
	p.wait(func() bool { return c.closed })
	if !errors.Is(c.err, ErrRefused) {
		t.Fatal(c.err)
	}
	p.lb = p.v.NewLoop("b")
	p.b = &end{v: p.v}
	p.listen()
	c = &end{v: p.v}
	p.dial(c)
	p.wait(func() bool { return c.opened && p.b.opened })
}

// TestPowerOff: nobody is told; a dial hangs; after the power is back a new dial works and old connections are reset, either
// at once, if something was waiting for an acknowledgement, or with the next bytes.
func TestPowerOff(t *testing.T) {
	for _, waiting := range []bool{true, false} {
		p := newPair(t, 1)
		p.n.Host("b").PowerOff()
		p.lb.Kill()
		c := &end{v: p.v}
		p.dial(c)
		if waiting {
			p.say(p.la, p.a, "anybody there?")
		}
		p.v.RunFor(10 * time.Second)
		if p.a.closed || c.opened || c.closed {
			t.Fatal(p.a.closed, c.opened, c.closed)
		}
		p.n.Host("b").PowerOn()
		p.lb = p.v.NewLoop("b")
		p.b = &end{v: p.v}
		p.listen()
		p.wait(func() bool { return c.opened && p.b.opened })
		if !waiting {
			if p.a.closed {
				t.Fatal("told out of nowhere")
			}
			p.say(p.la, p.a, "anybody there?")
		}
		p.wait(func() bool { return p.a.closed })
		if !errors.Is(p.a.err, ErrReset) || len(p.b.got) > 0 {
			t.Fatal(p.a.err, p.b.got)
		}
		if n := p.n.Connections("a", "b"); n != 1 {
			t.Errorf("%d connections", n)
		}
	}
}

func TestResetAndRefuse(t *testing.T) {
	p := newPair(t, 1)
	p.n.Reset("b", "a")
	p.wait(func() bool { return p.a.closed && p.b.closed })
	if !errors.Is(p.a.err, ErrReset) || !errors.Is(p.b.err, ErrReset) || len(p.n.conns) != 0 {
		t.Fatal(p.a.err, p.b.err, len(p.n.conns))
	}
	p.n.Refuse("a", "b", true)
	c := &end{v: p.v}
	p.dial(c)
	p.wait(func() bool { return c.closed })
	if !errors.Is(c.err, ErrRefused) {
		t.Fatal(c.err)
	}
	p.n.HealAll()
	c = &end{v: p.v}
	p.dial(c)
	p.wait(func() bool { return c.opened })
}

// TestDialIntoCut: a dial waits for the link, as TCP would; one that is closed meanwhile leaves nothing behind.
func TestDialIntoCut(t *testing.T) {
	p := newPair(t, 1)
	p.n.Partition("a", "b")
	c, d := &end{v: p.v}, &end{v: p.v}
	p.dial(c)
	p.dial(d)
	p.v.RunFor(time.Minute)
	if c.opened || c.closed {
		t.Fatal("answered through a cut")
	}
	p.la.Post(func() { d.s.Close() })
	p.v.RunFor(time.Second)
	if !d.closed || !errors.Is(d.err, torus.ErrClosed) {
		t.Fatal(d.err)
	}
	p.n.Join("a", "b")
	p.wait(func() bool { return c.opened })
	p.v.RunFor(time.Second)
	if len(p.n.conns) != 2 {
		t.Errorf("%d connections", len(p.n.conns))
	}
}

// TestReordering: two connections between the same hosts do not keep each other's order; one keeps its own.
func TestReordering(t *testing.T) {
	first := map[string]int{}
	for seed := range uint64(100) {
		v := loop.NewVirtual(seed)
		n := NewNetwork(v)
		la, lb := v.NewLoop("a"), v.NewLoop("b")
		order := ""
		n.Host("b").Listen(lb, "tcp://b:9", func(transport.Stream) transport.Handler {
			return &end{v: v, data: func(b []byte) { order += string(b) }}
		})
		x, y := &end{v: v}, &end{v: v}
		la.Post(func() {
			n.Host("a").Dial(la, "tcp://b:9", x)
			n.Host("a").Dial(la, "tcp://b:9", y)
		})
		v.Run(func() bool { return x.opened && y.opened }, time.Second)
		la.Post(func() { x.s.Write([]byte("1")); y.s.Write([]byte("a")) })
		la.Post(func() { x.s.Write([]byte("2")); y.s.Write([]byte("b")) })
		v.RunFor(time.Second)
		if len(order) != 4 || bytes.IndexByte([]byte(order), '1') > bytes.IndexByte([]byte(order), '2') {
			t.Fatalf("%q", order)
		}
		first[order[:1]]++
	}
	if first["1"] == 0 || first["a"] == 0 {
		t.Error(first)
	}
}

// TestEverySplit: a small message arrives cut at every place at which it can be.
func TestEverySplit(t *testing.T) {
	splits := map[int]bool{}
	for seed := range uint64(400) {
		p := newPair(t, seed)
		first := true
		p.b.data = func(b []byte) {
			if first {
				splits[len(b)] = true
				first = false
			}
		}
		p.say(p.la, p.a, "0123456789")
		p.wait(func() bool { return len(p.b.got) == 10 })
	}
	if len(splits) != 10 {
		t.Errorf("only %v", splits)
	}
}

// TestReproducible: the same seed gives the same history.
func TestReproducible(t *testing.T) {
	run := func() string {
		p := newPair(t, 7)
		history := ""
		p.v.SetTrace(func(e loop.Event) { history += fmt.Sprintln(e.At, e.Loop, e.Kind) })
		p.n.Default.Loss = 0.1
		for i := range 50 {
			p.say(p.la, p.a, fmt.Sprint("message", i))
			p.say(p.lb, p.b, fmt.Sprint("answer", i))
			p.v.RunFor(time.Duration(i) * time.Microsecond)
		}
		p.n.Reset("a", "b")
		p.v.RunFor(time.Minute)
		return history
	}
	if a, b := run(), run(); a != b || len(a) < 1000 {
		t.Error("two histories")
	}
}

// TestWindow: a receiver that does not read holds its sender back; what was queued stays counted.
func TestWindow(t *testing.T) {
	p := newPair(t, 1)
	p.lb.Post(func() { p.b.s.Pause() })
	p.v.RunFor(time.Millisecond)
	big := bytes.Repeat([]byte{7}, 1<<20)
	p.la.Post(func() {
		p.a.s.WriteShared(big[:1<<19])
		b := buf.Get(1 << 19)
		copy(b.Bytes(), big)
		p.a.s.WriteBuf(b, 1<<19)
	})
	p.v.RunFor(time.Minute)
	if q := p.a.s.Queued(); q != 1<<20-p.n.Window || len(p.b.got) > 0 {
		t.Fatal(q, len(p.b.got))
	}
	p.lb.Post(func() { p.b.s.Resume() })
	p.wait(func() bool { return bytes.Equal(p.b.got, big) && p.a.s.Queued() == 0 })
}

package mem

import (
	"time"

	"github.com/coreos/torus/loop"
)

// connection is two streams and the way between them.
type connection struct {
	n      *Network
	a, b   *Stream // a dialled
	ab, ba *pipe
	at     string // the listener's name at b's host
	lends  bool   // its ends lend to each other
	places uint64 // of what was lent
}

func newConnection(n *Network, from, to *Host) *connection {
	c := &connection{n: n}
	c.ab = &pipe{n: n, from: from, to: to}
	c.ba = &pipe{n: n, from: to, to: from, reverse: c.ab}
	c.ab.reverse = c.ba
	c.a = &Stream{host: from, c: c, out: c.ab}
	c.b = &Stream{host: to, c: c, out: c.ba}
	c.lends = n.rand.Float64() < n.Lending
	c.ab.src, c.ab.dst = c.a, c.b
	c.ba.src, c.ba.dst = c.b, c.a
	n.conns = append(n.conns, c)
	return c
}

func (c *connection) pipes() [2]*pipe { return [2]*pipe{c.ab, c.ba} }

type kind uint8

const (
	syn    kind = iota // a dial
	synAck             // it was accepted
	refuse             // it was not
	data
	fin   // an orderly end
	reset // an abrupt one
)

type packet struct {
	kind kind
	data []byte
	at   time.Duration // of its arrival
}

const (
	retransmit = 200 * time.Millisecond // TCP's first timeout on a fast network
	synRetry   = time.Second
)

// pipe is one direction of a connection: packets in the order in which they were sent and will arrive.
type pipe struct {
	n        *Network
	from, to *Host
	src, dst *Stream
	reverse  *pipe
	queue    []packet
	timer    *loop.Timer   // arrival of the first
	last     time.Duration // arrival of the last one pushed
	busy     time.Duration // until when the bandwidth is taken
	stalled  bool          // the first one has run into a cut
	inflight int           // bytes sent and not acknowledged
	unacked  int           // of these, bytes that have arrived but whose acknowledgement ran into a cut
	void     bool          // bytes went to a host without power
	giveUp   *loop.Timer
}

// push sends a packet.
func (p *pipe) push(k packet) {
	cfg := p.n.config(p.from, p.to)
	now := p.n.v.Now()
	at := now + cfg.Delay
	if cfg.Jitter > 0 {
		at += time.Duration(p.n.rand.Int64N(int64(cfg.Jitter) + 1))
	}
	if cfg.Bandwidth > 0 {
		p.busy = max(p.busy, now) + time.Duration(int64(len(k.data))*int64(time.Second)/cfg.Bandwidth)
		at += p.busy - now
	}
	for wait := retransmit; cfg.Loss > 0 && p.n.rand.Float64() < cfg.Loss && wait < time.Minute; wait *= 2 {
		at += wait
	}
	p.last = max(p.last, at)
	k.at = p.last
	p.inflight += len(k.data)
	p.queue = append(p.queue, k)
	if len(p.queue) == 1 && !p.stalled {
		p.arm()
	}
}

// arm waits for the arrival of the first packet.
func (p *pipe) arm() {
	p.timer = p.n.v.At(p.queue[0].at-p.n.v.Now(), p.arrive)
}

// arrive hands over what has come, unless the way is cut by now.
func (p *pipe) arrive() {
	if p.n.isCut(p.from, p.to) {
		if p.queue[0].kind == reset || p.queue[0].kind == refuse {
			p.queue = nil // said once, and nothing follows
			return
		}
		p.stalled = true
		p.wait()
		return
	}
	for len(p.queue) > 0 && p.queue[0].at <= p.n.v.Now() {
		k := p.queue[0]
		if k.kind == syn && p.to.off {
			p.queue[0].at += synRetry
			p.last = max(p.last, p.queue[0].at)
			break
		}
		p.queue = p.queue[1:]
		p.deliver(k)
	}
	if len(p.queue) > 0 {
		p.arm()
	}
}

func (p *pipe) deliver(k packet) {
	if p.to.off {
		p.void = p.void || k.kind == data || k.kind == fin
		if k.kind == data {
			p.wait()
		}
		return
	}
	switch {
	case k.kind == syn:
		p.dst.c.accept()
	case p.dst.phase == gone:
		if k.kind == data {
			p.reverse.push(packet{kind: reset})
		}
	default:
		p.dst.receive(k)
	}
}

// wait starts the clock after which the sender gives up.
func (p *pipe) wait() {
	if p.giveUp == nil && p.n.ResetAfter > 0 {
		p.giveUp = p.n.v.At(p.n.ResetAfter, func() { p.src.lost(ErrTimedOut) })
	}
}

func (p *pipe) stop() {
	p.timer.Stop()
	p.giveUp.Stop()
	p.queue = nil
}

// healed lets the packets that ran into a cut arrive, as soon as they have been sent again.
func (p *pipe) healed() {
	if p.giveUp != nil {
		p.giveUp.Stop()
		p.giveUp = nil
	}
	if !p.stalled || p.n.isCut(p.from, p.to) {
		return
	}
	p.stalled = false
	at := p.n.v.Now() + time.Duration(p.n.rand.Int64N(int64(retransmit)))
	for i := range p.queue {
		p.queue[i].at = max(p.queue[i].at, at)
	}
	p.last = max(p.last, at)
	if len(p.queue) > 0 {
		p.arm()
	}
}

// acknowledge tells the sender that n bytes have been taken, if the way back is open.
func (p *pipe) acknowledge(n int) {
	p.unacked += n
	if p.n.isCut(p.to, p.from) {
		p.wait()
		return
	}
	p.release()
}

// release makes room for more at the sender.
func (p *pipe) release() {
	if p.unacked == 0 || p.n.isCut(p.to, p.from) {
		return
	}
	p.inflight -= p.unacked
	p.unacked = 0
	if p.giveUp != nil && !p.stalled {
		p.giveUp.Stop()
		p.giveUp = nil
	}
	// Not for every byte, or streams would end up in crumbs.
	s := p.src
	if len(s.queue) > 0 && !s.flushing && s.phase != gone && p.n.Window-p.inflight >= min(s.queued, p.n.Window/4) {
		s.flushing = true
		s.l.Post(s.flush)
	}
}

// accept is the arrival of a dial.
func (c *connection) accept() {
	if c.a.phase == gone {
		c.b.bury()
		return
	}
	host := c.b.host
	ln := host.listeners[c.at]
	if k := c.n.links[direction{c.a.host.name, host.name}]; ln == nil || ln.closed || k != nil && k.refused {
		c.b.phase = gone
		c.ba.push(packet{kind: refuse})
		return
	}
	b := c.b
	b.l, b.phase = ln.l, established
	b.remote = "tcp://" + c.a.host.name
	c.ba.push(packet{kind: synAck})
	ln.l.Post(func() {
		if b.phase == gone {
			return
		}
		b.h = ln.accept(b)
		b.h.Opened(b)
	})
}

// Package mem is a network in memory on virtual time: a transport.Network for each host, between them
// delays, losses, partitions and crashes, all drawn from the seed of a loop.Virtual, so that a run can be repeated.
//
// Its streams keep the promises of TCP and no others. Bytes arrive in order, without gaps, cut into
// pieces at random; a link that is cut delivers nothing and loses nothing: what was under way arrives after it has
// been healed, unless the connection has been given up before; nobody is told that a link was cut, or that the
// power of a host has failed. Connections are independent of each other, so that what is sent on two of them may
// arrive in either order.
package mem

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/transport"
)

// Why a stream of this network closes, beside nil and torus.ErrClosed.
var (
	ErrReset    = errors.New("connection reset by peer")
	ErrRefused  = errors.New("connection refused")
	ErrTimedOut = errors.New("connection timed out")
)

// LinkConfig says how one direction between two hosts behaves.
type LinkConfig struct {
	Delay     time.Duration // of each piece
	Jitter    time.Duration // up to this much more
	Bandwidth int64         // bytes per second and connection; 0: unlimited
	Loss      float64       // share of the pieces that are lost and sent again, which takes 200 ms or more
}

// Network is a set of hosts. Like the loop.Virtual it runs on it belongs to one goroutine.
type Network struct {
	v     *loop.Virtual
	rand  *rand.Rand
	hosts map[string]*Host
	links map[direction]*link
	conns []*connection

	// Default is the configuration of links that SetLink was not called for; 50 to 100 µs at first.
	Default LinkConfig
	// Local is the same for connections of a host to itself; 10 to 20 µs.
	Local LinkConfig
	// ResetAfter is how long unacknowledged bytes may wait for a link before their sender gives the connection up;
	// 0, as at first: for ever.
	ResetAfter time.Duration
	// Window is how many bytes one side may have on their way to the other; 256 KiB at first.
	Window int
	// Cuts is the probability with which what was written in one turn is cut in two, and again each rest; 1/4 at first.
	Cuts float64
	// Lending is the probability with which the ends of a new connection can lend to each other, wherever they are; 1/2 at first.
	Lending float64
}

type direction struct{ from, to string }

type link struct {
	cfg     *LinkConfig // nil: Default or Local
	cut     bool
	refused bool
}

// NewNetwork returns a network without hosts. Chance comes from v.Rand.
func NewNetwork(v *loop.Virtual) *Network {
	return &Network{
		v:       v,
		rand:    v.Rand(),
		hosts:   map[string]*Host{},
		links:   map[direction]*link{},
		Default: LinkConfig{Delay: 50 * time.Microsecond, Jitter: 50 * time.Microsecond},
		Local:   LinkConfig{Delay: 10 * time.Microsecond, Jitter: 10 * time.Microsecond},
		Window:  256 << 10,
		Cuts:    0.25,
		Lending: 0.5,
	}
}

// Host returns the host of that name, which is made if need be.
func (n *Network) Host(name string) *Host {
	h := n.hosts[name]
	if h == nil {
		h = &Host{n: n, name: name, listeners: map[string]*listener{}, port: 40000}
		n.hosts[name] = h
	}
	return h
}

func (n *Network) link(from, to string) *link {
	d := direction{from, to}
	k := n.links[d]
	if k == nil {
		k = &link{}
		n.links[d] = k
	}
	return k
}

// SetLink configures what goes from one host to another.
func (n *Network) SetLink(from, to string, cfg LinkConfig) { n.link(from, to).cfg = &cfg }

// Cut stops everything that goes from one host to another, without anybody being told.
func (n *Network) Cut(from, to string) { n.link(from, to).cut = true }

// Heal ends a Cut. What was held back arrives now.
func (n *Network) Heal(from, to string) {
	n.link(from, to).cut = false
	for _, c := range n.conns {
		for _, p := range c.pipes() {
			if p.from.name == from && p.to.name == to {
				p.healed()
			} else if p.from.name == to && p.to.name == from {
				p.release()
			}
		}
	}
}

// Partition cuts both directions between two hosts.
func (n *Network) Partition(a, b string) {
	n.Cut(a, b)
	n.Cut(b, a)
}

// Join heals both directions between two hosts.
func (n *Network) Join(a, b string) {
	n.Heal(a, b)
	n.Heal(b, a)
}

// HealAll ends every Cut and every Refuse.
func (n *Network) HealAll() {
	for _, k := range n.links {
		k.cut, k.refused = false, false
	}
	for _, c := range n.conns {
		for _, p := range c.pipes() {
			p.healed()
			p.release()
		}
	}
}

// Refuse has dials from one host to another answered with ErrRefused, or ends that. Open connections stay.
func (n *Network) Refuse(from, to string, refuse bool) { n.link(from, to).refused = refuse }

// Reset breaks all connections between two hosts; both sides are told at once.
func (n *Network) Reset(a, b string) {
	for _, c := range append([]*connection(nil), n.conns...) {
		x, y := c.a.host.name, c.b.host.name
		if x == a && y == b || x == b && y == a {
			c.a.lost(ErrReset)
			c.b.lost(ErrReset)
		}
	}
}

// Connections counts the open ones between two hosts.
func (n *Network) Connections(a, b string) int {
	count := 0
	for _, c := range n.conns {
		x, y := c.a.host.name, c.b.host.name
		if (x == a && y == b || x == b && y == a) && c.a.open() && c.b.open() {
			count++
		}
	}
	return count
}

func (n *Network) config(from, to *Host) *LinkConfig {
	if k := n.links[direction{from.name, to.name}]; k != nil && k.cfg != nil {
		return k.cfg
	}
	if from == to {
		return &n.Local
	}
	return &n.Default
}

func (n *Network) isCut(from, to *Host) bool {
	k := n.links[direction{from.name, to.name}]
	return k != nil && k.cut
}

// forget drops connections whose both ends are gone.
func (n *Network) forget(c *connection) {
	if c.a.open() || c.b.open() {
		return
	}
	for i, x := range n.conns {
		if x == c {
			c.ab.stop()
			c.ba.stop()
			n.conns = append(n.conns[:i], n.conns[i+1:]...)
			return
		}
	}
}

// Host is one machine: a transport.Network whose addresses are "tcp://HOST:PORT", with the names of hosts, and
// "unix:PATH" within the host. "localhost", "127.0.0.1", "0.0.0.0" and "" stand for the host itself.
type Host struct {
	n         *Network
	name      string
	listeners map[string]*listener
	port      int
	off       bool
}

var _ transport.Network = (*Host)(nil)

// Name is what Network.Host was given.
func (h *Host) Name() string { return h.name }

// Crash is the end of the process (or all processes) on the host: its listeners and streams vanish and the other sides
// are told. Handlers of the host are not called any more; killing the loops they ran on is the caller's.
func (h *Host) Crash() { h.vanish(true) }

// PowerOff is the same, except that nobody is told. Until PowerOn nothing is answered, either.
func (h *Host) PowerOff() {
	h.off = true
	h.vanish(false)
}

// PowerOn lets the host be reached again. Whoever still believes in an old connection learns of its end
// from the first bytes that arrive.
func (h *Host) PowerOn() {
	h.off = false
	for _, c := range append([]*connection(nil), h.n.conns...) {
		for _, p := range c.pipes() {
			if p.to == h && p.void {
				p.reverse.push(packet{kind: reset})
			}
		}
	}
}

func (h *Host) vanish(tell bool) {
	for _, ln := range h.listeners {
		ln.closed = true
	}
	clear(h.listeners)
	for _, c := range append([]*connection(nil), h.n.conns...) {
		for _, e := range []*Stream{c.a, c.b} {
			if e.host == h && e.open() {
				e.vanish(tell)
			}
		}
	}
}

// resolve splits an address into its host and what is listened on there.
func (h *Host) resolve(addr string) (*Host, string, error) {
	if strings.HasPrefix(addr, "unix:") {
		return h, addr, nil
	}
	rest, ok := strings.CutPrefix(addr, "tcp://")
	i := strings.LastIndexByte(rest, ':')
	if !ok || i < 0 {
		return nil, "", fmt.Errorf("address %q is neither tcp://HOST:PORT nor unix:PATH: %w", addr, torus.ErrInvalid)
	}
	name, port := rest[:i], rest[i+1:]
	if p, err := strconv.Atoi(port); err != nil || p < 0 || p > 65535 {
		return nil, "", fmt.Errorf("address %q: port %q: %w", addr, port, torus.ErrInvalid)
	}
	to := h
	switch name {
	case "", "localhost", "127.0.0.1", "0.0.0.0", "[::]", "[::1]", h.name:
	default:
		if to = h.n.hosts[name]; to == nil {
			return nil, "", fmt.Errorf("no host %q: %w", name, torus.ErrNotExist)
		}
	}
	return to, port, nil
}

// Dial implements transport.Network.
func (h *Host) Dial(l loop.Loop, addr string, handler transport.Handler) transport.Stream {
	to, at, err := h.resolve(addr)
	if err != nil {
		s := &Stream{host: h, l: l, h: handler, remote: addr}
		l.Post(func() { s.end(err) })
		return s
	}
	c := newConnection(h.n, h, to)
	c.a.l, c.a.h, c.a.remote = l, handler, addr
	c.at = at
	c.ab.push(packet{kind: syn})
	return c.a
}

// Listen implements transport.Network.
func (h *Host) Listen(l loop.Loop, addr string, accept func(transport.Stream) transport.Handler) (transport.Listener, error) {
	to, at, err := h.resolve(addr)
	if err != nil {
		return nil, err
	}
	if to != h {
		return nil, fmt.Errorf("listen on %s at host %s: cannot assign requested address", addr, h.name)
	}
	name := addr
	if !strings.HasPrefix(addr, "unix:") {
		for at == "0" || at == "" {
			h.port++
			if p := strconv.Itoa(h.port); h.listeners[p] == nil {
				at = p
			}
		}
		name = "tcp://" + h.name + ":" + at
	}
	if h.listeners[at] != nil {
		return nil, fmt.Errorf("listen on %s: address already in use", addr)
	}
	ln := &listener{h: h, at: at, addr: name, l: l, accept: accept}
	h.listeners[at] = ln
	return ln, nil
}

type listener struct {
	h      *Host
	at     string
	addr   string
	l      loop.Loop
	accept func(transport.Stream) transport.Handler
	closed bool
}

func (ln *listener) Addr() string { return ln.addr }

func (ln *listener) Close() error {
	if !ln.closed {
		ln.closed = true
		delete(ln.h.listeners, ln.at)
	}
	return nil
}

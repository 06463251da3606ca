// Package distributor is the cluster as a client sees it: one connection per peer, who is healthy, which
// peers hold a block, and reads that fall through from one replica to the next.
package distributor

import (
	"fmt"
	"log/slog"
	"slices"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/models"
	"github.com/prometheus/client_golang/prometheus"
)

// Conn is a connection to one peer that reconnects by itself. transport/tdp has the real one, which is a Replacer, too.
type Conn interface {
	torus.BlockStore
	Close()
}

// Nearby is a Conn that knows, once it is up, whether reads go to a file of this machine rather than to a peer's process. They are cheaper, and load
// nobody else.
type Nearby interface {
	Near() bool
}

// Config is what a Distributor is made of.
type Config struct {
	Loop loop.Loop
	// Dial starts connecting to a peer. up and down are called on the loop as the connection comes and
	// goes, alternating, up first; requests submitted while it is down fail at once.
	Dial func(id torus.PeerID, addr string, up func(), down func(error)) Conn
	// LoadRing fetches the stored form of a ring version. It may block; it is called on a helper.
	LoadRing func(version uint64) (torus.Ring, error)
	Log      *slog.Logger          // nil: none
	Metrics  prometheus.Registerer // nil: none
}

// Distributor belongs to one loop; all methods are called on it.
type Distributor struct {
	cfg   Config
	log   *slog.Logger
	loop  loop.Loop
	peers map[torus.PeerID]*peer
	order []*peer // by id: anything that goes over all peers does so in this order
	heard bool    // of the directory
	ring  torus.Ring
	rings map[uint64]torus.Ring
	// members of the current ring
	members map[torus.PeerID]bool
	watch   []*watcher
	m       metrics
	reads   []*Read // free list
	hedges  []*hedge
	hedging hedging
}

type peer struct {
	id    torus.PeerID
	addr  string
	conn  Conn
	up    bool
	near  bool // its blocks can be read without asking it
	full  bool // it refused a new block for want of space, or says so itself
	unfit bool // it takes no new block at all, not even in the slots it keeps back
	alive bool // its lease in the MDS lives: it is worth waiting for
	said  complaint
	owes  int // reads that it has not answered in time; see hedge.go
}

// New returns a Distributor that knows no peers yet: see SetPeers and SetRing.
func New(cfg Config) *Distributor {
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	d := &Distributor{
		cfg: cfg, log: log, loop: cfg.Loop,
		peers: map[torus.PeerID]*peer{}, rings: map[uint64]torus.Ring{},
		m: newMetrics(cfg.Metrics),
	}
	d.initHedging()
	return d
}

// SetPeers tells the distributor who exists and where, as the MDS says. Peers that are not in the list any
// more are disconnected; a peer whose lease has expired keeps its connection for as long as that works.
func (d *Distributor) SetPeers(list []*models.Peer) {
	d.heard = true
	seen := make(map[torus.PeerID]bool, len(list))
	for _, m := range list {
		id, err := torus.ParsePeerID(m.Uuid)
		if err != nil {
			d.log.Warn("peer with a bad UUID in the directory", "uuid", m.Uuid)
			continue
		}
		seen[id] = true
		p := d.peers[id]
		if p == nil {
			p = &peer{id: id}
			d.peers[id] = p
			i := 0
			for i < len(d.order) && string(d.order[i].id[:]) < string(id[:]) {
				i++
			}
			d.order = append(d.order[:i], append([]*peer{p}, d.order[i:]...)...)
		}
		p.unfit = m.State == "failed"
		p.full = p.unfit || m.State == "full"
		p.alive = m.Alive
		if p.conn == nil || p.addr != m.Address {
			d.connect(p, m.Address)
		}
	}
	for i := 0; i < len(d.order); i++ {
		if p := d.order[i]; !seen[p.id] {
			d.disconnect(p)
			delete(d.peers, p.id)
			d.order = append(d.order[:i], d.order[i+1:]...)
			i--
		}
	}
	d.changed()
}

func (d *Distributor) connect(p *peer, addr string) {
	d.disconnect(p)
	p.addr = addr
	var conn Conn // events of an abandoned connection are not this peer's any more
	conn = d.cfg.Dial(p.id, addr, func() {
		if p.conn == conn {
			p.up = true
			n, ok := conn.(Nearby)
			p.near = ok && n.Near()
			d.log.Info("peer connected", "peer", p.id, "address", addr)
			d.changed()
		}
	}, func(err error) {
		if p.conn == conn && p.up {
			p.up = false
			d.log.Warn("peer lost", "peer", p.id, "address", addr, "err", err)
			d.changed()
		}
	})
	p.conn = conn
}

func (d *Distributor) disconnect(p *peer) {
	p.up = false
	if c := p.conn; c != nil {
		p.conn = nil
		c.Close()
	}
}

// Watch has fn called on every change of a peer's health or of the ring, until the returned function is called.
func (d *Distributor) Watch(fn func()) (stop func()) {
	w := &watcher{fn}
	d.watch = append(d.watch, w)
	return func() {
		w.fn = nil // if it is being called just now
		d.watch = slices.DeleteFunc(slices.Clone(d.watch), func(x *watcher) bool { return x == w })
	}
}

type watcher struct{ fn func() }

func (d *Distributor) changed() {
	for _, w := range d.watch {
		if w.fn != nil {
			w.fn()
		}
	}
}

// Healthy reports whether p is connected.
func (d *Distributor) Healthy(p torus.PeerID) bool {
	x := d.peers[p]
	return x != nil && x.up
}

// Alive reports whether p's lease in the MDS lives, connected or not.
func (d *Distributor) Alive(p torus.PeerID) bool {
	x := d.peers[p]
	return x != nil && x.alive
}

// Known reports whether p may come back: it is in the directory, or that has not been heard of yet.
func (d *Distributor) Known(p torus.PeerID) bool { return !d.heard || d.peers[p] != nil }

// Usable reports whether p may be given a new block: healthy and not full.
func (d *Distributor) Usable(p torus.PeerID) bool {
	x := d.peers[p]
	return x != nil && x.up && !x.full
}

// Spare reports whether p may be given a new block that is allowed to take a slot kept back (torus.Request.Reserve): healthy, and
// it has not refused one.
func (d *Distributor) Spare(p torus.PeerID) bool {
	x := d.peers[p]
	return x != nil && x.up && !x.unfit
}

// Lost remembers that p's connection refused a request: it is down, and the news of that is on its way.
func (d *Distributor) Lost(p torus.PeerID) {
	if x := d.peers[p]; x != nil && x.up {
		x.up = false
	}
}

// MarkFull remembers that p refused a block for want of space, until the directory says otherwise.
func (d *Distributor) MarkFull(p torus.PeerID) {
	if x := d.peers[p]; x != nil {
		x.full = true
	}
}

// MarkUnfit remembers that p takes no new block at all, until the directory has news of it: it refused one that was allowed to take
// a slot kept back, or its disk fails.
func (d *Distributor) MarkUnfit(p torus.PeerID) {
	if x := d.peers[p]; x != nil {
		x.full, x.unfit = true, true
	}
}

// Room counts the members of the ring that are healthy, and those of them that have room as well.
func (d *Distributor) Room() (healthy, usable int) {
	if d.ring == nil {
		return 0, 0
	}
	for _, p := range d.ring.Members() {
		if d.Healthy(p) {
			healthy++
		}
		if d.Usable(p) {
			usable++
		}
	}
	return healthy, usable
}

// Describe names a peer for a message: its UUID and address.
func (d *Distributor) Describe(p torus.PeerID) string {
	if x := d.peers[p]; x != nil {
		return fmt.Sprintf("%s (%s)", p, x.addr)
	}
	return fmt.Sprintf("%s (unknown address)", p)
}

// Submit sends r to peer p.
func (d *Distributor) Submit(p torus.PeerID, r *torus.Request) {
	x := d.peers[p]
	if x == nil || !x.up {
		r.Finish(torus.ErrNoPeer)
		return
	}
	x.conn.Submit(r)
}

// Close disconnects from everybody.
func (d *Distributor) Close() {
	for _, p := range d.order {
		d.disconnect(p)
	}
	d.watch = nil
}

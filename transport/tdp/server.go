package tdp

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/place"
	"github.com/coreos/torus/transport"
)

// ServerConfig is what Serve needs to know. Zero numbers mean the default given with each.
type ServerConfig struct {
	Hello Hello // how we introduce ourselves
	// Store takes the requests, on the server's loop. Those of one connection come in their order of arrival. If it is a place.Store clients on this machine
	// may read its blocks themselves.
	Store torus.BlockStore

	Log        *slog.Logger          // nil: discard
	Registerer prometheus.Registerer // nil: no metrics

	MaxConns       int           // 4096 connections
	MaxOutstanding int           // 1024 requests under way per connection; more wait unread
	MaxBytes       int           // 64 MiB of payload under way, or waiting to be sent, per connection
	KeepAlive      time.Duration // 200 ms: a sign of life is sent when a request takes longer than that
	IdleTimeout    time.Duration // 10 s: silence after which a client is given up; clients ping much oftener
	DrainTimeout   time.Duration // 2 s: for the requests under way at Close
}

func (cfg *ServerConfig) setDefaults() {
	for _, n := range []struct {
		at *int
		to int
	}{
		{&cfg.MaxConns, 4096},
		{&cfg.MaxOutstanding, 1024},
		{&cfg.MaxBytes, 64 << 20},
	} {
		if *n.at <= 0 {
			*n.at = n.to
		}
	}
	for _, d := range []struct {
		at *time.Duration
		to time.Duration
	}{
		{&cfg.KeepAlive, 200 * time.Millisecond},
		{&cfg.IdleTimeout, 10 * time.Second},
		{&cfg.DrainTimeout, 2 * time.Second},
	} {
		if *d.at <= 0 {
			*d.at = d.to
		}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	cfg.Hello.Role, cfg.Hello.MinVersion, cfg.Hello.MaxVersion = RolePeer, MinVersion, MaxVersion
}

// Server accepts connections and hands the requests it decodes to a BlockStore.
type Server struct {
	l      loop.Loop
	cfg    ServerConfig
	places place.Store // cfg.Store, or nil
	ln     transport.Listener
	m      metrics
	conns  []*conn
	free   *call // for reuse
	calls  int   // with the store
	ticker *loop.Timer

	closing bool
	closed  func() // what Close was given
	limit   *loop.Timer

	head [HeaderSize]byte // scratch
}

// Serve starts a server on l at addr: "tdp://host:port", port 0 for a free one, or any address that the network itself takes.
func Serve(l loop.Loop, n transport.Network, addr string, cfg ServerConfig) (*Server, error) {
	cfg.setDefaults()
	if err := cfg.Hello.check(); err != nil {
		return nil, err
	}
	m, err := newMetrics(cfg.Registerer)
	if err != nil {
		return nil, fmt.Errorf("metrics of the TDP server: %w", err)
	}
	s := &Server{l: l, cfg: cfg, m: m}
	s.places, _ = cfg.Store.(place.Store)
	s.ln, err = n.Listen(l, DialAddr(addr), s.accept)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", addr, err)
	}
	s.ticker = l.After(cfg.KeepAlive, s.tick)
	return s, nil
}

// Addr is the address to dial, as the network names it.
func (s *Server) Addr() string { return s.ln.Addr() }

// Conns is the number of open connections.
func (s *Server) Conns() int { return len(s.conns) }

var (
	errShutdown = fmt.Errorf("the peer is shutting down: %w", torus.ErrNoPeer)
	errCrowded  = fmt.Errorf("too many connections: %w", torus.ErrAgain)
)

// Close stops accepting and reading, lets the requests under way finish and their replies leave, and closes the
// connections. closed is called, once, when no connection is open and no request is with the store.
// What takes longer than DrainTimeout is cut off, except that the store is always waited for.
func (s *Server) Close(closed func()) {
	if s.closing {
		return
	}
	s.closing, s.closed = true, closed
	if err := s.ln.Close(); err != nil {
		s.cfg.Log.Warn("closing the listener", "err", err)
	}
	for _, c := range s.conns {
		c.drain()
	}
	s.limit = s.l.After(s.cfg.DrainTimeout, func() {
		for _, c := range s.conns {
			c.s.Close()
		}
	})
	s.l.Defer(s.maybeClosed)
}

func (s *Server) maybeClosed() {
	if !s.closing || len(s.conns) > 0 || s.calls > 0 || s.closed == nil {
		return
	}
	done := s.closed
	s.closed = nil
	s.limit.Stop()
	s.ticker.Stop()
	done()
}

func (s *Server) accept(st transport.Stream) transport.Handler {
	c := &conn{srv: s, s: st}
	c.filled = c.onFilled
	return c
}

// tick gives signs of life to clients whose requests take long, and gives up those that give none.
func (s *Server) tick() {
	s.ticker = s.l.After(s.cfg.KeepAlive, s.tick)
	for _, c := range s.conns {
		c.tick()
	}
}

// newCall returns a call from the free list.
func (s *Server) newCall(c *conn) *call {
	q := s.free
	if q == nil {
		q = &call{}
		q.done = q.finished
	} else {
		s.free = q.next
	}
	q.conn, q.next = c, nil
	return q
}

// freeCall puts q back, with its memory.
func (s *Server) freeCall(q *call) {
	if q.buf != nil {
		q.buf.Release()
		q.buf = nil
	}
	if q.lent {
		q.conn.lender.GiveBack()
		q.lent = false
	}
	q.req = torus.Request{}
	q.conn, q.next = nil, s.free
	s.free = q
}

// metrics of a server. All may be nil.
type metrics struct {
	conns    prometheus.Gauge
	refused  prometheus.Counter
	requests prometheus.Counter
	in, out  prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) (metrics, error) {
	m := metrics{
		conns: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "torus_server_tdp_connections", Help: "Open TDP connections."}),
		refused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "torus_server_tdp_refused_total", Help: "TDP connections closed because of what the other side sent."}),
		requests: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "torus_server_tdp_requests_total", Help: "TDP requests received."}),
		in: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "torus_server_tdp_received_bytes_total", Help: "Bytes of TDP requests, headers and what was lent included."}),
		out: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "torus_server_tdp_sent_bytes_total", Help: "Bytes of TDP replies, headers and what was lent included."}),
	}
	if reg == nil {
		return m, nil
	}
	var errs []error
	for _, c := range []prometheus.Collector{m.conns, m.refused, m.requests, m.in, m.out} {
		errs = append(errs, reg.Register(c))
	}
	return m, errors.Join(errs...)
}

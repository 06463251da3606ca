package nbd

import (
	"cmp"
	"fmt"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coreos/torus/device"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/transport"
)

// Config says what a Server serves, and bounds what its clients can make it do. Zero limits mean the defaults.
type Config struct {
	// Directory holds the exports. A device is opened when a client enters transmission and closed at the end of
	// that session. Its devices' loop is the server's.
	Directory device.Directory
	// Log may be nil.
	Log *slog.Logger
	// Registerer may be nil. Servers that share one share their metrics.
	Registerer prometheus.Registerer

	// MaxSessions is how many clients may be connected; more are turned away. Default 1024.
	MaxSessions int
	// MaxInFlight is how many requests of one session are under way at once; then its input waits. Default 256.
	MaxInFlight int
	// MaxSessionBytes is how many bytes of requests and of unsent replies one session may hold before its
	// input waits; one request more may exceed it. Default 64 MiB.
	MaxSessionBytes int
	// MaxServerBytes is the same for all sessions together. Default 1 GiB.
	MaxServerBytes int
	// HandshakeTimeout is how long a client may take to enter an export, the time its options wait for the
	// Directory not counted against it. Default 30 s.
	HandshakeTimeout time.Duration
	// ShutdownTimeout is how long Shutdown waits for clients to take their last replies. Default 5 s.
	ShutdownTimeout time.Duration
}

func (c *Config) setDefaults() {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	c.MaxSessions = cmp.Or(c.MaxSessions, 1024)
	c.MaxInFlight = cmp.Or(c.MaxInFlight, 256)
	c.MaxSessionBytes = cmp.Or(c.MaxSessionBytes, 64<<20)
	c.MaxServerBytes = cmp.Or(c.MaxServerBytes, 1<<30)
	c.HandshakeTimeout = cmp.Or(c.HandshakeTimeout, 30*time.Second)
	c.ShutdownTimeout = cmp.Or(c.ShutdownTimeout, 5*time.Second)
}

// Server serves the devices of a Directory. Its methods are called on its loop.
type Server struct {
	l        loop.Loop
	cfg      Config
	m        *metrics
	ln       transport.Listener
	sessions []*session
	free     []*call // for reuse
	held     int     // bytes held by all sessions, estimated, see full

	closed bool   // accepts no more
	drain  func() // Shutdown's; called when the last session has gone
}

// Serve listens on addr and serves whoever connects. Call it on l, or before l runs.
func Serve(l loop.Loop, n transport.Network, addr string, cfg Config) (*Server, error) {
	srv, err := newServer(l, cfg)
	if err != nil {
		return nil, err
	}
	srv.ln, err = n.Listen(l, addr, srv.accept)
	if err != nil {
		return nil, fmt.Errorf("nbd: listen on %s: %w", addr, err)
	}
	srv.cfg.Log.Info("nbd: listening", "addr", srv.ln.Addr())
	return srv, nil
}

func newServer(l loop.Loop, cfg Config) (*Server, error) {
	cfg.setDefaults()
	m, err := newMetrics(cfg.Registerer)
	if err != nil {
		return nil, fmt.Errorf("nbd: metrics: %w", err)
	}
	return &Server{l: l, cfg: cfg, m: m}, nil
}

// Addr is the address in the form that transport.Network.Dial takes.
func (srv *Server) Addr() string { return srv.ln.Addr() }

// Sessions is how many clients are connected, or have requests under way that outlive their connection.
func (srv *Server) Sessions() int { return len(srv.sessions) }

// Close stops accepting. Sessions live on.
func (srv *Server) Close() error {
	if srv.closed {
		return nil
	}
	srv.closed = true
	return srv.ln.Close()
}

// Shutdown stops accepting and ends all sessions: requests under way are finished and answered, new ones are
// refused with ESHUTDOWN, options with NBD_REP_ERR_SHUTDOWN. done is called, on the loop, when every device has been
// given back. Clients that do not go in time are cut off; requests a device does not finish are waited for.
func (srv *Server) Shutdown(done func()) {
	if srv.drain != nil {
		prev := srv.drain
		srv.drain = func() { prev(); done() }
		return
	}
	srv.drain = done
	if err := srv.Close(); err != nil {
		srv.cfg.Log.Warn("nbd: close listener", "err", err)
	}
	for _, s := range srv.copySessions() {
		s.settle() // now if nothing is under way, else behind the last reply; a handshake at its next option
	}
	if len(srv.sessions) == 0 {
		srv.l.Post(done)
		return
	}
	srv.l.After(srv.cfg.ShutdownTimeout, func() {
		for _, s := range srv.copySessions() {
			s.hangup()
		}
	})
}

// copySessions is what may be ranged over while sessions end.
func (srv *Server) copySessions() []*session { return append([]*session(nil), srv.sessions...) }

func (srv *Server) accept(st transport.Stream) transport.Handler {
	if srv.closed || len(srv.sessions) >= srv.cfg.MaxSessions {
		srv.cfg.Log.Warn("nbd: client turned away", "client", st.RemoteAddr(), "sessions", len(srv.sessions))
		return turnedAway{}
	}
	s := newSession(srv, st)
	s.index = len(srv.sessions)
	srv.sessions = append(srv.sessions, s)
	srv.m.sessions.Add(1)
	return s
}

// remove forgets a session that has ended.
func (srv *Server) remove(s *session) {
	last := srv.sessions[len(srv.sessions)-1]
	srv.sessions[s.index], last.index = last, s.index
	srv.sessions[len(srv.sessions)-1] = nil
	srv.sessions = srv.sessions[:len(srv.sessions)-1]
	srv.m.sessions.Add(-1)
	if srv.drain != nil && len(srv.sessions) == 0 {
		srv.l.Post(srv.drain)
	}
}

// full reports whether the sessions together hold as much as they may. The estimate only grows with what is
// admitted, so the exact sum is taken once per MaxServerBytes of traffic, not per request.
func (srv *Server) full() bool {
	if srv.held < srv.cfg.MaxServerBytes {
		return false
	}
	srv.held = 0
	for _, s := range srv.sessions {
		srv.held += s.holds()
	}
	return srv.held >= srv.cfg.MaxServerBytes
}

// pauseAll pauses all sessions that could take in more requests, because together they hold too much.
func (srv *Server) pauseAll() {
	for _, s := range srv.sessions {
		if s.phase == phaseTransmission && !s.paused && !s.busy {
			s.pause(true)
			s.planLook()
		}
	}
}

// keptExtents is how many extents of room a call keeps for its next use.
const keptExtents = 1024

// getCall returns a call for reuse; putCall takes it back.
func (srv *Server) getCall() *call {
	if n := len(srv.free); n > 0 {
		c := srv.free[n-1]
		srv.free = srv.free[:n-1]
		return c
	}
	return newCall()
}

func (srv *Server) putCall(c *call) {
	c.s = nil
	c.req.Data = nil
	if cap(c.req.Extents) > keptExtents {
		c.req.Extents = nil
	}
	if len(srv.free) < 4*srv.cfg.MaxInFlight {
		srv.free = append(srv.free, c)
	}
}

// turnedAway is the handler of a connection that gets no session.
type turnedAway struct{}

func (turnedAway) Opened(st transport.Stream)                          { st.Close() }
func (turnedAway) Data(_ transport.Stream, b []byte) (consumed, n int) { return len(b), 0 }
func (turnedAway) Closed(transport.Stream, error)                      {}

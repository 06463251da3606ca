package node

import (
	"log/slog"
	"strings"

	"github.com/coreos/torus/device"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/nbd"
	"github.com/coreos/torus/transport/sock"
)

// Export serves devices over NBD that need no cluster.
type Export struct {
	addr  string
	stops stack
}

// StartExport starts serving at [HOST]:PORT or unix:PATH, as the flag named says, what open returns; open is called on the loop it is given.
func StartExport(flag, listen string, open func(loop.Loop) device.Directory, log *slog.Logger) (*Export, error) {
	addr, err := listenAddress(flag, listen)
	if err != nil {
		return nil, err
	}
	l, err := newLoop(log)
	if err != nil {
		return nil, err
	}
	e := &Export{}
	e.stops.push(l.stop)
	srv, err := nbd.Serve(l.Epoll, sock.New(), addr, nbd.Config{Directory: open(l), Log: log})
	if err != nil {
		e.stops.run() //nolint:errcheck // the first error is the one that matters
		return nil, listenError(flag, listen, err)
	}
	l.start()
	e.addr = strings.TrimPrefix(srv.Addr(), "tcp://")
	e.stops.push(func() error { return disconnect(l, srv, log) })
	return e, nil
}

// Addr is where the devices are served: HOST:PORT or unix:PATH.
func (e *Export) Addr() string { return e.addr }

// Close answers what is under way and ends.
func (e *Export) Close() error { return e.stops.run() }

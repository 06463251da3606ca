package node

import (
	"context"
	"log/slog"
	"strings"
	"time"

	"github.com/coreos/torus/device"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/nbd"
	"github.com/coreos/torus/transport/sock"
)

// Export serves devices over NBD that need no cluster.
type Export struct {
	log   *slog.Logger
	loop  *eventLoop
	srv   *nbd.Server
	addr  string
	stops stack
}

// StartExport starts serving at [HOST]:PORT or unix:PATH, as the flag named says, what open returns; open is called on the loop it is given.
func StartExport(flag, listen string, open func(loop.Loop) device.Directory, log *slog.Logger) (_ *Export, err error) {
	addr, err := listenAddress(flag, listen)
	if err != nil {
		return nil, err
	}
	e := &Export{log: log}
	if e.loop, err = newLoop(log); err != nil {
		return nil, err
	}
	e.stops.push(e.loop.stop)
	if e.srv, err = nbd.Serve(e.loop.Epoll, sock.New(), addr, nbd.Config{Directory: open(e.loop), Log: log}); err != nil {
		e.stops.run() //nolint:errcheck // the first error is the one that matters
		return nil, listenError(flag, listen, err)
	}
	e.loop.start()
	e.addr = strings.TrimPrefix(e.srv.Addr(), "tcp://")
	e.stops.push(e.disconnect)
	return e, nil
}

// Addr is where the devices are served: HOST:PORT or unix:PATH.
func (e *Export) Addr() string { return e.addr }

// Close answers what is under way and ends.
func (e *Export) Close() error { return e.stops.run() }

func (e *Export) disconnect() error {
	ctx, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	e.loop.Post(func() { e.srv.Shutdown(cancel) })
	<-ctx.Done()
	if ctx.Err() == context.DeadlineExceeded {
		e.log.Error("clients' requests were not answered in time", "timeout", shutdownTimeout.Round(time.Second))
	}
	return nil
}

package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// HTTP serves what operators look at: /metrics, /debug/pprof, /healthz (the process lives) and /readyz (it
// serves what it was started for).
type HTTP struct {
	ln  net.Listener
	srv *http.Server
	err chan error
}

// NewRegistry returns a metrics registry with the process's own metrics in it.
func NewRegistry() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// ServeHTTP serves on addr until Close. ready returns why not, or nil; it may be called from any goroutine.
func ServeHTTP(addr string, metrics prometheus.Gatherer, ready func() error, log *slog.Logger) (*HTTP, error) {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, listenError("--http", addr, err)
	}
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{}))
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	h := &HTTP{ln: ln, srv: &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}, err: make(chan error, 1)}
	go func() { h.err <- h.srv.Serve(ln) }()
	log.Info("http: listening", "address", h.Addr())
	return h, nil
}

// Addr is the address listened on, HOST:PORT.
func (h *HTTP) Addr() string { return h.ln.Addr().String() }

// Close stops serving, and waits a second for the requests under way.
func (h *HTTP) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := h.srv.Shutdown(ctx); err != nil {
		h.srv.Close()
	}
	if err := <-h.err; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// readiness is what /readyz answers: nil once the process serves.
type readiness struct{ err atomic.Pointer[error] }

func newReadiness(waitingFor string) *readiness {
	r := &readiness{}
	r.set(errors.New(waitingFor))
	return r
}

func (r *readiness) set(err error) { r.err.Store(&err) }

func (r *readiness) check() error { return *r.err.Load() }

package node

import (
	"errors"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"syscall"
	"testing"
)

func TestHTTP(t *testing.T) {
	ready := newReadiness("waiting for etcd")
	h, err := ServeHTTP("127.0.0.1:0", NewRegistry(), ready.check, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	get := func(path string, status int, want string) {
		t.Helper()
		r, err := http.Get("http://" + h.Addr() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		if err != nil || r.StatusCode != status || !strings.Contains(string(b), want) {
			t.Errorf("%s: %d, %v, %.200s", path, r.StatusCode, err, b)
		}
	}
	get("/healthz", 200, "ok")
	get("/readyz", 503, "waiting for etcd")
	ready.set(nil)
	get("/readyz", 200, "ok")
	get("/metrics", 200, "go_goroutines")
	get("/debug/pprof/", 200, "heap")
	get("/debug/pprof/goroutine?debug=1", 200, "goroutine profile")

	if _, err := ServeHTTP(h.Addr(), NewRegistry(), ready.check, slog.New(slog.DiscardHandler)); !errors.Is(err, syscall.EADDRINUSE) ||
		!strings.Contains(err.Error(), "--http") {
		t.Errorf("address in use: %v", err)
	}
	http.DefaultClient.CloseIdleConnections()
	if err := h.Close(); err != nil {
		t.Error(err)
	}
}

// Package embed runs an etcd server, a cluster of one member, in this process: for those who do not want to run etcd
// beside Torus (`torusd --embed-etcd`, `torusd dev`) and for tests. What it stores is as durable as with any etcd:
// every write is fsynced. One member means that it is away whenever this process is.
package embed

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap/zapcore"

	"github.com/coreos/torus"
	"github.com/coreos/torus/metadata/internal/zaplog"
)

// DefaultReadyTimeout is how long Start waits for the server to serve.
const DefaultReadyTimeout = 30 * time.Second

// DefaultQuota bounds the database, in bytes. Torus keeps some hundred bytes a volume and 32 KiB a ring in it, and its history of
// the last minutes.
const DefaultQuota = 512 << 20

// Config is what Start needs.
type Config struct {
	// DataDir is the server's own directory, made if it is not there.
	DataDir string
	// ClientURL is where it serves: http://HOST:PORT, https://HOST:PORT or unix:///PATH; HOST:PORT is short for the
	// first. Port 0 takes a free one (Server.Endpoint).
	ClientURL string
	// CertFile and KeyFile are the server's certificate, for https. With CAFile clients must show one of that CA.
	CertFile, KeyFile, CAFile string

	ReadyTimeout time.Duration // DefaultReadyTimeout
	Quota        int64         // DefaultQuota
	Log          *slog.Logger  // errors only; nil discards
}

// Server is a running etcd.
type Server struct {
	etcd     *embed.Etcd
	endpoint string
	unlock   func()
	close    sync.Once
}

// Start starts the server and returns when it serves.
func Start(ctx context.Context, cfg Config) (*Server, error) {
	addr, err := parseURL(cfg.ClientURL)
	if err != nil {
		return nil, err
	}
	if cfg.ReadyTimeout <= 0 {
		cfg.ReadyTimeout = DefaultReadyTimeout
	}
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return nil, fmt.Errorf("embedded etcd: data directory: %w", err)
	}
	unlock, err := lock(cfg.DataDir)
	if err != nil {
		return nil, err
	}
	e, err := embed.StartEtcd(settings(cfg, addr))
	if err != nil {
		unlock()
		return nil, explain(err, cfg, addr)
	}
	s := &Server{etcd: e, endpoint: endpoint(e, addr), unlock: unlock}
	ready := time.NewTimer(cfg.ReadyTimeout)
	defer ready.Stop()
	select {
	case <-e.Server.ReadyNotify():
		return s, nil
	case err = <-e.Err():
		err = explain(err, cfg, addr)
	case <-e.Server.StopNotify():
		err = fmt.Errorf("embedded etcd in %s: stopped while starting: %w", cfg.DataDir, torus.ErrMetadataUnavailable)
	case <-ready.C:
		err = fmt.Errorf("embedded etcd in %s: not ready within %v: %w (is the disk very slow?)", cfg.DataDir, cfg.ReadyTimeout, torus.ErrMetadataUnavailable)
	case <-ctx.Done():
		err = fmt.Errorf("embedded etcd in %s: %w", cfg.DataDir, ctx.Err())
	}
	s.Close()
	return nil, err
}

// Endpoint is the address for clients, with the port that was taken.
func (s *Server) Endpoint() string { return s.endpoint }

// Err delivers an error if the server fails while it runs.
func (s *Server) Err() <-chan error { return s.etcd.Err() }

// Close stops the server and waits until its files are closed.
func (s *Server) Close() error {
	s.close.Do(func() {
		s.etcd.Close()
		s.unlock()
	})
	return nil
}

// lock takes the data directory, or says who may have it: etcd itself would wait for ever.
func lock(dir string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(dir, "torus.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("embedded etcd: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			err = fmt.Errorf("%w: another process uses it", torus.ErrLocked)
		}
		return nil, &torus.Error{Op: "embedded etcd", Obj: "in " + dir, Err: err, Hint: "Is another torusd running with this data directory?"}
	}
	return func() { f.Close() }, nil
}

func parseURL(text string) (*url.URL, error) {
	if !strings.Contains(text, "://") {
		text = "http://" + text
	}
	u, err := url.Parse(text)
	if err == nil {
		switch u.Scheme {
		case "http", "https":
			if _, _, err = net.SplitHostPort(u.Host); err == nil && u.Path == "" {
				return u, nil
			}
		case "unix":
			if u.Host+u.Path != "" {
				return u, nil
			}
		}
	}
	return nil, fmt.Errorf("embedded etcd: address %q: %w (HOST:PORT, http[s]://HOST:PORT or unix:///PATH)", text, torus.ErrInvalid)
}

// settings are for one member that holds little and should start at once.
func settings(cfg Config, addr *url.URL) *embed.Config {
	c := embed.NewConfig()
	c.Name = "torus"
	c.Dir = cfg.DataDir
	c.ListenClientUrls = []url.URL{*addr}
	c.AdvertiseClientUrls = []url.URL{*addr}
	// No other members, so nobody listens for them; the URL only names this one.
	self := url.URL{Scheme: "http", Host: "127.0.0.1:2380"}
	c.ListenPeerUrls = nil
	c.AdvertisePeerUrls = []url.URL{self}
	c.InitialCluster = c.Name + "=" + self.String()
	c.InitialClusterToken = "torus"

	// Alone, a member has nobody to wait for: the timeouts only bound how long it takes to elect itself. Shorter ones also mean
	// shorter leases (the least is one and a half election timeouts, rounded up: 1 s).
	c.TickMs, c.ElectionMs = 50, 500
	c.PreVote = false

	c.SnapshotCount = 5000 // raft entries kept in memory
	c.SnapshotCatchUpEntries = 500
	c.MaxSnapFiles, c.MaxWalFiles = 2, 2
	c.AutoCompactionMode, c.AutoCompactionRetention = embed.CompactorModePeriodic, "5m"
	c.BootstrapDefragThresholdMegabytes = 64
	c.QuotaBackendBytes = DefaultQuota
	if cfg.Quota > 0 {
		c.QuotaBackendBytes = cfg.Quota
	}
	c.BackendFreelistType = "map"
	c.EnableGRPCGateway = false
	c.MaxRequestBytes = 4 << 20

	if cfg.CertFile != "" || cfg.KeyFile != "" || cfg.CAFile != "" {
		c.ClientTLSInfo = transport.TLSInfo{
			CertFile: cfg.CertFile, KeyFile: cfg.KeyFile,
			TrustedCAFile: cfg.CAFile, ClientCertAuth: cfg.CAFile != "",
		}
	}
	c.LogLevel = "error"
	c.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zaplog.New(cfg.Log, zapcore.ErrorLevel))
	return c
}

func endpoint(e *embed.Etcd, addr *url.URL) string {
	if addr.Scheme == "unix" || len(e.Clients) == 0 {
		return addr.String()
	}
	host := addr.Hostname()
	_, port, err := net.SplitHostPort(e.Clients[0].Addr().String())
	if err != nil {
		return addr.String()
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1" // it serves everywhere; here is the nearest
	}
	u := url.URL{Scheme: addr.Scheme, Host: net.JoinHostPort(host, port)}
	return u.String()
}

func explain(err error, cfg Config, addr *url.URL) error {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return &torus.Error{Op: "embedded etcd", Obj: addr.String(), Err: fmt.Errorf("%w: the address is in use", torus.ErrExists),
			Hint: "If etcd runs there already, leave out --embed-etcd; else give another address with --etcd."}
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return &torus.Error{Op: "embedded etcd", Obj: addr.String(), Err: fmt.Errorf("%w: this machine has no such address", torus.ErrInvalid),
			Hint: "--embed-etcd serves at the address in --etcd, which must be one of this machine's."}
	}
	return &torus.Error{Op: "embedded etcd", Obj: "in " + cfg.DataDir, Err: err}
}

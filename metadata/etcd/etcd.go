// Package etcd is the metadata service on etcd.
//
// keys.go names every key. Each method is one transaction, preceded by one read where it must know what it
// replaces; it compares the revision of everything it read. call.go decides what to do about a request whose answer did not
// come: a write that may have been made is settled by asking again, so an error that wraps torus.ErrMetadataUnavailable is left for when
// etcd stays away. Watches list anew when etcd has forgotten what they missed.
package etcd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap/zapcore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/protobuf/proto"

	"github.com/coreos/torus"
	"github.com/coreos/torus/metadata"
	"github.com/coreos/torus/metadata/internal/zaplog"
	"github.com/coreos/torus/models"
)

// DefaultTimeout bounds the first contact and every call whose context has no earlier deadline.
const DefaultTimeout = 5 * time.Second

// Config is what New needs. Only Endpoints must be set.
type Config struct {
	Endpoints []string // HOST:PORT, http(s)://HOST:PORT or unix:///PATH
	Prefix    string   // of all keys; DefaultPrefix

	// TLS files in PEM: a CA, a certificate with its key, or both. https endpoints without any use the system's CAs.
	CAFile, CertFile, KeyFile string

	DialTimeout, RequestTimeout time.Duration // DefaultTimeout

	Log     *slog.Logger          // nil discards
	Metrics prometheus.Registerer // nil: none
}

// FromTorus translates the configuration of the root package.
func FromTorus(c torus.Config) Config {
	var endpoints []string
	for e := range strings.SplitSeq(c.MetadataAddress, ",") {
		if e = strings.TrimSpace(e); e != "" {
			endpoints = append(endpoints, e)
		}
	}
	return Config{
		Endpoints: endpoints,
		CAFile:    c.CAFile, CertFile: c.CertFile, KeyFile: c.KeyFile,
		DialTimeout: c.DialTimeout, RequestTimeout: c.RequestTimeout,
		Log: c.Log,
	}
}

// Register makes this package known to package torus as "etcd". metrics may be nil.
func Register(metrics prometheus.Registerer) {
	name := string(torus.MetadataEtcd)
	config := func(c torus.Config) Config {
		cfg := FromTorus(c)
		cfg.Metrics = metrics
		return cfg
	}
	torus.RegisterMetadataService(name, func(ctx context.Context, c torus.Config) (torus.MetadataService, error) {
		return New(ctx, config(c))
	})
	torus.RegisterMetadataInit(name, func(ctx context.Context, c torus.Config, gmd torus.GlobalMetadata, ring torus.Ring) error {
		return Init(ctx, config(c), gmd, ring)
	})
	torus.RegisterMetadataWipe(name, func(ctx context.Context, c torus.Config) error { return Wipe(ctx, config(c)) })
	torus.RegisterSetRing(name, func(ctx context.Context, c torus.Config, ring torus.Ring) error {
		return SetRing(ctx, config(c), ring)
	})
}

// Client is a connection to etcd. Safe for concurrent use.
type Client struct {
	cfg    Config
	keys   keys
	etcd   *clientv3.Client
	leases etcdserverpb.LeaseClient
	log    *slog.Logger

	metrics   metrics
	closing   context.CancelFunc
	closed    context.Context
	closeOnce sync.Once
	closeErr  error
}

var _ torus.MetadataService = (*Client)(nil)

// New connects to etcd and asks it something, so that a wrong address is an error here and now.
func New(ctx context.Context, cfg Config) (*Client, error) {
	c, err := open(cfg)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, c.cfg.DialTimeout)
	defer cancel()
	if _, err := c.GlobalMetadata(ctx); err != nil && !errors.Is(err, torus.ErrNoGlobalMetadata) {
		c.Close()
		return nil, err
	}
	return c, nil
}

func open(cfg Config) (*Client, error) {
	if len(cfg.Endpoints) == 0 {
		return nil, fmt.Errorf("etcd: no address: %w (give one with --etcd, such as 127.0.0.1:2379)", torus.ErrInvalid)
	}
	if cfg.Prefix == "" {
		cfg.Prefix = DefaultPrefix
	}
	if cfg.DialTimeout <= 0 {
		cfg.DialTimeout = DefaultTimeout
	}
	if cfg.RequestTimeout <= 0 {
		cfg.RequestTimeout = DefaultTimeout
	}
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	m, err := newMetrics(cfg.Metrics)
	if err != nil {
		return nil, err
	}
	tlsConfig, err := loadTLS(cfg)
	if err != nil {
		return nil, err
	}
	closed, closing := context.WithCancel(context.Background())
	cl, err := clientv3.New(clientv3.Config{
		Endpoints:   cfg.Endpoints,
		TLS:         tlsConfig,
		DialTimeout: cfg.DialTimeout,
		// A connection that went silent under a watch or a call is found out; etcd allows a ping every 5 s, none without either.
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 5 * time.Second,
		MaxUnaryRetries:      1, // call.go tries again
		DialOptions: []grpc.DialOption{
			grpc.WithChainUnaryInterceptor(whyNotConnected),
			// Back soon after etcd is, however long it was away: gRPC would wait up to two minutes.
			grpc.WithConnectParams(grpc.ConnectParams{
				Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
				MinConnectTimeout: 3 * time.Second,
			}),
		},
		// What goes wrong comes back as an error; the library's own log would say it twice.
		Logger:  zaplog.New(cfg.Log, zapcore.ErrorLevel),
		Context: closed,
	})
	if err != nil {
		closing()
		return nil, fmt.Errorf("etcd at %s: %v: %w", strings.Join(cfg.Endpoints, ","), err, torus.ErrInvalid)
	}
	return &Client{
		cfg: cfg, keys: keys{cfg.Prefix}, etcd: cl, log: log, metrics: m,
		leases:  etcdserverpb.NewLeaseClient(cl.ActiveConnection()),
		closing: closing, closed: closed,
	}, nil
}

func loadTLS(cfg Config) (*tls.Config, error) {
	secure := cfg.CAFile != "" || cfg.CertFile != "" || cfg.KeyFile != ""
	for _, e := range cfg.Endpoints {
		secure = secure || strings.HasPrefix(e, "https://") || strings.HasPrefix(e, "unixs://")
	}
	if !secure {
		return nil, nil
	}
	t := &tls.Config{MinVersion: tls.VersionTLS12}
	if cfg.CAFile != "" {
		pem, err := os.ReadFile(cfg.CAFile)
		if err != nil {
			return nil, fmt.Errorf("etcd CA: %w", err)
		}
		t.RootCAs = x509.NewCertPool()
		if !t.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("etcd CA %s: no certificate in it (PEM is wanted): %w", cfg.CAFile, torus.ErrInvalid)
		}
	}
	if cfg.CertFile != "" || cfg.KeyFile != "" {
		if cfg.CertFile == "" || cfg.KeyFile == "" {
			return nil, fmt.Errorf("etcd: a client certificate and its key are given together or not at all: %w", torus.ErrInvalid)
		}
		cert, err := tls.LoadX509KeyPair(cfg.CertFile, cfg.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("etcd client certificate %s: %w", cfg.CertFile, err)
		}
		t.Certificates = []tls.Certificate{cert}
	}
	return t, nil
}

// Kind is torus.MetadataEtcd.
func (c *Client) Kind() torus.MetadataKind { return torus.MetadataEtcd }

// Close ends the connection; calls under way fail.
func (c *Client) Close() error {
	c.closeOnce.Do(func() {
		c.closing()
		if err := c.etcd.Close(); err != nil && !errors.Is(err, context.Canceled) {
			c.closeErr = fmt.Errorf("etcd: %w", err)
		}
	})
	return c.closeErr
}

// Init makes a cluster; ring may be nil, else its version is 1. ErrExists if there is one.
func Init(ctx context.Context, cfg Config, gmd torus.GlobalMetadata, ring torus.Ring) error {
	if err := metadata.CheckGlobal(gmd); err != nil {
		return fmt.Errorf("init: %w", err)
	}
	c, err := open(cfg)
	if err != nil {
		return err
	}
	defer c.Close()
	global, err := proto.Marshal(&models.Global{
		Format: metadata.Format, ClusterId: gmd.ClusterID, BlockSize: gmd.BlockSize,
		DefaultBlockSpec: gmd.DefaultBlockSpec, CreatedUnixMs: time.Now().UnixMilli(),
	})
	if err != nil {
		return fmt.Errorf("init: %v: %w", err, torus.ErrInvalid)
	}
	puts := []clientv3.Op{clientv3.OpPut(c.keys.global(), string(global))}
	if ring != nil {
		if ring.Version() != 1 {
			return fmt.Errorf("init with ring version %d: %w (the first is 1)", ring.Version(), torus.ErrNonSequentialRing)
		}
		stored, err := ring.Marshal()
		if err != nil {
			return fmt.Errorf("init: %w", err)
		}
		puts = append(puts, clientv3.OpPut(c.keys.ring(), string(stored)), clientv3.OpPut(c.keys.ringAt(1), string(stored)))
	}
	return c.write(ctx, "init", "cluster", func(ctx context.Context, again bool) error {
		resp, err := c.txn(ctx,
			[]clientv3.Cmp{absent(c.keys.global())},
			puts, []clientv3.Op{clientv3.OpGet(c.keys.global())})
		if err != nil || resp.Succeeded {
			return err
		}
		have := value(resp, 0)
		if again && string(have) == string(global) {
			return nil
		}
		var g models.Global
		if err := proto.Unmarshal(have, &g); err != nil {
			return fmt.Errorf("%w, and it is not readable: %v", torus.ErrExists, err)
		}
		return fmt.Errorf("a cluster %w (%s); `torusctl wipe` forgets it", torus.ErrExists, g.ClusterId)
	})
}

// Wipe forgets the cluster: every key under the prefix.
func Wipe(ctx context.Context, cfg Config) error {
	c, err := open(cfg)
	if err != nil {
		return err
	}
	defer c.Close()
	return c.write(ctx, "wipe", "cluster", func(ctx context.Context, _ bool) error {
		from, end := c.keys.all()
		_, err := c.txn(ctx, nil, []clientv3.Op{clientv3.OpDelete(from, clientv3.WithRange(end))}, nil)
		return err
	})
}

// SetRing publishes a ring over a connection of its own.
func SetRing(ctx context.Context, cfg Config, ring torus.Ring) error {
	stored, err := ring.Marshal()
	if err != nil {
		return err
	}
	c, err := open(cfg)
	if err != nil {
		return err
	}
	defer c.Close()
	return c.SetRing(ctx, ring.Version(), stored)
}

// GlobalMetadata implements torus.MetadataService, like all the methods of Client from here on.
func (c *Client) GlobalMetadata(ctx context.Context) (torus.GlobalMetadata, error) {
	var gmd torus.GlobalMetadata
	err := c.read(ctx, "GlobalMetadata", "", func(ctx context.Context) error {
		resp, err := c.get(ctx, c.keys.global())
		if err != nil {
			return err
		}
		if len(resp.Kvs) == 0 {
			return torus.ErrNoGlobalMetadata
		}
		var g models.Global
		if err := decode(resp.Kvs[0], &g); err != nil {
			return err
		}
		if g.Format != metadata.Format {
			return fmt.Errorf("the cluster has format %d, this program knows %d: %w (use the version that made it, or a newer one)",
				g.Format, metadata.Format, torus.ErrNotSupported)
		}
		gmd = torus.GlobalMetadata{ClusterID: g.ClusterId, BlockSize: g.BlockSize, DefaultBlockSpec: g.DefaultBlockSpec}
		return nil
	})
	return gmd, err
}

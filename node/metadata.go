package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coreos/torus"
	"github.com/coreos/torus/blockset"
	"github.com/coreos/torus/metadata/etcd"
)

// DefaultBlockSpec is the block spec of clusters that are made without one.
const DefaultBlockSpec = "crc,rep=2"

// Etcd says where etcd is, and who we are to it.
type Etcd struct {
	Endpoints []string // HOST:PORT or URL
	CertFile  string
	KeyFile   string
	CAFile    string
	Log       *slog.Logger // nil: none
}

// ParseEndpoints reads a list of etcd addresses separated by commas, each HOST:PORT, with or without
// http:// or https:// before it. A port that is missing is 2379.
func ParseEndpoints(list string) ([]string, error) {
	bad := func(why string) ([]string, error) {
		return nil, fmt.Errorf("etcd address %q: %s: %w\nwrite it as HOST:2379, several with commas between", list, why, torus.ErrInvalid)
	}
	var out []string
	for _, endpoint := range strings.Split(list, ",") {
		endpoint = strings.TrimSuffix(strings.TrimSpace(endpoint), "/")
		scheme, address, found := strings.Cut(endpoint, "://")
		if !found {
			scheme, address = "", endpoint
		} else if scheme != "http" && scheme != "https" {
			return bad("unknown scheme " + scheme)
		}
		if address == "" {
			return bad("no host")
		}
		host, port, err := net.SplitHostPort(address)
		if err != nil {
			host, port, err = net.SplitHostPort(address + ":2379")
		}
		if err != nil || host == "" || strings.ContainsAny(host, " /?#@") {
			return bad("not HOST:PORT")
		}
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return bad("bad port")
		}
		address = net.JoinHostPort(host, port)
		if scheme != "" {
			address = scheme + "://" + address
		}
		out = append(out, address)
	}
	return out, nil
}

func (e Etcd) String() string { return strings.Join(e.Endpoints, ",") }

// config is the address in the form the metadata services take.
func (e Etcd) config(ctx context.Context) torus.Config {
	c := torus.Config{
		MetadataAddress: e.String(), CAFile: e.CAFile, CertFile: e.CertFile, KeyFile: e.KeyFile, Log: e.Log,
	}
	if deadline, ok := ctx.Deadline(); ok {
		c.DialTimeout = time.Until(deadline)
	}
	return c
}

// Connect connects to the MDS.
func (e Etcd) Connect(ctx context.Context) (torus.MetadataService, error) {
	return torus.CreateMetadataService(ctx, string(torus.MetadataEtcd), e.config(ctx))
}

// Init makes a new cluster, with an empty ring if withRing, and returns what was stored. ErrExists if there is one already.
func (e Etcd) Init(ctx context.Context, g torus.GlobalMetadata, withRing bool) (torus.GlobalMetadata, error) {
	if g.BlockSize < torus.MinBlockSize || g.BlockSize > torus.MaxBlockSize || g.BlockSize&(g.BlockSize-1) != 0 {
		return g, fmt.Errorf("block size of %d bytes: %w\ngive a power of two from 256KiB to 64MiB", g.BlockSize, torus.ErrInvalid)
	}
	spec, err := blockset.Parse(g.DefaultBlockSpec)
	if err != nil {
		return g, err
	}
	g.DefaultBlockSpec = spec.String()
	var first torus.Ring
	if withRing {
		if first, err = firstRing(spec.Replication()); err != nil {
			return g, err
		}
	}
	err = torus.InitMDS(ctx, string(torus.MetadataEtcd), e.config(ctx), g, first)
	if errors.Is(err, torus.ErrExists) {
		err = &torus.Error{Op: "init", Obj: "cluster in etcd at " + e.String(), Err: cause(err),
			Hint: "`torusctl init --view` shows it; `torusctl wipe` forgets it and all its volumes"}
	}
	return g, err
}

// Wipe forgets the cluster.
func (e Etcd) Wipe(ctx context.Context) error {
	return torus.WipeMDS(ctx, string(torus.MetadataEtcd), e.config(ctx))
}

// Explain says what to do if err is that etcd did not answer.
func (e Etcd) Explain(err error) error {
	if !errors.Is(err, torus.ErrMetadataUnavailable) {
		return err
	}
	return &torus.Error{Op: "reach", Obj: "etcd", Err: cause(err),
		Hint: "check that etcd is running there, or give another address with -C (--etcd) HOST:2379"}
}

// cause strips an error of what was attempted on what, and of hints.
func cause(err error) error {
	for {
		var e *torus.Error
		if !errors.As(err, &e) {
			return err
		}
		err = e.Err
	}
}

// Copies is how many copies of its blocks a volume with that spec keeps, in a ring with that replication.
func Copies(spec string, ringReplication int) int {
	if s, err := blockset.Parse(spec); err == nil && s.Replication() > 0 {
		return s.Replication()
	}
	return max(ringReplication, 1)
}

// RegisterMetadata makes the metadata services known to package torus. metrics, which may be nil, gets what their
// clients count.
func RegisterMetadata(metrics prometheus.Registerer) { etcd.Register(metrics) }

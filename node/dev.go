package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/coreos/torus"
	"github.com/coreos/torus/block"
	"github.com/coreos/torus/models"
)

// MaxDevNodes bounds DevConfig.Nodes.
const MaxDevNodes = 16

// DevConfig is a whole cluster in one process.
type DevConfig struct {
	Nodes       int
	Replication int
	DataDir     string
	Size        uint64 // of each peer, bytes
	Volumes     []DevVolume
	NBD         string // [HOST]:PORT or unix:PATH
	CacheSize   uint64 // bytes
	HTTP        string // empty: none
	Log         *slog.Logger
}

// DevVolume is a volume that a Dev makes unless it is there.
type DevVolume struct {
	Name string
	Size uint64 // bytes
}

// Dev is a running cluster: etcd, peers, volumes.
type Dev struct {
	cfg     DevConfig
	etcd    Etcd
	peers   []*Peer
	volumes *Volumes
	names   []string
	failed  <-chan error
	stops   stack
}

// devState is what a Dev remembers from one start to the next, so that what was typed once still works.
type devState struct {
	Etcd  string   `json:"etcd"`  // HOST:PORT
	Peers []string `json:"peers"` // tdp://HOST:PORT
}

const devStateFile = "dev.json"

// devTimeout bounds the start of a Dev.
const devTimeout = time.Minute

// StartDev starts a cluster; whatever is there already in the data dir is taken up again.
func StartDev(ctx context.Context, cfg DevConfig) (_ *Dev, err error) {
	ctx, cancel := context.WithTimeout(ctx, devTimeout)
	defer cancel()
	ReserveProcs(2*cfg.Nodes + 1)
	d := &Dev{cfg: cfg}
	defer func() {
		if err != nil {
			d.stops.run() //nolint:errcheck // the first error is the one that matters
		}
	}()
	d.stops.push(keepMemory())
	listen, err := listenAddress("--nbd", cfg.NBD)
	if err != nil {
		return nil, err
	}
	for _, v := range cfg.Volumes {
		if err := block.CheckName(v.Name); err != nil {
			return nil, fmt.Errorf("--volume: %w\nuse letters, digits and . _ -", err)
		}
	}
	dir, err := openDataDir(cfg.DataDir)
	if err != nil {
		return nil, err
	}
	d.stops.push(dir.close)
	// Before anything is made, as this is what fails most easily: another Dev runs already.
	if tcp, ok := strings.CutPrefix(listen, "tcp://"); ok {
		if err := checkFree(tcp); err != nil {
			return nil, listenError("--nbd", cfg.NBD, err)
		}
	}
	registry := NewRegistry()
	RegisterMetadata(registry)
	ready := newReadiness("starting")
	if cfg.HTTP != "" {
		h, err := ServeHTTP(cfg.HTTP, registry, ready.check, cfg.Log)
		if err != nil {
			return nil, err
		}
		d.stops.push(h.Close)
	}
	state, err := readDevState(dir)
	if err != nil {
		return nil, err
	}
	mds, err := d.startMDS(ctx, dir, &state)
	if err != nil {
		return nil, err
	}
	global, err := d.initCluster(ctx, mds)
	if err != nil {
		return nil, err
	}
	if err := d.startPeers(ctx, dir, &state, mds, global, registry); err != nil {
		return nil, err
	}
	if err := state.write(dir); err != nil {
		return nil, err
	}
	if err := d.ensureVolumes(ctx, mds); err != nil {
		return nil, err
	}
	d.volumes, err = StartVolumes(ctx, VolumesConfig{
		ClientConfig: ClientConfig{MDS: mds, Global: global, What: "torusd dev", Sole: true, CacheSize: cfg.CacheSize, Log: cfg.Log, Registerer: registry},
		Listen:       cfg.NBD, Flag: "--nbd",
	})
	if err != nil {
		return nil, err
	}
	d.stops.push(d.volumes.Close)
	ready.set(nil)
	return d, nil
}

// startMDS starts etcd where it was the last time, else at its usual port, else at any that is free.
func (d *Dev) startMDS(ctx context.Context, dir *dataDir, state *devState) (torus.MetadataService, error) {
	address := "127.0.0.1:2379"
	if state.Etcd != "" {
		address = state.Etcd
	}
	if err := checkFree(address); err != nil {
		address = "127.0.0.1:0"
	}
	server, where, err := startEtcd(ctx, Etcd{Endpoints: []string{address}, Log: d.cfg.Log}, dir.path("etcd"), d.cfg.Log)
	if err != nil {
		return nil, err
	}
	d.stops.push(server.Close)
	d.etcd, d.failed = where, server.Err()
	state.Etcd = strings.TrimPrefix(where.Endpoints[0], "http://")
	mds, err := where.WaitConnect(ctx, devTimeout, d.cfg.Log)
	if err != nil {
		return nil, err
	}
	d.stops.push(mds.Close)
	return mds, nil
}

// initCluster makes the cluster at the first start.
func (d *Dev) initCluster(ctx context.Context, mds torus.MetadataService) (torus.GlobalMetadata, error) {
	global, err := mds.GlobalMetadata(ctx)
	if errors.Is(err, torus.ErrNoGlobalMetadata) {
		global = torus.GlobalMetadata{ClusterID: uuid.NewString(), BlockSize: torus.DefaultBlockSize, DefaultBlockSpec: "crc"}
		global, err = d.etcd.Init(ctx, global, true)
	}
	if err != nil {
		return global, err
	}
	_, err = SetReplication(ctx, mds, d.cfg.Replication)
	if err != nil && !errors.Is(err, ErrUnchanged) {
		return global, err
	}
	return global, nil
}

// startPeers starts each peer where it was the last time, else at any free port, and puts all into the ring.
func (d *Dev) startPeers(ctx context.Context, dir *dataDir, state *devState, mds torus.MetadataService, global torus.GlobalMetadata, registry prometheus.Registerer) error {
	for len(state.Peers) < d.cfg.Nodes {
		state.Peers = append(state.Peers, "tdp://127.0.0.1:0")
	}
	var members []*models.Peer
	for i := range d.cfg.Nodes {
		node := fmt.Sprintf("node%d", i+1)
		cfg := PeerConfig{
			MDS: mds, Global: global, DataDir: dir.path(node), Capacity: Capacity{Bytes: d.cfg.Size}, Address: state.Peers[i],
			Labels: map[string]string{"host": node}, Log: d.cfg.Log.With("node", node),
			Registerer: prometheus.WrapRegistererWith(prometheus.Labels{"node": node}, registry),
		}
		p, err := StartPeer(ctx, cfg)
		if errors.Is(err, syscall.EADDRINUSE) {
			cfg.Address = "tdp://127.0.0.1:0"
			p, err = StartPeer(ctx, cfg)
		}
		if err != nil {
			return err
		}
		d.stops.push(p.Close)
		d.peers = append(d.peers, p)
		state.Peers[i] = p.Address()
		members = append(members, p.Record())
	}
	_, err := AddToRing(ctx, mds, members)
	if errors.Is(err, ErrUnchanged) {
		err = nil
	}
	return err
}

func (d *Dev) ensureVolumes(ctx context.Context, mds torus.MetadataService) error {
	for _, v := range d.cfg.Volumes {
		_, err := mds.Volume(ctx, v.Name)
		if errors.Is(err, torus.ErrNotExist) {
			_, err = block.Create(ctx, mds, v.Name, v.Size, "")
		}
		if err != nil {
			return fmt.Errorf("volume %s: %w", v.Name, err)
		}
	}
	all, err := mds.Volumes(ctx)
	for _, v := range all {
		d.names = append(d.names, v.Name)
	}
	return err
}

// Etcd is where its etcd is.
func (d *Dev) Etcd() Etcd { return d.etcd }

// Peers is the number of peers.
func (d *Dev) Peers() int { return len(d.peers) }

// NBD is where volumes are served: HOST:PORT or unix:PATH.
func (d *Dev) NBD() string { return d.volumes.Addr() }

// Volumes are the names of the volumes there were at the start.
func (d *Dev) Volumes() []string { return d.names }

// DataDir is where everything is kept.
func (d *Dev) DataDir() string { return d.cfg.DataDir }

// Failed delivers an error if the cluster cannot go on.
func (d *Dev) Failed() <-chan error { return d.failed }

// Close stops the cluster in order: volumes, peers, etcd.
func (d *Dev) Close() error { return d.stops.run() }

func readDevState(dir *dataDir) (devState, error) {
	var s devState
	b, err := os.ReadFile(dir.path(devStateFile))
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	if err != nil {
		return s, fmt.Errorf("%s: %w\nremove it: new ports will be chosen", dir.path(devStateFile), err)
	}
	return s, nil
}

func (s devState) write(dir *dataDir) error {
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	tmp := dir.path(devStateFile + ".new")
	if err := os.WriteFile(tmp, append(b, '\n'), 0o640); err != nil {
		return err
	}
	return os.Rename(tmp, dir.path(devStateFile))
}

// checkFree finds out whether a TCP address could be listened on.
func checkFree(address string) error {
	ln, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	return ln.Close()
}

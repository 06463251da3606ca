package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/coreos/torus"
	"github.com/coreos/torus/metadata/embed"
	"github.com/coreos/torus/models"
)

func testEtcd(t *testing.T) Etcd {
	t.Helper()
	RegisterMetadata(nil)
	s, err := embed.Start(t.Context(), embed.Config{DataDir: t.TempDir(), ClientURL: "http://127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return Etcd{Endpoints: []string{s.Endpoint()}}
}

func initCluster(t *testing.T, where Etcd) torus.GlobalMetadata {
	t.Helper()
	g, err := where.Init(t.Context(), torus.GlobalMetadata{ClusterID: uuid.NewString(), BlockSize: 1 << 20, DefaultBlockSpec: "crc,rep=1"}, true)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func connect(t *testing.T, where Etcd) torus.MetadataService {
	t.Helper()
	mds, err := where.Connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mds.Close() })
	return mds
}

func testDaemon(t *testing.T, where Etcd) DaemonConfig {
	t.Helper()
	return DaemonConfig{
		Etcd: where, EtcdWait: 10 * time.Second, Log: slog.New(slog.DiscardHandler),
		Peer: PeerConfig{DataDir: filepath.Join(t.TempDir(), "data"), Capacity: Capacity{Bytes: 64 << 20}, Address: "tdp://127.0.0.1:0"},
	}
}

// daemon is a RunDaemon under way.
type daemon struct {
	stop func()
	done chan error
}

func startDaemon(cfg DaemonConfig) *daemon {
	ctx, cancel := context.WithCancel(context.Background())
	d := &daemon{cancel, make(chan error, 1)}
	go func() { d.done <- RunDaemon(ctx, cfg) }()
	return d
}

// end stops it as SIGTERM does.
func (d *daemon) end(t *testing.T) {
	t.Helper()
	d.stop()
	if err := <-d.done; err != nil {
		t.Error(err)
	}
}

// until waits for a condition that somebody else brings about.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func alivePeers(t *testing.T, mds torus.MetadataService) []*models.Peer {
	t.Helper()
	peers, err := mds.Peers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var alive []*models.Peer
	for _, p := range peers {
		if p.Alive {
			alive = append(alive, p)
		}
	}
	return alive
}

// freePort is an address for a server that must be known before it runs.
func freePort(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

// The life of a peer: it waits for init, makes its data dir, registers where it really is, joins the ring; when it ends it is
// seen to be gone at once, and when it is back it is the same peer.
func TestDaemonLife(t *testing.T) {
	where := testEtcd(t)
	cfg := testDaemon(t, where)
	cfg.HTTP = freePort(t)
	cfg.Peer.AutoJoin, cfg.Peer.Labels = true, map[string]string{"zone": "a"}
	ready := func() (int, string) {
		r, err := http.Get("http://" + cfg.HTTP + "/readyz") //nolint:noctx // a test
		if err != nil {
			return 0, err.Error()
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		if err != nil {
			return 0, err.Error()
		}
		return r.StatusCode, string(b)
	}
	defer http.DefaultClient.CloseIdleConnections()
	d := startDaemon(cfg)
	until(t, "it says that it waits for init", func() bool {
		status, text := ready()
		return status == http.StatusServiceUnavailable && strings.Contains(text, "initialised")
	})
	global := initCluster(t, where)
	mds := connect(t, where)
	until(t, "it is ready", func() bool {
		status, _ := ready()
		return status == http.StatusOK
	})
	peers := alivePeers(t, mds)
	if len(peers) != 1 {
		t.Fatal(peers)
	}
	p := peers[0]
	if strings.HasSuffix(p.Address, ":0") || !strings.HasPrefix(p.Address, "tdp://127.0.0.1:") || p.SizeBytes != 60<<20 || p.State != StateOK ||
		p.Labels["zone"] != "a" || p.Incarnation == 0 {
		t.Errorf("%v", p)
	}
	r, err := CurrentRing(t.Context(), mds)
	if err != nil || len(r.Members()) != 1 || r.Members()[0].String() != p.Uuid {
		t.Errorf("%v, %v", r, err)
	}

	// The same data dir, and a copy of it while the peer runs.
	second := cfg
	second.HTTP = ""
	if err := RunDaemon(t.Context(), second); err == nil || !strings.Contains(err.Error(), "in use") || !strings.Contains(err.Error(), "--data-dir") {
		t.Errorf("data dir in use: %v", err)
	}
	taken := second
	taken.Peer.DataDir, taken.Peer.Address = filepath.Join(t.TempDir(), "data"), p.Address
	if err := RunDaemon(t.Context(), taken); err == nil || !strings.Contains(err.Error(), "--peer-address") {
		t.Errorf("address in use: %v", err)
	}

	d.end(t)
	if alive := alivePeers(t, mds); len(alive) != 0 {
		t.Errorf("it ended, and %v is alive", alive)
	}
	d = startDaemon(cfg)
	until(t, "it is back", func() bool { return len(alivePeers(t, mds)) == 1 })
	if again := alivePeers(t, mds)[0]; again.Uuid != p.Uuid || again.Incarnation == p.Incarnation {
		t.Errorf("%v came back as %v", p, again)
	}
	d.end(t)

	// Another cluster's etcd.
	other := testEtcd(t)
	initCluster(t, other)
	cfg.Etcd, cfg.HTTP = other, ""
	if err := RunDaemon(t.Context(), cfg); !errors.Is(err, torus.ErrWrongCluster) || !strings.Contains(err.Error(), global.ClusterID) {
		t.Errorf("data dir of another cluster: %v", err)
	}
}

// A data dir that was copied would make two peers that are one.
func TestTwin(t *testing.T) {
	where := testEtcd(t)
	global := initCluster(t, where)
	mds := connect(t, where)
	cfg := testDaemon(t, where).Peer
	cfg.MDS, cfg.Global = mds, global
	p, err := StartPeer(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	if err := refuseTwin(ctx, mds, p.ID(), "copy"); err == nil {
		t.Error("a second peer with the same identity was let in")
	}
	if err := refuseTwin(t.Context(), mds, torus.NewPeerID(), "other"); err != nil {
		t.Errorf("another peer: %v", err)
	}
	record := p.Record()
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	// Killed: its lease lives on, but nobody answers there.
	lease, err := mds.GrantLease(t.Context(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if err := mds.PutPeer(t.Context(), lease, record); err != nil {
		t.Fatal(err)
	}
	if err := refuseTwin(t.Context(), mds, p.ID(), "own"); err != nil {
		t.Errorf("the successor of a peer that was killed: %v", err)
	}
}

// --embed-etcd: no etcd to run, and NBD from a peer.
func TestDaemonEmbedEtcd(t *testing.T) {
	where := Etcd{Endpoints: []string{freePort(t)}}
	cfg := testDaemon(t, where)
	cfg.EmbedEtcd, cfg.Peer.AutoJoin = true, true
	cfg.NBD = "unix:" + filepath.Join(t.TempDir(), "nbd.sock")
	d := startDaemon(cfg)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	mds, err := where.WaitConnect(ctx, 30*time.Second, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer mds.Close()
	initCluster(t, where)
	until(t, "it listens", func() bool {
		_, err := os.Stat(strings.TrimPrefix(cfg.NBD, "unix:"))
		return err == nil
	})
	d.end(t)
}

// What cannot work fails with a message that names the thing and the flag to change.
func TestDaemonRefuses(t *testing.T) {
	where := testEtcd(t)
	initCluster(t, where)
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	for name, c := range map[string]struct {
		change func(*DaemonConfig)
		says   []string
	}{
		"no etcd": {func(c *DaemonConfig) {
			c.Etcd, c.EtcdWait = Etcd{Endpoints: []string{"127.0.0.1:1"}}, 100*time.Millisecond
		}, []string{"127.0.0.1:1", "--etcd"}},
		"peer address in use":  {func(c *DaemonConfig) { c.Peer.Address = "tdp://" + busy.Addr().String() }, []string{busy.Addr().String(), "--peer-address"}},
		"not our address":      {func(c *DaemonConfig) { c.Peer.Address = "tdp://192.0.2.1:0" }, []string{"192.0.2.1", "--peer-address"}},
		"http in use":          {func(c *DaemonConfig) { c.HTTP = busy.Addr().String() }, []string{busy.Addr().String(), "--http"}},
		"nbd in use":           {func(c *DaemonConfig) { c.NBD = busy.Addr().String() }, []string{busy.Addr().String(), "--nbd"}},
		"larger than the disk": {func(c *DaemonConfig) { c.Peer.Capacity.Bytes = 1 << 60 }, []string{"the file system has", "--size"}},
		"no size":              {func(c *DaemonConfig) { c.Peer.Capacity = Capacity{} }, []string{"too little", "--size"}},
		"data dir is a file":   {func(c *DaemonConfig) { c.Peer.DataDir = "/dev/null" }, []string{"/dev/null", "--data-dir"}},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := testDaemon(t, where)
			c.change(&cfg)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			err := RunDaemon(ctx, cfg)
			for _, s := range c.says {
				if err == nil || !strings.Contains(err.Error(), s) {
					t.Errorf("does not say %q: %v", s, err)
				}
			}
			if n := strings.Count(fmt.Sprint(err), "\n"); n > 2 {
				t.Errorf("%d lines: %v", n+1, err)
			}
		})
	}
}

// Told to stop while it waits, it ends at once, and that is no failure.
func TestDaemonStopsWhileWaiting(t *testing.T) {
	uninitialised := testEtcd(t)
	for name, where := range map[string]Etcd{"for etcd": {Endpoints: []string{"127.0.0.1:1"}}, "for init": uninitialised} {
		t.Run(name, func(t *testing.T) {
			cfg := testDaemon(t, where)
			cfg.EtcdWait = time.Hour
			d := startDaemon(cfg)
			until(t, "it has its data dir", func() bool {
				_, err := os.Stat(filepath.Join(cfg.Peer.DataDir, "torusd.lock"))
				return err == nil
			})
			began := time.Now()
			d.end(t)
			if took := time.Since(began); took > 5*time.Second {
				t.Errorf("took %v", took)
			}
		})
	}
}

package etcd

import (
	"context"
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/coreos/torus"
	"github.com/coreos/torus/metadata/embed"
	"github.com/coreos/torus/metadata/metadatatest"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/ring"
)

var gmd = torus.GlobalMetadata{ClusterID: "test", BlockSize: torus.DefaultBlockSize, DefaultBlockSpec: "crc,rep=2"}

func server(t *testing.T) *embed.Server {
	t.Helper()
	s, err := embed.Start(t.Context(), embed.Config{DataDir: t.TempDir(), ClientURL: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// fresh is the configuration of a cluster of its own in a shared etcd, removed after the test.
func fresh(t *testing.T, endpoints ...string) Config {
	cfg := Config{Endpoints: endpoints, Prefix: "/torus-test/" + rand.Text() + "/"}
	t.Cleanup(func() {
		if err := Wipe(context.Background(), cfg); err != nil {
			t.Error(err)
		}
	})
	return cfg
}

func connect(t *testing.T, cfg Config) *Client {
	t.Helper()
	c, err := New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func conformance(t *testing.T, ttl time.Duration, endpoints ...string) {
	metadatatest.Run(t, func(t *testing.T) *metadatatest.Service {
		cfg := fresh(t, endpoints...)
		return &metadatatest.Service{
			Connect: func(t *testing.T) torus.MetadataService { return connect(t, cfg) },
			Init:    func(g torus.GlobalMetadata, r torus.Ring) error { return Init(t.Context(), cfg, g, r) },
			Wipe:    func() error { return Wipe(t.Context(), cfg) },
			TTL:     ttl,
			Advance: func(time.Duration) {},
		}
	})
}

func TestConformance(t *testing.T) {
	conformance(t, time.Second, server(t).Endpoint())
}

// TestConformanceElsewhere runs the suite on the etcd that TORUS_TEST_ETCD names (HOST:PORT, comma separated), under
// prefixes of its own.
func TestConformanceElsewhere(t *testing.T) {
	for e := range strings.SplitSeq(os.Getenv("TORUS_TEST_ETCD"), ",") {
		if e != "" {
			conformance(t, 2*time.Second, FromTorus(torus.Config{MetadataAddress: os.Getenv("TORUS_TEST_ETCD")}).Endpoints...)
			return
		}
	}
}

func TestNobodyThere(t *testing.T) {
	began := time.Now()
	_, err := New(t.Context(), Config{Endpoints: []string{"127.0.0.1:1"}, DialTimeout: 300 * time.Millisecond})
	if !errors.Is(err, torus.ErrMetadataUnavailable) {
		t.Fatal(err)
	}
	for _, say := range []string{"127.0.0.1:1", "connection refused", "Is etcd running?"} {
		if !strings.Contains(err.Error(), say) {
			t.Errorf("%q does not say %q", err, say)
		}
	}
	if d := time.Since(began); d > 5*time.Second {
		t.Errorf("it took %v", d)
	}
	_, err = New(t.Context(), Config{})
	if !errors.Is(err, torus.ErrInvalid) {
		t.Error(err)
	}
	for _, cfg := range []Config{{CAFile: "nowhere.pem"}, {CertFile: "x.pem"}, {CAFile: "etcd_test.go"}} {
		cfg.Endpoints = []string{"https://127.0.0.1:1"}
		if _, err := New(t.Context(), cfg); err == nil || errors.Is(err, torus.ErrMetadataUnavailable) {
			t.Errorf("TLS files %+v: %v", cfg, err)
		}
	}
}

func TestForeignFormat(t *testing.T) {
	c := connect(t, fresh(t, server(t).Endpoint()))
	if _, err := c.etcd.Put(t.Context(), c.keys.global(), "\x08\x63"); err != nil { // format 99
		t.Fatal(err)
	}
	if _, err := c.GlobalMetadata(t.Context()); !errors.Is(err, torus.ErrNotSupported) || !strings.Contains(err.Error(), "99") {
		t.Error(err)
	}
	if _, err := c.etcd.Put(t.Context(), c.keys.global(), "junk"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.GlobalMetadata(t.Context()); !errors.Is(err, torus.ErrCorrupt) || !strings.Contains(err.Error(), "meta/global") {
		t.Error(err)
	}
}

// A state that is damaged hides no other.
func TestDamagedState(t *testing.T) {
	cfg := fresh(t, server(t).Endpoint())
	c := connect(t, cfg)
	if err := Init(t.Context(), cfg, torus.GlobalMetadata{ClusterID: "c", BlockSize: 1 << 20, DefaultBlockSpec: "crc"}, nil); err != nil {
		t.Fatal(err)
	}
	var ids []torus.VolumeID
	for _, name := range []string{"a", "b", "c"} {
		v := &models.Volume{Name: name, Type: "block", SizeBytes: 1 << 20}
		if err := c.CreateVolume(t.Context(), v); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, torus.VolumeID(v.Id))
	}
	if _, err := c.etcd.Put(t.Context(), c.keys.state(ids[1]), "\xff\xff\xff"); err != nil {
		t.Fatal(err)
	}
	page, err := c.VolumeStates(t.Context(), 0, 10)
	if err != nil || len(page.List) != 3 {
		t.Fatalf("%+v, %v", page, err)
	}
	for i, x := range page.List {
		if x.ID != ids[i] || errors.Is(x.Err, torus.ErrCorrupt) != (i == 1) {
			t.Errorf("volume %d: %v", x.ID, x.Err)
		}
	}
}

// lossy loses answers of transactions that write, or delays the transaction until the next one has been made.
type lossy struct {
	clientv3.KV
	mu   sync.Mutex
	lose int    // answers still to be lost
	late bool   // the transaction arrives only after the next one
	held func() // such a one
}

type lossyTxn struct {
	clientv3.Txn
	l      *lossy
	writes bool
}

func (l *lossy) Txn(ctx context.Context) clientv3.Txn {
	return &lossyTxn{Txn: l.KV.Txn(context.WithoutCancel(ctx)), l: l}
}

func (t *lossyTxn) If(cs ...clientv3.Cmp) clientv3.Txn { t.Txn = t.Txn.If(cs...); return t }

func (t *lossyTxn) Then(ops ...clientv3.Op) clientv3.Txn {
	for _, op := range ops {
		t.writes = t.writes || !op.IsGet()
	}
	t.Txn = t.Txn.Then(ops...)
	return t
}

func (t *lossyTxn) Else(ops ...clientv3.Op) clientv3.Txn { t.Txn = t.Txn.Else(ops...); return t }

var errLost = status.Error(codes.Unavailable, "the answer was lost")

func (t *lossyTxn) Commit() (*clientv3.TxnResponse, error) {
	t.l.mu.Lock()
	defer t.l.mu.Unlock()
	if !t.writes {
		return t.Txn.Commit()
	}
	if t.l.lose > 0 {
		t.l.lose--
		if t.l.late {
			t.l.held = func() { t.Txn.Commit() }
			return nil, errLost
		}
		if _, err := t.Txn.Commit(); err != nil {
			return nil, err
		}
		return nil, errLost
	}
	resp, err := t.Txn.Commit()
	if t.l.held != nil {
		t.l.held()
		t.l.held = nil
	}
	return resp, err
}

// L1: a write whose answer is lost, or which arrives after its own repetition, has its effect once and is told as a success.
func TestLostAnswers(t *testing.T) {
	endpoint := server(t).Endpoint()
	for name, late := range map[string]bool{"lost": false, "late": true} {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			cfg := fresh(t, endpoint)
			first, err := ring.NewEmpty(1, 2)
			if err != nil {
				t.Fatal(err)
			}
			if err := Init(ctx, cfg, gmd, first); err != nil {
				t.Fatal(err)
			}
			c, other := connect(t, cfg), connect(t, cfg)
			l := &lossy{KV: c.etcd.KV, late: late}
			c.etcd.KV = l
			lose := func(what string, f func() error) {
				t.Helper()
				l.mu.Lock()
				l.lose = 1
				l.mu.Unlock()
				if err := f(); err != nil {
					t.Fatalf("%s: %v", what, err)
				}
				l.mu.Lock()
				defer l.mu.Unlock()
				if l.lose != 0 || l.held != nil {
					t.Fatalf("%s: nothing was lost", what)
				}
			}
			lease, err := c.GrantLease(ctx, time.Minute)
			if err != nil {
				t.Fatal(err)
			}
			v := &models.Volume{Name: "v"}
			lose("CreateVolume", func() error { return c.CreateVolume(ctx, v) })
			id := torus.VolumeID(v.Id)
			got, err := other.Volume(ctx, "v")
			if err != nil || got.Id != v.Id {
				t.Fatalf("%v, %v; told id %d", got, err, v.Id)
			}

			var s torus.VolumeState
			lose("Attach", func() (err error) { s, err = c.Attach(ctx, id, lease, &models.Holder{What: "x"}, false); return err })
			now, err := other.VolumeState(ctx, id)
			if err != nil || now.Revision != s.Revision || now.Epoch != s.Epoch {
				t.Fatalf("attached at %v, it is %v", s, now)
			}
			h, err := other.Holder(ctx, id)
			if err != nil || h.GetEpoch() != s.Epoch {
				t.Fatal(h, err)
			}

			for n := range uint64(3) {
				lose("Commit", func() (err error) {
					s, err = c.Commit(ctx, id, s, &models.VolumeState{Epoch: s.Epoch, Head: &models.Head{Number: n}})
					return err
				})
				now, err = other.VolumeState(ctx, id)
				if err != nil || now.Revision != s.Revision || now.Txn != n+1 || now.Head.Number != n {
					t.Fatalf("committed %v, it is %v", s, now)
				}
			}
			lose("Relock", func() error { return c.Relock(ctx, id, s.Epoch, lease, nil) })
			lose("Unlock", func() error { return c.Unlock(ctx, id, s.Epoch) })
			if h, err := other.Holder(ctx, id); h != nil || err != nil {
				t.Fatal(h, err)
			}

			lose("SetRing", func() error { return c.SetRing(ctx, 2, []byte("two")) })
			if err := other.SetRing(ctx, 3, []byte("three")); err != nil {
				t.Fatal(err)
			}
			peer := torus.NewPeerID()
			lose("PutPeer", func() error { return c.PutPeer(ctx, lease, &models.Peer{Uuid: peer.String()}) })
			lose("DeletePeer", func() error { return c.DeletePeer(ctx, peer) })
			if list, err := other.Peers(ctx); err != nil || len(list) != 0 {
				t.Fatal(list, err)
			}
			lose("DeleteVolume", func() error { return c.DeleteVolume(ctx, "v") })
			resp, err := c.etcd.Get(ctx, cfg.Prefix+"volume", clientv3.WithPrefix())
			if err != nil || len(resp.Kvs) != 0 {
				t.Fatalf("left behind: %v, %v", resp, err)
			}
		})
	}
}

// L1: a commit that is lost, and then overtaken by a forced attach, is not told as a success.
func TestLostCommitThenFenced(t *testing.T) {
	cfg := fresh(t, server(t).Endpoint())
	ctx := t.Context()
	if err := Init(ctx, cfg, gmd, nil); err != nil {
		t.Fatal(err)
	}
	c, other := connect(t, cfg), connect(t, cfg)
	v := &models.Volume{Name: "v"}
	if err := c.CreateVolume(ctx, v); err != nil {
		t.Fatal(err)
	}
	id := torus.VolumeID(v.Id)
	lease, err := c.GrantLease(ctx, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	s, err := c.Attach(ctx, id, lease, nil, false)
	if err != nil {
		t.Fatal(err)
	}
	mine, err := other.GrantLease(ctx, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	overtaken := &overtaken{KV: c.etcd.KV, then: func() {
		if _, err := other.Attach(ctx, id, mine, nil, true); err != nil {
			t.Error(err)
		}
	}}
	c.etcd.KV = overtaken
	_, err = c.Commit(ctx, id, s, &models.VolumeState{Epoch: s.Epoch, Head: &models.Head{Number: 1}})
	if !errors.Is(err, torus.ErrCompareFailed) || !strings.Contains(err.Error(), "it was made before that") {
		t.Fatal(err)
	}
	now, err := other.VolumeState(ctx, id)
	if err != nil || now.Head.GetNumber() != 1 || now.Epoch != 2 {
		t.Fatal(now, err)
	}
}

// overtaken loses the answer of the first transaction and lets something happen before it is asked again.
type overtaken struct {
	clientv3.KV
	then func()
}

type overtakenTxn struct {
	clientv3.Txn
	o *overtaken
}

func (o *overtaken) Txn(ctx context.Context) clientv3.Txn {
	return &overtakenTxn{Txn: o.KV.Txn(ctx), o: o}
}
func (t *overtakenTxn) If(cs ...clientv3.Cmp) clientv3.Txn   { t.Txn = t.Txn.If(cs...); return t }
func (t *overtakenTxn) Then(ops ...clientv3.Op) clientv3.Txn { t.Txn = t.Txn.Then(ops...); return t }
func (t *overtakenTxn) Else(ops ...clientv3.Op) clientv3.Txn { t.Txn = t.Txn.Else(ops...); return t }
func (t *overtakenTxn) Commit() (*clientv3.TxnResponse, error) {
	resp, err := t.Txn.Commit()
	if then := t.o.then; then != nil {
		t.o.then = nil
		then()
		return nil, errLost
	}
	return resp, err
}

// Watches go on over a restart of etcd, though it has compacted away what they missed; calls wait for it to come back.
func TestRestartAndCompaction(t *testing.T) {
	dir, url := t.TempDir(), "unix://"+filepath.Join(t.TempDir(), "etcd.sock")
	run := func() *embed.Server {
		t.Helper()
		s, err := embed.Start(t.Context(), embed.Config{DataDir: dir, ClientURL: url})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		return s
	}
	s := run()
	cfg := Config{Endpoints: []string{url}, RequestTimeout: 20 * time.Second}
	ctx := t.Context()
	if err := Init(ctx, cfg, gmd, nil); err != nil {
		t.Fatal(err)
	}
	c := connect(t, cfg)
	if err := c.SetRing(ctx, 1, []byte("one")); err != nil {
		t.Fatal(err)
	}
	rings := make(chan string, 64)
	go c.WatchRing(ctx, func(b []byte) { rings <- string(b) })
	peers := make(chan int, 64)
	go c.WatchPeers(ctx, func(l []*models.Peer) { peers <- len(l) })
	awaitRing := func(want string) {
		t.Helper()
		for r := range rings {
			if r == want {
				return
			}
		}
	}
	awaitRing("one")
	if n := <-peers; n != 0 {
		t.Fatal(n)
	}

	for round, next := range []string{"two", "three"} {
		s.Close()
		// While etcd is away a call waits, and gets its answer when it is back.
		called := make(chan error, 1)
		go func() { _, err := c.Ring(ctx); called <- err }()
		s = run()
		if err := <-called; err != nil {
			t.Fatal(err)
		}
		// Another writer, and a compaction of all that was before.
		w := connect(t, cfg)
		if err := w.PutPeer(ctx, 0, &models.Peer{Uuid: torus.NewPeerID().String()}); err != nil {
			t.Fatal(err)
		}
		if err := w.SetRing(ctx, uint64(round+2), []byte(next)); err != nil {
			t.Fatal(err)
		}
		resp, err := w.etcd.Get(ctx, "x")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.etcd.Compact(ctx, resp.Header.Revision); err != nil {
			t.Fatal(err)
		}
		awaitRing(next)
		for n := range peers {
			if n == round+1 {
				break
			}
		}
	}
}

// A watch that starts from a compacted revision, as one does that was cut off for long, lists anew.
func TestCompactedWatch(t *testing.T) {
	c := connect(t, fresh(t, server(t).Endpoint()))
	ctx := t.Context()
	var revision int64
	for i := range 3 {
		resp, err := c.etcd.Put(ctx, c.keys.ring(), strings.Repeat("r", i+1))
		if err != nil {
			t.Fatal(err)
		}
		revision = resp.Header.Revision
	}
	if _, err := c.etcd.Compact(ctx, revision); err != nil {
		t.Fatal(err)
	}
	told := 0
	progress, err := c.follow(ctx, "WatchRing", c.keys.ring(), []clientv3.OpOption{clientv3.WithRev(1)}, watcher{
		event: func(*clientv3.Event) error { return nil },
		tell:  func() error { told++; return nil },
	})
	if progress || err != nil || told != 0 {
		t.Fatalf("progress %v, error %v, told %d times", progress, err, told)
	}
}

// While etcd is away nothing spins: a call makes a bounded number of attempts.
func TestNoRetryStorm(t *testing.T) {
	s := server(t)
	cfg := fresh(t, s.Endpoint())
	cfg.RequestTimeout = 600 * time.Millisecond
	c, err := New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	attempts := 0
	err = c.write(t.Context(), "test", "", func(context.Context, bool) error {
		attempts++
		return &rpcError{errLost}
	})
	if !errors.Is(err, torus.ErrMetadataUnavailable) || attempts < 3 || attempts > 10 {
		t.Fatalf("%d attempts: %v", attempts, err)
	}
}

func TestRegister(t *testing.T) {
	reg := prometheus.NewRegistry()
	Register(reg)
	ctx := t.Context()
	cfg := torus.Config{MetadataAddress: server(t).Endpoint()}
	first, err := ring.NewEmpty(1, 2)
	if err != nil {
		t.Fatal(err)
	}
	if err := torus.InitMDS(ctx, "etcd", cfg, gmd, first); err != nil {
		t.Fatal(err)
	}
	for range 2 { // two clients in one process share the metrics
		m, err := torus.CreateMetadataService(ctx, "etcd", cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		if got, err := m.GlobalMetadata(ctx); err != nil || got != gmd || m.Kind() != torus.MetadataEtcd {
			t.Fatal(got, err)
		}
	}
	second, err := ring.NewEmpty(2, 3)
	if err != nil {
		t.Fatal(err)
	}
	if err := torus.SetRing(ctx, "etcd", cfg, second); err != nil {
		t.Fatal(err)
	}
	if err := torus.SetRing(ctx, "etcd", cfg, second); !errors.Is(err, torus.ErrNonSequentialRing) {
		t.Fatal(err)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	ops := 0.0
	for _, f := range families {
		if f.GetName() == "torus_etcd_base_ops_total" {
			for _, m := range f.Metric {
				ops += m.GetCounter().GetValue()
			}
		}
	}
	if ops < 6 {
		t.Errorf("%v calls counted", ops)
	}
	if err := torus.WipeMDS(ctx, "etcd", cfg); err != nil {
		t.Fatal(err)
	}
	m, err := torus.CreateMetadataService(ctx, "etcd", cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if _, err := m.GlobalMetadata(ctx); !errors.Is(err, torus.ErrNoGlobalMetadata) {
		t.Fatal(err)
	}
}

package node

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/e2e/nbdclient"
)

func testDev(t *testing.T) DevConfig {
	t.Helper()
	dir := t.TempDir()
	return DevConfig{
		Nodes: 3, Replication: 2, DataDir: filepath.Join(dir, "data"), Size: 256 << 20, Volumes: []DevVolume{{"demo", 64 << 20}},
		NBD: "unix:" + filepath.Join(dir, "nbd.sock"), CacheSize: DefaultCacheSize, HTTP: "127.0.0.1:0", Log: slog.New(slog.DiscardHandler),
	}
}

func dialNBD(t *testing.T, address, export string) *nbdclient.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	c, err := nbdclient.Unix(strings.TrimPrefix(address, "unix:"), export).DialUntil(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// A cluster in one process keeps everything over a restart: its data (D1), its peers' identities, and its addresses,
// so that what was typed once works again.
func TestDevRestart(t *testing.T) {
	cfg := testDev(t)
	began := time.Now()
	d, err := StartDev(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { d.Close() }()
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("started in %v", took)
	}
	data := bytes.Repeat([]byte("torus"), 1<<20)
	c := dialNBD(t, d.NBD(), "demo")
	if c.Size() != 64<<20 {
		t.Errorf("demo has %d bytes", c.Size())
	}
	if err := c.WriteAt(data, 12345, nbdclient.FUA); err != nil {
		t.Fatal(err)
	}
	addresses := func() (a []string) {
		for _, p := range d.peers {
			a = append(a, p.ID().String()+" at "+p.Address())
		}
		return a
	}
	before, etcd := addresses(), d.Etcd().String()

	// A second one on the same directory would destroy it.
	if _, err := StartDev(t.Context(), cfg); !errors.Is(err, torus.ErrLocked) && (err == nil || !strings.Contains(err.Error(), "in use")) {
		t.Errorf("a second one on the same data dir: %v", err)
	}
	c.Close()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}

	if d, err = StartDev(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	if after := addresses(); !slices.Equal(before, after) || etcd != d.Etcd().String() {
		t.Errorf("etcd %s, peers %q\nbecame %s, %q", etcd, before, d.Etcd(), after)
	}
	c = dialNBD(t, d.NBD(), "demo")
	defer c.Close()
	got := make([]byte, len(data))
	if err := c.ReadAt(got, 12345); err != nil || !bytes.Equal(got, data) {
		t.Errorf("D1: what was written is gone: %v", err)
	}
}

// A process that was killed leaves its name on the volumes. Its successor does not wait for that lease to run out; any other
// holder is left alone.
func TestLeftovers(t *testing.T) {
	cfg := testDev(t)
	d, err := StartDev(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	RegisterMetadata(nil)
	mds, err := d.Etcd().Connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer mds.Close()
	v, err := mds.Volume(t.Context(), "demo")
	if err != nil {
		t.Fatal(err)
	}
	id := torus.VolumeID(v.Id)
	for _, c := range []struct {
		what string
		left bool
	}{{"torusd dev", false}, {"torusblk nbdserve", true}} {
		lease, err := mds.GrantLease(t.Context(), time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := mds.Attach(t.Context(), id, lease, holder(c.what), true); err != nil {
			t.Fatal(err)
		}
		if err := releaseLeftovers(t.Context(), mds, "torusd dev"); err != nil {
			t.Fatal(err)
		}
		if h, err := mds.Holder(t.Context(), id); err != nil || (h != nil) != c.left {
			t.Errorf("attached to %s: %v, %v", c.what, h, err)
		}
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

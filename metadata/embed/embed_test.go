package embed_test

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/metadata/embed"
	"github.com/coreos/torus/metadata/etcd"
	"github.com/coreos/torus/models"
)

func start(t *testing.T, cfg embed.Config) *embed.Server {
	t.Helper()
	s, err := embed.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// What was acknowledged is there after a restart, on another port, and at a socket.
func TestRestart(t *testing.T) {
	dir := t.TempDir()
	gmd := torus.GlobalMetadata{ClusterID: "test", BlockSize: torus.DefaultBlockSize}
	for i, url := range []string{"127.0.0.1:0", "http://127.0.0.1:0", "unix://" + filepath.Join(t.TempDir(), "etcd.sock")} {
		began := time.Now()
		s := start(t, embed.Config{DataDir: filepath.Join(dir, "etcd"), ClientURL: url})
		t.Logf("serves at %s after %v", s.Endpoint(), time.Since(began))
		cfg := etcd.Config{Endpoints: []string{s.Endpoint()}}
		err := etcd.Init(t.Context(), cfg, gmd, nil)
		if i == 0 && err != nil || i > 0 && !errors.Is(err, torus.ErrExists) {
			t.Fatalf("start %d: init: %v", i, err)
		}
		c, err := etcd.New(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		v := &models.Volume{Name: strings.Repeat("v", i+1)}
		if err := c.CreateVolume(t.Context(), v); err != nil {
			t.Fatal(err)
		}
		list, err := c.Volumes(t.Context())
		if err != nil || len(list) != i+1 || v.Id != uint64(i+1) {
			t.Fatalf("start %d: %v, %v, id %d", i, list, err, v.Id)
		}
		c.Close()
		s.Close()
		s.Close()
	}
}

func TestRefusals(t *testing.T) {
	s := start(t, embed.Config{DataDir: t.TempDir(), ClientURL: "127.0.0.1:0"})
	refuse := func(what string, cfg embed.Config, want error, say string) {
		t.Helper()
		s, err := embed.Start(t.Context(), cfg)
		if err == nil {
			s.Close()
		}
		if !errors.Is(err, want) || !strings.Contains(err.Error(), say) {
			t.Errorf("%s: %v", what, err)
		}
	}
	refuse("address in use", embed.Config{DataDir: t.TempDir(), ClientURL: s.Endpoint()}, torus.ErrExists, "in use")
	for _, bad := range []string{"", "127.0.0.1", "ftp://127.0.0.1:1", "http://127.0.0.1:1/path", "http://%zz"} {
		refuse(bad, embed.Config{DataDir: t.TempDir(), ClientURL: bad}, torus.ErrInvalid, "unix:///PATH")
	}
	dir := t.TempDir()
	start(t, embed.Config{DataDir: dir, ClientURL: "127.0.0.1:0"})
	refuse("data directory in use", embed.Config{DataDir: dir, ClientURL: "127.0.0.1:0"}, torus.ErrLocked, dir)

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := embed.Start(ctx, embed.Config{DataDir: t.TempDir(), ClientURL: "127.0.0.1:0"}); err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("context over: %v", err)
	}
}

// An address for all interfaces is served on all of them, and reached here.
func TestEndpoint(t *testing.T) {
	s := start(t, embed.Config{DataDir: t.TempDir(), ClientURL: "0.0.0.0:0"})
	if !strings.HasPrefix(s.Endpoint(), "http://127.0.0.1:") || strings.HasSuffix(s.Endpoint(), ":0") {
		t.Fatalf("endpoint %s", s.Endpoint())
	}
}

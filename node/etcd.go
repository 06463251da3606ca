package node

import (
	"context"
	"log/slog"
	"strings"

	"github.com/coreos/torus/metadata/embed"
)

// startEtcd runs etcd within this process, at the first of where's endpoints, and returns where it is.
func startEtcd(ctx context.Context, where Etcd, dir string, log *slog.Logger) (*embed.Server, Etcd, error) {
	address := where.Endpoints[0]
	cfg := embed.Config{DataDir: dir, ClientURL: address}
	if log.Enabled(ctx, slog.LevelDebug) { // it calls a listener that is closed an error
		cfg.Log = log
	}
	if strings.HasPrefix(address, "https://") {
		cfg.CertFile, cfg.KeyFile, cfg.CAFile = where.CertFile, where.KeyFile, where.CAFile
	}
	s, err := embed.Start(ctx, cfg)
	if err != nil {
		return nil, where, err
	}
	where.Endpoints = []string{s.Endpoint()}
	return s, where, nil
}

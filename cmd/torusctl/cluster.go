package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/block"
	"github.com/coreos/torus/cmd/internal/cli"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/node"
)

// program is what torusctl calls itself to whoever finds a volume attached by it.
const program = "torusctl"

// session is a connection to the cluster for verbs that take as long as they take: to etcd at once, to the peers when they are needed.
type session struct {
	torus.MetadataService
	global torus.GlobalMetadata
	log    *slog.Logger
	client *node.Client // nil: not needed so far
}

// withCluster connects to etcd and calls fn, with a context that only the user ends. The cluster must be initialised.
func (c *ctl) withCluster(ctx context.Context, fn func(context.Context, *session) error) error {
	where, err := c.etcd.Resolve()
	if err != nil {
		return err
	}
	s := &session{log: cli.NewLogger(os.Stderr, slog.LevelWarn)} // for what an attach waits
	if c.debug {
		s.log = cli.NewLogger(os.Stderr, slog.LevelDebug)
		where.Log = s.log
	}
	starting, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	if s.MetadataService, err = where.Connect(starting); err != nil {
		return where.Explain(err)
	}
	defer s.MetadataService.Close()
	if s.global, err = s.GlobalMetadata(starting); err == nil {
		err = fn(ctx, s)
	}
	return where.Explain(errors.Join(err, s.disconnect()))
}

// disconnect releases what is attached, and leaves the peers.
func (s *session) disconnect() error {
	if s.client == nil {
		return nil
	}
	p := s.client
	s.client = nil
	return p.Close()
}

// peers connects to the peers, once.
func (s *session) peers(ctx context.Context) (*node.Client, error) {
	var err error
	if s.client == nil {
		s.client, err = node.StartClient(ctx, node.ClientConfig{
			MDS: s.MetadataService, Global: s.global, What: program, CacheSize: node.DefaultCacheSize, Log: s.log,
		})
	}
	return s.client, err
}

// recovering does something to a volume, again after an attach if it was not released in order and nobody has it attached.
func (s *session) recovering(ctx context.Context, vol string, do func() error) error {
	err := do()
	if !errors.Is(err, block.ErrUnclean) {
		return err
	}
	p, err := s.peers(ctx)
	if err == nil {
		err = p.Recover(ctx, vol)
	}
	if err != nil {
		return err
	}
	return do()
}

// snapshot takes a snapshot.
func (s *session) snapshot(ctx context.Context, vol, name string) (pin *models.Pin, err error) {
	err = s.recovering(ctx, vol, func() error {
		pin, err = block.CreateSnapshot(ctx, s, vol, name)
		return err
	})
	return pin, err
}

// dropTimeout bounds the removal of a snapshot that was needed for a while, also when the user has interrupted the rest.
const dropTimeout = 10 * time.Second

// drop deletes a snapshot that was needed for a while.
func (s *session) drop(ctx context.Context, vol, name string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), dropTimeout)
	defer cancel()
	return block.DeleteSnapshot(ctx, s, vol, name)
}

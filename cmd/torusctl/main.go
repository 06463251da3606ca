// Command torusctl administers a Torus cluster: it sets one up, and shows and changes its peers,
// its ring and its volumes. All it talks to is etcd.
package main

import (
	"context"
	"log/slog"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/coreos/torus"
	"github.com/coreos/torus/cmd/internal/cli"
	"github.com/coreos/torus/node"
)

func main() { cli.Main(rootCommand()) }

// ctl is what the verbs share: the global flags.
type ctl struct {
	etcd    cli.Etcd
	out     cli.Output
	timeout time.Duration
	debug   bool
}

func rootCommand() *cobra.Command {
	c := &ctl{}
	root := &cobra.Command{
		Use:   "torusctl",
		Short: "Administer a Torus cluster",
		PersistentPreRunE: func(*cobra.Command, []string) error {
			return c.out.Check()
		},
	}
	flags := root.PersistentFlags()
	c.etcd.AddFlags(flags)
	c.out.AddFlags(flags)
	flags.DurationVar(&c.timeout, "timeout", 10*time.Second, "how long to wait for etcd")
	flags.BoolVar(&c.debug, "debug", false, "log what happens to standard error")
	root.AddCommand(
		initCommand(c),
		wipeCommand(c),
		statusCommand(c),
		peerCommand(c),
		listPeersCommand(c),
		ringCommand(c),
		volumeCommand(c),
		blockCommand(c),
		backupCommand(c),
		fsckCommand(c),
		configCommand(c),
		cli.VersionCommand(),
	)
	return root
}

// withEtcd resolves where etcd is and calls fn with a context that ends after --timeout.
func (c *ctl) withEtcd(ctx context.Context, fn func(context.Context, node.Etcd) error) error {
	where, err := c.etcd.Resolve()
	if err != nil {
		return err
	}
	if c.debug {
		where.Log = cli.NewLogger(os.Stderr, slog.LevelDebug)
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	return where.Explain(fn(ctx, where))
}

// withMDS connects to etcd and calls fn. The cluster must be initialised.
func (c *ctl) withMDS(ctx context.Context, fn func(context.Context, torus.MetadataService) error) error {
	return c.withEtcd(ctx, func(ctx context.Context, where node.Etcd) error {
		mds, err := where.Connect(ctx)
		if err != nil {
			return err
		}
		defer mds.Close()
		if _, err := mds.GlobalMetadata(ctx); err != nil {
			return err
		}
		return fn(ctx, mds)
	})
}

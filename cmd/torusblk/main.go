// Command torusblk makes block volumes of a Torus cluster available on this machine.
package main

import (
	"time"

	"github.com/spf13/cobra"

	"github.com/coreos/torus/cmd/internal/cli"
	"github.com/coreos/torus/node"
)

func main() { cli.Main(rootCommand()) }

// blk is what the verbs share: the global flags.
type blk struct {
	etcd     cli.Etcd
	etcdWait time.Duration
	http     string
	force    bool
	cache    cli.Size
	compact  cli.Utilisation
	debug    bool
}

func rootCommand() *cobra.Command {
	b := &blk{cache: node.DefaultCacheSize}
	root := &cobra.Command{
		Use:   "torusblk",
		Short: "Use block volumes of a Torus cluster on this machine",
	}
	flags := root.PersistentFlags()
	b.etcd.AddFlags(flags)
	flags.DurationVar(&b.etcdWait, "etcd-wait", 30*time.Second, "how long to wait for etcd at the start")
	flags.StringVar(&b.http, "http", "", "serve /metrics, /healthz, /readyz and /debug/pprof at `[HOST]:PORT`")
	flags.BoolVar(&b.force, "force", false, "take volumes over from whoever has them attached")
	flags.Var(&b.cache, "cache-size", "memory for the maps of volumes")
	flags.Var(&b.compact, "utilisation", cli.UtilisationUsage)
	flags.BoolVar(&b.debug, "debug", false, "log more")
	root.AddCommand(nbdCommand(b), nbdserveCommand(b), cli.VersionCommand())
	return root
}

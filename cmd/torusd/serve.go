package main

import (
	"fmt"
	"net"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/coreos/torus/cmd/internal/cli"
	"github.com/coreos/torus/node"
)

// daemon is the flags of torusd.
type daemon struct {
	etcd        cli.Etcd
	etcdWait    time.Duration
	embedEtcd   bool
	dataDir     string
	size        capacityFlag
	peerAddress string
	labels      []string
	autoJoin    bool
	nbd         string
	cache       cli.Size
	compact     cli.Utilisation
	http        string
	debug       bool
	version     bool
	completion  bool

	host string // of the HTTP server, as it was given at first
	port int
}

func rootCommand() *cobra.Command {
	d := &daemon{cache: node.DefaultCacheSize}
	d.size.Set("1GiB") //nolint:errcheck // a constant
	cmd := &cobra.Command{
		Use:   "torusd --etcd HOST:2379 --data-dir DIR --size 20GiB|80% --peer-address tdp://IP:PORT",
		Short: "Store blocks for a Torus cluster",
		Long: `Store blocks for a Torus cluster: offer a part of this machine's disk to it. The first start makes the data dir
and waits for the cluster to be initialised (torusctl init); the peer holds data once it is in
the ring (torusctl peer add, or --auto-join). To try Torus on one machine: torusd dev.`,
		Args: cli.Args(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case d.version:
				_, err := fmt.Fprintln(cmd.OutOrStdout(), cli.Version(cmd.Name()))
				return err
			case d.completion:
				return cli.WriteCompletion(cmd.Root(), cmd.OutOrStdout(), "bash")
			}
			return d.run(cmd)
		},
	}
	flags := cmd.Flags()
	d.etcd.AddFlags(flags)
	flags.DurationVar(&d.etcdWait, "etcd-wait", time.Minute, "how long to wait for etcd at the start")
	flags.BoolVar(&d.embedEtcd, "embed-etcd", false, "run an etcd within this process, at the address given by --etcd, its data in the data dir")
	flags.StringVar(&d.dataDir, "data-dir", "torus-data", "`DIR` to store blocks in")
	flags.Var(&d.size, "size", "how much to store there: bytes, or a share of the file system")
	flags.StringVar(&d.peerAddress, "peer-address", "tdp://127.0.0.1:40000", "`tdp://IP:PORT` that clients and other peers reach this one at; port 0 is any that is free")
	flags.StringArrayVar(&d.labels, "label", nil, "`KEY=VALUE` that says where this peer is: zone=a, rack=r1; may be repeated")
	flags.BoolVar(&d.autoJoin, "auto-join", false, "put this peer into the ring")
	flags.StringVar(&d.nbd, "nbd", "", "also serve volumes over NBD at `[HOST]:PORT|unix:PATH`")
	flags.Var(&d.cache, "cache-size", "memory for the maps of volumes served over NBD")
	flags.Var(&d.compact, "utilisation", cli.UtilisationUsage)
	flags.StringVar(&d.http, "http", "", "serve /metrics, /healthz, /readyz and /debug/pprof at `[HOST]:PORT`")
	flags.BoolVar(&d.debug, "debug", false, "log more")
	flags.BoolVar(&d.version, "version", false, "print the version and exit")
	flags.BoolVar(&d.completion, "completion", false, "print a bash completion script and exit")
	flags.StringVar(&d.host, "host", "", "")
	flags.IntVar(&d.port, "port", 0, "")
	for _, old := range []string{"host", "port"} {
		if err := flags.MarkDeprecated(old, "use --http HOST:PORT"); err != nil {
			panic(err) // a flag that is not there
		}
	}
	cmd.AddCommand(devCommand(), cli.VersionCommand())
	return cmd
}

func (d *daemon) run(cmd *cobra.Command) error {
	labels, err := cli.ParseLabels(d.labels)
	if err != nil {
		return err
	}
	where, err := d.etcd.Resolve()
	if err != nil {
		return err
	}
	if d.http == "" && d.port != 0 {
		d.http = net.JoinHostPort(d.host, strconv.Itoa(d.port))
	}
	err = node.RunDaemon(cmd.Context(), node.DaemonConfig{
		Etcd:      where,
		EtcdWait:  d.etcdWait,
		EmbedEtcd: d.embedEtcd,
		Peer: node.PeerConfig{
			DataDir:  d.dataDir,
			Capacity: d.size.Capacity,
			Address:  d.peerAddress,
			Labels:   labels,
			AutoJoin: d.autoJoin,
		},
		NBD:       d.nbd,
		CacheSize: uint64(d.cache), Utilisation: d.compact.Value(),
		HTTP: d.http,
		Log:  cli.NewLogger(cmd.ErrOrStderr(), cli.LogLevel(d.debug)),
	})
	return where.Explain(err)
}

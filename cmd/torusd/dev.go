package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"github.com/spf13/cobra"

	"github.com/coreos/torus"
	"github.com/coreos/torus/cmd/internal/cli"
	"github.com/coreos/torus/node"
)

func devCommand() *cobra.Command {
	var (
		nodes       int
		replication int
		dataDir     string
		volumes     []string
		nbd         string
		http        string
		debug       bool
		size        = cli.Size(4 << 30)
		cache       = cli.Size(node.DefaultCacheSize)
	)
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Run a whole cluster in this process: etcd, peers, and volumes over NBD",
		Long: `Run a whole cluster in this process, to try Torus or to develop against it: etcd, three peers, a volume, and
an NBD server. All it keeps is in the data dir, and is there again at the next start. One process is no
protection against the loss of a machine.`,
		Args: cli.Args(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			wanted, err := parseVolumes(volumes)
			if err != nil {
				return err
			}
			if nodes < 1 || nodes > node.MaxDevNodes {
				return fmt.Errorf("--nodes %d: %w\ngive a number of peers from 1 to %d", nodes, torus.ErrInvalid, node.MaxDevNodes)
			}
			if replication < 1 || replication > torus.MaxReplication || replication > nodes {
				return fmt.Errorf("--replication %d: %w\ngive a number of copies from 1 to %d", replication, torus.ErrInvalid, min(nodes, torus.MaxReplication))
			}
			log := cli.NewLogger(cmd.ErrOrStderr(), slog.LevelWarn)
			if debug {
				log = cli.NewLogger(cmd.ErrOrStderr(), slog.LevelDebug)
			}
			dev, err := node.StartDev(cmd.Context(), node.DevConfig{
				Nodes: nodes, Replication: replication, DataDir: dataDir, Size: uint64(size), Volumes: wanted,
				NBD: nbd, CacheSize: uint64(cache), HTTP: http, Log: log,
			})
			if err != nil {
				if errors.Is(err, context.Canceled) && cmd.Context().Err() != nil {
					err = nil // told to stop while it was starting
				}
				return err
			}
			if _, err := fmt.Fprint(cmd.OutOrStdout(), whatNext(dev)); err != nil {
				dev.Close()
				return err
			}
			select {
			case <-cmd.Context().Done():
				return dev.Close()
			case err := <-dev.Failed():
				dev.Close()
				return err
			}
		},
	}
	flags := cmd.Flags()
	flags.IntVar(&nodes, "nodes", 3, "number of peers")
	flags.IntVar(&replication, "replication", 2, "number of copies of each block")
	flags.StringVar(&dataDir, "data-dir", "torus-dev", "`DIR` for everything")
	flags.StringArrayVar(&volumes, "volume", []string{"demo=1GiB"}, "`NAME=SIZE` of a volume to make unless it is there; may be repeated")
	flags.StringVar(&nbd, "nbd", "localhost:10809", "serve the volumes over NBD at `[HOST]:PORT|unix:PATH`")
	flags.StringVar(&http, "http", "", "serve /metrics, /healthz, /readyz and /debug/pprof at `[HOST]:PORT`")
	flags.Var(&size, "size", "how much each peer may store")
	flags.Var(&cache, "cache-size", "memory for the maps of volumes")
	flags.BoolVar(&debug, "debug", false, "log more")
	return cmd
}

func parseVolumes(list []string) ([]node.DevVolume, error) {
	var out []node.DevVolume
	for _, text := range list {
		name, size, ok := strings.Cut(text, "=")
		if !ok {
			return nil, fmt.Errorf("--volume %q: %w\nwrite it as NAME=SIZE, such as demo=1GiB", text, torus.ErrInvalid)
		}
		n, err := cli.ParseSize(size)
		if err != nil {
			return nil, err
		}
		out = append(out, node.DevVolume{Name: name, Size: n})
	}
	return out, nil
}

// whatNext says what can be typed now, in another terminal.
func whatNext(dev *node.Dev) string {
	var b strings.Builder
	etcd := strings.TrimPrefix(dev.Etcd().String(), "http://")
	fmt.Fprintf(&b, "torus: etcd at %s, %d peers, volumes over NBD at %s\n\nIn another terminal:\n", etcd, dev.Peers(), dev.NBD())
	for _, name := range dev.Volumes() {
		uri := nbdURI(dev.NBD(), name)
		fmt.Fprintf(&b, "  nbdinfo '%s'\n", uri)
		fmt.Fprintf(&b, "  qemu-img bench -w -t none -f raw '%s'\n", uri)
		if path, ok := strings.CutPrefix(dev.NBD(), "unix:"); ok {
			fmt.Fprintf(&b, "  nbd-client -unix %s -N %s /dev/nbd0\n", path, name)
		} else {
			host, port := hostPort(dev.NBD())
			fmt.Fprintf(&b, "  nbd-client %s %s -N %s /dev/nbd0 && mkfs.ext4 /dev/nbd0\n", host, port, name)
		}
		fmt.Fprintf(&b, "  qemu-system-x86_64 -drive file='%s',format=raw,if=virtio …\n", uri)
	}
	fmt.Fprintf(&b, "  torusctl -C %s status\n  torusctl -C %s volume create-block NAME 10GiB\n\nCtrl-C stops it; the data stays in %s.\n", etcd, etcd, dev.DataDir())
	return b.String()
}

package main

import (
	"context"
	"fmt"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"github.com/coreos/torus"
	"github.com/coreos/torus/cmd/internal/cli"
	"github.com/coreos/torus/node"
)

// clusterJSON is the cluster as -o json prints it.
type clusterJSON struct {
	ClusterID        string `json:"cluster_id"`
	BlockSizeBytes   uint64 `json:"block_size_bytes"`
	DefaultBlockSpec string `json:"default_block_spec"`
}

func initCommand(c *ctl) *cobra.Command {
	var noRing, view bool
	blockSize, spec := cli.Size(torus.DefaultBlockSize), node.DefaultBlockSpec
	cmd := &cobra.Command{
		Use:   "init [--block-size 4MiB] [--block-spec crc,rep=2] [--no-ring] [--view]",
		Short: "Make a new cluster: once, before anything else",
		Long: `Make a new cluster in etcd: its id, its block size and the block spec of volumes that name none.
None of these can be changed afterwards. Peers that wait for it start serving; they hold data once
they are in the ring (torusctl peer add).`,
		Args: cli.Args(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.withEtcd(cmd.Context(), func(ctx context.Context, where node.Etcd) error {
				if view {
					mds, err := where.Connect(ctx)
					if err != nil {
						return err
					}
					defer mds.Close()
					global, err := mds.GlobalMetadata(ctx)
					if err != nil {
						return err
					}
					return printCluster(c, cmd, global)
				}
				global, err := where.Init(ctx, torus.GlobalMetadata{
					ClusterID: uuid.NewString(), BlockSize: uint64(blockSize), DefaultBlockSpec: spec,
				}, !noRing)
				if err != nil {
					return err
				}
				if c.out.Format != "table" {
					return printCluster(c, cmd, global)
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "cluster %s: block size %s, block spec %s\n",
					global.ClusterID, cli.FormatSize(global.BlockSize, false), global.DefaultBlockSpec)
				return err
			})
		},
	}
	flags := cmd.Flags()
	flags.Var(&blockSize, "block-size", "size of a block, a power of two from 256KiB to 64MiB")
	flags.StringVar(&spec, "block-spec", spec, "how blocks are stored unless a volume says otherwise: crc,rep=N keeps N copies")
	flags.BoolVar(&noRing, "no-ring", false, "make no ring")
	flags.BoolVar(&view, "view", false, "print what the cluster was made with; change nothing")
	return cmd
}

func printCluster(c *ctl, cmd *cobra.Command, g torus.GlobalMetadata) error {
	return c.out.Print(cmd.OutOrStdout(), clusterJSON{g.ClusterID, g.BlockSize, g.DefaultBlockSpec}, cli.Table{
		Columns: []string{"cluster_id", "block_size_bytes", "default_block_spec"},
		Rows:    [][]any{{g.ClusterID, cli.Bytes(g.BlockSize), g.DefaultBlockSpec}},
	})
}

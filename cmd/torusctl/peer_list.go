package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/coreos/torus"
	"github.com/coreos/torus/cmd/internal/cli"
)

func peerListCommand(c *ctl) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the peers with their addresses, sizes and states",
		Args:  cli.Args(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.withMDS(cmd.Context(), func(ctx context.Context, mds torus.MetadataService) error {
				peers, err := listPeers(ctx, mds)
				if err != nil {
					return err
				}
				t := cli.Table{Columns: []string{"uuid", "address", "size_bytes", "used_bytes", "labels", "member", "status", "updated"}}
				for _, p := range peers {
					t.Rows = append(t.Rows, []any{
						p.UUID, p.Address, cli.Bytes(p.SizeBytes), cli.Bytes(p.UsedBytes), p.Labels, p.Member, p.Status, p.Updated,
					})
				}
				return c.out.Print(cmd.OutOrStdout(), peers, t)
			})
		},
	}
	c.out.AddListFlags(cmd.Flags())
	return cmd
}

// listPeersCommand is the name peer list had at first.
func listPeersCommand(c *ctl) *cobra.Command {
	cmd := peerListCommand(c)
	cmd.Use, cmd.Short = "list-peers", "The same as peer list"
	return cmd
}

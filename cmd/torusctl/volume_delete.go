package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/coreos/torus"
	"github.com/coreos/torus/block"
	"github.com/coreos/torus/cmd/internal/cli"
)

func volumeDeleteCommand(c *ctl) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "delete NAME [--force]",
		Short: "Delete a volume and all that is in it; with snapshots only by --force",
		Long: `Delete a volume and all that is in it. A volume that has snapshots is deleted with --force only, and they go with it. Clones of it go on
as they are: what they share with it stays stored until they are deleted or flattened (torusctl volume list --all shows it).`,
		Args: cli.Args("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.withMDS(cmd.Context(), func(ctx context.Context, mds torus.MetadataService) error {
				if err := block.Delete(ctx, mds, args[0], force); err != nil {
					return volumeError("delete", args[0], err)
				}
				_, err := fmt.Fprintf(cmd.OutOrStdout(), "volume %s is deleted\n", args[0])
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "together with its snapshots")
	return cmd
}

package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/coreos/torus"
	"github.com/coreos/torus/cmd/internal/cli"
)

func volumeDeleteCommand(c *ctl) *cobra.Command {
	return &cobra.Command{
		Use:   "delete NAME",
		Short: "Delete a volume and all that is in it",
		Args:  cli.Args("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.withMDS(cmd.Context(), func(ctx context.Context, mds torus.MetadataService) error {
				if err := mds.DeleteVolume(ctx, args[0]); err != nil {
					return volumeError("delete", args[0], err)
				}
				_, err := fmt.Fprintf(cmd.OutOrStdout(), "volume %s is deleted\n", args[0])
				return err
			})
		},
	}
}

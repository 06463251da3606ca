package main

import (
	"context"
	"slices"

	"github.com/spf13/cobra"

	"github.com/coreos/torus"
	"github.com/coreos/torus/block"
	"github.com/coreos/torus/cmd/internal/cli"
)

func volumeListCommand(c *ctl) *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the volumes with their sizes, and who has them attached",
		Args:  cli.Args(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.withMDS(cmd.Context(), func(ctx context.Context, mds torus.MetadataService) error {
				volumes, err := mds.Volumes(ctx)
				if err != nil {
					return err
				}
				if !all {
					volumes = slices.DeleteFunc(volumes, block.Deleted)
				}
				list, err := describeVolumes(ctx, mds, volumes)
				if err != nil {
					return err
				}
				return printVolumes(c, cmd, list, list)
			})
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "deleted ones too that are kept for their clones")
	c.out.AddListFlags(cmd.Flags())
	return cmd
}

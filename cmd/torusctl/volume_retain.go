package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/coreos/torus"
	"github.com/coreos/torus/block"
	"github.com/coreos/torus/cmd/internal/cli"
)

func volumeRetainCommand(c *ctl) *cobra.Command {
	return &cobra.Command{
		Use:   "retain VOLUME TIME|0",
		Short: "Say for how long a volume can be rewound, as 24h or 7d; 0: not at all",
		Long: `Say for how long a volume's past is kept, so that it can be rewound and cloned at any time within. It holds from now on: what has been
given up already does not come back. What is overwritten stays stored for that long.`,
		Args: cli.Args("VOLUME", "TIME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := parseDuration(args[1])
			if err != nil {
				return err
			}
			return c.withMDS(cmd.Context(), func(ctx context.Context, mds torus.MetadataService) error {
				if err := block.SetRetention(ctx, mds, args[0], d); err != nil {
					return volumeError("retain", args[0], err)
				}
				_, err := fmt.Fprintf(cmd.OutOrStdout(), "volume %s: %s\n", args[0], formatRetention(d))
				return err
			})
		},
	}
}

func formatRetention(d time.Duration) string {
	if d == 0 {
		return "its past is not kept"
	}
	return fmt.Sprintf("its past is kept for %v", d)
}

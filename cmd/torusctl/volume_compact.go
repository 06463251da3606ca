package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/coreos/torus/block"
	"github.com/coreos/torus/cmd/internal/cli"
)

func volumeCompactCommand(c *ctl) *cobra.Command {
	return &cobra.Command{
		Use:   "compact VOLUME",
		Short: "Give back the space of what was overwritten, trimmed, or kept only by snapshots that are gone",
		Long: `Give back the space of what was overwritten, trimmed, or kept only by snapshots that are gone, but for a twentieth or so. A quarter of what is stored may be
dead otherwise, since to copy the rest together costs more than the space is worth. Whoever has the volume attached does it, while it is in use; if nobody has,
this command does. It waits until it is done; what has been given back when it is interrupted stays given back.`,
		Args: cli.Args("VOLUME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.withCluster(cmd.Context(), func(ctx context.Context, s *session) error {
				if err := s.ofAttached(ctx, args[0], block.Compact); err != nil {
					return volumeError("compact", args[0], err)
				}
				_, err := fmt.Fprintf(cmd.OutOrStdout(), "volume %s is compact\n", args[0])
				return err
			})
		},
	}
}

package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/coreos/torus/cmd/internal/cli"
)

func volumeRewindCommand(c *ctl) *cobra.Command {
	var to string
	cmd := &cobra.Command{
		Use:   "rewind VOLUME --to TIME",
		Short: "Take a volume that is not attached back to what it was at a time",
		Long: `Take a volume back to what it was at a time, as far as its retention reaches (torusctl volume retain). Nobody may have it attached. To look
before you leap, clone it at that time: torusctl volume clone VOLUME@-5m LOOK.`,
		Args: cli.Args("VOLUME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if to == "" {
				return cli.Usage(cmd, "--to is missing: to which time?")
			}
			at, err := parsePast(to, time.Now())
			if err != nil {
				return err
			}
			return c.withCluster(cmd.Context(), func(ctx context.Context, s *session) error {
				if _, err := s.Volume(ctx, args[0]); err != nil {
					return volumeError("rewind", args[0], err)
				}
				p, err := s.peers(ctx)
				if err == nil {
					err = p.Rewind(ctx, args[0], at)
				}
				if err != nil {
					return pastError("rewind", args[0], err)
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "volume %s is what it was at %s\n", args[0], at.UTC().Format(time.RFC3339Nano))
				return err
			})
		},
	}
	cmd.Flags().StringVar(&to, "to", "", "`TIME` as 2006-01-02T15:04:05Z, or -5m for five minutes ago")
	return cmd
}

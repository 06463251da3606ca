package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/coreos/torus"
	"github.com/coreos/torus/cmd/internal/cli"
	"github.com/coreos/torus/node"
)

func ringSetReplicationCommand(c *ctl) *cobra.Command {
	return &cobra.Command{
		Use:   "set-replication N",
		Short: "Say how many copies new blocks get; those there are stay as they are",
		Args:  cli.Args("N"),
		RunE: func(cmd *cobra.Command, args []string) error {
			n, err := strconv.Atoi(args[0])
			if err != nil || n < 1 || n > torus.MaxReplication {
				return fmt.Errorf("replication %q: %w\ngive a number of copies from 1 to %d", args[0], torus.ErrInvalid, torus.MaxReplication)
			}
			return c.withMDS(cmd.Context(), func(ctx context.Context, mds torus.MetadataService) error {
				r, err := node.SetReplication(ctx, mds, n)
				if err != nil && !errors.Is(err, node.ErrUnchanged) {
					return err
				}
				return printRingChange(cmd, r)
			})
		},
	}
}

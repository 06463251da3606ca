package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/coreos/torus"
	"github.com/coreos/torus/block"
	"github.com/coreos/torus/cmd/internal/cli"
)

func volumeFlattenCommand(c *ctl) *cobra.Command {
	return &cobra.Command{
		Use:   "flatten VOLUME",
		Short: "Copy what a clone still shares with its origin, so that either can go without the other",
		Long: `Copy what a clone still shares with its origin, so that either can go without the other. Whoever has the clone attached does it, while it is
in use; if nobody has, this command does. It waits until it is done; what has been copied when it is interrupted stays copied.`,
		Args: cli.Args("VOLUME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.withCluster(cmd.Context(), func(ctx context.Context, s *session) error {
				if err := s.ofAttached(ctx, args[0], block.Flatten); err != nil {
					return volumeError("flatten", args[0], err)
				}
				_, err := fmt.Fprintf(cmd.OutOrStdout(), "volume %s shares nothing any more\n", args[0])
				return err
			})
		},
	}
}

// ofAttached has something done by whoever has a volume attached; if that is nobody, by this process.
func (s *session) ofAttached(ctx context.Context, vol string, do func(context.Context, torus.MetadataService, string) (bool, error)) error {
	done, err := do(ctx, s, vol)
	if done || err != nil {
		return err
	}
	p, err := s.peers(ctx)
	if err != nil {
		return err
	}
	disk, err := p.Open(ctx, vol)
	if err != nil {
		return err
	}
	defer disk.Close()
	_, err = do(ctx, s, vol)
	return err
}

package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/coreos/torus"
	"github.com/coreos/torus/block"
	"github.com/coreos/torus/cmd/internal/cli"
)

func volumeCreateBlockCommand(c *ctl) *cobra.Command {
	var spec, retain string
	cmd := &cobra.Command{
		Use:   "create-block NAME SIZE",
		Short: "Create a block volume; SIZE as 1GiB, 10G, 512MiB or bytes. Only what is written takes space",
		Args:  cli.Args("NAME", "SIZE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			size, err := cli.ParseSize(args[1])
			if err != nil {
				return err
			}
			kept, err := parseDuration(retain)
			if err != nil {
				return err
			}
			return c.withMDS(cmd.Context(), func(ctx context.Context, mds torus.MetadataService) error {
				v, err := block.Create(ctx, mds, args[0], size, spec)
				if err != nil {
					return volumeError("create", args[0], err)
				}
				if kept > 0 {
					if err := block.SetRetention(ctx, mds, args[0], kept); err != nil {
						return volumeError("retain", args[0], err)
					}
				}
				if c.out.Format != "table" {
					d, err := describeVolume(ctx, mds, v, 0)
					if err != nil {
						return err
					}
					return printVolumes(c, cmd, d, []volumeJSON{d})
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "volume %s: %s\n", v.Name, cli.FormatSize(v.SizeBytes, false))
				return err
			})
		},
	}
	cmd.Flags().StringVar(&spec, "block-spec", "", "how its blocks are stored, as crc,rep=3 (default: the cluster's)")
	cmd.Flags().StringVar(&retain, "retain", "0", "for how long its past is kept, to rewind and clone it, as 24h or 7d")
	return cmd
}

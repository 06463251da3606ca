package main

import (
	"context"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/coreos/torus"
	"github.com/coreos/torus/cmd/internal/cli"
	"github.com/coreos/torus/node"
)

func volumeInfoCommand(c *ctl) *cobra.Command {
	return &cobra.Command{
		Use:   "info NAME",
		Short: "Show one volume",
		Args:  cli.Args("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.withMDS(cmd.Context(), func(ctx context.Context, mds torus.MetadataService) error {
				v, err := mds.Volume(ctx, args[0])
				if err != nil {
					return volumeError("show", args[0], err)
				}
				r, err := node.CurrentRing(ctx, mds)
				if err != nil {
					return err
				}
				d, err := describeVolume(ctx, mds, v, r.Replication())
				if err != nil {
					return volumeError("show", args[0], err)
				}
				if c.out.Format == "table" {
					return c.out.Print(cmd.OutOrStdout(), nil, volumeDetails(d))
				}
				return printVolumes(c, cmd, d, []volumeJSON{d})
			})
		},
	}
}

// volumeDetails is a volume from top to bottom.
func volumeDetails(d volumeJSON) cli.Table {
	checkpoint := any("")
	if d.Checkpoint != nil {
		checkpoint = *d.Checkpoint
	}
	origin := ""
	if d.Origin != nil {
		origin = d.Origin.Volume + " of " + d.Origin.Time.Format(time.RFC3339)
	}
	return cli.Table{Rows: [][]any{
		{"name", d.Name},
		{"id", d.ID},
		{"type", d.Type},
		{"size", cli.Bytes(d.SizeBytes)},
		{"live", cli.Bytes(d.LiveBytes)},
		{"stored", cli.Bytes(d.StoredBytes)},
		{"stored per replica", cli.Bytes(d.StoredBytesPerReplica)},
		{"block spec", d.BlockSpec},
		{"status", d.Status},
		{"attached to", d.AttachedTo},
		{"epoch", d.Epoch},
		{"checkpoint", checkpoint},
		{"created", d.Created},
		{"snapshots", strings.Join(d.Snapshots, ", ")},
		{"clones", strings.Join(d.Clones, ", ")},
		{"origin", origin},
		{"past", formatRetention(time.Duration(d.RetainSeconds * float64(time.Second)))},
	}}
}

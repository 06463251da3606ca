package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/coreos/torus"
	"github.com/coreos/torus/cmd/internal/cli"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/node"
)

func peerRemoveCommand(c *ctl) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "remove ADDRESS|UUID... [--force]",
		Short: "Take peers out of the ring",
		Long: `Take peers out of the ring: new blocks go elsewhere. Blocks they hold stay where they are, and are read from
there while the peers run; nothing moves them to other peers yet. So a peer that holds data is removed only
with --force, and should then be kept running.`,
		Args: cobra.MinimumNArgs(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cli.Usage(cmd, "name the peers by address or UUID")
			}
			return c.withMDS(cmd.Context(), func(ctx context.Context, mds torus.MetadataService) error {
				all, err := mds.Peers(ctx)
				if err != nil {
					return err
				}
				peers, err := findPeers(all, args)
				if err != nil {
					return err
				}
				r, err := node.CurrentRing(ctx, mds)
				if err != nil {
					return err
				}
				if !force {
					if err := mayRemove(r, peers); err != nil {
						return err
					}
				}
				if r, err = node.RemoveFromRing(ctx, mds, peers); err == nil {
					err = printRingChange(cmd, r)
				} else if errors.Is(err, node.ErrUnchanged) {
					err = nil // not in the ring: forgetting is all there is to do
				}
				if err != nil {
					return err
				}
				return forget(ctx, cmd, mds, peers)
			})
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "even if blocks lose copies, or their last one")
	return cmd
}

// mayRemove refuses what could cost data or stop writes.
func mayRemove(r torus.Ring, peers []*models.Peer) error {
	members := len(r.Members())
	for _, p := range peers {
		id, err := torus.ParsePeerID(p.Uuid)
		if err != nil {
			return err
		}
		if !r.Members().Has(id) {
			continue
		}
		members--
		if p.UsedBytes > 0 {
			return &torus.Error{Op: "remove", Obj: "peer " + p.Uuid,
				Err:  fmt.Errorf("it holds %s, and nothing moves that to other peers yet", cli.FormatSize(p.UsedBytes, false)),
				Hint: "--force takes it out of the ring; keep it running then, blocks may have their last copies there"}
		}
	}
	if members < r.Replication() {
		return &torus.Error{Op: "remove", Obj: fmt.Sprintf("%d peers", len(r.Members())-members),
			Err:  fmt.Errorf("%d members would be left for %d copies, and writes would wait", members, r.Replication()),
			Hint: "add peers first, or lower `torusctl ring set-replication`, or give --force"}
	}
	return nil
}

// forget removes the records of peers that are gone; one that is alive would only come back.
func forget(ctx context.Context, cmd *cobra.Command, mds torus.MetadataService, peers []*models.Peer) error {
	for _, p := range peers {
		id, err := torus.ParsePeerID(p.Uuid)
		if err != nil {
			return err
		}
		if p.Alive {
			fmt.Fprintf(cmd.OutOrStdout(), "peer %s still runs\n", p.Uuid)
			continue
		}
		if err := mds.DeletePeer(ctx, id); err != nil && !errors.Is(err, torus.ErrNotExist) {
			return err
		}
		fmt.Fprintf(cmd.OutOrStdout(), "peer %s is forgotten\n", p.Uuid)
	}
	return nil
}

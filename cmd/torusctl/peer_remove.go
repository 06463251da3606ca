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
		Long: `Take peers out of the ring, for good: new blocks go elsewhere, and the other members make the copies that are missing again
by themselves, most endangered first; torusctl status counts them down (blocks short). Not for a peer that will be back: it
only fetches what it missed.

A peer that runs is removed only with --force. Its blocks are read from there until they are elsewhere, so keep it running
until no blocks are short. Never fewer members are left than there are copies.`,
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
				if err := mayRemove(r, peers, force); err != nil {
					return err
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
	cmd.Flags().BoolVar(&force, "force", false, "even if they run")
	return cmd
}

// mayRemove refuses what would stop writes, and, unless forced, what is not called for.
func mayRemove(r torus.Ring, peers []*models.Peer, force bool) error {
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
		if p.Alive && !force {
			return &torus.Error{Op: "remove", Obj: "peer " + p.Uuid, Err: errors.New("it is alive, and nothing moves its blocks away beforehand"),
				Hint: "if it is to go for good, stop its torusd first, or give --force and keep it running until `torusctl status` shows no blocks short"}
		}
	}
	if members < len(r.Members()) && members < r.Replication() {
		return &torus.Error{Op: "remove", Obj: fmt.Sprintf("%d peers", len(r.Members())-members),
			Err:  fmt.Errorf("%d members would be left for %d copies, and writes would wait", members, r.Replication()),
			Hint: "add peers first (torusctl peer add), or lower `torusctl ring set-replication`"}
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
			fmt.Fprintf(cmd.OutOrStdout(), "peer %s still runs: keep it so until torusctl status shows no blocks short\n", p.Uuid)
			continue
		}
		if err := mds.DeletePeer(ctx, id); err != nil && !errors.Is(err, torus.ErrNotExist) {
			return err
		}
		fmt.Fprintf(cmd.OutOrStdout(), "peer %s is forgotten\n", p.Uuid)
	}
	return nil
}

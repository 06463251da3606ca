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

func peerAddCommand(c *ctl) *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "add ADDRESS|UUID... | --all-peers",
		Short: "Put peers into the ring, so that they hold data",
		Args:  cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if all == (len(args) > 0) {
				return cli.Usage(cmd, "name peers by address or UUID, or give --all-peers")
			}
			return c.withMDS(cmd.Context(), func(ctx context.Context, mds torus.MetadataService) error {
				peers, err := mds.Peers(ctx)
				if err != nil {
					return err
				}
				if all {
					peers = alive(peers)
					if len(peers) == 0 {
						return fmt.Errorf("no peer is alive: %w\nstart torusd on the storage machines first", torus.ErrNoPeer)
					}
				} else if peers, err = findPeers(peers, args); err != nil {
					return err
				}
				r, err := node.AddToRing(ctx, mds, peers)
				if errors.Is(err, node.ErrUnchanged) {
					_, err = fmt.Fprintf(cmd.OutOrStdout(), "ring version %d has them all already\n", r.Version())
					return err
				}
				if err != nil {
					return err
				}
				return printRingChange(cmd, r)
			})
		},
	}
	cmd.Flags().BoolVar(&all, "all-peers", false, "all peers that are alive")
	return cmd
}

func alive(peers []*models.Peer) []*models.Peer {
	var out []*models.Peer
	for _, p := range peers {
		if p.Alive {
			out = append(out, p)
		}
	}
	return out
}

// findPeers finds the peers that names name: by address, UUID, or the first eight or more digits of a UUID.
func findPeers(peers []*models.Peer, names []string) ([]*models.Peer, error) {
	var out []*models.Peer
	for _, name := range names {
		p, err := node.FindPeer(peers, name)
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

func printRingChange(cmd *cobra.Command, r torus.Ring) error {
	if n := len(r.Members()); n < r.Replication() {
		fmt.Fprintf(cmd.ErrOrStderr(), "warning: the ring has %d members and keeps %d copies: writes wait for %d more (torusctl peer add)\n",
			n, r.Replication(), r.Replication()-n)
	}
	_, err := fmt.Fprintf(cmd.OutOrStdout(), "ring version %d: %d members, %d copies\n", r.Version(), len(r.Members()), r.Replication())
	return err
}

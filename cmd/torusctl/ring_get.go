package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/coreos/torus"
	"github.com/coreos/torus/cmd/internal/cli"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/node"
	"github.com/coreos/torus/ring"
)

// ringJSON is the ring as -o json prints it.
type ringJSON struct {
	Version     uint64       `json:"version"`
	Type        string       `json:"type"`
	Replication int          `json:"replication"`
	Slots       int          `json:"slots"`
	Members     []memberJSON `json:"members"`
}

type memberJSON struct {
	UUID    string            `json:"uuid"`
	Address string            `json:"address"`
	Weight  uint64            `json:"weight"`
	Share   float64           `json:"share"` // of all copies
	Labels  map[string]string `json:"labels"`
}

func ringGetCommand(c *ctl) *cobra.Command {
	return &cobra.Command{
		Use:   "get",
		Short: "Print the ring and its members",
		Args:  cli.Args(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.withMDS(cmd.Context(), func(ctx context.Context, mds torus.MetadataService) error {
				current, err := node.CurrentRing(ctx, mds)
				if err != nil {
					return err
				}
				peers, err := mds.Peers(ctx)
				if err != nil {
					return err
				}
				r := toRingJSON(current, peers)
				t := cli.Table{Columns: []string{"uuid", "address", "weight", "share", "labels"}}
				for _, m := range r.Members {
					t.Rows = append(t.Rows, []any{m.UUID, m.Address, cli.Bytes(m.Weight), fmt.Sprintf("%.4f", m.Share), m.Labels})
				}
				if c.out.Format == "table" {
					fmt.Fprintf(cmd.OutOrStdout(), "version %d, type %s, %d copies, %d members\n", r.Version, r.Type, r.Replication, len(r.Members))
				}
				return c.out.Print(cmd.OutOrStdout(), r, t)
			})
		},
	}
}

func toRingJSON(current torus.Ring, peers []*models.Peer) ringJSON {
	r := ringJSON{
		Version: current.Version(), Type: ringTypeName(current.Type()), Replication: current.Replication(), Members: []memberJSON{},
	}
	if table, ok := current.(*ring.SlotTable); ok {
		r.Slots = table.Slots()
	}
	address := map[string]string{}
	for _, p := range peers {
		address[p.Uuid] = p.Address
	}
	for _, share := range ring.Shares(current) {
		id, labels := share.ID.String(), share.Labels
		if labels == nil {
			labels = map[string]string{}
		}
		r.Members = append(r.Members, memberJSON{id, address[id], share.Weight, share.Copies, labels})
	}
	return r
}

func ringTypeName(t torus.RingType) string {
	switch t {
	case torus.RingEmpty:
		return "empty"
	case torus.RingSingle:
		return "single"
	case torus.RingSlotTable:
		return "slot-table"
	}
	return fmt.Sprintf("type %d", t)
}

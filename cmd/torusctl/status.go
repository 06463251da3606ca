package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/coreos/torus"
	"github.com/coreos/torus/cmd/internal/cli"
	"github.com/coreos/torus/node"
)

// statusJSON is the state of the cluster as -o json prints it.
type statusJSON struct {
	clusterJSON
	Status          string     `json:"status"` // "ok", "degraded", or "stalled": writes wait
	Problems        []string   `json:"problems"`
	RingVersion     uint64     `json:"ring_version"`
	Replication     int        `json:"replication"`
	Members         int        `json:"members"`
	SizeBytes       uint64     `json:"size_bytes"` // of the members
	UsedBytes       uint64     `json:"used_bytes"`
	BlocksShort     uint64     `json:"blocks_short"`   // copies that are missing or damaged, by the last count of each member
	BlocksCorrupt   uint64     `json:"blocks_corrupt"` // of these, damaged ones
	PeersChecking   int        `json:"peers_checking"` // members that have not looked through their blocks under this ring yet
	Volumes         int        `json:"volumes"`
	VolumesAttached int        `json:"volumes_attached"`
	Peers           []peerJSON `json:"peers"`
}

func statusCommand(c *ctl) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show how the cluster is, and what is wrong with it",
		Args:  cli.Args(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.withMDS(cmd.Context(), func(ctx context.Context, mds torus.MetadataService) error {
				s, err := gatherStatus(ctx, mds)
				if err != nil {
					return err
				}
				return c.out.Print(cmd.OutOrStdout(), s, statusTable(s, c.out.Format == "csv"))
			})
		},
	}
}

func gatherStatus(ctx context.Context, mds torus.MetadataService) (statusJSON, error) {
	var s statusJSON
	global, err := mds.GlobalMetadata(ctx)
	if err != nil {
		return s, err
	}
	s.clusterJSON = clusterJSON{global.ClusterID, global.BlockSize, global.DefaultBlockSpec}
	r, err := node.CurrentRing(ctx, mds)
	if err != nil {
		return s, err
	}
	s.RingVersion, s.Replication, s.Members = r.Version(), r.Replication(), len(r.Members())
	if s.Peers, err = listPeers(ctx, mds); err != nil {
		return s, err
	}
	volumes, err := mds.Volumes(ctx)
	if err != nil {
		return s, err
	}
	list, err := describeVolumes(ctx, mds, volumes)
	if err != nil {
		return s, err
	}
	s.Volumes = len(list)
	for _, v := range list {
		if v.AttachedTo != "" {
			s.VolumesAttached++
		}
	}
	s.assess()
	return s, nil
}

// assess says what is wrong, from what is known.
func (s *statusJSON) assess() {
	s.Status, s.Problems = "ok", []string{}
	healthy, unknown := 0, uint64(0)
	for _, p := range s.Peers {
		if !p.Member {
			s.Problems = append(s.Problems, fmt.Sprintf("peer %s (%s) is not in the ring: torusctl peer add %s", p.UUID, p.Address, p.UUID))
			continue
		}
		s.SizeBytes += p.SizeBytes
		s.UsedBytes += p.UsedBytes
		s.BlocksShort += p.BlocksShort
		s.BlocksCorrupt += p.BlocksCorrupt
		unknown = max(unknown, p.VolumesUnknown)
		if p.Status == statusDown {
			s.BlocksShort += p.UsedBytes / max(s.BlockSizeBytes, 1) // what it held
		} else if p.CheckedRing < s.RingVersion {
			s.PeersChecking++
		}
		switch p.Status {
		case node.StateOK:
			healthy++
		case node.StateNearFull:
			healthy++
			s.Problems = append(s.Problems, fmt.Sprintf("peer %s (%s) is nearly full: add peers or delete volumes", p.UUID, p.Address))
		case statusDown:
			s.Status = "degraded"
			s.Problems = append(s.Problems, fmt.Sprintf("peer %s (%s) is down: start its torusd, or if it is gone for good: torusctl peer remove %s", p.UUID, p.Address, p.UUID))
		default:
			s.Status = "degraded"
			s.Problems = append(s.Problems, fmt.Sprintf("peer %s (%s) is %s", p.UUID, p.Address, p.Status))
		}
	}
	if s.BlocksShort > 0 {
		if s.Status == "ok" {
			s.Status = "degraded"
		}
		s.Problems = append(s.Problems, fmt.Sprintf("%d copies of blocks are missing: members that are up make them again by themselves", s.BlocksShort))
	}
	if s.BlocksCorrupt > 0 {
		s.Problems = append(s.Problems, fmt.Sprintf("%d of them are damaged: replaced from good ones; the log of torusd names those that have none", s.BlocksCorrupt))
	}
	if unknown > 0 {
		if s.Status == "ok" {
			s.Status = "degraded"
		}
		s.Problems = append(s.Problems, fmt.Sprintf("the blocks of %d volumes cannot be listed now: what is missing of them is not known", unknown))
	}
	if healthy < s.Replication {
		s.Status = "stalled"
		s.Problems = append(s.Problems, fmt.Sprintf("%d members can take %d copies: writes wait until there are %d", healthy, s.Replication, s.Replication))
	}
}

func statusTable(s statusJSON, flat bool) cli.Table {
	columns := []string{"status", "cluster_id", "block_size_bytes", "default_block_spec", "ring_version", "replication", "members",
		"size_bytes", "used_bytes", "blocks_short", "blocks_corrupt", "peers_checking", "volumes", "volumes_attached"}
	values := []any{s.Status, s.ClusterID, cli.Bytes(s.BlockSizeBytes), s.DefaultBlockSpec, s.RingVersion, s.Replication, s.Members,
		cli.Bytes(s.SizeBytes), cli.Bytes(s.UsedBytes), s.BlocksShort, s.BlocksCorrupt, s.PeersChecking, s.Volumes, s.VolumesAttached}
	if flat {
		return cli.Table{Columns: columns, Rows: [][]any{values}}
	}
	t := cli.Table{Rows: [][]any{
		{"cluster", s.ClusterID},
		{"status", s.Status},
		{"block size", cli.Bytes(s.BlockSizeBytes)},
		{"block spec", s.DefaultBlockSpec},
		{"ring", fmt.Sprintf("version %d, %d copies, %d members", s.RingVersion, s.Replication, s.Members)},
		{"used", fmt.Sprintf("%s of %s", cli.FormatSize(s.UsedBytes, false), cli.FormatSize(s.SizeBytes, false))},
		{"blocks short", shortText(s)},
		{"volumes", fmt.Sprintf("%d, %d attached", s.Volumes, s.VolumesAttached)},
	}}
	for _, p := range s.Peers {
		t.Rows = append(t.Rows, []any{"peer", fmt.Sprintf("%s %s %s", p.UUID, p.Address, p.Status)})
	}
	for _, p := range s.Problems {
		t.Rows = append(t.Rows, []any{"problem", p})
	}
	return t
}

func shortText(s statusJSON) string {
	text := fmt.Sprint(s.BlocksShort)
	if s.BlocksCorrupt > 0 {
		text += fmt.Sprintf(", %d of them damaged", s.BlocksCorrupt)
	}
	if s.PeersChecking > 0 {
		text += fmt.Sprintf(" (%d peers are still looking)", s.PeersChecking)
	}
	return text
}

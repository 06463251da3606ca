package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"github.com/coreos/torus"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/node"
)

func peerCommand(c *ctl) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "peer",
		Short: "Show peers, and say which of them hold data",
	}
	cmd.AddCommand(peerListCommand(c), peerAddCommand(c), peerRemoveCommand(c))
	return cmd
}

// peerJSON is a peer as -o json prints it. The keys are an interface: scripts read them.
type peerJSON struct {
	UUID      string            `json:"uuid"`
	Address   string            `json:"address"`
	SizeBytes uint64            `json:"size_bytes"`
	UsedBytes uint64            `json:"used_bytes"`
	Labels    map[string]string `json:"labels"`
	Member    bool              `json:"member"` // of the ring
	Status    string            `json:"status"` // what it said of itself last, or "down"
	Version   string            `json:"version"`
	Updated   time.Time         `json:"updated"`

	BlocksShort    uint64 `json:"blocks_short"`    // that it is to hold whole and does not
	BlocksCorrupt  uint64 `json:"blocks_corrupt"`  // of these, damaged ones
	BlocksRepaired uint64 `json:"blocks_repaired"` // since it was started
	CheckedRing    uint64 `json:"checked_ring"`    // version under which it last looked through all its blocks
	VolumesUnknown uint64 `json:"volumes_unknown"` // that it cannot look through
}

// StatusDown is the status of a peer whose lease has run out.
const statusDown = "down"

func toPeerJSON(p *models.Peer, members torus.PeerList) peerJSON {
	out := peerJSON{
		UUID: p.Uuid, Address: p.Address, SizeBytes: p.SizeBytes, UsedBytes: p.UsedBytes, Labels: p.Labels,
		Status: p.State, Version: p.Version, Updated: time.UnixMilli(p.UpdatedUnixMs).UTC(),
		BlocksShort: p.ShortBlocks, BlocksCorrupt: p.CorruptBlocks, BlocksRepaired: p.RepairedBlocks, CheckedRing: p.CheckedRing, VolumesUnknown: p.UnknownVolumes,
	}
	if id, err := torus.ParsePeerID(p.Uuid); err == nil {
		out.Member = members.Has(id)
	}
	if out.Labels == nil {
		out.Labels = map[string]string{}
	}
	if !p.Alive {
		out.Status = statusDown
	}
	return out
}

// listPeers returns all peers, and the members of the ring that nothing else is known of.
func listPeers(ctx context.Context, mds torus.MetadataService) ([]peerJSON, error) {
	peers, err := mds.Peers(ctx)
	if err != nil {
		return nil, err
	}
	r, err := node.CurrentRing(ctx, mds)
	if err != nil {
		return nil, err
	}
	known := torus.PeerList{}
	out := make([]peerJSON, 0, len(peers))
	for _, p := range peers {
		out = append(out, toPeerJSON(p, r.Members()))
		if id, err := torus.ParsePeerID(p.Uuid); err == nil {
			known = append(known, id)
		}
	}
	for _, id := range r.Members() {
		if !known.Has(id) {
			out = append(out, peerJSON{UUID: id.String(), Labels: map[string]string{}, Member: true, Status: "unknown"})
		}
	}
	return out, nil
}

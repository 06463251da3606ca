package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/coreos/torus"
	"github.com/coreos/torus/cmd/internal/cli"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/node"
)

func volumeCommand(c *ctl) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "volume",
		Short: "Create, show and delete volumes",
	}
	cmd.AddCommand(volumeListCommand(c), volumeInfoCommand(c), volumeCreateBlockCommand(c), volumeDeleteCommand(c))
	return cmd
}

// blockCommand has what is particular to volumes of type block.
func blockCommand(c *ctl) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "block",
		Short: "Block volumes",
	}
	create := volumeCreateBlockCommand(c)
	create.Use = "create NAME SIZE"
	cmd.AddCommand(create)
	return cmd
}

// volumeJSON is a volume as -o json prints it. The keys are an interface: scripts read them.
type volumeJSON struct {
	Name      string `json:"name"`
	ID        uint64 `json:"id"`
	Type      string `json:"type"`
	SizeBytes uint64 `json:"size_bytes"`
	// LiveBytes is what the volume's data takes, StoredBytes what all its blocks take on all peers together, as
	// of the last checkpoint.
	LiveBytes             uint64 `json:"live_bytes"`
	StoredBytes           uint64 `json:"stored_bytes"`
	StoredBytesPerReplica uint64 `json:"stored_bytes_per_replica"`
	Status                string `json:"status"`      // "attached" or "available"
	AttachedTo            string `json:"attached_to"` // empty: nobody

	BlockSpec  string     `json:"block_spec"`
	Created    time.Time  `json:"created"`
	Epoch      uint64     `json:"epoch"`
	Checkpoint *time.Time `json:"checkpoint"` // null: none yet
}

// describeVolume puts together what the MDS knows of a volume.
func describeVolume(ctx context.Context, mds torus.MetadataService, v *models.Volume, replication int) (volumeJSON, error) {
	out := volumeJSON{
		Name: v.Name, ID: v.Id, Type: v.Type, SizeBytes: v.SizeBytes, Status: "available",
		BlockSpec: v.BlockSpec,
	}
	if v.CreatedUnixMs > 0 {
		out.Created = time.UnixMilli(v.CreatedUnixMs).UTC()
	}
	id := torus.VolumeID(v.Id)
	state, err := mds.VolumeState(ctx, id)
	if err != nil {
		return out, err
	}
	holder, err := mds.Holder(ctx, id)
	if err != nil {
		return out, err
	}
	out.Epoch = state.Epoch
	if head := state.Head; head != nil {
		out.LiveBytes, out.StoredBytesPerReplica = head.LiveBytes, head.StoredBytes
		out.StoredBytes = head.StoredBytes * uint64(node.Copies(v.BlockSpec, replication))
		at := time.UnixMilli(head.CommittedUnixMs).UTC()
		out.Checkpoint = &at
	}
	if holder != nil {
		out.Status = "attached"
		out.AttachedTo = fmt.Sprintf("%s pid %d (%s)", holder.Host, holder.Pid, holder.What)
	}
	return out, nil
}

// describeVolumes is describeVolume for several; what has been deleted meanwhile is left out.
func describeVolumes(ctx context.Context, mds torus.MetadataService, volumes []*models.Volume) ([]volumeJSON, error) {
	r, err := node.CurrentRing(ctx, mds)
	if err != nil {
		return nil, err
	}
	out := make([]volumeJSON, 0, len(volumes))
	for _, v := range volumes {
		d, err := describeVolume(ctx, mds, v, r.Replication())
		if errors.Is(err, torus.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		out = append(out, d)
	}
	return out, nil
}

func printVolumes(c *ctl, cmd *cobra.Command, v any, volumes []volumeJSON) error {
	t := cli.Table{Columns: []string{"name", "id", "type", "size_bytes", "live_bytes", "stored_bytes", "stored_bytes_per_replica", "status", "attached_to"}}
	for _, d := range volumes {
		t.Rows = append(t.Rows, []any{
			d.Name, d.ID, d.Type, cli.Bytes(d.SizeBytes), cli.Bytes(d.LiveBytes), cli.Bytes(d.StoredBytes), cli.Bytes(d.StoredBytesPerReplica),
			d.Status, d.AttachedTo,
		})
	}
	return c.out.Print(cmd.OutOrStdout(), v, t)
}

// volumeError adds the volume's name, and what to do, to what the MDS answered.
func volumeError(op, name string, err error) error {
	e := &torus.Error{Op: op, Obj: "volume " + name, Err: err}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, torus.ErrNotExist):
		e.Hint = "`torusctl volume list` shows the volumes there are"
	case errors.Is(err, torus.ErrExists):
		e.Hint = "choose another name, or delete it first with `torusctl volume delete " + name + "`"
	case errors.Is(err, torus.ErrLocked):
		e.Hint = "stop what has it attached first; `torusctl volume info " + name + "` shows it"
	default:
		return fmt.Errorf("%s volume %s: %w", op, name, err)
	}
	return e
}

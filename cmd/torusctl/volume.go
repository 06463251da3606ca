package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/coreos/torus"
	"github.com/coreos/torus/block"
	"github.com/coreos/torus/cmd/internal/cli"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/node"
)

func volumeCommand(c *ctl) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "volume",
		Short: "Create, show, clone, resize and delete volumes",
	}
	cmd.AddCommand(volumeListCommand(c), volumeInfoCommand(c), volumeCreateBlockCommand(c), volumeDeleteCommand(c), volumeResizeCommand(c),
		volumeCloneCommand(c), volumeFlattenCommand(c), volumeCompactCommand(c), volumeRewindCommand(c), volumeRetainCommand(c))
	return cmd
}

// blockCommand has what is particular to volumes of type block.
func blockCommand(c *ctl) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "block",
		Short: "Block volumes: snapshots, and files to and from volumes",
	}
	create := volumeCreateBlockCommand(c)
	create.Use = "create NAME SIZE"
	cmd.AddCommand(create, blockSnapshotCommand(c), blockDumpCommand(c), blockLoadCommand(c))
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
	Status                string `json:"status"`      // "attached", "available", or "deleted": kept for its clones
	AttachedTo            string `json:"attached_to"` // empty: nobody

	BlockSpec  string     `json:"block_spec"`
	Created    time.Time  `json:"created"`
	Epoch      uint64     `json:"epoch"`
	Checkpoint *time.Time `json:"checkpoint"` // null: none yet

	Snapshots     []string    `json:"snapshots"`
	Clones        []string    `json:"clones"` // volumes that need what this one keeps for them
	Origin        *originJSON `json:"origin"` // of a clone; null: none
	RetainSeconds float64     `json:"retain_seconds"`
}

// originJSON is what a clone began with.
type originJSON struct {
	Volume string    `json:"volume"`
	Time   time.Time `json:"time"`
}

// describeVolume puts together what the MDS knows of a volume.
func describeVolume(ctx context.Context, mds torus.MetadataService, v *models.Volume, replication int) (volumeJSON, error) {
	out := volumeJSON{
		Name: v.Name, ID: v.Id, Type: v.Type, SizeBytes: v.SizeBytes, Status: "available",
		BlockSpec: v.BlockSpec, Snapshots: []string{}, Clones: []string{},
	}
	if block.Deleted(v) {
		out.Status = "deleted"
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
	out.Epoch, out.RetainSeconds = state.Epoch, (time.Duration(state.RetainMs) * time.Millisecond).Seconds()
	for _, p := range block.Snapshots(state.VolumeState) {
		out.Snapshots = append(out.Snapshots, p.Name)
	}
	if err := out.relatives(ctx, mds, v, state.Pins); err != nil {
		return out, err
	}
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

// relatives fills in the clones of a volume and its origin, by their names.
func (out *volumeJSON) relatives(ctx context.Context, mds torus.MetadataService, v *models.Volume, pins []*models.Pin) error {
	if v.Origin == nil && !slices.ContainsFunc(pins, func(p *models.Pin) bool { return p.Clone != 0 }) {
		return nil
	}
	all, err := mds.Volumes(ctx)
	if err != nil {
		return err
	}
	name := func(id uint64) string {
		for _, x := range all {
			if x.Id == id {
				return x.Name
			}
		}
		return fmt.Sprintf("volume %d", id)
	}
	for _, p := range pins {
		if p.Clone != 0 {
			out.Clones = append(out.Clones, name(p.Clone))
		}
	}
	if v.Origin != nil {
		out.Origin = &originJSON{name(v.Origin.Volume), time.UnixMicro(int64(v.Origin.At.GetTimeUs())).UTC()}
	}
	return nil
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

// volumeError adds the volume's name, and what to do, to what is wrong, unless that says it already.
func volumeError(op, name string, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, torus.ErrLocked) { // by whom is what the innermost one says
		for inner := (*torus.Error)(nil); errors.As(err, &inner); {
			err = inner.Err
		}
	}
	var told *torus.Error
	if errors.As(err, &told) && told.Hint != "" {
		return err
	}
	e := &torus.Error{Op: op, Obj: "volume " + name, Err: err}
	if told != nil && told.Obj == e.Obj {
		e.Err = told.Err
	}
	base, _ := block.SplitName(name)
	switch {
	case errors.Is(err, torus.ErrNotExist), errors.Is(err, device.ErrNotExist):
		e.Hint = "`torusctl volume list` shows the volumes there are"
	case errors.Is(err, torus.ErrExists):
		e.Hint = "choose another name, or delete it first with `torusctl volume delete " + base + "`"
	case errors.Is(err, torus.ErrLocked):
		e.Hint = "stop what has it attached first; `torusctl volume info " + base + "` shows it. The lease of one that died ends after 10 s"
	case errors.Is(err, context.Canceled):
		e.Err, e.Hint = errors.New("interrupted"), "`torusctl volume info "+base+"` shows what became of it"
	case strings.Contains(err.Error(), "\n"):
		return err
	default:
		return e
	}
	return e
}

// pastError is volumeError for what looks for a volume's past.
func pastError(op, name string, err error) error {
	if !errors.Is(err, torus.ErrNotExist) {
		return volumeError(op, name, err)
	}
	vol, _ := block.SplitName(name)
	return &torus.Error{Op: op, Obj: "volume " + name, Err: err,
		Hint: "its past is kept from the first checkpoint on after `torusctl volume retain " + vol + " 24h`; snapshots stay until they are deleted"}
}

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/coreos/torus"
	"github.com/coreos/torus/block"
	"github.com/coreos/torus/cmd/internal/cli"
	"github.com/coreos/torus/models"
)

func blockSnapshotCommand(c *ctl) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "snapshot",
		Short: "Keep what volumes are at a moment, to read it, to clone it or to go back to it",
	}
	cmd.AddCommand(snapshotCreateCommand(c), snapshotListCommand(c), snapshotDeleteCommand(c), snapshotRestoreCommand(c))
	return cmd
}

// parseSnapshot takes VOL@SNAP apart.
func parseSnapshot(name string) (vol, snap string, err error) {
	vol, snap = block.SplitName(name)
	if vol == "" || snap == "" {
		return "", "", fmt.Errorf("%q names no snapshot: %w\nwrite it as VOLUME@SNAPSHOT", name, torus.ErrInvalid)
	}
	return vol, snap, nil
}

// snapshotJSON is a snapshot as -o json prints it. The keys are an interface: scripts read them.
type snapshotJSON struct {
	Name      string    `json:"name"`
	Volume    string    `json:"volume"`
	Created   time.Time `json:"created"`
	SizeBytes uint64    `json:"size_bytes"`
	Time      time.Time `json:"time"` // the moment it shows, by the clock of whoever had the volume attached
}

func describeSnapshot(vol string, p *models.Pin) snapshotJSON {
	return snapshotJSON{
		Name: p.Name, Volume: vol, Created: time.UnixMilli(p.CreatedUnixMs).UTC(), SizeBytes: p.At.GetSizeBytes(), Time: time.UnixMicro(int64(p.At.GetTimeUs())).UTC(),
	}
}

func printSnapshots(c *ctl, cmd *cobra.Command, v any, l []snapshotJSON) error {
	t := cli.Table{Columns: []string{"name", "created", "size_bytes", "time"}}
	for _, s := range l {
		t.Rows = append(t.Rows, []any{s.Name, s.Created, cli.Bytes(s.SizeBytes), s.Time.Format(time.RFC3339Nano)})
	}
	return c.out.Print(cmd.OutOrStdout(), v, t)
}

func snapshotCreateCommand(c *ctl) *cobra.Command {
	return &cobra.Command{
		Use:   "create VOLUME@SNAPSHOT",
		Short: "Keep what a volume is now, whether it is attached or not",
		Long: `Keep what a volume is now: all that has been acknowledged until this moment. It takes a flush and two small transactions, however
large the volume is, and nobody has to stop writing. The snapshot is read as VOLUME@SNAPSHOT over NBD, by any number of clients.`,
		Args: cli.Args("VOLUME@SNAPSHOT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			vol, snap, err := parseSnapshot(args[0])
			if err != nil {
				return err
			}
			return c.withCluster(cmd.Context(), func(ctx context.Context, s *session) error {
				p, err := s.snapshot(ctx, vol, snap)
				if err != nil {
					return snapshotError("create", vol, snap, err)
				}
				d := describeSnapshot(vol, p)
				if c.out.Format != "table" {
					return printSnapshots(c, cmd, d, []snapshotJSON{d})
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "snapshot %s@%s of %s\n", vol, snap, d.Time.Format(time.RFC3339Nano))
				return err
			})
		},
	}
}

func snapshotListCommand(c *ctl) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list VOLUME",
		Short: "List the snapshots of a volume, oldest first",
		Args:  cli.Args("VOLUME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.withMDS(cmd.Context(), func(ctx context.Context, mds torus.MetadataService) error {
				st, err := volumeState(ctx, mds, args[0])
				if err != nil {
					return volumeError("show", args[0], err)
				}
				l := []snapshotJSON{}
				for _, p := range block.Snapshots(st.VolumeState) {
					l = append(l, describeSnapshot(args[0], p))
				}
				return printSnapshots(c, cmd, l, l)
			})
		},
	}
	c.out.AddListFlags(cmd.Flags())
	return cmd
}

func volumeState(ctx context.Context, mds torus.MetadataService, name string) (torus.VolumeState, error) {
	v, err := mds.Volume(ctx, name)
	if err != nil {
		return torus.VolumeState{}, err
	}
	return mds.VolumeState(ctx, torus.VolumeID(v.Id))
}

func snapshotDeleteCommand(c *ctl) *cobra.Command {
	return &cobra.Command{
		Use:   "delete VOLUME@SNAPSHOT",
		Short: "Give a snapshot up; what only it needed becomes free",
		Args:  cli.Args("VOLUME@SNAPSHOT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			vol, snap, err := parseSnapshot(args[0])
			if err != nil {
				return err
			}
			return c.withMDS(cmd.Context(), func(ctx context.Context, mds torus.MetadataService) error {
				if err := block.DeleteSnapshot(ctx, mds, vol, snap); err != nil {
					return snapshotError("delete", vol, snap, err)
				}
				_, err := fmt.Fprintf(cmd.OutOrStdout(), "snapshot %s@%s is deleted\n", vol, snap)
				return err
			})
		},
	}
}

func snapshotRestoreCommand(c *ctl) *cobra.Command {
	return &cobra.Command{
		Use:   "restore VOLUME@SNAPSHOT",
		Short: "Take a volume that is not attached back to what it was",
		Long: `Take a volume back to what it was when the snapshot was taken. Nobody may have it attached. What it was until now is gone, unless another
snapshot or the volume's retention keeps it: take a snapshot first if you may want it back.`,
		Args: cli.Args("VOLUME@SNAPSHOT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			vol, snap, err := parseSnapshot(args[0])
			if err != nil {
				return err
			}
			return c.withCluster(cmd.Context(), func(ctx context.Context, s *session) error {
				if _, _, err := block.Snapshot(ctx, s, vol, snap); err != nil { // before the volume is attached for nothing
					return snapshotError("restore", vol, snap, err)
				}
				p, err := s.peers(ctx)
				if err == nil {
					err = p.Restore(ctx, vol, snap)
				}
				if err != nil {
					return snapshotError("restore", vol, snap, err)
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "volume %s is what it was at snapshot %s\n", vol, snap)
				return err
			})
		},
	}
}

// snapshotError says what to do next, unless err does.
func snapshotError(op, vol, snap string, err error) error {
	if errors.Is(err, torus.ErrLocked) {
		return volumeError(op, vol+"@"+snap, err)
	}
	var e *torus.Error
	if errors.As(err, &e) && e.Hint != "" {
		return err
	}
	if e != nil {
		err = e.Err
	}
	e = &torus.Error{Op: op, Obj: "snapshot " + vol + "@" + snap, Err: err}
	switch {
	case errors.Is(err, torus.ErrNotExist):
		e.Hint = "`torusctl block snapshot list " + vol + "` shows the snapshots there are, `torusctl volume list` the volumes"
	case errors.Is(err, context.Canceled):
		e.Hint = "interrupted; `torusctl block snapshot list " + vol + "` shows what there is"
	}
	return e
}

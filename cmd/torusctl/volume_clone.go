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
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/models"
)

func volumeCloneCommand(c *ctl) *cobra.Command {
	return &cobra.Command{
		Use:   "clone VOLUME[@SNAPSHOT|@TIME] NEW [SIZE]",
		Short: "Make a volume that begins with what another is, or was",
		Long: `Make a volume that begins with what another one is now, was at a snapshot, or was at a time, as far as its retention reaches (TIME as
2006-01-02T15:04:05Z or -5m). Nothing is copied: the clone takes space for what is written to it, and the other one keeps what the clone still needs.
SIZE makes the clone larger.`,
		Args: cli.Args("VOLUME", "NEW", "SIZE?"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var size uint64
			if len(args) > 2 {
				var err error
				if size, err = cli.ParseSize(args[2]); err != nil {
					return err
				}
			}
			return c.withCluster(cmd.Context(), func(ctx context.Context, s *session) error {
				v, err := s.clone(ctx, args[0], args[1], size, time.Now())
				if err != nil {
					return volumeError("clone", args[0], err)
				}
				d, err := describeVolume(ctx, s, v, 0)
				if err != nil {
					return err
				}
				if c.out.Format != "table" {
					return printVolumes(c, cmd, d, []volumeJSON{d})
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "volume %s: %s, a clone of %s\n", v.Name, cli.FormatSize(v.SizeBytes, false), args[0])
				return err
			})
		},
	}
}

// clone makes a clone of what from names: VOL, VOL@SNAP or VOL@TIME.
func (s *session) clone(ctx context.Context, from, name string, size uint64, now time.Time) (*models.Volume, error) {
	if err := block.CheckName(name); err != nil {
		return nil, &torus.Error{Op: "clone", Obj: "volume " + from + " as " + name, Err: err, Hint: "Use letters, digits and . _ - (at most 128, beginning with a letter or digit)."}
	}
	vol, when := block.SplitName(from)
	parent, err := s.Volume(ctx, vol)
	if err != nil {
		return nil, err
	}
	var at *models.Moment
	if when == "" { // what it is now
		temporary := temporaryName("clone")
		pin, err := s.snapshot(ctx, vol, temporary)
		if err != nil {
			return nil, err
		}
		defer s.drop(ctx, vol, temporary) //nolint:errcheck // it is in the list of snapshots, if it stays
		at = pin.At
	} else if _, pin, err := block.Snapshot(ctx, s, vol, when); err == nil {
		at = pin.At
	} else if block.CheckName(when) == nil || !errors.Is(err, torus.ErrNotExist) { // no time is written like a name
		return nil, err
	} else {
		t, err := parsePast(when, now)
		if err != nil {
			return nil, err
		}
		if parent, at, err = s.locate(ctx, vol, t); err != nil {
			return nil, pastError("clone", from, err)
		}
	}
	v, err := block.Clone(ctx, s, parent, at, name, size)
	if err != nil {
		return nil, err
	}
	return v, s.settle(ctx, parent, at)
}

// temporaryName is a name for a snapshot that is needed for a while.
func temporaryName(what string) string {
	return fmt.Sprintf("%s-%s", what, time.Now().UTC().Format("20060102-150405.000000000"))
}

// locate finds the moment of a volume at a time.
func (s *session) locate(ctx context.Context, vol string, at time.Time) (*models.Volume, *models.Moment, error) {
	p, err := s.peers(ctx)
	if err != nil {
		return nil, nil, err
	}
	v, m, err := p.Locate(ctx, vol, at)
	if !errors.Is(err, torus.ErrAgain) {
		return v, m, err
	}
	// The log of that time has not been committed. A snapshot makes whoever has the volume attached do it, and an attach does otherwise.
	temporary := temporaryName("locate")
	pin, err := s.snapshot(ctx, vol, temporary)
	if err != nil {
		return nil, nil, err
	}
	defer s.drop(ctx, vol, temporary) //nolint:errcheck // it is in the list of snapshots, if it stays
	if v, err = s.Volume(ctx, vol); err == nil {
		err = s.settle(ctx, v, pin.At)
	}
	if err != nil {
		return nil, nil, err
	}
	return p.Locate(ctx, vol, at)
}

// settle waits until what a moment needs has been committed, so that it no longer matters what becomes of whoever has the volume attached.
func (s *session) settle(ctx context.Context, v *models.Volume, at *models.Moment) error {
	id := torus.VolumeID(v.Id)
	for {
		st, err := s.VolumeState(ctx, id)
		if err != nil || file.Settled(st.VolumeState, at) {
			return err
		}
		h, err := s.Holder(ctx, id)
		if err != nil {
			return err
		}
		if h == nil { // it died just now
			p, err := s.peers(ctx)
			if err == nil {
				err = p.Recover(ctx, v.Name)
			}
			if err != nil {
				return err
			}
			continue
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
}

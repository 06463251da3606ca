package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/coreos/torus"
	"github.com/coreos/torus/block"
	"github.com/coreos/torus/cmd/internal/cli"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/models"
)

func volumeResizeCommand(c *ctl) *cobra.Command {
	var shrink, yes bool
	cmd := &cobra.Command{
		Use:   "resize VOLUME SIZE",
		Short: "Make a volume larger while it is in use, or, with --shrink, smaller",
		Long: `Make a volume larger, also while it is attached: clients that connect from then on see its new size, and /dev/nbdN of torusblk nbd grows by
itself. Then grow the file system. With --shrink it becomes smaller, and what lies behind its new end is lost: shrink the file system first, and
detach the volume.`,
		Args: cli.Args("VOLUME", "SIZE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			size, err := cli.ParseSize(args[1])
			if err != nil {
				return err
			}
			return c.withCluster(cmd.Context(), func(ctx context.Context, s *session) error {
				v, err := s.Volume(ctx, args[0])
				switch {
				case err != nil:
				case size < v.SizeBytes:
					if err = confirmShrink(cmd, v, size, shrink, yes); err != nil {
						return err
					}
					err = s.shrink(ctx, v, size)
				default:
					err = block.Grow(ctx, s, args[0], size)
				}
				if err != nil {
					return volumeError("resize", args[0], err)
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "volume %s: %s\n", args[0], cli.FormatSize(size, false))
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&shrink, "shrink", false, "make it smaller: what lies behind its new end is lost")
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask again")
	return cmd
}

// confirmShrink asks twice: by a flag, and by a question or another flag.
func confirmShrink(cmd *cobra.Command, v *models.Volume, size uint64, shrink, yes bool) error {
	lost := fmt.Sprintf("the last %s of volume %s (of %s)", cli.FormatSize(v.SizeBytes-size, false), v.Name, cli.FormatSize(v.SizeBytes, false))
	if !shrink {
		return fmt.Errorf("resize volume %s: %s would be lost: %w\nif that is what you want, shrink its file system, detach it and give --shrink", v.Name, lost, torus.ErrInvalid)
	}
	if yes {
		return nil
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "%s will be lost for good; type yes to go on: ", lost)
	answer, _ := bufio.NewReader(cmd.InOrStdin()).ReadString('\n')
	if strings.TrimSpace(answer) != "yes" {
		fmt.Fprintln(cmd.ErrOrStderr())
		return errors.New("not confirmed: nothing was changed\ntype yes when asked, or give --yes")
	}
	return nil
}

// trimStep is how much is trimmed by one request.
const trimStep = 1 << 30

// shrink makes a volume smaller. It holds the volume meanwhile, so nobody has it attached with the old size.
func (s *session) shrink(ctx context.Context, v *models.Volume, size uint64) error {
	if size == 0 || size%512 != 0 {
		return &torus.Error{Op: "resize", Obj: "volume " + v.Name, Err: fmt.Errorf("a size of %d bytes: %w", size, torus.ErrInvalid), Hint: "It must be whole sectors."}
	}
	p, err := s.peers(ctx)
	if err != nil {
		return err
	}
	disk, err := p.Open(ctx, v.Name)
	if err != nil {
		return err
	}
	defer disk.Close()
	for off := size; off < disk.Size(); off += trimStep {
		if err := errors.Join(ctx.Err(), disk.Do(&device.Request{Op: device.Trim, Off: off, Len: min(trimStep, disk.Size()-off)})); err != nil {
			return err
		}
	}
	if err := disk.Flush(); err != nil {
		return err
	}
	return s.UpdateVolume(ctx, v.Name, func(now *models.Volume) error {
		if now.Id != v.Id || now.SizeBytes > disk.Size() {
			return fmt.Errorf("somebody else has changed it: %w", torus.ErrCompareFailed)
		}
		now.SizeBytes = size
		return nil
	})
}

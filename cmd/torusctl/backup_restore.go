package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/coreos/torus"
	"github.com/coreos/torus/backup"
	"github.com/coreos/torus/block"
	"github.com/coreos/torus/cmd/internal/cli"
	"github.com/coreos/torus/node"
)

func backupRestoreCommand(c *ctl) *cobra.Command {
	var toFile, always bool
	cmd := &cobra.Command{
		Use:   "restore REPOSITORY BACKUP VOLUME | --file REPOSITORY BACKUP FILE|-",
		Short: "Make a volume, or a file, of a backup",
		Long: `Make a new volume of a backup, or with --file a file, a disk or a stream, for which no cluster is needed. Every page is checked on its way; if one
is damaged the restore fails, names the object, and leaves no volume behind.`,
		Args: cli.Args("REPOSITORY", "BACKUP", "VOLUME|FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			return c.withRepository(ctx, args[0], false, func(r *backup.Repository) error {
				b, err := r.Find(ctx, args[1])
				if err != nil {
					return err
				}
				rd := r.NewReader(b)
				defer rd.Close()
				bar := newProgress(cmd.ErrOrStderr(), always, 0, b.Size)
				var moved uint64
				if toFile {
					moved, err = restoreFile(ctx, cmd, rd, args[2], bar)
				} else {
					err = c.withCluster(ctx, func(ctx context.Context, s *session) error {
						moved, err = restoreVolume(ctx, s, rd, args[2], bar)
						return err
					})
				}
				if errors.Is(err, context.Canceled) {
					err = errors.New("interrupted")
				}
				if err != nil {
					return &torus.Error{Op: "restore", Obj: "backup " + b.Name(), Err: err}
				}
				bar.end(b.Size, moved)
				if args[2] == "-" && toFile {
					return nil
				}
				what := "volume " + args[2]
				if toFile {
					what = args[2]
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: %s as of %s, %s of it written\n", what, cli.FormatSize(b.Size, false), b.Moment.Format("2006-01-02T15:04:05Z"), cli.FormatSize(moved, false))
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&toFile, "file", false, "to a FILE, or - for standard output")
	cmd.Flags().BoolVarP(&always, "progress", "p", false, "show progress, though standard error is no terminal")
	return cmd
}

// restoreFile restores to a file that is not there yet, a disk, or what takes bytes in their order only.
func restoreFile(ctx context.Context, cmd *cobra.Command, rd *backup.Reader, path string, bar *progress) (moved uint64, err error) {
	var to sink = &streamSink{cmd.OutOrStdout()}
	if path != "-" {
		if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() {
			return 0, fmt.Errorf("%s: %w\nchoose another name, or remove it first", path, torus.ErrExists)
		}
		var f *os.File
		if to, f, err = openDump(path, false); err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, f.Close()) }()
	}
	size := rd.Backup().Size
	err = rd.Restore(ctx, func(off, n uint64, data []byte) error {
		defer func() { bar.at(off+n, moved) }()
		if data == nil {
			return to.hole(off, n)
		}
		return runs(off, data, func(off uint64, b []byte) error { return to.hole(off, uint64(len(b))) }, func(off uint64, b []byte) error {
			moved += uint64(len(b))
			return to.data(off, b)
		})
	})
	if err == nil {
		err = to.end(size)
	}
	return moved, err
}

// restoreVolume makes a volume, all of it or none.
func restoreVolume(ctx context.Context, s *session, rd *backup.Reader, name string, bar *progress) (moved uint64, err error) {
	v, err := block.Create(ctx, s, name, rd.Backup().Size, "")
	if err != nil {
		return 0, err
	}
	defer func() {
		if err == nil {
			return
		}
		derr := s.disconnect()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), dropTimeout)
		defer cancel()
		if derr == nil {
			derr = block.Delete(ctx, s, v.Name, true)
		}
		if derr != nil {
			err = fmt.Errorf("%w\nwhat there is of volume %s is not whole, and is to be removed: `torusctl volume delete --force %s`", err, name, name)
		}
	}()
	p, err := s.peers(ctx)
	if err != nil {
		return 0, err
	}
	disk, err := p.Open(ctx, name)
	if err != nil {
		return 0, err
	}
	err = rd.Restore(ctx, func(off, n uint64, data []byte) error {
		defer func() { bar.at(off+n, moved) }()
		n, err := writeAll(disk, off, data)
		moved += n
		return err
	})
	if err == nil {
		err = disk.Flush()
	}
	disk.Close()
	return moved, err
}

// writeAll writes what is not zeroes, several pieces at a time.
func writeAll(disk *node.Disk, off uint64, data []byte) (moved uint64, err error) {
	var g errgroup.Group
	g.SetLimit(inFlight)
	skip := func(uint64, []byte) error { return nil }
	err = runs(off, data, skip, func(off uint64, b []byte) error {
		moved += uint64(len(b))
		for len(b) > 0 {
			part := b[:min(len(b), pieceSize)]
			at := int64(off)
			g.Go(func() error {
				_, err := disk.WriteAt(part, at)
				return err
			})
			off, b = off+uint64(len(part)), b[len(part):]
		}
		return nil
	})
	return moved, errors.Join(err, g.Wait())
}

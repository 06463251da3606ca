package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/coreos/torus"
	"github.com/coreos/torus/block"
	"github.com/coreos/torus/cmd/internal/cli"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/node"
)

// loadNote is the suffix of the note of a load.
const loadNote = ".torus-load"

func blockLoadCommand(c *ctl) *cobra.Command {
	var resume, overwrite, always bool
	cmd := &cobra.Command{
		Use:   "load FILE|- VOLUME [SIZE]",
		Short: "Copy a file, or standard input, to a volume",
		Long: `Copy a file, or standard input, to a volume. The volume is made unless it is there: of SIZE, or as large as the file. One that is there is
loaded with --overwrite only; what lies behind the end of the file stays as it is. Nobody may have it attached. Holes of the file, and zeroes,
take no space.

A load of a file that was interrupted goes on with --resume: FILE` + loadNote + ` says how far it got, and the last of it is compared first.`,
		Args: cli.Args("FILE", "VOLUME", "SIZE?"),
		RunE: func(cmd *cobra.Command, args []string) error {
			l := &load{path: args[0], name: args[1], resume: resume, overwrite: overwrite, in: cmd.InOrStdin()}
			if resume && l.path == "-" {
				return errors.New("what came from standard input cannot be resumed\nload a file instead")
			}
			if len(args) > 2 {
				var err error
				if l.size, err = cli.ParseSize(args[2]); err != nil {
					return err
				}
			}
			if err := l.open(); err != nil {
				return err
			}
			if l.file != nil {
				defer l.file.Close()
			}
			return c.withCluster(cmd.Context(), func(ctx context.Context, s *session) error {
				l.s = s
				if err := l.run(ctx, cmd, always); err != nil {
					return l.explain(err)
				}
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&resume, "resume", false, "go on with a load that was interrupted")
	cmd.Flags().BoolVar(&overwrite, "overwrite", false, "into a volume that is there already")
	cmd.Flags().BoolVarP(&always, "progress", "p", false, "show progress, though standard error is no terminal")
	return cmd
}

// load is a file on its way to a volume.
type load struct {
	s                 *session
	path, name        string
	resume, overwrite bool
	size              uint64 // that was asked for; 0: none

	in    io.Reader
	file  *os.File // nil: in is all there is
	mark  note     // SizeBytes is that of the file; 0: unknown
	noted bool
}

// open finds out what is to be loaded.
func (l *load) open() error {
	if l.path == "-" {
		return nil
	}
	f, err := os.Open(l.path)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return err
	}
	switch {
	case st.IsDir():
		f.Close()
		return fmt.Errorf("%s is a directory: %w", l.path, torus.ErrInvalid)
	case st.Mode()&(fs.ModeCharDevice|fs.ModeNamedPipe|fs.ModeSocket) != 0:
		l.in = f // it is closed with the process
		return nil
	}
	l.file = f
	end, err := f.Seek(0, io.SeekEnd) // the size of a block device as well
	if err == nil && end == 0 {
		err = fmt.Errorf("%s is empty: %w", l.path, torus.ErrInvalid)
	}
	if err != nil {
		f.Close()
		return err
	}
	l.mark.SizeBytes, l.mark.Modified = uint64(end), modified(st)
	return nil
}

func (l *load) run(ctx context.Context, cmd *cobra.Command, always bool) error {
	v, err := l.volume(ctx)
	if err != nil {
		return err
	}
	p, err := l.s.peers(ctx)
	if err != nil {
		return err
	}
	disk, err := p.Open(ctx, l.name)
	if err != nil {
		return err
	}
	defer disk.Close()
	if disk.Size() < l.mark.SizeBytes {
		return fmt.Errorf("%s has %d bytes, and the volume %d: %w\nmake it larger first: torusctl volume resize %s %d", l.path, l.mark.SizeBytes, disk.Size(), torus.ErrOutOfSpace, l.name, wholeSectors(l.mark.SizeBytes))
	}
	if l.resume {
		if err := sameTail(l.mark.DoneBytes, l.file, disk); err != nil {
			return err
		}
	}
	l.mark.Volume, l.mark.VolumeID = v.Name, v.Id
	if l.file != nil {
		if err := l.mark.write(l.path + loadNote); err != nil {
			fmt.Fprintf(cmd.ErrOrStderr(), "it cannot be resumed if it is interrupted: %v\n", err)
		} else {
			l.noted = true
		}
	}
	loaded, moved, err := l.copy(ctx, disk, newProgress(cmd.ErrOrStderr(), always, l.mark.DoneBytes, l.mark.SizeBytes))
	if err == nil {
		err = disk.Flush()
	}
	if err != nil {
		return err
	}
	if l.noted {
		if err := os.Remove(l.path + loadNote); err != nil {
			return err
		}
		l.noted = false
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "volume %s: %s loaded, %s of it written\n", l.name, cli.FormatSize(loaded, false), cli.FormatSize(moved, false))
	return err
}

func wholeSectors(n uint64) uint64 { return (n + 511) / 512 * 512 }

// volume finds the volume, or makes it.
func (l *load) volume(ctx context.Context) (*models.Volume, error) {
	v, err := l.s.Volume(ctx, l.name)
	if l.resume {
		n, nerr := readNote(l.path + loadNote)
		switch {
		case nerr != nil:
			return nil, nerr
		case err != nil:
			return nil, err
		case n.Volume != l.name || n.VolumeID != v.Id:
			return nil, fmt.Errorf("%s was being loaded into another volume (%s, id %d): %w\nremove %s to begin anew", l.path, n.Volume, n.VolumeID, torus.ErrInvalid, l.path+loadNote)
		case n.SizeBytes != l.mark.SizeBytes || n.Modified != l.mark.Modified:
			return nil, fmt.Errorf("%s has been changed since: %w\nremove %s to begin anew", l.path, torus.ErrInvalid, l.path+loadNote)
		}
		l.mark, l.overwrite = n, n.Overwrite
		return v, nil
	}
	switch {
	case err == nil && !l.overwrite:
		return nil, &torus.Error{Op: "load", Obj: "volume " + l.name, Err: torus.ErrExists, Hint: "choose another name, or give --overwrite (--resume if it is a load that was interrupted)"}
	case err == nil:
		l.mark.Overwrite = true
		if l.size != 0 && l.size != v.SizeBytes {
			return nil, fmt.Errorf("volume %s has %d bytes, not %d: %w\nleave SIZE out, or resize it first: torusctl volume resize %s %d", l.name, v.SizeBytes, l.size, torus.ErrInvalid, l.name, l.size)
		}
		return v, nil
	case !errors.Is(err, torus.ErrNotExist):
		return nil, err
	}
	size := l.size
	switch {
	case size == 0 && l.mark.SizeBytes == 0:
		return nil, fmt.Errorf("nobody knows how much there is to read: %w\ngive the SIZE of the volume", torus.ErrInvalid)
	case size == 0:
		size = wholeSectors(l.mark.SizeBytes)
	case size < l.mark.SizeBytes:
		return nil, fmt.Errorf("%s has %d bytes, more than %d: %w\nleave SIZE out, or give a larger one", l.path, l.mark.SizeBytes, size, torus.ErrInvalid)
	}
	return block.Create(ctx, l.s, l.name, size, "")
}

// copy copies all from DoneBytes on. It returns how far it got and how many bytes were written.
func (l *load) copy(ctx context.Context, disk *node.Disk, bar *progress) (at, moved uint64, err error) {
	pool := newBufferPool()
	hole := func(off, n uint64) error {
		if !l.mark.Overwrite {
			return nil // it is new: there is nothing in it
		}
		for ; n > 0; off, n = off+min(n, trimStep), n-min(n, trimStep) {
			if err := disk.Do(&device.Request{Op: device.Trim, Off: off, Len: min(n, trimStep)}); err != nil {
				return err
			}
		}
		return nil
	}
	write := func(p *piece) error {
		return runs(p.off, p.data, func(off uint64, b []byte) error { return hole(off, uint64(len(b))) }, func(off uint64, b []byte) error {
			_, err := disk.WriteAt(b, int64(off))
			return err
		})
	}
	at = l.mark.DoneBytes
	written := func(p *piece) error {
		if p.data == nil {
			if err := hole(p.off, p.n); err != nil {
				return err
			}
		} else if !allZero(p.data) {
			moved += p.n
		}
		pool.give(p.data)
		at = p.off + p.n
		bar.at(at, moved)
		if l.noted && at-l.mark.DoneBytes >= markEvery {
			if err := disk.Flush(); err != nil {
				return err
			}
			l.mark.DoneBytes = at
			return l.mark.write(l.path + loadNote)
		}
		return nil
	}
	plan := func(emit func(piece) error) error { return l.readAll(disk.Size(), pool, emit) }
	if l.file != nil {
		plan = func(emit func(piece) error) error { return l.readFile(pool, emit) }
	}
	err = inOrder(ctx, plan, write, written)
	bar.end(at, moved)
	return at, moved, err
}

// readFile reads what there is of a file, and skips its holes.
func (l *load) readFile(pool bufferPool, emit func(piece) error) error {
	size := l.mark.SizeBytes
	for off := l.mark.DoneBytes; off < size; {
		data, err := l.file.Seek(int64(off), unix.SEEK_DATA)
		switch {
		case errors.Is(err, unix.ENXIO): // a hole up to the end
			data = int64(size)
		case err != nil: // not every file can tell
			data = int64(off)
		}
		if n := min(uint64(data), size); n > off {
			if err := emit(piece{off: off, n: n - off}); err != nil {
				return err
			}
			off = n
			continue
		}
		end, err := l.file.Seek(int64(off), unix.SEEK_HOLE)
		if err != nil || uint64(end) <= off {
			end = int64(size)
		}
		for stop := min(uint64(end), size); off < stop; {
			p := piece{off: off, n: min(stop-off, pieceSize-off%pieceSize)}
			p.data = pool.take(p.n)
			if _, err := l.file.ReadAt(p.data, int64(off)); err != nil {
				return fmt.Errorf("%s has become shorter while it was read: %w", l.path, err)
			}
			if err := emit(p); err != nil {
				return err
			}
			off += p.n
		}
	}
	return nil
}

// readAll reads to the end of what is no file.
func (l *load) readAll(room uint64, pool bufferPool, emit func(piece) error) error {
	for off := uint64(0); ; {
		b := pool.take(pieceSize)
		n, err := io.ReadFull(l.in, b)
		if n > 0 {
			if uint64(n) > room-off {
				return fmt.Errorf("there is more to read than the %d bytes of the volume: %w\nload it into a larger one", room, torus.ErrOutOfSpace)
			}
			if err := emit(piece{off: off, n: uint64(n), data: b[:n]}); err != nil {
				return err
			}
			off += uint64(n)
		}
		switch {
		case err == io.EOF || err == io.ErrUnexpectedEOF:
			return nil
		case err != nil:
			return err
		}
	}
}

// explain says how to go on.
func (l *load) explain(err error) error {
	if !l.noted {
		return volumeError("load", l.name, err)
	}
	if errors.Is(err, context.Canceled) {
		err = errors.New("interrupted")
	}
	return &torus.Error{Op: "load", Obj: "volume " + l.name, Err: err, Hint: "go on with --resume, or give it up: remove " + l.path + loadNote + " and the volume"}
}

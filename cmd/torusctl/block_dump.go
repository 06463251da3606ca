package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/coreos/torus"
	"github.com/coreos/torus/block"
	"github.com/coreos/torus/cmd/internal/cli"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/node"
)

// dumpNote is the suffix of the note of a dump.
const dumpNote = ".torus-dump"

func blockDumpCommand(c *ctl) *cobra.Command {
	var resume, always bool
	cmd := &cobra.Command{
		Use:   "dump VOLUME[@SNAPSHOT] FILE|-",
		Short: "Copy a volume, or a snapshot of it, to a file or to standard output",
		Long: `Copy a volume, or a snapshot of it, to a file or to standard output. The volume may be in use: what is copied is what it is when the dump begins, by
a snapshot that goes with it. Only what has been written is read, and what is zeroes becomes holes of the file.

A dump to a file that was interrupted goes on with --resume: FILE` + dumpNote + ` says how far it got, and the last of it is compared first.`,
		Args: cli.Args("VOLUME", "FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if resume && args[1] == "-" {
				return errors.New("what went to standard output cannot be resumed\ndump to a file instead")
			}
			return c.withCluster(cmd.Context(), func(ctx context.Context, s *session) error {
				d := &dump{s: s, name: args[0], path: args[1]}
				if err := d.run(ctx, cmd, resume, always); err != nil {
					return d.explain(err)
				}
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&resume, "resume", false, "go on with a dump that was interrupted")
	cmd.Flags().BoolVarP(&always, "progress", "p", false, "show progress, though standard error is no terminal")
	return cmd
}

// dump is a volume on its way to a file.
type dump struct {
	s     *session
	name  string // VOL or VOL@SNAP
	path  string // "-": standard output
	note  note
	noted bool // there is one beside the file
}

func (d *dump) run(ctx context.Context, cmd *cobra.Command, resume, always bool) (err error) {
	var to sink = &streamSink{cmd.OutOrStdout()}
	if d.path != "-" {
		var f *os.File
		if to, f, err = openDump(d.path, resume); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, f.Close()) }()
	}
	if err := d.begin(ctx, to, resume); err != nil {
		return err
	}
	if d.note.Temporary {
		defer func() {
			if err == nil || !d.noted {
				err = errors.Join(err, d.s.drop(ctx, d.note.Volume, d.note.Snapshot))
			}
		}()
	}
	p, err := d.s.peers(ctx)
	if err != nil {
		return err
	}
	disk, err := p.Open(ctx, d.note.Volume+"@"+d.note.Snapshot)
	if err != nil {
		return err
	}
	defer disk.Close()
	if d.note.SizeBytes != 0 && d.note.SizeBytes != disk.Size() {
		return fmt.Errorf("%d bytes, not the %d that were to be dumped: %w", disk.Size(), d.note.SizeBytes, torus.ErrInvalid)
	}
	d.note.SizeBytes = disk.Size()
	if f, ok := to.(*fileSink); ok {
		if err := d.takeUp(f, disk); err != nil {
			return err
		}
	}
	moved, err := d.copy(ctx, disk, to, newProgress(cmd.ErrOrStderr(), always, d.note.DoneBytes, disk.Size()))
	if err != nil {
		return err
	}
	if d.noted {
		if err := os.Remove(d.path + dumpNote); err != nil {
			return err
		}
		d.noted = false
	}
	if d.path != "-" {
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: %s, %s of it written\n", d.path, cli.FormatSize(disk.Size(), false), cli.FormatSize(moved, false))
	}
	return err
}

// begin finds out what is to be dumped: what the note says, or the snapshot that was named, or one that is taken now.
func (d *dump) begin(ctx context.Context, to sink, resume bool) error {
	vol, snap := block.SplitName(d.name)
	if resume {
		n, err := readNote(d.path + dumpNote)
		switch {
		case err == nil && (n.Volume != vol || snap != "" && n.Snapshot != snap):
			return fmt.Errorf("%s belongs to a dump of %s@%s: %w\nbegin anew without --resume", d.path, n.Volume, n.Snapshot, torus.ErrInvalid)
		case err == nil:
			v, _, err := block.Snapshot(ctx, d.s, n.Volume, n.Snapshot)
			if err == nil && v.Id != n.VolumeID {
				err = fmt.Errorf("volume %s is another one by now: %w\nbegin anew without --resume", vol, torus.ErrInvalid)
			}
			d.note, d.noted = n, true
			return err
		case snap == "" || !errors.Is(err, torus.ErrNotExist):
			return err
		}
		// A snapshot does not change: the file itself says how far it got.
	}
	v, err := d.s.Volume(ctx, vol)
	if err != nil {
		return err
	}
	d.note = note{Volume: vol, VolumeID: v.Id, Snapshot: snap}
	if snap == "" {
		d.note.Snapshot, d.note.Temporary = temporaryName("dump"), true
		if _, err := d.s.snapshot(ctx, vol, d.note.Snapshot); err != nil {
			return err
		}
	} else if _, _, err := block.Snapshot(ctx, d.s, vol, snap); err != nil {
		return err
	}
	if f, ok := to.(*fileSink); ok && resume {
		st, err := f.Stat()
		if err != nil {
			return err
		}
		d.note.DoneBytes = uint64(st.Size()) / pieceSize * pieceSize
	}
	return nil
}

// takeUp makes sure that the file holds what has been dumped already and nothing else, and leaves a note beside it.
func (d *dump) takeUp(f *fileSink, disk *node.Disk) error {
	if d.note.DoneBytes > d.note.SizeBytes {
		return fmt.Errorf("%s has %d bytes already, and %s only %d: %w\nbegin anew without --resume", d.path, d.note.DoneBytes, d.name, d.note.SizeBytes, torus.ErrInvalid)
	}
	if err := sameTail(d.note.DoneBytes, f, disk); err != nil {
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("%s has less than the %d bytes that were dumped: %w\nbegin anew without --resume", d.path, d.note.DoneBytes, torus.ErrCorrupt)
		}
		return err
	}
	if f.device {
		end, err := f.Seek(0, io.SeekEnd)
		if err == nil && uint64(end) < d.note.SizeBytes {
			err = fmt.Errorf("%s has %d bytes, and %s %d: %w", d.path, end, d.name, d.note.SizeBytes, torus.ErrOutOfSpace)
		}
		return err
	}
	if err := f.Truncate(int64(d.note.DoneBytes)); err != nil {
		return err
	}
	d.noted = true
	return d.note.write(d.path + dumpNote)
}

// copy copies all from DoneBytes on. It returns how many bytes were written.
func (d *dump) copy(ctx context.Context, disk *node.Disk, to sink, bar *progress) (moved uint64, err error) {
	pool := newBufferPool()
	plan := func(emit func(piece) error) error {
		for off := d.note.DoneBytes; off < disk.Size(); {
			r := &device.Request{Op: device.Status, Off: off, Len: disk.Size() - off}
			if err := disk.Do(r); err != nil {
				return err
			}
			for _, x := range r.Extents {
				for x.Len > 0 {
					p := piece{off: off, n: x.Len}
					if !x.Zero {
						p.n = min(x.Len, pieceSize-off%pieceSize)
						p.data = pool.take(p.n)
					}
					if err := emit(p); err != nil {
						return err
					}
					off, x.Len = off+p.n, x.Len-p.n
				}
			}
		}
		return nil
	}
	read := func(p *piece) error {
		_, err := disk.ReadAt(p.data, int64(p.off))
		return err
	}
	at := d.note.DoneBytes
	write := func(p *piece) error {
		err := error(nil)
		if p.data == nil {
			err = to.hole(p.off, p.n)
		} else {
			err = runs(p.off, p.data, func(off uint64, b []byte) error { return to.hole(off, uint64(len(b))) }, func(off uint64, b []byte) error {
				moved += uint64(len(b))
				return to.data(off, b)
			})
		}
		pool.give(p.data)
		if err != nil {
			return err
		}
		at = p.off + p.n
		bar.at(at, moved)
		if d.noted && at-d.note.DoneBytes >= markEvery {
			if err := to.end(at); err != nil {
				return err
			}
			d.note.DoneBytes = at
			return d.note.write(d.path + dumpNote)
		}
		return nil
	}
	if err = inOrder(ctx, plan, read, write); err == nil {
		err = to.end(disk.Size())
	}
	bar.end(at, moved)
	return moved, err
}

// explain says how to go on.
func (d *dump) explain(err error) error {
	what := "dump"
	if errors.Is(err, context.Canceled) {
		err = errors.New("interrupted")
	} else if !d.noted {
		return volumeError(what, d.name, err)
	}
	e := &torus.Error{Op: what, Obj: "volume " + d.name, Err: err}
	if d.noted {
		e.Hint = fmt.Sprintf("go on with --resume, or give it up: remove %s", d.path+dumpNote)
		if d.note.Temporary {
			e.Hint += fmt.Sprintf(" and `torusctl block snapshot delete %s@%s`", d.note.Volume, d.note.Snapshot)
		}
	}
	return e
}

// sink is where a dump goes, from the beginning to the end.
type sink interface {
	data(off uint64, b []byte) error
	hole(off, n uint64) error
	end(at uint64) error // all up to at is durable
}

// streamSink is one that cannot seek.
type streamSink struct{ w io.Writer }

func (s *streamSink) data(_ uint64, b []byte) error {
	_, err := s.w.Write(b)
	return err
}

func (s *streamSink) hole(_, n uint64) error {
	for n > 0 {
		k := min(n, uint64(len(zeroes)))
		if _, err := s.w.Write(zeroes[:k]); err != nil {
			return err
		}
		n -= k
	}
	return nil
}

func (s *streamSink) end(uint64) error { return nil }

// fileSink is a file or a device.
type fileSink struct {
	*os.File
	device bool // it has the size it has, and something in it
}

// openDump opens what a dump goes to: a file, a disk, or what takes bytes in their order only.
func openDump(path string, resume bool) (sink, *os.File, error) {
	if _, err := os.Stat(path + dumpNote); err == nil && !resume {
		return nil, nil, fmt.Errorf("%s is a dump that was interrupted: %w\ngo on with --resume, or remove %s to begin anew", path, torus.ErrExists, path+dumpNote)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, nil, err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	switch mode := st.Mode(); {
	case mode&(fs.ModeCharDevice|fs.ModeNamedPipe) != 0:
		return &streamSink{f}, f, nil
	case mode&fs.ModeDevice != 0:
		return &fileSink{f, true}, f, nil
	}
	return &fileSink{f, false}, f, nil
}

func (s *fileSink) data(off uint64, b []byte) error {
	_, err := s.WriteAt(b, int64(off))
	return err
}

// hole leaves zeroes: a file ends before them until end.
func (s *fileSink) hole(off, n uint64) error {
	if !s.device {
		return nil
	}
	if unix.Fallocate(int(s.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(off), int64(n)) == nil {
		return nil
	}
	for n > 0 {
		k := min(n, uint64(len(zeroes)))
		if err := s.data(off, zeroes[:k]); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

func (s *fileSink) end(at uint64) error {
	if !s.device {
		if err := s.Truncate(int64(at)); err != nil {
			return err
		}
	}
	return s.Sync()
}

// modified is when a file was, in nanoseconds since 1970.
func modified(st fs.FileInfo) int64 { return st.ModTime().Sub(time.Unix(0, 0)).Nanoseconds() }

// Command bench measures a volume against what it stands on: the raw file on the same disk, one copy of it behind
// QEMU's NBD server, and Torus with two copies on three peers, all on this machine, in interleaved rounds.
//
//	make bench
//	make bench BENCHFLAGS='--cells write-4k-32,read-4k-32 --rounds 5'
//	make bench-compare OLD=v0.2.0
//
// Two more commands measure what grows: with the number and size of volumes and the number of peers, and what was to be chosen
// (docs/scale.md).
//
//	make bench-scale
//	make bench-choices
//
// docs/performance.md says what the cells are and how the figures are to be read.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
)

func main() {
	// What is started is told to die with the thread that started it (see process.go): this one, which never ends.
	runtime.LockOSThread()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// options are what the flags say.
type options struct {
	cells       []cell
	contestants []string
	rounds      int
	seconds     int
	size        byteSize
	peerSize    byteSize // 0: by the rest
	dir         string
	bin         string
	old         string
	oldRef      string
	json        string
	profile     *cell
}

var errUsage = errors.New("see bench --help")

func parseFlags(args []string, stderr io.Writer) (*options, error) {
	o := &options{size: 2 << 30}
	var cells, contestants, profile string
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&cells, "cells", "", "`LIST` of cells to measure, with commas; all: "+strings.Join(cellNames(), ","))
	f.StringVar(&contestants, "contestants", "", "`LIST` of raw, qemu, torus to measure; all. --old or --old-ref adds one")
	f.IntVar(&o.rounds, "rounds", 3, "how often each cell is measured, the contestants in turn; medians are reported")
	f.IntVar(&o.seconds, "seconds", 5, "length of one measurement")
	f.Var(&o.size, "size", "size of the volume, which is written once before it is measured")
	f.Var(&o.peerSize, "peer-size", "what each peer may store (default: enough for the volume and the log of a round)")
	f.StringVar(&o.dir, "dir", "/var/tmp", "where the data goes while it runs: a directory of the disk to be measured")
	f.StringVar(&o.bin, "bin", "bin", "`DIR` of torusd, torusctl and torusblk")
	f.StringVar(&o.old, "old", "", "`DIR` of an earlier build, measured as \"old\"")
	f.StringVar(&o.oldRef, "old-ref", "", "git `REF` to build and measure as \"old\"")
	f.StringVar(&o.json, "json", "bin/bench.json", "`FILE` for all figures")
	f.StringVar(&profile, "cpuprofile", "", "`CELL` to run once more at the end with CPU profiles of all Torus processes, put beside the JSON file")
	if err := f.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil, err
		}
		return nil, errUsage // the flag set has said what is wrong
	}
	if f.NArg() > 0 {
		return nil, fmt.Errorf("%q is not a flag: %w", f.Arg(0), errUsage)
	}
	if o.rounds < 1 || o.seconds < 1 || o.size < minSize {
		return nil, fmt.Errorf("--rounds and --seconds are at least 1, --size at least %v", byteSize(minSize))
	}
	if o.old != "" && o.oldRef != "" {
		return nil, errors.New("--old and --old-ref name the same contestant: give one of them")
	}
	var err error
	if o.cells, err = parseCells(cells); err != nil {
		return nil, fmt.Errorf("--cells: %w", err)
	}
	if o.contestants, err = parseContestants(contestants, o.old != "" || o.oldRef != ""); err != nil {
		return nil, fmt.Errorf("--contestants: %w", err)
	}
	if profile != "" {
		c, err := parseCells(profile)
		if err != nil || len(c) != 1 {
			return nil, fmt.Errorf("--cpuprofile %s: give one cell of %s", profile, strings.Join(cellNames(), ","))
		}
		o.profile = &c[0]
	}
	// What is started runs in another directory.
	for _, p := range []*string{&o.bin, &o.old, &o.dir} {
		if *p != "" {
			if *p, err = filepath.Abs(*p); err != nil {
				return nil, err
			}
		}
	}
	return o, nil
}

func parseContestants(list string, old bool) ([]string, error) {
	all := []string{"raw", "qemu", "torus"}
	if old {
		all = append(all, "old")
		if list != "" {
			list += ",old"
		}
	}
	return choose(all, list)
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	if len(args) > 0 {
		switch args[0] {
		case "scale":
			return runScale(ctx, args[0], scaleSections, args[1:], stdout, stderr)
		case "choices":
			return runScale(ctx, args[0], choiceSections, args[1:], stdout, stderr)
		}
	}
	o, err := parseFlags(args, stderr)
	if err != nil {
		return err
	}
	if err := checkTools(o); err != nil {
		return err
	}
	if err := checkDisk(o); err != nil {
		return err
	}
	dir, err := os.MkdirTemp(o.dir, "torus-bench-")
	if err != nil {
		return fmt.Errorf("--dir: %w", err)
	}
	defer func() {
		if e := os.RemoveAll(dir); e != nil {
			err = errors.Join(err, fmt.Errorf("data is left behind: %w", e))
		}
	}()
	if o.oldRef != "" {
		if o.old, err = buildRef(ctx, o.oldRef, dir, stderr); err != nil {
			return err
		}
	}
	b := &bench{options: o, dir: dir, progress: stderr}
	defer b.close()
	failed := b.measure(ctx)
	if ctx.Err() != nil {
		failed = errors.New("interrupted")
	}
	// What was measured before a failure is reported too.
	r := b.report()
	if !r.empty() {
		if _, err := io.WriteString(stdout, r.markdown()); err != nil {
			return errors.Join(failed, err)
		}
		if err := r.save(o.json); err != nil {
			return errors.Join(failed, err)
		}
	}
	return failed
}

package main

import (
	"context"
	"fmt"
	"strconv"
	"time"
)

// load is what fio does to several volumes at once: so much in all, however many there are.
type load struct {
	title string
	rw    string // as fio calls it
	bs    int    // bytes
	depth int    // requests under way, of all volumes together
	rate  int    // operations a second, of all together; 0: as many as it can
	fsync bool   // a flush after each write
	bytes byteSize
	skew  bool // 80 % of the operations go to 20 % of the area
	// conns is how many connections each volume gets; they share its part of the depth. 0 is 1.
	conns int
}

// args is fio's command line: a job for each volume (or connection), every one in an area of its own volume. Without bytes the load lasts
// some seconds; with them it ends when each volume has had its part.
func (l load) args(uris []string, area byteSize, seconds, seed int) []string {
	conns := max(l.conns, 1)
	jobs := len(uris) * conns
	args := []string{
		"--ioengine=nbd", "--rw=" + l.rw, "--bs=" + strconv.Itoa(l.bs), "--iodepth=" + strconv.Itoa(max(l.depth/jobs, 1)),
		"--size=" + strconv.FormatUint(uint64(area), 10), "--randseed=" + strconv.Itoa(seed), "--norandommap",
	}
	if l.bytes > 0 {
		args = append(args, "--io_size="+strconv.FormatUint(uint64(l.bytes)/uint64(jobs), 10), "--end_fsync=1")
	} else {
		args = append(args, "--time_based", "--runtime="+strconv.Itoa(seconds))
	}
	if l.skew {
		args = append(args, "--random_distribution=zoned:80/20:20/80")
	}
	if l.rate > 0 {
		args = append(args, "--rate_iops="+strconv.Itoa(max(l.rate/jobs, 1)))
	}
	if l.fsync {
		args = append(args, "--fsync=1")
	}
	for i, uri := range uris {
		for k := range conns {
			args = append(args, fmt.Sprintf("--name=volume%d.%d", i, k), "--uri="+uri)
		}
	}
	return args
}

// measured is a load, and what the cluster spent on it.
type measured struct {
	sample
	span
}

// run puts a load on volumes that are attached.
func (c *cluster) run(ctx context.Context, l load, uris []string, area byteSize, seconds, seed int) (m measured, err error) {
	if err := c.rest(ctx); err != nil {
		return m, err
	}
	if m.span, err = c.begin(ctx); err != nil {
		return m, err
	}
	limit := time.Duration(seconds)*time.Second + fioGrace
	if l.bytes > 0 {
		limit = fillLimit
	}
	r, err := runFio(ctx, c.dir, limit, l.args(uris, area, seconds, seed))
	if err != nil {
		return m, c.explain(fmt.Errorf("%s: %w", l.title, err))
	}
	if err := m.end(ctx); err != nil {
		return m, err
	}
	m.sample = newSample(r, m.before, m.after)
	return m, nil
}

// fill writes the area of each volume once.
func (c *cluster) fill(ctx context.Context, uris []string, area byteSize) error {
	l := load{title: "fill", rw: "write", bs: 1 << 20, depth: max(8, len(uris)), bytes: area * byteSize(len(uris))}
	if _, err := runFio(ctx, c.dir, fillLimit, l.args(uris, area, 0, 1)); err != nil {
		return c.explain(err)
	}
	return nil
}

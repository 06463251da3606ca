package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// diskArea is what one way of writing has to itself: more than it gets to write in its time, at a page a sync.
const diskArea = 256 << 20

// way is a way to make a page durable.
type way struct {
	title string
	flags int
	sync  int // pages for each fdatasync; 0: the flags say it all
}

func ways() []way {
	return []way{
		{"buffered, fdatasync", 0, 1},
		{"O_DIRECT, fdatasync", unix.O_DIRECT, 1},
		{"O_DIRECT and O_DSYNC", unix.O_DIRECT | unix.O_DSYNC, 0},
		{"buffered, fdatasync for 8", 0, 8},
		{"O_DIRECT, fdatasync for 8", unix.O_DIRECT, 8},
	}
}

// disk measures ways to write pages one behind the other, as a log does, into what was written through before and into what was merely
// allocated, on the file system of the directory and on xfs.
func (s *scale) disk(ctx context.Context) error {
	systems := []struct{ name, dir string }{{fileSystem(s.dir), s.dir}}
	xfs, unmount, err := mountXFS(ctx, s.dir)
	if err != nil {
		s.say("no xfs: %v", err)
	} else {
		defer unmount()
		systems = append(systems, struct{ name, dir string }{"xfs on a loop device", xfs})
	}
	t := &table{
		title: "Ways to make 4 KiB durable",
		note: "One at a time, one behind the other. Pages a second; µs until a page is durable, p50 / p99 (of those that wait for it); CPU µs a page; what reaches the device for a page, in KiB, and how many " +
			"requests that takes. Written through: the file was written from end to end and synced before; allocated: fallocate(2), the first write to a place changes the file system's metadata. " +
			"A loop device lies on a file of the other file system: compare within a file system.",
		head: []string{"file system", "file", "way", "pages / s", "µs", "CPU µs", "KiB to the device", "requests"},
	}
	for _, fs := range systems {
		for _, written := range []bool{true, false} {
			for _, w := range ways() {
				if err := ctx.Err(); err != nil {
					return err
				}
				file := map[bool]string{true: "written through", false: "allocated"}[written]
				r, err := w.measure(filepath.Join(fs.dir, "page"), written, time.Duration(s.seconds)*time.Second/2)
				if err != nil {
					return fmt.Errorf("%s, %s, %s: %w", fs.name, file, w.title, err)
				}
				s.say("%s, %s, %s: %.0f/s", fs.name, file, w.title, r.rate)
				t.add(fs.name, file, w.title, thousands(r.rate), thousands(r.p50)+" / "+thousands(r.p99), significant(r.cpu), significant(r.device), significant(r.requests))
			}
		}
	}
	return s.print(t)
}

// written is what a way of writing did, for a page unless said otherwise.
type written struct {
	rate     float64 // pages a second
	p50, p99 float64 // µs, of what waits for durability
	cpu      float64 // µs
	device   float64 // KiB
	requests float64 // of writes and flushes
}

func (w way) measure(path string, through bool, d time.Duration) (r written, err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(path)) }()
	if err := unix.Fallocate(int(f.Fd()), 0, 0, diskArea); err != nil {
		return r, fmt.Errorf("fallocate: %w", err)
	}
	page := aligned(1 << 20)
	for i := range page {
		page[i] = byte(i)
	}
	if through {
		for off := int64(0); off < diskArea; off += int64(len(page)) {
			if _, err := f.WriteAt(page, off); err != nil {
				return r, err
			}
		}
	}
	if err := f.Sync(); err != nil {
		return r, err
	}
	g, err := os.OpenFile(path, os.O_RDWR|w.flags, 0)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, g.Close()) }()
	device, err := deviceStat(path)
	if err != nil {
		return r, err
	}
	page = page[:4096]
	var before, after syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_THREAD, &before); err != nil {
		return r, err
	}
	was, err := readDevice(device)
	if err != nil {
		return r, err
	}
	var waits []float64
	pages := 0
	began := time.Now()
	start := began
	for off := int64(0); off < diskArea && (len(waits) == 0 || time.Since(began) < d); off += 4096 {
		if _, err := g.WriteAt(page, off); err != nil {
			return r, err
		}
		pages++
		if w.sync > 0 {
			if pages%w.sync != 0 {
				continue
			}
			if err := unix.Fdatasync(int(g.Fd())); err != nil {
				return r, err
			}
		}
		now := time.Now()
		waits = append(waits, float64(now.Sub(start).Nanoseconds())/1000)
		start = now
	}
	seconds := time.Since(began).Seconds()
	is, err := readDevice(device)
	if err != nil {
		return r, err
	}
	if err := syscall.Getrusage(syscall.RUSAGE_THREAD, &after); err != nil {
		return r, err
	}
	slices.Sort(waits)
	n := float64(pages)
	cpu := time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
	return written{
		rate: n / seconds, p50: waits[len(waits)/2], p99: waits[len(waits)*99/100], cpu: float64(cpu.Nanoseconds()) / 1000 / n,
		device: float64(is.sectors-was.sectors) / 2 / n, requests: float64(is.writes-was.writes+is.flushes-was.flushes) / n,
	}, nil
}

// aligned is memory that O_DIRECT takes.
func aligned(n int) []byte {
	b := make([]byte, n+4096)
	off := int(-uintptr(unsafe.Pointer(&b[0])) & 4095)
	return b[off : off+n : off+n]
}

// deviceStat is the file of /sys in which the kernel counts for the device a file lies on.
func deviceStat(path string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", err
	}
	return fmt.Sprintf("/sys/dev/block/%d:%d/stat", unix.Major(st.Dev), unix.Minor(st.Dev)), nil
}

// deviceCounts are since the machine was started (Documentation/block/stat.rst of Linux).
type deviceCounts struct{ writes, sectors, flushes uint64 }

func readDevice(path string) (c deviceCounts, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return c, err
	}
	return parseDevice(string(b))
}

func parseDevice(text string) (c deviceCounts, err error) {
	f := strings.Fields(text)
	if len(f) < 16 {
		return c, fmt.Errorf("%d numbers about a device, not 16", len(f))
	}
	for i, p := range map[int]*uint64{4: &c.writes, 6: &c.sectors, 15: &c.flushes} {
		if *p, err = strconv.ParseUint(f[i], 10, 64); err != nil {
			return c, err
		}
	}
	return c, nil
}

func fileSystem(dir string) string {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil {
		return "?"
	}
	switch st.Type {
	case unix.EXT4_SUPER_MAGIC:
		return "ext4"
	case unix.XFS_SUPER_MAGIC:
		return "xfs"
	case unix.BTRFS_SUPER_MAGIC:
		return "btrfs"
	}
	return fmt.Sprintf("%#x", st.Type)
}

// mountXFS makes an xfs in a file of dir and mounts it. The loop device goes with the mount.
func mountXFS(ctx context.Context, dir string) (at string, unmount func(), err error) {
	if os.Getuid() != 0 {
		return "", nil, errors.New("only root can mount it")
	}
	if _, err := exec.LookPath("mkfs.xfs"); err != nil {
		return "", nil, fmt.Errorf("%w (make setup installs it)", err)
	}
	image, at := filepath.Join(dir, "xfs.img"), filepath.Join(dir, "xfs")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		return "", nil, err
	}
	defer func() {
		if err != nil {
			os.Remove(image)
		}
	}()
	if err := errors.Join(os.Truncate(image, 1<<30), os.Mkdir(at, 0o700)); err != nil {
		return "", nil, err
	}
	if _, err := command(ctx, dir, "fallocate", "-l", "1GiB", image); err != nil {
		return "", nil, err
	}
	if _, err := command(ctx, dir, "mkfs.xfs", "-q", image); err != nil {
		return "", nil, err
	}
	out, err := command(ctx, dir, "losetup", "--find", "--show", "--direct-io=on", image)
	if err != nil {
		return "", nil, err
	}
	device := strings.TrimSpace(out)
	end := context.WithoutCancel(ctx)
	if _, err = command(ctx, dir, "mount", device, at); err != nil {
		_, e := command(end, dir, "losetup", "--detach", device)
		return "", nil, errors.Join(err, e)
	}
	return at, func() {
		// A failure shows when the directory cannot be removed.
		command(end, dir, "umount", at)                  //nolint:errcheck
		command(end, dir, "losetup", "--detach", device) //nolint:errcheck
		os.Remove(image)
	}, nil
}

// blocks measures what can be chosen when a cluster is made or used: the size of blocks, how much is under way, connections.
func (s *scale) blocks(ctx context.Context) error {
	const area = 1 << 30
	sizes := &table{
		title: "Size of a block",
		note:  "One volume of 1 GiB, written through first, then a flush after each of its writes, then as many as it takes, then large ones. CPU seconds for 10,000 operations of all processes; transactions in etcd for the volume; blocks at all peers at the end.",
		head:  []string{"block", "load", "ops/s", "CPU", "switches / op", "p50 / p99 µs", "etcd txn", "blocks"},
	}
	depths := &table{
		title: "Depth: writes in a record, with blocks of 4 MiB",
		note:  "4 KiB random writes to one volume. Records are what a peer appends; each is at two peers. A record has room for 256 pages; there is no option for it.",
		head:  []string{"under way", "connections", "ops/s", "writes / record", "CPU", "switches / op", "p50 / p99 µs"},
	}
	for _, size := range []byteSize{1 << 20, 4 << 20, 16 << 20} {
		if err := s.blockSize(ctx, size, area, sizes, depths); err != nil {
			return fmt.Errorf("blocks of %v: %w", size, err)
		}
	}
	return s.print(sizes, depths)
}

func (s *scale) blockSize(ctx context.Context, size, area byteSize, sizes, depths *table) error {
	c, remove, err := s.cluster(ctx, clusterOptions{peers: 3, blockSize: size})
	if err != nil {
		return err
	}
	defer remove()
	const name = "v"
	if err := errors.Join(c.create(ctx, area, name), c.serve()); err != nil {
		return err
	}
	hold, err := c.attach(ctx, name)
	if err != nil {
		return err
	}
	defer hold.release()
	if err := c.fill(ctx, c.uris(name), area); err != nil {
		return err
	}
	mds, err := c.mds(ctx)
	if err != nil {
		return err
	}
	defer mds.Close()
	for i, l := range []load{
		{title: "4 KiB random write + flush each", rw: "randwrite", bs: 4 << 10, depth: 1, fsync: true},
		{title: "4 KiB random write, 32 under way", rw: "randwrite", bs: 4 << 10, depth: 32},
		{title: "1 MiB sequential write, 8 under way", rw: "write", bs: 1 << 20, depth: 8},
	} {
		was, _, err := state(ctx, mds, name)
		if err != nil {
			return err
		}
		m, err := c.run(ctx, l, c.uris(name), area, s.seconds, i+1)
		if err != nil {
			return err
		}
		is, _, err := state(ctx, mds, name)
		if err != nil {
			return err
		}
		blocks := 0.0
		for _, p := range c.peers {
			blocks += m.is.torus[p.name].sum("torus_storage_blocks")
		}
		s.say("blocks of %v: %s: %.0f/s", size, l.title, m.IOPS)
		sizes.add(size.String(), l.title, thousands(m.IOPS), significant(m.CPUPer10k), significant(m.SwitchesPerOp), thousands(m.LatencyUs.P50)+" / "+thousands(m.LatencyUs.P99),
			strconv.FormatUint(is.Txn-was.Txn, 10), thousands(blocks))
	}
	if size != 4<<20 {
		return nil
	}
	for _, x := range []struct{ depth, conns int }{{1, 1}, {4, 1}, {16, 1}, {64, 1}, {64, 4}, {256, 1}} {
		l := load{title: "depth", rw: "randwrite", bs: 4 << 10, depth: x.depth, conns: x.conns}
		m, err := c.run(ctx, l, c.uris(name), area, max(1, s.seconds/2), 9)
		if err != nil {
			return err
		}
		depths.add(strconv.Itoa(x.depth), strconv.Itoa(x.conns), thousands(m.IOPS), significant(2*m.Ops/m.peers("torus_storage_written_blocks")), significant(m.CPUPer10k), significant(m.SwitchesPerOp),
			thousands(m.LatencyUs.P50)+" / "+thousands(m.LatencyUs.P99))
	}
	return nil
}

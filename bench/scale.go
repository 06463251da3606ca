package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/block"
	"github.com/coreos/torus/e2e/nbdclient"
	"github.com/coreos/torus/metadata/etcd"
)

// scale is what Torus costs as work grows: more volumes, more peers, larger volumes, nothing to do at all. docs/scale.md has what came
// out, and what follows from it for sizes that no machine of ours can try.
type scale struct {
	dir, bin string
	seconds  int
	idle     time.Duration
	sections []string
	over     []overLoad // how a volume is overwritten
	size     byteSize   // of the volume that is overwritten
	profile  string     // directory for CPU profiles of idle clusters; empty: none
	stdout   io.Writer
	progress io.Writer
	clusters int // started so far
}

// The sections of the report.
const (
	sectionLoad   = "load"      // volumes and peers
	sectionSize   = "size"      // size of a volume, attach, etcd
	sectionMap    = "map"       // memory of the map
	sectionIdle   = "idle"      // nothing to do
	sectionEtcd   = "etcd"      // as much as etcd can take
	sectionOver   = "overwrite" // compaction
	sectionDisk   = "disk"      // ways to write to a file durably
	sectionBlocks = "blocks"    // block size, depth, connections
)

var (
	scaleSections  = []string{sectionLoad, sectionSize, sectionMap, sectionIdle, sectionEtcd, sectionOver}
	choiceSections = []string{sectionDisk, sectionBlocks}
)

func parseScaleFlags(name string, sections, args []string, stdout, stderr io.Writer) (*scale, error) {
	s := &scale{stdout: stdout, progress: stderr}
	var chosen, over string
	f := flag.NewFlagSet("bench "+name, flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&chosen, "sections", "", "`LIST` of what to measure, with commas; all: "+strings.Join(sections, ","))
	f.IntVar(&s.seconds, "seconds", 4, "length of one measurement")
	f.DurationVar(&s.idle, "idle", 62*time.Second, "how long to watch clusters that have nothing to do; peers look through all volumes once a minute")
	s.size = 4 << 30
	f.Var(&s.size, "size", "size of the volume that is overwritten; ten times as much is written, twice")
	f.StringVar(&over, "overwrite", overLoads, "`LIST` of how it is overwritten: at random (uniform or skewed), compaction's target, depth")
	f.StringVar(&s.dir, "dir", "/var/tmp", "where the data goes while it runs: a directory of the disk to be measured")
	f.StringVar(&s.bin, "bin", "bin", "`DIR` of torusd, torusctl and torusblk")
	f.StringVar(&s.profile, "cpuprofile", "", "`DIR` for CPU profiles of the idle clusters' processes")
	if err := f.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil, err
		}
		return nil, fmt.Errorf("see bench %s --help", name) // the flag set has said what is wrong
	}
	if f.NArg() > 0 {
		return nil, fmt.Errorf("%q is not a flag: see bench %s --help", f.Arg(0), name)
	}
	if s.seconds < 1 || s.idle < time.Second {
		return nil, errors.New("--seconds is at least 1, --idle at least 1s")
	}
	var err error
	if s.sections, err = choose(sections, chosen); err != nil {
		return nil, fmt.Errorf("--sections: %w", err)
	}
	if s.over, err = parseOverLoads(over); err != nil {
		return nil, fmt.Errorf("--overwrite: %w", err)
	}
	for _, p := range []*string{&s.bin, &s.dir, &s.profile} { // what is started runs in another directory
		if *p != "" {
			if *p, err = filepath.Abs(*p); err != nil {
				return nil, err
			}
		}
	}
	return s, nil
}

// runScale measures and prints tables, each section as soon as it is through.
func runScale(ctx context.Context, name string, sections, args []string, stdout, stderr io.Writer) (err error) {
	s, err := parseScaleFlags(name, sections, args, stdout, stderr)
	if err != nil {
		return err
	}
	o := &options{dir: s.dir, bin: s.bin, contestants: []string{"torus"}, size: 8 << 30}
	if err := errors.Join(checkTools(o), checkDisk(o)); err != nil {
		return err
	}
	dir, err := os.MkdirTemp(s.dir, "torus-bench-")
	if err != nil {
		return fmt.Errorf("--dir: %w", err)
	}
	defer func() {
		if e := os.RemoveAll(dir); e != nil {
			err = errors.Join(err, fmt.Errorf("data is left behind: %w", e))
		}
	}()
	s.dir = dir
	began := time.Now()
	b := &bench{options: o}
	m := b.describe()
	fmt.Fprintf(stdout, "%s; %d × %s, %d GiB; Linux %s; load average at the start %s\ntorus: %s\n", m.Time, m.CPUs, m.CPU, m.Memory>>30, m.Kernel, m.Load, m.Version["torus"])
	for _, section := range s.sections {
		s.say("%s", section)
		if err := map[string]func(context.Context) error{
			sectionLoad: s.loads, sectionSize: s.sizes, sectionMap: s.mapMemory, sectionIdle: s.idleness, sectionEtcd: s.metadata, sectionOver: s.overwrite,
			sectionDisk: s.disk, sectionBlocks: s.blocks,
		}[section](ctx); err != nil {
			if ctx.Err() != nil {
				err = errors.New("interrupted")
			}
			return fmt.Errorf("%s: %w", section, err)
		}
	}
	s.say("took %v", time.Since(began).Round(time.Second))
	return nil
}

func (s *scale) say(format string, args ...any) { fmt.Fprintf(s.progress, format+"\n", args...) }

// table is one of the report.
type table struct {
	title, note string
	head        []string
	rows        [][]string
}

func (t *table) add(fields ...string) { t.rows = append(t.rows, fields) }

func (s *scale) print(tables ...*table) error {
	var b strings.Builder
	for _, t := range tables {
		if len(t.rows) == 0 {
			continue
		}
		fmt.Fprintf(&b, "\n### %s\n\n%s\n\n", t.title, t.note)
		row(&b, true, t.head...)
		for _, r := range t.rows {
			row(&b, false, r...)
		}
	}
	_, err := io.WriteString(s.stdout, b.String())
	return err
}

// cluster starts one in a directory of its own, which the returned function removes.
func (s *scale) cluster(ctx context.Context, o clusterOptions) (*cluster, func(), error) {
	s.clusters++
	dir := filepath.Join(s.dir, strconv.Itoa(s.clusters))
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, nil, err
	}
	if o.peerSize == 0 {
		o.peerSize = 16 << 30 // files grow as they are needed
	}
	o.http = true
	c, err := startCluster(ctx, dir, s.bin, o)
	if err != nil {
		return nil, nil, err
	}
	return c, func() {
		c.stop()
		os.RemoveAll(dir) // what stays is removed at the end, or reported then
	}, nil
}

// mds is the metadata service of a cluster, for what torusctl would take a process for each.
func (c *cluster) mds(ctx context.Context) (torus.MetadataService, error) {
	return etcd.New(ctx, etcd.Config{Endpoints: []string{c.etcd}})
}

// create makes volumes of a size.
func (c *cluster) create(ctx context.Context, size byteSize, names ...string) error {
	mds, err := c.mds(ctx)
	if err != nil {
		return err
	}
	defer mds.Close()
	for _, name := range names {
		if _, err := block.Create(ctx, mds, name, uint64(size), ""); err != nil {
			return err
		}
	}
	return nil
}

func volumeNames(n int) (names []string) {
	for i := range n {
		names = append(names, "v"+strconv.Itoa(i+1))
	}
	return names
}

func (c *cluster) uris(names ...string) (uris []string) {
	for _, name := range names {
		uris = append(uris, nbdclient.Unix(c.socket, name).URI())
	}
	return uris
}

// held are volumes that connections keep attached.
type held []*nbdclient.Conn

func (h held) release() {
	for _, c := range h {
		c.Close()
	}
}

// attach connects to volumes, which attaches them.
func (c *cluster) attach(ctx context.Context, names ...string) (h held, err error) {
	for _, name := range names {
		conn, err := c.dial(ctx, name)
		if err != nil {
			h.release()
			return nil, err
		}
		h = append(h, conn)
	}
	return h, nil
}

func (c *cluster) dial(ctx context.Context, name string) (conn *nbdclient.Conn, err error) {
	err = eventually(ctx, startLimit, "volume "+name+" is served", c.processes(), func(ctx context.Context) error {
		conn, err = nbdclient.Unix(c.socket, name).Dial(ctx)
		return err
	})
	return conn, err
}

// firstByte connects to a volume and reads its first page: how long that takes is how long an attach takes for whoever waits for it.
func (c *cluster) firstByte(ctx context.Context, name string) (*nbdclient.Conn, time.Duration, error) {
	began := time.Now()
	conn, err := c.dial(ctx, name)
	if err != nil {
		return nil, 0, err
	}
	if err := conn.ReadAt(make([]byte, torus.PageSize), 0); err != nil {
		conn.Close()
		return nil, 0, c.explain(err)
	}
	return conn, time.Since(began), nil
}

// released waits until nobody holds a volume.
func (c *cluster) released(ctx context.Context, mds torus.MetadataService, name string) error {
	v, err := mds.Volume(ctx, name)
	if err != nil {
		return err
	}
	return eventually(ctx, startLimit, "volume "+name+" is released", c.processes(), func(ctx context.Context) error {
		h, err := mds.Holder(ctx, torus.VolumeID(v.Id))
		if err == nil && h != nil {
			err = fmt.Errorf("held under epoch %d", h.Epoch)
		}
		return err
	})
}

var attachedLine = regexp.MustCompile(`msg=attached .*took=(\S+) .*recovered=(\d+)`)

// lastAttach is what torusblk says of its last attach: how long it took, and how many records it recovered.
func (c *cluster) lastAttach() (took time.Duration, recovered int, err error) {
	b, err := os.ReadFile(c.client.log)
	if err != nil {
		return 0, 0, err
	}
	all := attachedLine.FindAllStringSubmatch(string(b), -1)
	if len(all) == 0 {
		return 0, 0, fmt.Errorf("%s says of no attach", c.client.name)
	}
	last := all[len(all)-1]
	if took, err = time.ParseDuration(last[1]); err == nil {
		recovered, err = strconv.Atoi(last[2])
	}
	return took, recovered, err
}

// loads is the same work for more and more volumes, and for more and more peers.
func (s *scale) loads(ctx context.Context) error {
	const area = 512 << 20
	work := []load{
		{title: "4 KiB random write, 64 under way in all", rw: "randwrite", bs: 4 << 10, depth: 64},
		{title: "4 KiB random write, 3,200 a second in all", rw: "randwrite", bs: 4 << 10, depth: 64, rate: 3200},
		{title: "4 KiB random read, 64 under way in all, from page caches", rw: "randread", bs: 4 << 10, depth: 64},
	}
	tables := make([]*table, len(work))
	for i, l := range work {
		tables[i] = &table{
			title: l.title,
			note: "CPU seconds for 10,000 operations: of all processes; of torusblk; of the peer with etcd inside; of the other peers together. Context switches of all of them for an operation. " +
				"Latency p50 / p99 in µs.",
			head: []string{"volumes", "peers", "ops/s", "all", "torusblk", "peer + etcd", "other peers", "switches / op", "latency", "etcd puts / s"},
		}
	}
	mem := &table{
		title: "Memory and blocks after that",
		note: "MiB of memory that is no file of a disk: of torusblk, of the peer with etcd inside, of each other peer. Blocks are slots taken at all peers together; 512 MiB were written once, and then at random; " +
			"connections are those that peers have accepted.",
		head: []string{"volumes", "peers", "torusblk", "peer + etcd", "other peer", "blocks", "connections"},
	}
	for _, n := range []struct{ volumes, peers int }{{1, 3}, {8, 3}, {64, 3}, {8, 6}, {8, 12}} {
		if err := s.loaded(ctx, n.volumes, n.peers, area/byteSize(n.volumes), work, tables, mem); err != nil {
			return fmt.Errorf("%d volumes, %d peers: %w", n.volumes, n.peers, err)
		}
	}
	return s.print(append(tables, mem)...)
}

func (s *scale) loaded(ctx context.Context, volumes, peers int, area byteSize, work []load, tables []*table, mem *table) error {
	c, remove, err := s.cluster(ctx, clusterOptions{peers: peers})
	if err != nil {
		return err
	}
	defer remove()
	names := volumeNames(volumes)
	if err := errors.Join(c.create(ctx, 1<<30, names...), c.serve()); err != nil {
		return err
	}
	hold, err := c.attach(ctx, names...)
	if err != nil {
		return err
	}
	defer hold.release()
	if err := c.fill(ctx, c.uris(names...), area); err != nil {
		return err
	}
	size := []string{strconv.Itoa(volumes), strconv.Itoa(peers)}
	for i, l := range work {
		m, err := c.run(ctx, l, c.uris(names...), area, s.seconds, i+1)
		if err != nil {
			return err
		}
		s.say("%d volumes, %d peers: %s: %.0f/s, %.2f CPU s", volumes, peers, l.title, m.IOPS, m.CPUPer10k)
		fields := append(slices.Clone(size), thousands(m.IOPS), significant(m.CPUPer10k))
		for _, k := range []kind{kindClient, kindEtcd, kindPeer} {
			cpu, _ := m.cpu(k)
			fields = append(fields, significant(cpu/m.Ops*10_000))
		}
		tables[i].add(append(fields, significant(m.SwitchesPerOp), thousands(m.LatencyUs.P50)+" / "+thousands(m.LatencyUs.P99), significant(m.etcd("etcd_mvcc_put_total")/m.seconds))...)
	}
	fields := slices.Clone(size)
	for _, k := range []kind{kindClient, kindEtcd, kindPeer} {
		x, err := c.memory(k)
		if err != nil {
			return err
		}
		fields = append(fields, mib(x.Own))
	}
	now, err := c.counters(ctx)
	if err != nil {
		return err
	}
	blocks, conns := 0.0, 0.0
	for _, p := range c.peers {
		blocks += now.torus[p.name].sum("torus_storage_blocks")
		conns += now.torus[p.name].sum("torus_server_tdp_connections")
	}
	mem.add(append(fields, thousands(blocks), thousands(conns))...)
	return nil
}

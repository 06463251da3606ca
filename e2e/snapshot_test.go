package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/block"
	"github.com/coreos/torus/e2e/nbdclient"
	"github.com/coreos/torus/node"
	"github.com/coreos/torus/sim"
)

// metadata connects to the cluster's etcd.
func (c *cluster) metadata(t *testing.T) torus.MetadataService {
	t.Helper()
	node.RegisterMetadata(nil)
	mds, err := node.Etcd{Endpoints: []string{c.etcdURL}}.Connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mds.Close() })
	return mds
}

// forget deletes a volume with its snapshots at the end of the test.
func (c *cluster) forget(t *testing.T, names ...string) {
	t.Cleanup(func() {
		c.stopBlks(t)
		for _, name := range names {
			if _, err := c.tryCtl(context.Background(), "volume", "delete", "--force", name); err != nil {
				t.Logf("the volume stays: %v", err)
			}
		}
	})
}

// released waits until nobody has a volume attached, and returns how long that took.
func (c *cluster) released(t *testing.T, mds torus.MetadataService, volume string) time.Duration {
	t.Helper()
	v, err := mds.Volume(t.Context(), volume)
	if err != nil {
		t.Fatal(err)
	}
	return eventually(t, startLimit, volume+" is released", func() error {
		h, err := mds.Holder(t.Context(), torus.VolumeID(v.Id))
		if err == nil && h != nil {
			err = errNotYet
		}
		return err
	})
}

// taken is a snapshot that was taken while a stamper wrote: it shows the history up to a write that was acknowledged when it was asked for, or
// a later one that had been sent when it was there.
type taken struct {
	name       string
	least, top uint64
	took       time.Duration
	image      []byte // of the region, once it has been read
}

// take takes a snapshot of what a stamper writes.
func take(t *testing.T, mds torus.MetadataService, w *stamper, volume, name string) *taken {
	t.Helper()
	_, acked, _ := w.counts()
	began := time.Now()
	if _, err := block.CreateSnapshot(t.Context(), mds, volume, name); err != nil {
		t.Fatal(err)
	}
	took := time.Since(began)
	last, _, _ := w.counts()
	return &taken{name: name, least: acked, top: last, took: took}
}

// mustFit: an image is what the stamper's volume was when the snapshot was taken (S1, C1, W1).
func (s *taken) mustFit(t *testing.T, w *stamper, img []byte) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	n, err := w.check(img, s.least)
	if err != nil {
		t.Errorf("S1: snapshot %s: %v", s.name, err)
		return
	}
	for i := uint64(0); i < w.pages; i++ {
		if at, _ := sim.ReadStamp(img[i*pageSize:(i+1)*pageSize], w.hist.Seed, w.first+i); at > s.top {
			t.Errorf("S1: snapshot %s holds write %d of page %d, and %d was the last one when it was there", s.name, at, w.first+i, s.top)
			return
		}
	}
	if s.image != nil && !bytes.Equal(s.image, img) {
		t.Errorf("S1: snapshot %s reads otherwise than before (up to write %d)", s.name, n)
	}
	s.image = img
}

// read copies a snapshot with one of the clients that people use, and returns the stamper's region of it.
func (s *taken) read(t *testing.T, b *blk, volume, dir string, w *stamper, i int) []byte {
	t.Helper()
	uri, out := b.export(volume+"@"+s.name).URI(), filepath.Join(dir, s.name)
	defer os.Remove(out) //nolint:errcheck // a temporary file
	if i%2 == 0 {
		tool(t, "nbdcopy", "--connections=2", "--requests=16", uri, out)
	} else {
		tool(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", uri, out)
	}
	return w.region(t, out)
}

// region reads what the stamper writes to from a copy of the volume.
func (w *stamper) region(t *testing.T, path string) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	img := make([]byte, w.pages*pageSize)
	if _, err := f.ReadAt(img, int64(w.first*pageSize)); err != nil {
		t.Fatal(err)
	}
	return img
}

func median(l []time.Duration) time.Duration {
	l = slices.Sorted(slices.Values(l))
	return l[len(l)/2]
}

// Snapshots are taken one after the other while a volume is being written: each takes a moment, nobody waits for it, and each shows a
// prefix of the writes that contains all that was acknowledged before (C1, W1), for as long as it exists (S1): also when half of the
// others are deleted, and after torusblk was killed in the moment when one had been taken.
func TestSnapshots(t *testing.T) {
	c := sharedCluster(t)
	mds := c.metadata(t)
	const volume = "snapshots"
	c.ctl(t, "volume", "create-block", volume, "128MiB")
	c.forget(t, volume)
	b := c.newBlk(t, "--force")
	conn := dial(t, b.export(volume), startLimit)
	w := newStamper(71, 0, 4096, 16)
	w.pace = 500 * time.Microsecond
	dir := tempDir(t)

	load := startFio(t, b.export(volume), "64m", "32m", "4m,4m")
	s := startStream(t, b.export(volume), 32<<8, 1024, time.Millisecond)
	stop := w.start(conn)
	time.Sleep(500 * time.Millisecond)
	s.look()
	time.Sleep(2 * time.Second)
	quiet := s.look()
	t.Logf("before: %v", quiet)

	var snaps []*taken
	var times, ctl []time.Duration
	var worst stall
	var own time.Duration
	for i := range rounds(t, 40, 100) {
		name := fmt.Sprint("s", i)
		if i%10 == 9 { // as people do
			began := time.Now()
			c.ctl(t, "block", "snapshot", "create", volume+"@ctl-"+name)
			ctl = append(ctl, time.Since(began))
		}
		s.look()
		x := take(t, mds, w, volume, name)
		time.Sleep(50 * time.Millisecond)
		seen := s.look()
		snaps, times = append(snaps, x), append(times, x.took)
		worst.write, worst.read, worst.noise = max(worst.write, seen.write), max(worst.read, seen.read), max(worst.noise, seen.noise)
		own = max(own, seen.own())
		if i%10 == 4 {
			x.mustFit(t, w, x.read(t, b, volume, dir, w, i/10))
		}
		if t.Failed() || !s.running(nil) {
			break
		}
	}
	t.Logf("SNAPSHOT %d taken: median %v, at most %v (target 50ms); by torusctl median %v, at most %v", len(times), median(times).Round(time.Microsecond),
		slices.Max(times).Round(time.Millisecond), median(ctl).Round(time.Millisecond), slices.Max(ctl).Round(time.Millisecond))
	t.Logf("STALL by a snapshot: writes and flushes %v, reads %v, the machine alone %v; without that at most %v (target 100ms)", worst.write.Round(time.Millisecond),
		worst.read.Round(time.Millisecond), worst.noise.Round(time.Millisecond), own.Round(time.Millisecond))
	if median(times) > 500*time.Millisecond || own > time.Second {
		t.Errorf("snapshots take too long")
	}
	if err := s.end(); err != nil {
		t.Error(err)
	}
	load.stop()

	// Half of them go; the others are read again, by several at once.
	var left []*taken
	for i, x := range snaps {
		if i%2 == 1 {
			c.ctl(t, "block", "snapshot", "delete", volume+"@"+x.name)
		} else {
			left = append(left, x)
		}
	}
	if _, err := b.export(volume + "@" + snaps[1].name).Dial(t.Context()); err == nil {
		t.Error("a deleted snapshot is served")
	}
	for i, x := range left {
		if x.image == nil && i%5 != 0 {
			continue
		}
		for k := range 2 {
			x.mustFit(t, w, x.read(t, b, volume, dir, w, k))
		}
	}

	// torusblk is killed when a snapshot has just been taken: what it shows has been committed by nobody yet.
	for i := range rounds(t, 2, 20) {
		x := take(t, mds, w, volume, fmt.Sprint("killed", i))
		b.kill()
		stop() //nolint:errcheck // its server was killed
		conn.Close()
		b.serve(t)
		x.mustFit(t, w, x.read(t, b, volume, dir, w, i))
		if left[0].image != nil {
			left[0].mustFit(t, w, left[0].read(t, b, volume, dir, w, i))
		}
		conn = dial(t, b.export(volume), startLimit)
		w.settle(t, conn, true)
		// From here on the history begins anew: what was taken before is compared with what it was.
		for _, y := range append(left, x) {
			if y.image != nil && !bytes.Equal(y.image, y.read(t, b, volume, dir, w, i)) {
				t.Errorf("S1: snapshot %s reads otherwise than before the kill", y.name)
			}
		}
		left = nil
		left = append(left, take(t, mds, w, volume, fmt.Sprint("again", i)))
		stop = w.start(conn)
		time.Sleep(300 * time.Millisecond)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	w.mustBeRight(t)
	var v struct {
		Snapshots []string
		Live      uint64 `json:"live_bytes"`
		Stored    uint64 `json:"stored_bytes_per_replica"`
	}
	info := func() {
		t.Helper()
		if err := c.json(t.Context(), &v, "volume", "info", volume); err != nil {
			t.Fatal(err)
		}
		t.Logf("%d snapshots left, %d bytes alive, %d stored", len(v.Snapshots), v.Live, v.Stored)
	}
	info()

	// All of them go, and what only they needed is given back, while the volume is in use.
	for _, name := range v.Snapshots {
		c.ctl(t, "block", "snapshot", "delete", volume+"@"+name)
	}
	c.ctl(t, "volume", "compact", volume)
	if info(); v.Stored > v.Live*105/100+2*4<<20 {
		t.Errorf("%d bytes are stored for %d", v.Stored, v.Live)
	}
	w.mustEqual(t, conn)
	conn.Close()
}

// point is a moment at which nothing was under way, and all was flushed.
type point struct {
	at    time.Time
	name  string // of a snapshot; empty: none was taken
	image []byte
}

// A volume is cloned at, restored to and rewound to moments at which it was flushed: each gives exactly what it held then.
func TestGoingBack(t *testing.T) {
	c := sharedCluster(t)
	mds := c.metadata(t)
	const volume = "past"
	c.ctl(t, "volume", "create-block", volume, "64MiB", "--retain", "1h")
	c.forget(t, volume)
	b := c.newBlk(t, "--force")
	conn := dial(t, b.export(volume), startLimit)
	w := newStamper(72, 0, 4096, 16)
	w.runFor(t, conn, 200*time.Millisecond)
	w.flush(t, conn)
	c.ctl(t, "block", "snapshot", "create", volume+"@first") // has the first checkpoint made, from which on the past is kept
	eventually(t, startLimit, "the first checkpoint", func() error {
		if c.volume(t, volume).Checkpoint == nil {
			return errNotYet
		}
		return nil
	})
	var points []point
	for i := range rounds(t, 8, 40) {
		w.runFor(t, conn, time.Duration(50+i*97%300)*time.Millisecond)
		w.flush(t, conn)
		img, err := w.image(conn)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Millisecond) // the clock has ticked since the last write
		p := point{at: time.Now(), image: img}
		time.Sleep(2 * time.Millisecond)
		if i%3 == 1 {
			p.name = fmt.Sprint("p", i)
			c.ctl(t, "block", "snapshot", "create", volume+"@"+p.name)
		}
		points = append(points, p)
		if i == 4 { // not released in order
			b.kill()
			conn.Close()
			b.serve(t)
			conn = dial(t, b.export(volume), startLimit)
		}
	}
	same := func(what, export string, want []byte) {
		t.Helper()
		n := dial(t, b.export(export), startLimit)
		defer n.Close()
		got, err := w.image(n)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s: not what it was", what)
		}
	}
	when := func(p point) string { return p.at.UTC().Format(time.RFC3339Nano) }
	// While it is being written.
	stop := w.start(conn)
	for i, p := range points {
		if i%3 == 2 {
			continue
		}
		from := volume + "@" + when(p)
		if p.name != "" {
			from = volume + "@" + p.name
		}
		name := fmt.Sprint("clone", i)
		began := time.Now()
		c.ctl(t, "volume", "clone", from, name)
		t.Logf("clone of %s: %v", from, time.Since(began).Round(time.Millisecond))
		c.forget(t, name)
		same("clone of "+from, name, p.image)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	// torusblk dies: torusctl recovers the volume by itself, when the lease has ended.
	b.kill()
	conn.Close()
	eventually(t, leaseTime+5*time.Second, "the lease of a killed torusblk ends", func() error {
		if c.volume(t, volume).Status == "attached" {
			return errNotYet
		}
		return nil
	})
	c.ctl(t, "block", "snapshot", "create", volume+"@end")
	b.serve(t)
	for i := len(points) - 1; i >= 0; i -= 2 {
		p := points[i]
		if p.name != "" {
			c.ctl(t, "block", "snapshot", "restore", volume+"@"+p.name)
		} else {
			c.ctl(t, "volume", "rewind", volume, "--to", when(p))
		}
		same("taken back to "+when(p), volume, p.image)
		c.released(t, mds, volume)
	}
	// And forward again: all that was acknowledged is in the snapshot taken after the kill.
	c.ctl(t, "block", "snapshot", "restore", volume+"@end")
	conn = dial(t, b.export(volume), startLimit)
	w.settle(t, conn, true)
	conn.Close()
}

// A volume of 1 TiB with little in it: everything about it takes less than a second.
func TestThinVolume(t *testing.T) {
	c := sharedCluster(t)
	mds := c.metadata(t)
	const volume, clone = "thin", "thinner"
	b := c.newBlk(t)
	c.forget(t, volume, clone)
	timed := func(what string, do func()) {
		t.Helper()
		began := time.Now()
		do()
		took := time.Since(began)
		t.Logf("THIN 1TiB %s: %v (target 1s)", what, took.Round(time.Millisecond))
		if took > 5*time.Second {
			t.Errorf("%s took %v", what, took)
		}
	}
	var conn *nbdclient.Conn
	data := bytes.Repeat([]byte("thin"), 1<<18)
	ends := []uint64{0, 1 << 39, 1<<40 - 1<<20}
	write := func(b []byte) {
		for _, off := range ends {
			if err := conn.WriteAt(b, off, 0); err != nil {
				t.Fatal(err)
			}
		}
		if err := conn.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	reads := func(want []byte) {
		t.Helper()
		got := make([]byte, len(want))
		for _, off := range ends {
			if err := conn.ReadAt(got, off); err != nil || !bytes.Equal(got, want) {
				t.Errorf("at %d: %v, or not what was written", off, err)
			}
		}
	}
	attach := func(name string) { conn = dial(t, b.export(name), startLimit) }
	detach := func(name string) {
		conn.Close()
		c.released(t, mds, name)
	}
	timed("create", func() { c.ctl(t, "volume", "create-block", volume, "1TiB") })
	timed("attach", func() { attach(volume) })
	write(data)
	timed("snapshot", func() { c.ctl(t, "block", "snapshot", "create", volume+"@s") })
	write(make([]byte, len(data)))
	timed("clone of the snapshot", func() { c.ctl(t, "volume", "clone", volume+"@s", clone) })
	timed("detach", func() { detach(volume) })
	timed("attach again", func() { attach(volume) })
	reads(make([]byte, len(data)))
	timed("detach again", func() { detach(volume) })
	timed("attach of the clone", func() { attach(clone) })
	reads(data)
	timed("detach of the clone", func() { detach(clone) })
	timed("restore", func() { c.ctl(t, "block", "snapshot", "restore", volume+"@s") })
	timed("resize", func() { c.ctl(t, "volume", "resize", volume, "2TiB") })
	attach(volume)
	reads(data)
	if conn.Size() != 2<<40 {
		t.Errorf("%d bytes", conn.Size())
	}
	conn.Close()
	out := filepath.Join(tempDir(t), "dump")
	timed("dump of the snapshot", func() { c.ctl(t, "block", "dump", volume+"@s", out) })
	st, err := os.Stat(out)
	if err != nil {
		t.Fatal(err)
	}
	if st.Size() != 1<<40 || st.Sys().(*syscall.Stat_t).Blocks*512 > 8<<20 {
		t.Errorf("the dump has %d bytes and takes %d", st.Size(), st.Sys().(*syscall.Stat_t).Blocks*512)
	}
	f, err := os.Open(out)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got := make([]byte, len(data))
	for _, off := range ends {
		if _, err := f.ReadAt(got, int64(off)); err != nil || !bytes.Equal(got, data) {
			t.Errorf("the dump at %d: %v, or not what was written", off, err)
		}
	}
}

// A volume is dumped into a pipe from which another is loaded, and into a file, interrupted by SIGKILL, and gone on with; so is a load. What
// arrives is what was sent.
func TestDumpLoad(t *testing.T) {
	c := sharedCluster(t)
	mds := c.metadata(t)
	dir := tempDir(t)
	in, out := filepath.Join(dir, "in"), filepath.Join(dir, "out")
	image(t, in, 21)
	c.forget(t, "loaded", "piped")
	c.ctl(t, "block", "load", in, "loaded")
	b := c.newBlk(t)
	tool(t, "nbdcopy", b.export("loaded").URI(), out)
	sameFile(t, in, out)
	c.released(t, mds, "loaded")

	dump := newProcess(dir, "dump", "/bin/sh", "-c", strings.Join([]string{c.torusctl, "-C", c.etcdURL, "block dump loaded - |", c.torusctl, "-C", c.etcdURL, "block load - piped", fmt.Sprint(imageSize)}, " "))
	dump.start(t)
	if err := dump.wait(); err != nil {
		t.Fatalf("%v\n%s", err, dump.tail(10))
	}
	os.Remove(out) //nolint:errcheck // it is written anew
	tool(t, "nbdcopy", b.export("piped").URI(), out)
	sameFile(t, in, out)
	c.released(t, mds, "piped")

	// killed runs a command and kills it when it has left its note, or a moment later; false: it had ended before.
	killed := func(note string, after time.Duration, args ...string) bool {
		p := newProcess(dir, "killed", append([]string{c.torusctl, "-C", c.etcdURL}, args...)...)
		p.start(t)
		for p.alive() {
			if _, err := os.Stat(note); err == nil {
				time.Sleep(after)
				break
			}
			time.Sleep(time.Millisecond)
		}
		alive := p.alive()
		p.kill()
		return alive
	}
	cut := 0
	for i := range rounds(t, 2, 10) {
		after := time.Duration(i) * 50 * time.Millisecond
		os.Remove(out) //nolint:errcheck // it is written anew
		if killed(out+".torus-dump", after, "block", "dump", "loaded", out) {
			cut++
			c.ctl(t, "block", "dump", "loaded", out, "--resume")
		}
		sameFile(t, in, out)
		if killed(in+".torus-load", after, "block", "load", in, "resumed") {
			cut++
			c.released(t, mds, "resumed") // its lease ends
			c.ctl(t, "block", "load", in, "resumed", "--resume")
		}
		os.Remove(out) //nolint:errcheck // it is written anew
		tool(t, "nbdcopy", b.export("resumed").URI(), out)
		sameFile(t, in, out)
		c.released(t, mds, "resumed")
		c.ctl(t, "volume", "delete", "resumed")
	}
	if cut == 0 {
		t.Error("nothing was interrupted")
	}
	var left []struct{ Name string }
	if err := c.json(t.Context(), &left, "block", "snapshot", "list", "loaded"); err != nil || len(left) > 0 {
		t.Errorf("snapshots left: %v, %v", left, err)
	}
}

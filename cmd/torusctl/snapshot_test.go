package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/cmd/internal/clitest"
	"github.com/coreos/torus/e2e/nbdclient"
	"github.com/coreos/torus/node"
)

// devCluster is a cluster with peers, in this process, and a directory.
type devCluster struct {
	*cluster
	dir, socket string
}

func newDevCluster(t *testing.T) *devCluster {
	t.Helper()
	t.Setenv("HOME", t.TempDir())
	node.RegisterMetadata(nil)
	dir, err := os.MkdirTemp("", "torusctl") // short, for the socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	d, err := node.StartDev(t.Context(), node.DevConfig{
		Nodes: 3, Replication: 2, DataDir: filepath.Join(dir, "data"), Size: 512 << 20, NBD: "unix:" + filepath.Join(dir, "s"), CacheSize: node.DefaultCacheSize,
		Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	c := &clitest.Cluster{Etcd: d.Etcd().String()}
	return &devCluster{&cluster{c, c.MDS(t)}, dir, filepath.Join(dir, "s")}
}

// dial connects to an export of the cluster's own front end.
func (c *devCluster) dial(t *testing.T, export string) *nbdclient.Conn {
	t.Helper()
	n, err := nbdclient.Unix(c.socket, export).DialUntil(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// released disconnects and waits until nobody has the volume attached.
func (c *devCluster) released(t *testing.T, n *nbdclient.Conn, vol string) {
	t.Helper()
	n.Close()
	v, err := c.mds.Volume(t.Context(), vol)
	if err != nil {
		t.Fatal(err)
	}
	for {
		h, err := c.mds.Holder(t.Context(), torus.VolumeID(v.Id))
		if err != nil {
			t.Fatal(err)
		}
		if h == nil {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// reads reads the beginning of an export, which must be want, and returns its size.
func (c *devCluster) reads(t *testing.T, export string, want []byte) uint64 {
	t.Helper()
	n := c.dial(t, export)
	b := make([]byte, len(want))
	for off := 0; off < len(b); off += 16 << 20 { // a request has its bounds
		if err := n.ReadAt(b[off:min(off+16<<20, len(b))], uint64(off)); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(b, want) {
		t.Errorf("%s does not hold what it should", export)
	}
	size := n.Size()
	if strings.Contains(export, "@") {
		n.Close()
	} else {
		c.released(t, n, export)
	}
	return size
}

func (c *devCluster) write(t *testing.T, n *nbdclient.Conn, b []byte, off uint64) {
	t.Helper()
	if err := n.WriteAt(b, off, nbdclient.FUA); err != nil {
		t.Fatal(err)
	}
}

func random(seed uint64, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed)}).Read(b) //nolint:errcheck // it cannot fail
	return b
}

// Snapshots, clones, going back and other sizes, by the commands (S1: a snapshot reads the same for as long as it exists).
func TestSnapshotCommands(t *testing.T) {
	c := newDevCluster(t)
	a, b := random(1, 1<<20), random(2, 1<<20)
	c.run("volume", "create-block", "v", "64MiB", "--retain", "1h").CheckSuccess(t)
	n := c.dial(t, "v")
	c.write(t, n, a, 0)
	c.run("block", "snapshot", "create", "v@one").CheckSuccess(t, "snapshot v@one")
	for v := (volumeJSON{}); v.Checkpoint == nil; { // from the first one on its past is kept
		c.json(t, &v, "volume", "info", "v")
	}
	time.Sleep(2 * time.Millisecond) // clocks have ticked
	past := time.Now()
	time.Sleep(2 * time.Millisecond)
	c.write(t, n, b, 0)
	c.run("volume", "clone", "v", "now").CheckSuccess(t, "volume now")
	c.run("volume", "clone", "v@one", "then", "128MiB").CheckSuccess(t, "128.0 MiB")
	c.run("volume", "clone", "v@"+past.UTC().Format(time.RFC3339Nano), "past").CheckSuccess(t, "volume past")

	// Larger, while it is attached; and a clone of what lies behind the old end, before any checkpoint.
	c.run("volume", "resize", "v", "96MiB").CheckSuccess(t, "96.0 MiB")
	again := c.dial(t, "v")
	if again.Size() != 96<<20 || n.Size() != 64<<20 {
		t.Errorf("%d bytes for a new client, %d for the old one", again.Size(), n.Size())
	}
	c.write(t, again, a, 90<<20)
	again.Close()
	time.Sleep(2 * time.Millisecond)
	late := time.Now().UTC().Format(time.RFC3339Nano)
	time.Sleep(2 * time.Millisecond)
	c.write(t, n, a, 4<<20)
	c.run("volume", "clone", "v@"+late, "late").CheckSuccess(t)
	// Nothing is written: an idle volume has a past as well.
	c.run("volume", "clone", "v@-0s", "idle").CheckSuccess(t)

	c.run("block", "snapshot", "restore", "v@one").CheckFailure(t, "locked", "torusctl volume info v")
	c.run("volume", "rewind", "v", "--to", "-1s").CheckFailure(t, "locked", "torusctl volume info v")
	c.run("volume", "resize", "v", "32MiB", "--shrink", "--yes").CheckFailure(t, "locked", "torusctl volume info v")
	c.run("volume", "delete", "v").CheckFailure(t, "snapshots", "--force v")

	for vol, want := range map[string][]byte{"v@one": a, "then": a, "past": a, "now": b} {
		if size, is := c.reads(t, vol, want), map[bool]uint64{true: 128 << 20, false: 64 << 20}[vol == "then"]; size != is {
			t.Errorf("%s has %d bytes, not %d", vol, size, is)
		}
	}
	l := c.dial(t, "late")
	got := make([]byte, len(a))
	if err := l.ReadAt(got, 90<<20); err != nil || !bytes.Equal(got, a) {
		t.Errorf("a clone of what was written behind the old end: %v", err)
	}
	if err := l.ReadAt(got, 4<<20); err != nil || bytes.Equal(got, a) {
		t.Errorf("a clone has what was written later: %v", err)
	}
	l.Close()

	var snaps []snapshotJSON
	c.json(t, &snaps, "block", "snapshot", "list", "v")
	if len(snaps) != 1 || snaps[0].Name != "one" || snaps[0].SizeBytes != 64<<20 || past.Sub(snaps[0].Time) < 0 || past.Sub(snaps[0].Time) > time.Minute {
		t.Errorf("%+v", snaps)
	}
	c.run("block", "snapshot", "list", "v", "--csv").CheckSuccess(t, "name,created,size_bytes,time", "one,", ",67108864,")
	var v volumeJSON
	c.json(t, &v, "volume", "info", "v")
	if fmt.Sprint(v.Snapshots, v.Clones, v.Origin, v.RetainSeconds) != "[one] [now then past late idle] <nil> 3600" {
		t.Errorf("%+v", v)
	}
	c.json(t, &v, "volume", "info", "then")
	if v.Origin == nil || v.Origin.Volume != "v" {
		t.Errorf("%+v", v)
	}
	c.run("volume", "info", "then").CheckSuccess(t, "origin", "v of 20")

	// Back, and back from there.
	c.released(t, n, "v")
	c.run("block", "snapshot", "create", "v@two").CheckSuccess(t)
	c.run("block", "snapshot", "restore", "v@one").CheckSuccess(t)
	c.reads(t, "v", a)
	c.run("block", "snapshot", "restore", "v@two").CheckSuccess(t)
	c.reads(t, "v", b)
	c.run("volume", "rewind", "v", "--to", past.UTC().Format(time.RFC3339Nano)).CheckSuccess(t)
	if size := c.reads(t, "v", a); size != 96<<20 {
		t.Errorf("%d bytes: going back makes nothing smaller", size)
	}

	// Smaller, and as large again as a snapshot is.
	c.run("volume", "resize", "v", "512KiB").CheckFailure(t, "95.5 MiB", "--shrink")
	c.run("volume", "resize", "v", "512KiB", "--shrink").CheckFailure(t, "not confirmed", "--yes")
	c.run("volume", "resize", "v", "512KiB", "--shrink", "--yes").CheckSuccess(t)
	if size := c.reads(t, "v", a[:512<<10]); size != 512<<10 {
		t.Errorf("%d bytes", size)
	}
	c.run("volume", "resize", "v", "1MiB").CheckSuccess(t)
	c.reads(t, "v", append(bytes.Clone(a[:512<<10]), make([]byte, 512<<10)...))
	c.run("volume", "resize", "v", "512KiB", "--shrink", "--yes").CheckSuccess(t)
	c.run("block", "snapshot", "restore", "v@two").CheckSuccess(t)
	if size := c.reads(t, "v", b); size != 96<<20 {
		t.Errorf("%d bytes", size)
	}

	// Its origin goes, then what it needs of it.
	c.run("volume", "delete", "--force", "v").CheckSuccess(t)
	c.run("volume", "info", "v").CheckFailure(t, "does not exist")
	if out := c.run("volume", "list").Stdout; strings.Contains(out, ".deleted") {
		t.Errorf("a deleted volume is listed:\n%s", out)
	}
	c.run("volume", "list", "--all").CheckSuccess(t, ".deleted")
	c.run("volume", "flatten", "then").CheckSuccess(t)
	c.reads(t, "then", a)
	for _, name := range []string{"now", "past", "late", "idle"} {
		c.run("volume", "delete", name).CheckSuccess(t)
	}
	if out := c.run("volume", "list", "--all").Stdout; strings.Contains(out, ".deleted") {
		t.Errorf("what no clone needs is kept:\n%s", out)
	}
	c.reads(t, "then", a)
	c.run("volume", "flatten", "then").CheckFailure(t, "not a clone")
	c.run("volume", "compact", "then").CheckSuccess(t, "is compact")
	c.run("volume", "compact", "no-such").CheckFailure(t, "does not exist")
	c.reads(t, "then", a)
}

// What cannot be done is said so, with the next step.
func TestSnapshotRefusals(t *testing.T) {
	c := initCluster(t)
	c.run("volume", "create-block", "v", "1MiB").CheckSuccess(t)
	c.run("block", "snapshot", "create", "v@s").CheckSuccess(t)
	for line, want := range map[string][]string{
		"block snapshot create v":                   {`"v"`, "VOLUME@SNAPSHOT"},
		"block snapshot create v@s":                 {"v@s", "already exists", "torusctl block snapshot delete v@s"},
		"block snapshot create v@a/b":               {"v@a/b", "letters"},
		"block snapshot create none@s":              {"none@s", "does not exist", "torusctl volume list"},
		"block snapshot delete v@t":                 {"v@t", "does not exist", "torusctl block snapshot list v"},
		"block snapshot restore v@t":                {"v@t", "does not exist", "torusctl block snapshot list v"},
		"block snapshot list none":                  {"none", "does not exist", "torusctl volume list"},
		"volume clone none new":                     {"none", "does not exist", "torusctl volume list"},
		"volume clone v@t new":                      {"v@t", "does not exist", "torusctl block snapshot list v"},
		"volume clone v@12:00 new":                  {`"12:00"`, "-5m"},
		"volume clone v@-1x new":                    {`"-1x"`, "-5m"},
		"volume clone v@2999-01-01T00:00:00Z new":   {"future", "-5m"},
		"volume clone v@s a/b":                      {"a/b", "letters"},
		"volume clone v@s v":                        {"already exists"},
		"volume clone v@s new 512KiB":               {"524288", "1048576"},
		"volume clone v@s new 1XB":                  {"1XB"},
		"volume rewind v":                           {"--to", "torusctl volume rewind --help"},
		"volume rewind v --to tomorrow":             {`"tomorrow"`, "-5m"},
		"volume rewind none --to -5m":               {"none", "torusctl volume list"},
		"volume retain v forever":                   {`"forever"`, "24h"},
		"volume retain v 1ms":                       {"1ms", "24h"},
		"volume retain none 1h":                     {"none", "torusctl volume list"},
		"volume resize v 1000":                      {"--shrink"},
		"volume resize v 2000001":                   {"2000001", "sectors"},
		"volume resize none 1GiB":                   {"none", "torusctl volume list"},
		"volume flatten v":                          {"not a clone"},
		"volume delete v":                           {"1 snapshots", "--force"},
		"volume create-block w 1MiB --retain x":     {`"x"`, "24h"},
		"block dump none -":                         {"none", "torusctl volume list"},
		"block dump v@t -":                          {"v@t", "torusctl block snapshot list v"},
		"block dump v - --resume":                   {"standard output"},
		"block dump v /nowhere/f":                   {"/nowhere/f"},
		"block dump v /dev/null/x --resume":         {"/dev/null/x"},
		"block load /nowhere/f new":                 {"/nowhere/f"},
		"block load /etc new":                       {"/etc", "directory"},
		"block load - new":                          {"SIZE"},
		"block load - new --resume":                 {"standard input"},
		"block load /etc/passwd v":                  {"already exists", "--overwrite"},
		"block load /etc/passwd v 2MiB --overwrite": {"1048576", "torusctl volume resize"},
		"block load /etc/passwd new 1":              {"larger"},
	} {
		t.Run(line, func(t *testing.T) { c.run(strings.Fields(line)...).CheckFailure(t, want...) })
	}
	if l := c.run("block", "snapshot", "list", "v", "--csv").Stdout; strings.Count(l, "\n") != 2 {
		t.Errorf("a snapshot was left behind:\n%s", l)
	}
}

// A dump holds what the volume held when it began, holes for zeroes, and goes on where it was interrupted; so does a load.
func TestDumpLoad(t *testing.T) {
	c := newDevCluster(t)
	const size = 300<<20 + 512
	// Data, zeroes that were written, holes, and an end within a page.
	want := make([]byte, size)
	copy(want[1<<20:], random(3, 3<<20+4096))
	copy(want[150<<20+8192:], random(4, 1<<20))
	copy(want[290<<20:], random(5, 2<<20))
	copy(want[size-700:], random(6, 700))
	in, out := filepath.Join(c.dir, "in"), filepath.Join(c.dir, "out")
	if err := os.WriteFile(in, want, 0o600); err != nil { // no holes: zeroes are found
		t.Fatal(err)
	}
	equal := func(path string) {
		t.Helper()
		got, err := os.ReadFile(path)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is not what was loaded: %d bytes, %v", path, len(got), err)
		}
	}
	stored := func(path string) int64 {
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return st.Sys().(*syscall.Stat_t).Blocks * 512
	}
	c.run("block", "load", in, "v").CheckSuccess(t, "300.0 MiB loaded")
	var v volumeJSON
	c.json(t, &v, "volume", "info", "v")
	if v.SizeBytes != size || v.LiveBytes > 8<<20 {
		t.Errorf("%d bytes, %d alive", v.SizeBytes, v.LiveBytes)
	}
	r := c.run("block", "dump", "v", out, "-p")
	r.CheckSuccess(t, "300.0 MiB")
	if !strings.Contains(r.Stderr, "100%") {
		t.Errorf("progress: %q", r.Stderr)
	}
	equal(out)
	if n := stored(out); n > 10<<20 {
		t.Errorf("the dump takes %d bytes", n)
	}
	if got := c.run("block", "dump", "v", "-").Stdout; got != string(want) {
		t.Errorf("to standard output: %d bytes", len(got))
	}
	left := func() {
		t.Helper()
		var snaps []snapshotJSON
		if c.json(t, &snaps, "block", "snapshot", "list", "v"); len(snaps) > 0 {
			t.Errorf("snapshots left: %+v", snaps)
		}
		for _, path := range []string{in + loadNote, out + dumpNote} {
			if _, err := os.Stat(path); err == nil {
				t.Errorf("%s is left", path)
			}
		}
	}
	left()

	// A dump that ended at 256 MiB; the volume has changed since.
	c.run("block", "snapshot", "create", "v@dump-1").CheckSuccess(t)
	n := c.dial(t, "v")
	c.write(t, n, random(9, 4<<20), 1<<20)
	c.released(t, n, "v")
	interrupted := func(done uint64) {
		t.Helper()
		if err := os.Truncate(out, 256<<20+12345); err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(note{Volume: "v", VolumeID: v.ID, Snapshot: "dump-1", Temporary: true, SizeBytes: size, DoneBytes: done})
		if err == nil {
			err = os.WriteFile(out+dumpNote, b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	interrupted(256 << 20)
	c.run("block", "dump", "v", out).CheckFailure(t, "interrupted", "--resume", dumpNote)
	c.run("block", "dump", "w", out, "--resume").CheckFailure(t, "v@dump-1", "anew")
	c.run("block", "dump", "v", out, "--resume").CheckSuccess(t, "of it written")
	equal(out)
	left()
	// What is there already is compared.
	c.run("block", "snapshot", "create", "v@dump-1").CheckSuccess(t)
	interrupted(151 << 20)
	f, err := os.OpenFile(out, os.O_RDWR, 0)
	if err == nil {
		_, err = f.WriteAt([]byte{want[150<<20+9000] + 1}, 150<<20+9000)
		f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	c.run("block", "dump", "v", out, "--resume").CheckFailure(t, "not what was copied", "anew")

	// A load that ended at 2 MiB, into a volume that held something else.
	st, err := os.Stat(in)
	if err != nil {
		t.Fatal(err)
	}
	c.run("volume", "create-block", "w", "301MiB").CheckSuccess(t)
	n = c.dial(t, "w")
	id := func() uint64 { var w volumeJSON; c.json(t, &w, "volume", "info", "w"); return w.ID }()
	c.write(t, n, want[:2<<20], 0)
	c.write(t, n, random(10, 4<<20), 146<<20)
	tail := random(11, 4096)
	c.write(t, n, tail, 301<<20-4096)
	c.released(t, n, "w")
	b, err := json.Marshal(note{Volume: "w", VolumeID: id, Overwrite: true, SizeBytes: size, Modified: modified(st), DoneBytes: 2 << 20})
	if err == nil {
		err = os.WriteFile(in+loadNote, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	c.run("block", "load", in, "w", "--resume").CheckSuccess(t, "300.0 MiB loaded")
	n = c.dial(t, "w")
	got := make([]byte, 301<<20)
	for off := 0; off < len(got); off += 7 << 20 {
		if err := n.ReadAt(got[off:min(off+7<<20, len(got))], uint64(off)); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(got[:size], want) || !bytes.Equal(got[301<<20-4096:], tail) {
		t.Error("what was loaded is not what is there")
	}
	c.released(t, n, "w")
	c.run("block", "load", in, "w", "--resume").CheckFailure(t, "nothing to resume", "--resume")
	c.run("volume", "create-block", "small", "1MiB").CheckSuccess(t)
	c.run("block", "load", in, "small", "--overwrite").CheckFailure(t, "torusctl volume resize small")
}

func TestTimes(t *testing.T) {
	now := time.Date(2020, 5, 6, 7, 8, 9, 0, time.UTC)
	for text, want := range map[string]time.Duration{"-5m": 5 * time.Minute, "-7d": 7 * 24 * time.Hour, "-0s": 0, "2020-05-06T07:08:08.5Z": time.Second / 2, "2020-05-06T09:08:09+02:00": 0} {
		if at, err := parsePast(text, now); err != nil || now.Sub(at) != want {
			t.Errorf("%s is %v, %v", text, at, err)
		}
	}
	for _, text := range []string{"", "-", "5m", "--5m", "-5", "2020-05-06", "2020-05-06T07:08:10Z", "-999999999d", "-1e9h"} {
		if at, err := parsePast(text, now); err == nil {
			t.Errorf("%q is %v", text, at)
		}
	}
}

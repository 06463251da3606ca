package main

import (
	"errors"
	"flag"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"
)

func TestScaleFlags(t *testing.T) {
	s, err := parseScaleFlags("scale", scaleSections, []string{"--sections", "idle,load", "--seconds", "2", "--idle", "5s"}, io.Discard, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(s.sections, []string{"load", "idle"}) || s.seconds != 2 || s.idle != 5*time.Second || !filepath.IsAbs(s.bin) || s.profile != "" {
		t.Errorf("%+v", s)
	}
	if _, err := parseScaleFlags("choices", choiceSections, []string{"--help"}, io.Discard, io.Discard); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("--help: %v", err)
	}
	for args, want := range map[string]string{
		"--sections disk": "load,size,map,idle,etcd,overwrite", "--seconds 0": "at least 1", "--overwrite uniform-1-32": "uniform-0.7-32", "--overwrite skewed-0.7": "skewed-0.7", "--idle 1ms": "at least", "extra": `"extra"`, "--nope": "bench scale --help",
	} {
		if _, err := parseScaleFlags("scale", scaleSections, strings.Fields(args), io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want something of %q", args, err, want)
		}
	}
}

// The load is the same in all, however many volumes and connections share it.
func TestLoadArgs(t *testing.T) {
	l := load{rw: "randwrite", bs: 4096, depth: 64, rate: 3200, conns: 2}
	args := l.args([]string{"nbd:a", "nbd:b", "nbd:c", "nbd:d"}, 1<<20, 3, 7)
	for _, want := range []string{"--iodepth=8", "--rate_iops=400", "--runtime=3", "--time_based", "--randseed=7", "--size=1048576"} {
		if !slices.Contains(args, want) {
			t.Errorf("no %s in %q", want, args)
		}
	}
	jobs, uris := 0, map[string]int{}
	for _, a := range args {
		if strings.HasPrefix(a, "--name=") {
			jobs++
		}
		if uri, ok := strings.CutPrefix(a, "--uri="); ok {
			uris[uri]++
		}
	}
	if jobs != 8 || len(uris) != 4 || uris["nbd:c"] != 2 {
		t.Errorf("%d jobs, %v", jobs, uris)
	}
	l = load{rw: "write", bs: 1 << 20, depth: 1, bytes: 8 << 20}
	args = l.args([]string{"nbd:a", "nbd:b"}, 1<<30, 3, 1)
	if !slices.Contains(args, "--io_size=4194304") || !slices.Contains(args, "--iodepth=1") || slices.Contains(args, "--time_based") {
		t.Errorf("%q", args)
	}
}

func TestParseMetrics(t *testing.T) {
	m, err := parseMetrics(strings.NewReader("# HELP a b\na{x=\"1 2\"} 3\na{x=\"2\"} 4.5e+01\nab 7\n\nb 1\n"))
	if err != nil || m.sum("a") != 48 || m.sum("ab") != 7 || m.sum("c") != 0 {
		t.Errorf("%v, %v", m, err)
	}
	for _, bad := range []string{"a", "a x"} {
		if m, err := parseMetrics(strings.NewReader(bad)); err == nil {
			t.Errorf("%q: %v", bad, m)
		}
	}
}

func TestParseDevice(t *testing.T) {
	c, err := parseDevice("1 2 3 4 50 6 700 8 9 10 11 12 13 14 15 16 17\n")
	if err != nil || c != (deviceCounts{writes: 50, sectors: 700, flushes: 16}) {
		t.Errorf("%+v, %v", c, err)
	}
	for _, bad := range []string{"1 2 3", "1 2 3 4 x 6 7 8 9 10 11 12 13 14 15 16"} {
		if c, err := parseDevice(bad); err == nil {
			t.Errorf("%q: %+v", bad, c)
		}
	}
}

func TestTouched(t *testing.T) {
	near(t, "all", touched(10, 1, true), 10)
	near(t, "one", touched(10, 1, false), 1)
	near(t, "two", touched(10, 2, false), 1.9)
}

func TestAligned(t *testing.T) {
	for range 10 {
		if b := aligned(8192); len(b) != 8192 || uintptr(unsafe.Pointer(&b[0]))%4096 != 0 {
			t.Fatalf("%d bytes at %p", len(b), &b[0])
		}
	}
}

// Every way writes what it says it does, and leaves nothing behind.
func TestWays(t *testing.T) {
	dir := t.TempDir()
	for _, w := range ways() {
		if strings.Contains(w.title, "O_DIRECT") && strings.HasPrefix(fileSystem(dir), "0x") {
			continue // not every file system has it
		}
		r, err := w.measure(filepath.Join(dir, "page"), false, time.Millisecond)
		if err != nil {
			t.Fatalf("%s: %v", w.title, err)
		}
		if r.rate <= 0 || r.p50 <= 0 || r.p99 < r.p50 {
			t.Errorf("%s: %+v", w.title, r)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("%v is left, %v", left, err)
	}
}

// A small cluster is measured with real programs: what is counted is what was done.
func TestClusterSpan(t *testing.T) {
	bin := t.TempDir()
	build := exec.CommandContext(t.Context(), "go", "build", "-o", bin, "../cmd/torusd", "../cmd/torusctl", "../cmd/torusblk")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	s := &scale{dir: t.TempDir(), bin: bin, seconds: 1, stdout: io.Discard, progress: io.Discard}
	c, remove, err := s.cluster(t.Context(), clusterOptions{peers: 3, peerSize: 256 << 20, blockSize: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer remove()
	names := volumeNames(2)
	if err := errors.Join(c.create(t.Context(), 64<<20, names...), c.serve()); err != nil {
		t.Fatal(err)
	}
	hold, took, err := c.firstByte(t.Context(), names[0])
	if err != nil || took <= 0 {
		t.Fatalf("%v, %v", took, err)
	}
	if alone, recovered, err := c.lastAttach(); err != nil || alone <= 0 || recovered != 0 {
		t.Errorf("attach took %v, %d recovered, %v", alone, recovered, err)
	}
	others, err := c.attach(t.Context(), names[1])
	if err != nil {
		t.Fatal(err)
	}
	defer others.release()
	m, err := c.run(t.Context(), load{title: "small", rw: "write", bs: 64 << 10, depth: 4, bytes: 8 << 20}, c.uris(names...), 64<<20, 0, 1)
	if err != nil {
		t.Fatal(err)
	}
	if m.Ops != 128 {
		t.Errorf("%v operations", m.Ops)
	}
	// Two copies, with headers; less than a third of it.
	if got := m.peers("torus_server_tdp_received_bytes_total"); got < 16<<20 || got > 24<<20 {
		t.Errorf("peers received %v bytes", got)
	}
	for k, want := range map[kind]int{kindClient: 1, kindEtcd: 1, kindPeer: 2} {
		if _, n := m.cpu(k); n != want {
			t.Errorf("%d processes of kind %d", n, k)
		}
		if x, err := c.memory(k); err != nil || x.Own == 0 {
			t.Errorf("memory of kind %d: %+v, %v", k, x, err)
		}
	}
	if n, err := heap(t.Context(), c.client.http); err != nil || n < 100<<10 {
		t.Errorf("a heap of %d, %v", n, err)
	}
	mds, err := c.mds(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer mds.Close()
	calls, err := c.begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	hold.Close()
	if err := c.released(t.Context(), mds, names[0]); err != nil {
		t.Fatal(err)
	}
	if err := calls.end(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := calls.calls(kindClient)["Unlock"]; n != 1 {
		t.Errorf("%v unlocks: %v", n, calls.calls(kindClient))
	}
	if st, bytes, err := state(t.Context(), mds, names[0]); err != nil || st.Head == nil || bytes == 0 {
		t.Errorf("%v, %d bytes, %v", st, bytes, err)
	}
}

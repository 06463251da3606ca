package main

import (
	"bytes"
	"context"
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
)

func TestParseFlags(t *testing.T) {
	o, err := parseFlags([]string{"--cells", "read-4k-1,write-4k-1", "--contestants", "torus,raw", "--old", "x", "--size", "256MiB", "--cpuprofile", "write-4k-32"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if len(o.cells) != 2 || o.cells[0].Name != "read-4k-1" || o.cells[1].Name != "write-4k-1" {
		t.Errorf("cells: %+v", o.cells)
	}
	if !slices.Equal(o.contestants, []string{"raw", "torus", "old"}) {
		t.Errorf("contestants: %q", o.contestants)
	}
	if o.size != 256<<20 || o.rounds != 3 || o.seconds != 5 || o.profile.Name != "write-4k-32" || !filepath.IsAbs(o.old) || !filepath.IsAbs(o.bin) {
		t.Errorf("%+v", o)
	}
	// Two copies on three peers, one cell that writes for 5 s.
	if got := o.peerBytes(); got != 512<<20+5*logBytesPerSecond {
		t.Errorf("peers of %v", got)
	}
	if o, err = parseFlags(nil, io.Discard); err != nil || len(o.cells) != len(cells()) || len(o.contestants) != 3 {
		t.Errorf("%+v, %v", o, err)
	}
	if _, err := parseFlags([]string{"--help"}, io.Discard); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("--help: %v", err)
	}
}

func TestBadFlags(t *testing.T) {
	for args, want := range map[string]string{
		"--cells write-4k":                 "write-4k-1,write-4k-fsync",
		"--cells ,":                        "--cells",
		"--contestants raw,ceph":           "raw,qemu,torus",
		"--contestants old":                "raw,qemu,torus",
		"--rounds 0":                       "at least 1",
		"--seconds 0":                      "at least 1",
		"--size 1MiB":                      "64MiB",
		"--size huge":                      "--help",
		"--nope":                           "--help",
		"extra":                            `"extra"`,
		"--old a --old-ref b":              "one of them",
		"--cpuprofile x":                   "one cell",
		"--cpuprofile read-1m-8,read-4k-1": "one cell",
	} {
		if _, err := parseFlags(strings.Fields(args), io.Discard); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want something of %q", args, err, want)
		}
	}
}

func TestByteSize(t *testing.T) {
	for text, want := range map[string]byteSize{"0": 0, "4096": 4096, "1KiB": 1 << 10, "512MiB": 512 << 20, "2GiB": 2 << 30, "1TiB": 1 << 40} {
		var s byteSize
		if err := s.Set(text); err != nil || s != want {
			t.Errorf("%s: %d, %v", text, s, err)
		}
	}
	for size, want := range map[byteSize]string{0: "0", 1: "1", 4096: "4KiB", 1536 << 20: "1536MiB", 1 << 40: "1TiB"} {
		if size.String() != want {
			t.Errorf("%d: %s, want %s", size, size, want)
		}
	}
	for _, bad := range []string{"", "GiB", "-1GiB", "2 GiB", "1e9", "18446744073709551615TiB", "x"} {
		var s byteSize
		if err := s.Set(bad); err == nil {
			t.Errorf("%q was taken for %d", bad, s)
		}
	}
}

func TestMissingPrograms(t *testing.T) {
	o, err := parseFlags([]string{"--bin", t.TempDir(), "--cells", "write-4k-1"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if err := checkTools(o); err == nil || !strings.Contains(err.Error(), "torusd is missing") || !strings.Contains(err.Error(), "make build") {
		t.Errorf("no torusd: %v", err)
	}
	t.Setenv("PATH", t.TempDir())
	if err := checkTools(o); err == nil || !strings.Contains(err.Error(), "fio is missing") || !strings.Contains(err.Error(), "make setup") {
		t.Errorf("no fio: %v", err)
	}
}

func TestDisk(t *testing.T) {
	o := &options{dir: filepath.Join(t.TempDir(), "none"), size: 1 << 20}
	if err := checkDisk(o); err == nil || !strings.Contains(err.Error(), "--dir") {
		t.Errorf("no such directory: %v", err)
	}
	o.dir, o.size, o.contestants = ".", 1<<60, []string{"raw"}
	if err := checkDisk(o); err == nil || !strings.Contains(err.Error(), "--size") {
		t.Errorf("an exbibyte: %v", err)
	}
	o.dir, o.size = filepath.Join(t.TempDir(), strings.Repeat("x", 100)), 1<<20
	if err := os.Mkdir(o.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := checkDisk(o); err == nil || !strings.Contains(err.Error(), "shorter") {
		t.Errorf("a long path: %v", err)
	}
}

// A server that ends by itself is reported with what it said, and one that runs is ended.
func TestProcess(t *testing.T) {
	dir := t.TempDir()
	p, err := start("short", dir, "sh", "-c", "echo out of luck >&2; exit 3")
	if err != nil {
		t.Fatal(err)
	}
	err = eventually(t.Context(), time.Minute, "it works", []*process{p}, func(context.Context) error { return errors.New("not yet") })
	if err == nil || !strings.Contains(err.Error(), "out of luck") || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("%v", err)
	}
	p.stop()

	p, err = start("long", dir, "sleep", "1000")
	if err != nil {
		t.Fatal(err)
	}
	if err := p.check(); err != nil {
		t.Error(err)
	}
	err = eventually(t.Context(), time.Millisecond, "it works", []*process{p}, func(context.Context) error { return errors.New("not yet") })
	if err == nil || !strings.Contains(err.Error(), "it works: not within 1ms") {
		t.Errorf("%v", err)
	}
	p.stop()
	if err := p.check(); err == nil {
		t.Error("it is still there")
	}
	if _, err := start("none", dir, filepath.Join(dir, "none")); err == nil {
		t.Error("a program that is not there was started")
	}
}

func TestEscape(t *testing.T) {
	if got := fioPath("/a:b/c"); got != `/a\:b/c` {
		t.Error(got)
	}
	if got := qemuPath("/a,b/c"); got != "/a,,b/c" {
		t.Error(got)
	}
}

// All of it once, with the programs as they are now: every contestant, the tables and the file come out, and nothing stays.
func TestRun(t *testing.T) {
	defer func(d time.Duration) { restFor = d }(restFor)
	restFor = 0
	bin, dir := t.TempDir(), t.TempDir()
	build := exec.CommandContext(t.Context(), "go", "build", "-o", bin, "../cmd/torusd", "../cmd/torusctl", "../cmd/torusblk")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	o, err := parseFlags([]string{
		"--bin", bin, "--dir", dir, "--size", "64MiB", "--peer-size", "512MiB", "--rounds", "1", "--seconds", "1",
		"--cells", "flush-beside-bulk,write-1m-8", "--old", bin, "--cpuprofile", "write-1m-8", "--json", filepath.Join(dir, "out", "bench.json"),
	}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "out"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := checkTools(o); err != nil {
		t.Fatal(err)
	}
	var progress bytes.Buffer
	work := filepath.Join(dir, "work")
	if err := os.Mkdir(work, 0o755); err != nil {
		t.Fatal(err)
	}
	b := &bench{options: o, dir: work, progress: &progress}
	err = b.measure(t.Context())
	b.close()
	if err != nil {
		t.Fatalf("%v\n%s", err, progress.String())
	}
	for _, c := range b.contestants {
		for _, p := range c.servers {
			if p.check() == nil {
				t.Errorf("%s of %s still runs", p.name, c.name)
			}
		}
	}
	r := b.report()
	for _, c := range r.Cells {
		for _, name := range []string{"raw", "qemu", "torus", "old"} {
			f := c.Contestants[name]
			if len(f.Samples) != 1 || f.Median.IOPS <= 0 || f.Median.LatencyUs.P50 <= 0 || f.Median.LatencyUs.P999 < f.Median.LatencyUs.P50 {
				t.Errorf("%s, %s: %+v", c.Name, name, f.Median)
			}
			if (f.Median.FlushUs.P50 > 0) != c.fsync {
				t.Errorf("%s, %s: flushes took %v", c.Name, name, f.Median.FlushUs)
			}
			if (f.Median.BulkMBPerSecond > 0) != c.bulk {
				t.Errorf("%s, %s: bulk writes at %v MB/s", c.Name, name, f.Median.BulkMBPerSecond)
			}
			if servers := map[string]int{"raw": 0, "qemu": 1, "torus": 4, "old": 4}[name]; len(f.Median.ProcessCPUPer10k) != servers {
				t.Errorf("%s, %s: CPU of %v", c.Name, name, f.Median.ProcessCPUPer10k)
			} else if servers > 0 && (f.Median.CPUPer10k <= 0 || f.Median.SwitchesPerOp <= 0) {
				t.Errorf("%s, %s: no CPU, or no switches: %+v", c.Name, name, f.Median)
			}
		}
	}
	if len(r.Cells) != 2 || len(r.Memory["torus"]) != 4 || r.Memory["qemu"]["qemu-storage-daemon"].RSS == 0 || r.Memory["torus"]["torusblk"].Rest == 0 {
		t.Errorf("%d cells, memory %v", len(r.Cells), r.Memory)
	}
	profiles, err := filepath.Glob(filepath.Join(dir, "out", "bench-write-1m-8-*.pprof"))
	if err != nil || len(profiles) != 8 {
		t.Errorf("profiles: %q, %v", profiles, err)
	}
	for _, p := range profiles {
		if st, err := os.Stat(p); err != nil || st.Size() == 0 {
			t.Errorf("%s is empty: %v", p, err)
		}
	}
	t.Log(progress.String() + r.markdown())
}

func TestBuildRefNames(t *testing.T) {
	if _, err := buildRef(t.Context(), "--output=x", t.TempDir(), io.Discard); err == nil {
		t.Error("a flag was taken for a commit")
	}
	if _, err := buildRef(t.Context(), "no-such-ref", t.TempDir(), io.Discard); err == nil || !strings.Contains(err.Error(), "no-such-ref") {
		t.Errorf("%v", err)
	}
}

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func cellNamed(name string) cell {
	all := cells()
	return all[slices.IndexFunc(all, func(c cell) bool { return c.Name == name })]
}

// made is a run with two rounds of two cells, the second of which failed for Torus.
func made(contestants ...string) *bench {
	b := &bench{options: &options{cells: []cell{cellNamed("write-4k-fsync"), cellNamed("write-1m-8")}, contestants: contestants, rounds: 2, seconds: 5, size: 2 << 30}}
	one := func(x float64, servers ...string) sample {
		s := sample{
			Ops: x, IOPS: x, MBPerSecond: x / 10, LatencyUs: percentiles{x / 100, x / 10, x}, FlushUs: percentiles{1, 2, 3},
			ProcessCPUPer10k: map[string]float64{}, ProcessSwitchPerOp: map[string]float64{},
		}
		for _, name := range servers {
			s.ProcessCPUPer10k[name] = 0.25
			s.CPUPer10k += 0.25
			s.SwitchesPerOp += 6
		}
		return s
	}
	torus := []sample{one(2000, "torusblk", "torusd-1"), one(4000, "torusblk", "torusd-1")}
	b.samples = map[string]map[string][]sample{
		"write-4k-fsync": {
			"raw": {one(8000), one(8000)}, "qemu": {one(4000, "qemu-storage-daemon"), one(5000, "qemu-storage-daemon")}, "torus": torus, "old": torus,
		},
		"write-1m-8": {"raw": {one(12_345_678)}},
	}
	b.memory = map[string]map[string]memory{
		"qemu": {"qemu-storage-daemon": {10 << 20, 9 << 20, 3 << 20, 8 << 20}}, "torus": {"torusblk": {80 << 20, 70 << 20, 60 << 20, 50 << 20}, "torusd-1": {61 << 20, 46 << 20, 36 << 20, 31 << 20}},
	}
	return b
}

func TestMarkdown(t *testing.T) {
	r := made("raw", "qemu", "torus").report()
	r.Machine = machine{Time: "2030-01-01T00:00:00Z", Kernel: "7.0", CPU: "Abacus", CPUs: 2, Memory: 4 << 30, Load: "0.01 0.02 0.03", Version: map[string]string{"fio": "fio-3.33"}}
	want := `2030-01-01T00:00:00Z; 2 × Abacus, 4 GiB; Linux 7.0; load average at the end 0.01 0.02 0.03
fio: fio-3.33

2GiB volume; medians of 2 interleaved rounds of 5 s

### Rates

IOPS, or MB/s (10⁶ bytes) where it says so. Ratios are medians of the rounds' ratios.

| cell | raw | qemu | torus | qemu / raw | torus / raw | torus / qemu |
|---|--:|--:|--:|--:|--:|--:|
| 4 KiB random write + flush each | 8,000 | 4,500 | 3,000 | 0.56 | 0.38 | 0.65 |
| 1 MiB sequential write, depth 8 | 1,234,568 MB/s | – | – | – | – | – |

### Latency

p50 / p99 / p99.9 in µs, from submission to completion, as the client sees it.

| cell | raw | qemu | torus |
|---|--:|--:|--:|
| 4 KiB random write + flush each: the write | 80 / 800 / 8,000 | 45 / 450 / 4,500 | 30 / 300 / 3,000 |
| 4 KiB random write + flush each: the flush | 1 / 2 / 3 | 1 / 2 / 3 | 1 / 2 / 3 |
| 1 MiB sequential write, depth 8 | 123,457 / 1,234,568 / 12,345,678 | – | – |

### CPU

CPU seconds (user and system) of the servers for 10,000 operations; context switches of all of them for one.

| cell | qemu: all | switches / op | torus: all | torusblk | torusd-1 | switches / op |
|---|--:|--:|--:|--:|--:|--:|
| 4 KiB random write + flush each | 0.25 | 6.0 | 0.50 | 0.25 | 0.25 | 12 |
| 1 MiB sequential write, depth 8 | – | – | – | – | – | – |

### Memory

MiB at the end: resident; the same with what several processes have counted in parts; and of that what is no file of a disk. At rest: resident, some seconds later.

| process | resident | in parts | own | at rest |
|---|--:|--:|--:|--:|
| qemu: qemu-storage-daemon | 10 | 9 | 3 | 8 |
| torus: torusblk | 80 | 70 | 60 | 50 |
| torus: torusd-1 | 61 | 46 | 36 | 31 |
| torus: all | 141 | 116 | 96 | 81 |
`
	if got := r.markdown(); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
}

// An earlier build is compared like the present one, and with it.
func TestMarkdownOld(t *testing.T) {
	got := made("raw", "torus", "old").report().markdown()
	for _, line := range []string{
		"| cell | raw | torus | old | torus / raw | torus / old | old / raw |\n",
		"| 4 KiB random write + flush each | 8,000 | 3,000 | 3,000 | 0.38 | 1.00 | 0.38 |\n",
	} {
		if !strings.Contains(got, line) {
			t.Errorf("no line %s in\n%s", line, got)
		}
	}
}

// Bulk writes have a line of their own, and what they cost is not divided by the operations beside them.
func TestMarkdownBulk(t *testing.T) {
	c := cellNamed("flush-beside-bulk")
	b := made("raw", "qemu", "torus")
	b.cells = append(b.cells, c)
	b.samples[c.Name] = map[string][]sample{
		"raw":   {{IOPS: 1000, BulkMBPerSecond: 2000}},
		"torus": {{IOPS: 250, BulkMBPerSecond: 750, CPUPer10k: 5, ProcessCPUPer10k: map[string]float64{"torusblk": 5}, SwitchesPerOp: 5}},
	}
	got := b.report().markdown()
	for _, line := range []string{
		"\n| " + c.Title + " | 1,000 | – | 250 | – | 0.25 | – |\n| " + c.Title + ": the 1 MiB writes | 2,000 MB/s | – | 750 MB/s | – | – | – |\n",
		"\n| " + c.Title + " | – | – | – | – | – | – |\n\n### Memory",
	} {
		if !strings.Contains(got, line) {
			t.Errorf("no line %s in\n%s", line, got)
		}
	}
}

func TestSave(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new", "bench.json")
	if err := made("raw", "qemu", "torus").report().save(path); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var back report
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	f := back.Cells[0].Contestants["torus"]
	if back.Cells[0].Name != "write-4k-fsync" || len(f.Samples) != 2 || f.Median.IOPS != 3000 || back.Cells[0].Contestants["raw"].VsRaw != nil {
		t.Errorf("%+v", back.Cells[0])
	}
	near(t, "torus / raw", *f.VsRaw, 0.375)
	near(t, "torus / qemu", *f.VsQemu, 0.65)
	if m := back.Memory["torus"]["torusblk"]; m.RSS != 80<<20 {
		t.Errorf("%+v", m)
	}
}

func TestNothingMeasured(t *testing.T) {
	b := made("raw")
	b.samples = nil
	if r := b.report(); !r.empty() {
		t.Errorf("%+v", r)
	}
}

func TestThousands(t *testing.T) {
	for x, want := range map[float64]string{0: "0", 999.4: "999", 999.5: "1,000", 12345: "12,345", 1234567: "1,234,567"} {
		if got := thousands(x); got != want {
			t.Errorf("%v: %s, want %s", x, got, want)
		}
	}
}

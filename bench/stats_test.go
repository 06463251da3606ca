package main

import (
	"math"
	"os"
	"testing"
)

func near(t *testing.T, what string, got, want float64) {
	t.Helper()
	if math.Abs(got-want) > 1e-9*math.Max(1, math.Abs(want)) {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
}

func TestQuantile(t *testing.T) {
	var h histogram
	if q := h.quantile(0.5); q != 0 {
		t.Errorf("of nothing: %d", q)
	}
	// 1,000 values: 990 of 100 ns, 9 of 2,000 ns and one of 10,000 ns, from two directions. Keys of different lengths, so that
	// an order by text shows.
	for _, bins := range []map[string]uint64{{"100": 600, "2000": 9}, {"100": 390, "10000": 1}} {
		if err := h.add(bins); err != nil {
			t.Fatal(err)
		}
	}
	for q, want := range map[float64]uint64{0: 100, 0.5: 100, 0.99: 100, 0.991: 2000, 0.999: 2000, 0.9991: 10000, 1: 10000} {
		if got := h.quantile(q); got != want {
			t.Errorf("%v: %d, want %d", q, got, want)
		}
	}
	if p := h.percentiles(); p != (percentiles{0.1, 0.1, 2}) {
		t.Errorf("%+v", p)
	}
	if err := h.add(map[string]uint64{"x": 1}); err == nil {
		t.Error("a latency of x was taken")
	}
}

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		of   []float64
		want float64
	}{{[]float64{7}, 7}, {[]float64{9, 1, 2}, 2}, {[]float64{10, 1, 2, 4}, 3}} {
		if got := median(c.of); got != c.want {
			t.Errorf("%v: %v, want %v", c.of, got, c.want)
		}
	}
	if !math.IsNaN(median(nil)) {
		t.Error("of nothing there is one")
	}
}

func TestNewSample(t *testing.T) {
	r := fioResult{ops: 20_000, bytes: 80 << 20, seconds: 2, bulk: 7_500_000}
	if err := r.latency.add(map[string]uint64{"50000": 1}); err != nil {
		t.Fatal(err)
	}
	before := usage{
		"a": {cpuSeconds: 10, switches: map[string]uint64{"1": 100, "2": 50_000}},
		"b": {cpuSeconds: 1, switches: map[string]uint64{"9": 7}},
	}
	after := usage{
		// Thread 2 has ended and its id was given away; thread 3 is new.
		"a": {cpuSeconds: 13, switches: map[string]uint64{"1": 20_100, "2": 10_000, "3": 10_000}},
		"b": {cpuSeconds: 1.5, switches: map[string]uint64{"9": 7}},
	}
	s := newSample(r, before, after)
	near(t, "IOPS", s.IOPS, 10_000)
	near(t, "MB/s", s.MBPerSecond, 80*1.048576/2)
	near(t, "p50", s.LatencyUs.P50, 50)
	near(t, "flush", s.FlushUs.P50, 0)
	near(t, "bulk", s.BulkMBPerSecond, 7.5)
	near(t, "CPU", s.CPUPer10k, 1.75)
	near(t, "CPU of a", s.ProcessCPUPer10k["a"], 1.5)
	near(t, "CPU of b", s.ProcessCPUPer10k["b"], 0.25)
	near(t, "switches", s.SwitchesPerOp, 2)
	near(t, "switches of b", s.ProcessSwitchPerOp["b"], 0)
}

func TestMedianSample(t *testing.T) {
	one := func(x float64) sample {
		return sample{
			Ops: x, IOPS: 2 * x, MBPerSecond: 3 * x, LatencyUs: percentiles{x, -x, 5}, FlushUs: percentiles{P999: x}, BulkMBPerSecond: 6 * x, CPUPer10k: -x,
			ProcessCPUPer10k: map[string]float64{"a": x}, SwitchesPerOp: 4 * x, ProcessSwitchPerOp: map[string]float64{"a": 5 * x},
		}
	}
	m := medianSample([]sample{one(3), one(1), one(2)})
	for what, pair := range map[string][2]float64{
		"ops": {m.Ops, 2}, "IOPS": {m.IOPS, 4}, "MB/s": {m.MBPerSecond, 6}, "p50": {m.LatencyUs.P50, 2}, "p99": {m.LatencyUs.P99, -2},
		"p99.9": {m.LatencyUs.P999, 5}, "flush": {m.FlushUs.P999, 2}, "bulk": {m.BulkMBPerSecond, 12}, "CPU": {m.CPUPer10k, -2}, "CPU of a": {m.ProcessCPUPer10k["a"], 2},
		"switches": {m.SwitchesPerOp, 8}, "switches of a": {m.ProcessSwitchPerOp["a"], 10},
	} {
		near(t, what, pair[0], pair[1])
	}
}

// The ratio is that of rounds, not of medians: here the machine was ten times slower in the last one.
func TestRatio(t *testing.T) {
	iops := func(l ...float64) (out []sample) {
		for _, x := range l {
			out = append(out, sample{IOPS: x, MBPerSecond: 1})
		}
		return out
	}
	c := cell{Name: "x"}
	near(t, "ratio", ratio(c, iops(100, 300, 20), iops(200, 500, 10)), 0.6)
	near(t, "with a round that failed", ratio(c, iops(100, 300), iops(200)), 0.5)
	c.bandwidth = true
	near(t, "of MB/s", ratio(c, iops(100), iops(200)), 1)
	if !math.IsNaN(ratio(c, nil, iops(1))) {
		t.Error("of nothing there is one")
	}
}

func TestParseStat(t *testing.T) {
	// A name that tries hard: ") R 1 2".
	line := "4242 (x) R 1 2) S 1 4242 4242 0 -1 4194560 1833 0 12 0 321 123 7 8 20 0 9 0 99 1000 250 18446744073709551615\n"
	if n, err := parseStat([]byte(line)); err != nil || n != 444 {
		t.Errorf("%d, %v", n, err)
	}
	for _, bad := range []string{"", "4242", "1 (a) S 1 2 3", "1 (a) S 1 1 1 0 -1 1 1 0 1 0 x 1 1"} {
		if n, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q: %d", bad, n)
		}
	}
}

func TestParseStatus(t *testing.T) {
	text := []byte("Name:\tx\nVmRSS:\t   10184 kB\nRssAnon:\t    2048 kB\nvoluntary_ctxt_switches:\t15\nnonvoluntary_ctxt_switches:\t3\n")
	f, err := parseStatus(text, "nonvoluntary_ctxt_switches", "voluntary_ctxt_switches", "VmRSS")
	if err != nil || f[0] != 3 || f[1] != 15 || f[2] != 10184 {
		t.Errorf("%v, %v", f, err)
	}
	for _, bad := range []string{"Name", "VmSwap"} {
		if f, err := parseStatus(text, bad); err == nil {
			t.Errorf("%s: %v", bad, f)
		}
	}
}

// What the kernel says of this process is understood.
func TestReadProcess(t *testing.T) {
	before, err := readUsage(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for sum := 0.0; ; {
		for i := range 1_000_000 {
			sum += math.Sqrt(float64(i))
		}
		after, err := readUsage(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		if after.cpuSeconds < before.cpuSeconds {
			t.Fatal("CPU time runs backwards")
		}
		if after.cpuSeconds > before.cpuSeconds && len(after.switches) > 0 {
			break
		}
	}
	if m, err := readMemory(os.Getpid()); err != nil || m.RSS < 1<<20 || m.Own < 1<<18 || m.Own > m.PSS || m.PSS > m.RSS {
		t.Errorf("%+v, %v", m, err)
	}
}

package main

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
)

// histogram counts latencies in nanoseconds; fio's bins are at most 1/64 wide.
type histogram struct {
	bins  map[uint64]uint64
	total uint64
}

func (h *histogram) add(bins map[string]uint64) error {
	for k, n := range bins {
		ns, err := strconv.ParseUint(k, 10, 64)
		if err != nil {
			return fmt.Errorf("output of fio: latency %q: %w", k, err)
		}
		if h.bins == nil {
			h.bins = map[uint64]uint64{}
		}
		h.bins[ns] += n
		h.total += n
	}
	return nil
}

// quantile is the least latency, in nanoseconds, that a share q of all does not exceed.
func (h *histogram) quantile(q float64) uint64 {
	rank := max(1, uint64(math.Ceil(q*float64(h.total))))
	seen := uint64(0)
	for _, ns := range slices.Sorted(maps.Keys(h.bins)) {
		if seen += h.bins[ns]; seen >= rank {
			return ns
		}
	}
	return 0
}

// percentiles are in microseconds.
type percentiles struct {
	P50  float64 `json:"p50"`
	P99  float64 `json:"p99"`
	P999 float64 `json:"p99_9"`
}

func (h *histogram) percentiles() percentiles {
	us := func(q float64) float64 { return float64(h.quantile(q)) / 1000 }
	return percentiles{us(0.5), us(0.99), us(0.999)}
}

// sample is one measurement, or the medians of several.
type sample struct {
	Ops         float64     `json:"ops"`
	IOPS        float64     `json:"iops"`
	MBPerSecond float64     `json:"mb_per_second"` // 10⁶ bytes
	LatencyUs   percentiles `json:"latency_us"`
	// FlushUs is the latency of the flushes by themselves; zero where there are none.
	FlushUs percentiles `json:"flush_latency_us"`
	// BulkMBPerSecond is the rate of the bulk writes beside it, in 10⁶ bytes; zero where there are none.
	BulkMBPerSecond float64 `json:"bulk_mb_per_second"`
	// CPU seconds, user and system, of the servers for 10,000 operations; of all together, and by process. What bulk writes cost is in them,
	// and in the switches, but their operations are not counted.
	CPUPer10k          float64            `json:"cpu_seconds_per_10k"`
	ProcessCPUPer10k   map[string]float64 `json:"process_cpu_seconds_per_10k"`
	SwitchesPerOp      float64            `json:"context_switches_per_op"`
	ProcessSwitchPerOp map[string]float64 `json:"process_context_switches_per_op"`
}

// newSample relates what the servers used between two looks at them to what fio did meanwhile.
func newSample(r fioResult, before, after usage) sample {
	s := sample{
		Ops: float64(r.ops), IOPS: float64(r.ops) / r.seconds, MBPerSecond: float64(r.bytes) / r.seconds / 1e6,
		LatencyUs: r.latency.percentiles(), FlushUs: r.flush.percentiles(), BulkMBPerSecond: r.bulk / 1e6,
		ProcessCPUPer10k: map[string]float64{}, ProcessSwitchPerOp: map[string]float64{},
	}
	for name, a := range after {
		cpu := (a.cpuSeconds - before[name].cpuSeconds) / s.Ops * 10_000
		switches := float64(a.switchesSince(before[name])) / s.Ops
		s.ProcessCPUPer10k[name], s.ProcessSwitchPerOp[name] = cpu, switches
		s.CPUPer10k += cpu
		s.SwitchesPerOp += switches
	}
	return s
}

// median of no values is NaN; of an even number it is the mean of the two in the middle.
func median(v []float64) float64 {
	if len(v) == 0 {
		return math.NaN()
	}
	v = slices.Sorted(slices.Values(v))
	n := len(v)
	return (v[(n-1)/2] + v[n/2]) / 2
}

// medianSample is the median of each figure by itself.
func medianSample(l []sample) sample {
	of := func(get func(sample) float64) float64 {
		var v []float64
		for _, s := range l {
			v = append(v, get(s))
		}
		return median(v)
	}
	byProcess := func(get func(sample) map[string]float64) map[string]float64 {
		out := map[string]float64{}
		for _, s := range l {
			for name := range get(s) {
				out[name] = of(func(s sample) float64 { return get(s)[name] })
			}
		}
		return out
	}
	latency := func(get func(sample) percentiles) percentiles {
		return percentiles{
			of(func(s sample) float64 { return get(s).P50 }), of(func(s sample) float64 { return get(s).P99 }),
			of(func(s sample) float64 { return get(s).P999 }),
		}
	}
	return sample{
		Ops:                of(func(s sample) float64 { return s.Ops }),
		IOPS:               of(func(s sample) float64 { return s.IOPS }),
		MBPerSecond:        of(func(s sample) float64 { return s.MBPerSecond }),
		LatencyUs:          latency(func(s sample) percentiles { return s.LatencyUs }),
		FlushUs:            latency(func(s sample) percentiles { return s.FlushUs }),
		BulkMBPerSecond:    of(func(s sample) float64 { return s.BulkMBPerSecond }),
		CPUPer10k:          of(func(s sample) float64 { return s.CPUPer10k }),
		ProcessCPUPer10k:   byProcess(func(s sample) map[string]float64 { return s.ProcessCPUPer10k }),
		SwitchesPerOp:      of(func(s sample) float64 { return s.SwitchesPerOp }),
		ProcessSwitchPerOp: byProcess(func(s sample) map[string]float64 { return s.ProcessSwitchPerOp }),
	}
}

// ratio is the median of the ratios round by round: what made a whole round slow cancels out. NaN if there is no round
// that measured both.
func ratio(c cell, of, to []sample) float64 {
	var v []float64
	for i := range min(len(of), len(to)) {
		v = append(v, c.rate(of[i])/c.rate(to[i]))
	}
	return median(v)
}

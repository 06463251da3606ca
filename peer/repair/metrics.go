package repair

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics of a Repairer. They are counted whether or not they are registered.
type metrics struct {
	short, corrupt, unknown, garbage prometheus.Gauge
	repaired, failures, copied       prometheus.Counter
	swept, sweptBytes                prometheus.Counter
	scrubbed, scrubs, found          prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	var all []prometheus.Collector
	gauge := func(name, help string) prometheus.Gauge {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
		all = append(all, g)
		return g
	}
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
		all = append(all, c)
		return c
	}
	m := &metrics{
		short:      gauge("torus_repair_short_blocks", "Blocks this peer is to hold whole and does not."),
		corrupt:    gauge("torus_repair_corrupt_blocks", "Blocks whose copy here is damaged."),
		unknown:    gauge("torus_repair_unknown_volumes", "Volumes whose blocks could not be listed."),
		garbage:    gauge("torus_repair_garbage_blocks", "Blocks here that nothing needs and that wait to be deleted."),
		repaired:   counter("torus_repair_repaired_blocks_total", "Blocks made whole."),
		failures:   counter("torus_repair_failures_total", "Attempts to make a block whole, or to delete one, that failed."),
		copied:     counter("torus_repair_read_bytes_total", "Bytes read from copies to make others of."),
		swept:      counter("torus_repair_swept_blocks_total", "Blocks deleted as nothing needs them."),
		sweptBytes: counter("torus_repair_swept_bytes_total", "What these held, in bytes."),
		scrubbed:   counter("torus_scrub_bytes_total", "Bytes read and verified."),
		scrubs:     counter("torus_scrub_rounds_total", "Scrubs of all blocks that were finished."),
		found:      counter("torus_scrub_damaged_blocks_total", "Blocks that a scrub found damaged."),
	}
	if reg == nil {
		return m, nil
	}
	var errs []error
	for _, c := range all {
		errs = append(errs, reg.Register(c))
	}
	return m, errors.Join(errs...)
}

func (m *metrics) set(s Stats) {
	m.short.Set(float64(s.Short))
	m.corrupt.Set(float64(s.Corrupt))
	m.unknown.Set(float64(s.Unknown))
	m.garbage.Set(float64(s.Garbage))
}

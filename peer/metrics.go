package peer

import (
	"errors"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coreos/torus"
)

// metrics of a Service. They are counted whether or not they are registered.
type metrics struct {
	ops      [torus.OpVerify + 1]prometheus.Counter
	failures [torus.OpVerify + 1]prometheus.Counter
	fenced   prometheus.Counter
	fences   prometheus.Counter
	lost     prometheus.Counter // fences that could not be persisted
	read     *prometheus.CounterVec
	written  *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "torus_server_" + name, Help: help})
	}
	vec := func(name, help, label string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "torus_server_" + name, Help: help}, []string{label})
	}
	m := &metrics{
		fenced:  counter("fenced_total", "Requests refused because their volume has been attached anew."),
		fences:  counter("fences_total", "Fences promised, repeated ones included."),
		lost:    counter("fence_failures_total", "Fences that could not be made durable."),
		read:    vec("volume_read_bytes_total", "Bytes read, by volume id.", "volume"),
		written: vec("volume_written_bytes_total", "Bytes appended, by volume id.", "volume"),
	}
	ops := vec("ops_total", "Requests completed.", "op")
	failures := vec("op_failures_total", "Requests that failed.", "op")
	for op := torus.OpPing; op <= torus.OpVerify; op++ {
		m.ops[op] = ops.WithLabelValues(op.String())
		m.failures[op] = failures.WithLabelValues(op.String())
	}
	if reg == nil {
		return m, nil
	}
	var errs []error
	for _, c := range []prometheus.Collector{ops, failures, m.fenced, m.fences, m.lost, m.read, m.written} {
		errs = append(errs, reg.Register(c))
	}
	return m, errors.Join(errs...)
}

// label is how a volume is named in metrics: its id in hexadecimal, as in BlockRef.String.
func label(v torus.VolumeID) string { return strconv.FormatUint(uint64(v), 16) }

package nbd

import (
	"errors"
	"math/bits"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// latencyBuckets is how many buckets a latency histogram has; bucket i ends at 2^i microseconds: 1 µs to 16 s.
const latencyBuckets = 25

// metrics counts with a few uncontended atomic additions per request, cheap enough to leave nothing out. It may be
// shared by the servers of several loops.
type metrics struct {
	ops        [cmdCount]opMetrics
	sessions   atomic.Int64
	refused    atomic.Uint64 // commands that never reached a device
	violations atomic.Uint64 // sessions ended because of what the client sent

	requestsDesc, errorsDesc, bytesDesc, secondsDesc, sessionsDesc, refusedDesc, violationsDesc *prometheus.Desc
}

// opMetrics is the account of one command.
type opMetrics struct {
	errors  atomic.Uint64
	bytes   atomic.Uint64 // of those that succeeded
	nanos   atomic.Uint64
	buckets [latencyBuckets + 1]atomic.Uint64 // the last one has no end
}

var commandNames = [cmdCount]string{
	cmdRead: "read", cmdWrite: "write", cmdFlush: "flush", cmdTrim: "trim", cmdCache: "cache",
	cmdWriteZeroes: "write_zeroes", cmdBlockStatus: "block_status",
}

// newMetrics registers with r, which may be nil, or finds what another server has registered there.
func newMetrics(r prometheus.Registerer) (*metrics, error) {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("torus_nbd_"+name, help, labels, nil)
	}
	m := &metrics{
		requestsDesc:   desc("requests_total", "Commands that devices have done.", "command"),
		errorsDesc:     desc("errors_total", "Commands that devices have failed.", "command"),
		bytesDesc:      desc("bytes_total", "Bytes of the commands that succeeded.", "command"),
		secondsDesc:    desc("request_seconds", "Time from a command to its reply.", "command"),
		sessionsDesc:   desc("sessions", "Clients connected."),
		refusedDesc:    desc("refused_total", "Commands refused before they reached a device."),
		violationsDesc: desc("violations_total", "Sessions ended because of what the client sent, or did not."),
	}
	if r == nil {
		return m, nil
	}
	err := r.Register(m)
	var already prometheus.AlreadyRegisteredError
	if errors.As(err, &already) {
		if other, ok := already.ExistingCollector.(*metrics); ok {
			return other, nil
		}
	}
	return m, err
}

// observe counts one command that a device has done.
func (m *metrics) observe(cmd command, err error, d time.Duration) {
	o := &m.ops[cmd.typ]
	if err != nil {
		o.errors.Add(1)
	} else {
		o.bytes.Add(uint64(cmd.len))
	}
	o.nanos.Add(uint64(d))
	o.buckets[bucketOf(d)].Add(1)
}

// bucketOf is the least i with d ≤ 2^i µs, latencyBuckets if there is none.
func bucketOf(d time.Duration) int {
	if d <= time.Microsecond {
		return 0
	}
	return min(bits.Len64(uint64((d-1)/time.Microsecond)), latencyBuckets)
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{m.requestsDesc, m.errorsDesc, m.bytesDesc, m.secondsDesc, m.sessionsDesc,
		m.refusedDesc, m.violationsDesc} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	for i := range m.ops {
		name := commandNames[i]
		if name == "" { // DISC has no reply
			continue
		}
		o := &m.ops[i]
		var count uint64
		buckets := make(map[float64]uint64, latencyBuckets)
		for j := range o.buckets {
			count += o.buckets[j].Load()
			if j < latencyBuckets {
				buckets[float64(uint64(1)<<j)/1e6] = count
			}
		}
		ch <- prometheus.MustNewConstMetric(m.requestsDesc, prometheus.CounterValue, float64(count), name)
		ch <- prometheus.MustNewConstMetric(m.errorsDesc, prometheus.CounterValue, float64(o.errors.Load()), name)
		ch <- prometheus.MustNewConstMetric(m.bytesDesc, prometheus.CounterValue, float64(o.bytes.Load()), name)
		ch <- prometheus.MustNewConstHistogram(m.secondsDesc, count, float64(o.nanos.Load())/1e9, buckets, name)
	}
	ch <- prometheus.MustNewConstMetric(m.sessionsDesc, prometheus.GaugeValue, float64(m.sessions.Load()))
	ch <- prometheus.MustNewConstMetric(m.refusedDesc, prometheus.CounterValue, float64(m.refused.Load()))
	ch <- prometheus.MustNewConstMetric(m.violationsDesc, prometheus.CounterValue, float64(m.violations.Load()))
}

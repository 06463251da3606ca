package etcd

import (
	"errors"
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	ops, retries, failures *prometheus.CounterVec
}

func newMetrics(r prometheus.Registerer) (m metrics, err error) {
	counter := func(name, help string) *prometheus.CounterVec {
		c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, []string{"kind"})
		if r == nil || err != nil {
			return c
		}
		var have prometheus.AlreadyRegisteredError
		switch e := r.Register(c); {
		case e == nil:
		case errors.As(e, &have): // several clients in one process count together
			if old, ok := have.ExistingCollector.(*prometheus.CounterVec); ok {
				return old
			}
			err = fmt.Errorf("metric %s: %w", name, e)
		default:
			err = fmt.Errorf("metric %s: %w", name, e)
		}
		return c
	}
	m.ops = counter("torus_etcd_base_ops_total", "Calls of the metadata service, by method.")
	m.retries = counter("torus_etcd_atomic_retries", "Transactions made again since somebody else had changed what they were built on, by method.")
	m.failures = counter("torus_etcd_failures_total", "Calls that got no answer from etcd in time, by method.")
	return m, err
}

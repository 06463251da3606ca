package storage

import (
	"github.com/prometheus/client_golang/prometheus"
)

// metrics are those of one store.
type metrics struct {
	registerer prometheus.Registerer
	all        []prometheus.Collector

	blocks, blocksTotal, blockBytes, failed prometheus.Gauge

	reads, failedReads, writes, failedWrites prometheus.Counter
	deletes, failedDeletes, flushes          prometheus.Counter
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{registerer: r}
	gauge := func(name, help string) prometheus.Gauge {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Name: "torus_storage_" + name, Help: help})
		m.all = append(m.all, g)
		return g
	}
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: "torus_storage_" + name, Help: help})
		m.all = append(m.all, c)
		return c
	}
	m.blocks = gauge("blocks", "Slots taken by blocks.")
	m.blocksTotal = gauge("blocks_total", "Blocks that the store may hold.")
	m.blockBytes = gauge("block_bytes", "Size of a block in bytes.")
	m.failed = gauge("failed", "1 once the disk failed: nothing more is accepted until the peer is restarted.")
	m.reads = counter("read_blocks", "Reads from blocks that succeeded.")
	m.failedReads = counter("failed_blocks", "Reads from blocks that failed.")
	m.writes = counter("written_blocks", "Appends to blocks that succeeded.")
	m.failedWrites = counter("failed_written_blocks", "Appends to blocks that failed.")
	m.deletes = counter("deleted_blocks", "Blocks deleted.")
	m.failedDeletes = counter("failed_deleted_blocks", "Deletions of blocks that failed.")
	m.flushes = counter("flushes", "Group commits: fdatasync calls made for requests.")
	if r == nil {
		return m, nil
	}
	for i, c := range m.all {
		if err := r.Register(c); err != nil {
			for _, c := range m.all[:i] {
				r.Unregister(c)
			}
			return nil, err
		}
	}
	return m, nil
}

func (m *metrics) unregister() {
	if m.registerer == nil {
		return
	}
	for _, c := range m.all {
		m.registerer.Unregister(c)
	}
}

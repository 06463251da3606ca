package node

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/coreos/torus/block"
	"github.com/coreos/torus/file"
)

// volumeMetrics are those of the volumes attached here, read when they are asked for.
type volumeMetrics struct{ c *Client }

type volumeMetric struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(*file.Stats) uint64
}

var volumeMetricList = []volumeMetric{
	volumeCounter("log_bytes_total", "Bytes appended to the log of a volume since it was attached, one replica, headers included.", func(s *file.Stats) uint64 { return s.LogBytes }),
	volumeCounter("moved_bytes_total", "Bytes that compaction has copied since the volume was attached, one replica.", func(s *file.Stats) uint64 { return s.MovedBytes }),
	volumeCounter("paced_writes_total", "Writes that had to wait for compaction.", func(s *file.Stats) uint64 { return s.Paced }),
	volumeCounter("read_ahead_bytes_total", "Bytes read before anybody asked for them, for those who read in order.", func(s *file.Stats) uint64 { return s.AheadBytes }),
	volumeCounter("read_ahead_used_bytes_total", "Bytes given to readers that had been read ahead.", func(s *file.Stats) uint64 { return s.AheadUsed }),
	volumeCounter("records_total", "Records appended to the log.", func(s *file.Stats) uint64 { return s.Records }),
	volumeCounter("syncs_total", "Rounds of flushes of the log.", func(s *file.Stats) uint64 { return s.Syncs }),
	volumeCounter("checkpoints_total", "INodes committed.", func(s *file.Stats) uint64 { return s.Checkpoints }),
	volumeCounter("rolls_total", "Blocks given up because a replica failed.", func(s *file.Stats) uint64 { return s.Rolls }),
	volumeGauge("live_bytes", "Bytes of data that the volume, as it is now, consists of.", func(s *file.Stats) uint64 { return s.LiveBytes }),
	volumeGauge("stored_bytes", "Bytes in the blocks that are listed, one replica.", func(s *file.Stats) uint64 { return s.StoredBytes }),
	volumeGauge("retained_bytes", "Bytes of records that are kept in memory until they are flushed and in the map.", func(s *file.Stats) uint64 { return uint64(s.RetainedBytes) }),
	volumeGauge("map_leaves", "Leaves of the map in memory, 4 KiB each.", func(s *file.Stats) uint64 { return uint64(s.Leaves) }),
	volumeGauge("epoch", "The fencing token under which the volume is attached.", func(s *file.Stats) uint64 { return s.Epoch }),
}

func volumeDesc(name, help string) *prometheus.Desc {
	return prometheus.NewDesc("torus_volume_"+name, help, []string{"volume"}, nil)
}

func volumeCounter(name, help string, value func(*file.Stats) uint64) volumeMetric {
	return volumeMetric{volumeDesc(name, help), prometheus.CounterValue, value}
}

func volumeGauge(name, help string, value func(*file.Stats) uint64) volumeMetric {
	return volumeMetric{volumeDesc(name, help), prometheus.GaugeValue, value}
}

func (m volumeMetrics) Describe(ch chan<- *prometheus.Desc) {
	for _, x := range volumeMetricList {
		ch <- x.desc
	}
}

func (m volumeMetrics) Collect(ch chan<- prometheus.Metric) {
	type volume struct {
		name  string
		stats file.Stats
	}
	var l []volume
	m.c.loop.call(func() {
		m.c.dir.Each(func(v *block.Volume) { l = append(l, volume{v.Info().Name, v.File().Stats()}) })
	})
	for _, v := range l {
		for _, x := range volumeMetricList {
			ch <- prometheus.MustNewConstMetric(x.desc, x.kind, float64(x.value(&v.stats)), v.name)
		}
	}
}

package distributor

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	blockRequests, blockFailures, peerFailures, corrupt, hedged, hedgesWon prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) metrics {
	c := func(name, help string) prometheus.Counter {
		x := prometheus.NewCounter(prometheus.CounterOpts{Name: "torus_distributor_" + name, Help: help})
		if reg != nil {
			reg.MustRegister(x)
		}
		return x
	}
	return metrics{
		blockRequests: c("block_requests_total", "Reads of runs of bytes of a block."),
		blockFailures: c("block_request_failures", "Reads that no replica could answer."),
		peerFailures:  c("block_rpc_failures", "Reads that one replica could not answer and the next was asked."),
		hedged:        c("block_hedged_total", "Reads of which a second replica was asked, as the first took long."),
		hedgesWon:     c("block_hedges_won_total", "Reads that the second replica answered before the first."),
		corrupt:       c("block_corrupt_replies", "Replies that did not match their checksum."),
	}
}

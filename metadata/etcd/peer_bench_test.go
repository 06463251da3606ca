package etcd

import (
	"fmt"
	"testing"

	"github.com/google/uuid"

	"github.com/coreos/torus/models"
)

// What everybody who watches the peers does for each heartbeat of one of them (docs/scale.md).
func BenchmarkPeerList(b *testing.B) {
	for _, n := range []int{10, 100, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			s := newPeerSet(keys{DefaultPrefix})
			s.peers, s.nodes = map[string]*models.Peer{}, map[string]bool{}
			for range n {
				id := uuid.NewString()
				s.nodes[id] = true
				s.peers[id] = &models.Peer{
					Uuid: id, Address: "tdp://192.0.2.1:40000", SizeBytes: 1 << 40, UsedBytes: 1 << 39, UpdatedUnixMs: 1 << 40, Incarnation: 1 << 60,
					Version: "v0.0.0", State: "ok", Labels: map[string]string{"zone": "a", "rack": "r1"},
				}
			}
			b.ReportAllocs()
			for b.Loop() {
				s.list()
			}
		})
	}
}

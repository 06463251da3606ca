package distributor

import (
	"fmt"
	"testing"

	"github.com/google/uuid"

	"github.com/coreos/torus"
	"github.com/coreos/torus/models"
)

type noConn struct{}

func (noConn) Submit(r *torus.Request) { r.Finish(torus.ErrNoPeer) }
func (noConn) Close()                  {}

// What a loop does for each heartbeat of a peer (docs/scale.md).
func BenchmarkSetPeers(b *testing.B) {
	for _, n := range []int{10, 100, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			d := New(Config{Dial: func(torus.PeerID, string, func(), func(error)) Conn { return noConn{} }})
			var list []*models.Peer
			for range n {
				list = append(list, &models.Peer{Uuid: uuid.NewString(), Address: "tdp://192.0.2.1:40000", Alive: true})
			}
			b.ReportAllocs()
			for b.Loop() {
				d.SetPeers(list)
			}
		})
	}
}

package mem

import (
	"testing"
	"time"

	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/transport/transporttest"
)

// TestTransport runs the suite of all transports, over several seeds and with every kind of harmless trouble.
func TestTransport(t *testing.T) {
	for _, c := range []struct {
		name string
		set  func(*Network)
	}{
		{"plain", func(n *Network) {}},
		{"pieces", func(n *Network) { n.Cuts = 0.9 }},
		{"whole", func(n *Network) { n.Cuts = 0 }},
		{"loss", func(n *Network) { n.Default.Loss = 0.05 }},
		{"slow", func(n *Network) { n.Default.Bandwidth, n.Window = 20<<20, 16<<10 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			seed := uint64(0)
			transporttest.Run(t, func(t *testing.T) transporttest.World {
				seed++
				v := loop.NewVirtual(seed)
				n := NewNetwork(v)
				c.set(n)
				return transporttest.World{
					Network: n.Host("a"),
					Server:  v.NewLoop("server"),
					Client:  v.NewLoop("client"),
					Addr:    func() string { return "tcp://a:0" },
					Nobody:  func() string { return "tcp://a:1" },
					Run: func(until func() bool) bool {
						if until == nil {
							v.RunFor(time.Second)
							return true
						}
						return v.Run(until, time.Hour)
					},
				}
			})
		})
	}
}

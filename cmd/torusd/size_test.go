package main

import (
	"testing"

	"github.com/coreos/torus/node"
)

func TestCapacityFlag(t *testing.T) {
	for text, want := range map[string]node.Capacity{
		"20GiB": {Bytes: 20 << 30}, "80%": {Percent: 80}, "0.5%": {Percent: 0.5}, "100%": {Percent: 100}, "4096": {Bytes: 4096},
	} {
		var c capacityFlag
		if err := c.Set(text); err != nil || c.Capacity != want {
			t.Errorf("%q: %+v, %v", text, c.Capacity, err)
		}
	}
	for _, text := range []string{"", "0", "0%", "-5%", "101%", "NaN%", "%", "x", "Inf%", "-1GiB"} {
		var c capacityFlag
		if err := c.Set(text); err == nil {
			t.Errorf("%q was taken for %+v", text, c.Capacity)
		}
	}
}

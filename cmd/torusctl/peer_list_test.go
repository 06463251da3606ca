package main

import (
	"encoding/csv"
	"strings"
	"testing"
	"time"

	"github.com/coreos/torus/node"
)

func TestPeerList(t *testing.T) {
	c := initCluster(t)
	var none []peerJSON
	c.json(t, &none, "peer", "list")
	if none == nil || len(none) != 0 {
		t.Errorf("no peers: %v, want an empty list", none)
	}
	a, lease := c.addPeer(t, 1)
	a.UsedBytes, a.State = 90<<30, node.StateNearFull
	c.put(t, lease, a)
	b, gone := c.addPeer(t, 2)
	if err := c.mds.RevokeLease(t.Context(), gone); err != nil {
		t.Fatal(err)
	}
	c.run("peer", "add", a.Address).CheckSuccess(t)

	// The keys are an interface.
	var raw []map[string]any
	c.json(t, &raw, "peer", "list")
	for _, key := range []string{"uuid", "address", "size_bytes", "used_bytes", "labels", "member", "updated", "status"} {
		if _, ok := raw[0][key]; !ok {
			t.Errorf("no key %q: %v", key, raw[0])
		}
	}
	if at, err := time.Parse(time.RFC3339, raw[0]["updated"].(string)); err != nil || time.Since(at) > time.Hour {
		t.Errorf("updated %v, %v", at, err)
	}
	var peers []peerJSON
	c.json(t, &peers, "peer", "list")
	for _, p := range peers {
		switch p.UUID {
		case a.Uuid:
			// coreos/torus 401: how full a peer is can be seen.
			if p.Address != a.Address || p.SizeBytes != 100<<30 || p.UsedBytes != 90<<30 || !p.Member || p.Status != node.StateNearFull || p.Labels["zone"] != "a" {
				t.Errorf("%+v", p)
			}
		case b.Uuid:
			if p.Member || p.Status != "down" {
				t.Errorf("%+v", p)
			}
		default:
			t.Errorf("%+v", p)
		}
	}

	c.run("peer", "list").CheckSuccess(t, "UUID", "100.0 GiB", "near-full", "rack=1,zone=a", "yes")
	c.run("list-peers", "--si").CheckSuccess(t, "107.4 GB")
	rows, err := csv.NewReader(strings.NewReader(c.run("list-peers", "--csv").Stdout)).ReadAll()
	if err != nil || len(rows) != 3 || rows[0][0] != "uuid" || rows[1][2] != "107374182400" {
		t.Errorf("%v, %v", rows, err)
	}
}

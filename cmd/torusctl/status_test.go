package main

import (
	"encoding/csv"
	"strings"
	"testing"

	"github.com/coreos/torus/node"
)

func TestStatus(t *testing.T) {
	c := initCluster(t)
	expect := func(status string, problems ...string) {
		t.Helper()
		var s statusJSON
		c.json(t, &s, "status")
		if s.Status != status || len(s.Problems) != len(problems) {
			t.Errorf("%s, %q, want %s, %q", s.Status, s.Problems, status, problems)
		}
		for _, p := range problems {
			if !strings.Contains(strings.Join(s.Problems, "\n"), p) {
				t.Errorf("%q does not say %q", s.Problems, p)
			}
		}
	}
	expect("stalled", "0 members can take 2 copies")
	a, lease := c.addPeer(t, 1)
	b, gone := c.addPeer(t, 2)
	d, _ := c.addPeer(t, 3)
	expect("stalled", "0 members", "torusctl peer add "+a.Uuid, "torusctl peer add "+b.Uuid, d.Uuid)
	c.run("peer", "add", "--all-peers").CheckSuccess(t)
	c.run("volume", "create-block", "v", "1GiB").CheckSuccess(t)
	c.attach(t, "v")
	expect("ok")

	a.State, a.UsedBytes = node.StateNearFull, 90<<30
	c.put(t, lease, a)
	expect("ok", a.Uuid)
	// Copies that are missing: what members say, and what a dead one held.
	a.ShortBlocks, a.CorruptBlocks, a.CheckedRing = 7, 2, 2
	c.put(t, lease, a)
	expect("degraded", a.Uuid, "7 copies of blocks are missing", "2 of them are damaged")
	a.ShortBlocks, a.CorruptBlocks = 0, 0
	a.State = node.StateFull // coreos/torus 401
	c.put(t, lease, a)
	expect("degraded", "is full")
	if err := c.mds.RevokeLease(t.Context(), gone); err != nil {
		t.Fatal(err)
	}
	expect("stalled", "is full", "is down", "1 members can take 2 copies")
	b.UsedBytes, b.ShortBlocks = 40<<20, 1
	c.put(t, 0, b)
	expect("stalled", "is full", "torusctl peer remove "+b.Uuid, "11 copies of blocks are missing", "1 members can take 2 copies")
	var short statusJSON
	c.json(t, &short, "status")
	if short.BlocksShort != 11 || short.BlocksCorrupt != 0 || short.PeersChecking != 1 {
		t.Errorf("%+v", short)
	}
	c.run("status").CheckSuccess(t, "blocks short", "11 (1 peers are still looking)")
	b.UsedBytes, b.ShortBlocks = 0, 0
	c.put(t, 0, b)

	var s statusJSON
	c.json(t, &s, "status")
	if s.Members != 3 || s.SizeBytes != 300<<30 || s.UsedBytes != 90<<30 || s.Volumes != 1 || s.VolumesAttached != 1 || s.Replication != 2 ||
		s.RingVersion != 2 || s.ClusterID == "" || len(s.Peers) != 3 {
		t.Errorf("%+v", s)
	}
	c.run("status").CheckSuccess(t, "stalled", "90.0 GiB of 300.0 GiB", "1, 1 attached", "problem")
	rows, err := csv.NewReader(strings.NewReader(c.run("status", "-o", "csv").Stdout)).ReadAll()
	if err != nil || len(rows) != 2 || rows[0][0] != "status" || rows[1][0] != "stalled" {
		t.Errorf("%v, %v", rows, err)
	}
}

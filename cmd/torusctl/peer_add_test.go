package main

import (
	"strings"
	"testing"
)

func TestPeerAdd(t *testing.T) {
	c := initCluster(t)
	c.run("peer", "add", "--all-peers").CheckFailure(t, "no peer is alive", "torusd")
	a, _ := c.addPeer(t, 1)
	b, _ := c.addPeer(t, 2)
	d, gone := c.addPeer(t, 3)
	if err := c.mds.RevokeLease(t.Context(), gone); err != nil {
		t.Fatal(err)
	}
	c.run("peer", "add", "10.9.9.9:1").CheckFailure(t, `"10.9.9.9:1"`, "torusctl peer list")
	// One that does not exist: none is added.
	c.run("peer", "add", a.Uuid, "nobody").CheckFailure(t, `"nobody"`)

	// Fewer members than copies: it works, and says that writes wait (F1).
	if r := c.run("peer", "add", strings.TrimPrefix(a.Address, "tdp://")); r.Status != 0 || !strings.Contains(r.Stderr, "writes wait") {
		t.Errorf("%+v", r)
	}
	c.run("peer", "add", a.Uuid).CheckSuccess(t, "has them all already")
	c.run("peer", "add", "--all-peers").CheckSuccess(t, "2 members")
	c.run("peer", "add", d.Uuid[:8]).CheckSuccess(t, "3 members") // it may be back soon
	var ring ringJSON
	c.json(t, &ring, "ring", "get")
	if len(ring.Members) != 3 || ring.Type != "slot-table" || ring.Version != 4 {
		t.Errorf("%+v", ring)
	}
	for _, m := range ring.Members {
		if m.Weight != 100<<30 || m.Share < 0.3 || m.Share > 0.37 || m.Labels["zone"] != "a" || m.Address == "" {
			t.Errorf("%+v", m)
		}
	}
	c.run("ring", "get").CheckSuccess(t, "version 4, type slot-table, 2 copies, 3 members", b.Uuid)
}

package main

import (
	"strings"
	"testing"
)

func TestRingSetReplication(t *testing.T) {
	c := initCluster(t)
	c.addPeer(t, 1)
	c.addPeer(t, 2)
	c.run("peer", "add", "--all-peers").CheckSuccess(t)
	r := c.run("ring", "set-replication", "3")
	r.CheckSuccess(t, "version 3", "3 copies")
	if !strings.Contains(r.Stderr, "writes wait for 1 more") {
		t.Errorf("no warning: %s", r.Stderr)
	}
	c.run("ring", "set-replication", "1").CheckSuccess(t, "version 4")
	c.run("ring", "set-replication", "1").CheckSuccess(t, "version 4") // nothing to do
	var ring ringJSON
	c.json(t, &ring, "ring", "get")
	if ring.Replication != 1 || ring.Version != 4 {
		t.Errorf("%+v", ring)
	}
}

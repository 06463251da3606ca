package main

import (
	"testing"

	"github.com/google/uuid"

	"github.com/coreos/torus"
)

func TestInit(t *testing.T) {
	c := newCluster(t)
	// Nothing works before, and the message says what to do.
	for _, args := range [][]string{{"status"}, {"volume", "list"}, {"ring", "get"}, {"init", "--view"}, {"wipe"}} {
		c.run(args...).CheckFailure(t, "not initialised", "torusctl init")
	}
	c.run("init", "--block-size", "1MiB", "--block-spec", "rep=3,crc").CheckSuccess(t, "1.0 MiB", "crc,rep=3")
	var view clusterJSON
	c.json(t, &view, "init", "--view")
	if _, err := uuid.Parse(view.ClusterID); err != nil || view.BlockSizeBytes != 1<<20 || view.DefaultBlockSpec != "crc,rep=3" {
		t.Errorf("%+v, %v", view, err)
	}
	var ring ringJSON
	c.json(t, &ring, "ring", "get")
	if ring.Version != 1 || ring.Replication != 3 || ring.Type != "empty" || len(ring.Members) != 0 {
		t.Errorf("%+v", ring)
	}
	// Once is enough: a second init must not touch a cluster that is in use.
	c.run("init").CheckFailure(t, "already exists", "torusctl init --view")
	var again clusterJSON
	c.json(t, &again, "init", "--view")
	if again != view {
		t.Errorf("%+v became %+v", view, again)
	}
}

func TestInitWithoutRing(t *testing.T) {
	c := newCluster(t)
	c.run("init", "--no-ring").CheckSuccess(t)
	if _, err := c.mds.Ring(t.Context()); err == nil {
		t.Error("there is a ring")
	}
	p, _ := c.addPeer(t, 1)
	c.run("peer", "add", p.Uuid).CheckSuccess(t, "1 members")
	if g, err := c.mds.GlobalMetadata(t.Context()); err != nil || g.BlockSize != torus.DefaultBlockSize {
		t.Errorf("%+v, %v", g, err)
	}
}

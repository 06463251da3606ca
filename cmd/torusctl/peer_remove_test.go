package main

import "testing"

func TestPeerRemove(t *testing.T) {
	c := initCluster(t)
	a, _ := c.addPeer(t, 1)
	b, _ := c.addPeer(t, 2)
	d, gone := c.addPeer(t, 3)
	c.run("peer", "add", "--all-peers").CheckSuccess(t, "3 members")
	c.run("peer", "remove", "nobody").CheckFailure(t, `"nobody"`, "torusctl peer list")

	// One that runs is not removed by mistake.
	c.run("peer", "remove", a.Address).CheckFailure(t, a.Uuid, "alive", "--force")
	// One that is dead is forgotten, whatever it held: the others make the copies again.
	if err := c.mds.RevokeLease(t.Context(), gone); err != nil {
		t.Fatal(err)
	}
	c.run("peer", "remove", d.Uuid).CheckSuccess(t, "2 members", "is forgotten")
	// Too few members would be left (F1): --force does not help.
	c.run("peer", "remove", a.Uuid, "--force").CheckFailure(t, "1 members would be left for 2 copies", "set-replication")
	c.run("ring", "set-replication", "1").CheckSuccess(t)
	c.run("peer", "remove", a.Uuid, "--force").CheckSuccess(t, "1 members", "still runs")

	var peers []peerJSON
	c.json(t, &peers, "peer", "list")
	if len(peers) != 2 {
		t.Errorf("%+v", peers)
	}
	for _, p := range peers {
		if p.Member != (p.UUID == b.Uuid) {
			t.Errorf("%+v", p)
		}
	}
}

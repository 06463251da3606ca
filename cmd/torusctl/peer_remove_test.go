package main

import "testing"

func TestPeerRemove(t *testing.T) {
	c := initCluster(t)
	a, lease := c.addPeer(t, 1)
	b, _ := c.addPeer(t, 2)
	d, gone := c.addPeer(t, 3)
	c.run("peer", "add", "--all-peers").CheckSuccess(t, "3 members")
	c.run("peer", "remove", "nobody").CheckFailure(t, `"nobody"`, "torusctl peer list")

	// Data would lose a copy, maybe the last: refused, and the reason said.
	a.UsedBytes = 3 << 30
	c.put(t, lease, a)
	c.run("peer", "remove", a.Address).CheckFailure(t, a.Uuid, "3.0 GiB", "--force")
	// An empty one goes without force; one that is dead is forgotten.
	if err := c.mds.RevokeLease(t.Context(), gone); err != nil {
		t.Fatal(err)
	}
	c.run("peer", "remove", d.Uuid).CheckSuccess(t, "2 members", "is forgotten")
	// Too few members would be left.
	c.run("peer", "remove", b.Uuid).CheckFailure(t, "1 members would be left for 2 copies", "--force")
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

package main

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/cmd/internal/clitest"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/node"
)

// cluster is an etcd to run torusctl against.
type cluster struct {
	*clitest.Cluster
	mds torus.MetadataService
}

// newCluster returns one that is not initialised.
func newCluster(t *testing.T) *cluster {
	t.Helper()
	c := clitest.NewCluster(t)
	return &cluster{c, c.MDS(t)}
}

// initCluster returns one that is.
func initCluster(t *testing.T) *cluster {
	t.Helper()
	c := newCluster(t)
	c.run("init").CheckSuccess(t)
	return c
}

func (c *cluster) run(args ...string) clitest.Result {
	return clitest.Run(rootCommand(), append([]string{"-C", c.Etcd}, args...)...)
}

// json runs a command with -o json and decodes what it prints.
func (c *cluster) json(t *testing.T, v any, args ...string) {
	t.Helper()
	r := c.run(append([]string{"-o", "json"}, args...)...)
	r.CheckSuccess(t)
	if err := json.Unmarshal([]byte(r.Stdout), v); err != nil {
		t.Fatalf("%v\n%s", err, r.Stdout)
	}
}

// addPeer records a peer as torusd would, alive until the test ends or its lease is revoked.
func (c *cluster) addPeer(t *testing.T, n int) (*models.Peer, torus.LeaseID) {
	t.Helper()
	lease, err := c.mds.GrantLease(t.Context(), 5*time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	p := &models.Peer{
		Uuid: torus.NewPeerID().String(), Address: fmt.Sprintf("tdp://10.0.0.%d:40000", n), SizeBytes: 100 << 30, UsedBytes: 0,
		Labels: map[string]string{"zone": "a", "rack": fmt.Sprint(n)}, UpdatedUnixMs: time.Now().UnixMilli(), State: node.StateOK, Version: "v2",
	}
	c.put(t, lease, p)
	return p, lease
}

func (c *cluster) put(t *testing.T, lease torus.LeaseID, p *models.Peer) {
	t.Helper()
	if err := c.mds.PutPeer(t.Context(), lease, p); err != nil {
		t.Fatal(err)
	}
}

// attach attaches a volume as a client would, and returns the state to commit to.
func (c *cluster) attach(t *testing.T, name string) (torus.VolumeID, torus.VolumeState) {
	t.Helper()
	v, err := c.mds.Volume(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	lease, err := c.mds.GrantLease(t.Context(), 5*time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	state, err := c.mds.Attach(t.Context(), torus.VolumeID(v.Id), lease, &models.Holder{Host: "h1", Pid: 7, What: "torusblk nbdserve"}, false)
	if err != nil {
		t.Fatal(err)
	}
	return torus.VolumeID(v.Id), state
}

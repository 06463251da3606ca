package clitest

import (
	"testing"

	"github.com/coreos/torus"
	"github.com/coreos/torus/metadata/embed"
	"github.com/coreos/torus/node"
)

// Cluster is an etcd of a test.
type Cluster struct {
	Etcd string // as for -C
}

// NewCluster starts an etcd that lives as long as the test. There is no cluster in it yet.
func NewCluster(t *testing.T) *Cluster {
	t.Helper()
	t.Setenv("HOME", t.TempDir()) // no config file
	s, err := embed.Start(t.Context(), embed.Config{DataDir: t.TempDir(), ClientURL: "http://127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return &Cluster{Etcd: s.Endpoint()}
}

// MDS connects to the cluster.
func (c *Cluster) MDS(t *testing.T) torus.MetadataService {
	t.Helper()
	node.RegisterMetadata(nil)
	mds, err := node.Etcd{Endpoints: []string{c.Etcd}}.Connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mds.Close() })
	return mds
}

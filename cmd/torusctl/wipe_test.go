package main

import (
	"errors"
	"strings"
	"testing"

	"github.com/coreos/torus"
	"github.com/coreos/torus/cmd/internal/cli"
)

func TestWipe(t *testing.T) {
	c := initCluster(t)
	c.run("volume", "create-block", "precious", "1GiB").CheckSuccess(t)
	// Nobody confirms: nothing is lost.
	r := c.run("wipe")
	if r.Status != 1 || !strings.Contains(r.Stderr, "1 volumes") || !strings.Contains(r.Stderr, "--yes-i-am-sure") {
		t.Errorf("%+v", r)
	}
	c.run("volume", "info", "precious").CheckSuccess(t)

	root := rootCommand()
	root.SetIn(strings.NewReader("no\n"))
	var out, stderr strings.Builder
	if status := cli.Run(root, []string{"-C", c.Etcd, "wipe"}, &out, &stderr); status != 1 {
		t.Errorf("no was taken for yes: %s", out.String())
	}
	root = rootCommand()
	root.SetIn(strings.NewReader("yes\n"))
	if status := cli.Run(root, []string{"-C", c.Etcd, "wipe"}, &out, &stderr); status != 0 {
		t.Errorf("yes was not taken: %s", stderr.String())
	}
	if _, err := c.mds.GlobalMetadata(t.Context()); !errors.Is(err, torus.ErrNoGlobalMetadata) {
		t.Errorf("after wipe: %v", err)
	}
	c.run("init").CheckSuccess(t)
	c.run("wipe", "--yes-i-am-sure").CheckSuccess(t)
	c.run("status").CheckFailure(t, "not initialised")
}

package main

import (
	"path/filepath"
	"testing"

	"github.com/google/uuid"

	"github.com/coreos/torus"
	"github.com/coreos/torus/cmd/internal/clitest"
	"github.com/coreos/torus/node"
)

// Command lines that cannot be meant fail before anything is done, and say what to do.
func TestBadCommandLines(t *testing.T) {
	t.Setenv("HOME", t.TempDir())
	clitest.RunBad(t, rootCommand, map[string][]string{
		"":                                {"what to do is missing", "nbdserve", "torusblk --help"},
		"nbdsrv":                          {`"nbdsrv"`, `did you mean "nbd`, "torusblk --help"},
		"nbdserve --nope":                 {"--nope", "torusblk nbdserve --help"},
		"nbdserve -l nowhere":             {"--listen", "localhost:10809"},
		"nbdserve -l unix:":               {"--listen", "unix:/run/torus.sock"},
		"nbdserve -C a:b:c":               {"a:b:c", "HOST:2379"},
		"nbdserve --cache-size big":       {"--cache-size", `"big"`, "1GiB"},
		"nbdserve --profile prod":         {"config.json", "torusctl config"},
		"nbdserve --http 127.0.0.1:99999": {"127.0.0.1:99999", "--http"},
		"nbdserve -C 127.0.0.1:1 --etcd-wait 200ms": {"127.0.0.1:1", "no answer for 200ms", "HOST:2379"},
		"nbd":                {"VOLUME is missing", "usage: torusblk nbd VOLUME"},
		"nbd a /dev/nbd0 b":  {`"b"`, "usage:"},
		"nbd a -d /dev/nbd0": {`"a"`, "usage:"},
		"nbd -d /dev/sda":    {"/dev/sda"},
		"completion tcsh":    {`"tcsh"`, "bash, zsh, fish"},
	})
}

func TestNoSuchVolume(t *testing.T) {
	c := clitest.NewCluster(t)
	socket := "unix:" + filepath.Join(t.TempDir(), "s")
	run := func(args ...string) clitest.Result {
		return clitest.Run(rootCommand(), append([]string{"-C", c.Etcd}, args...)...)
	}
	run("nbdserve", "-l", socket).CheckFailure(t, "not initialised", "torusctl init")
	global := torus.GlobalMetadata{ClusterID: uuid.NewString(), BlockSize: torus.DefaultBlockSize, DefaultBlockSpec: node.DefaultBlockSpec}
	if _, err := (node.Etcd{Endpoints: []string{c.Etcd}}).Init(t.Context(), global, true); err != nil {
		t.Fatal(err)
	}
	run("nbdserve", "-l", socket, "nosuch").CheckFailure(t, "volume nosuch", "does not exist", "torusctl volume list")
	run("nbd", "nosuch").CheckFailure(t, "volume nosuch", "does not exist", "torusctl volume list")
}

func TestVersion(t *testing.T) {
	clitest.Run(rootCommand(), "version").CheckSuccess(t, "torusblk ")
	clitest.Run(rootCommand(), "nbdserve", "--help").CheckSuccess(t, "Usage:", "localhost")
}

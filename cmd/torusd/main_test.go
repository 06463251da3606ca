package main

import (
	"testing"

	"github.com/coreos/torus/cmd/internal/clitest"
)

// Command lines that cannot be meant fail before anything is touched, and say what to do.
func TestBadCommandLines(t *testing.T) {
	t.Setenv("HOME", t.TempDir())
	t.Chdir(t.TempDir()) // the default data dirs are relative
	clitest.RunBad(t, rootCommand, map[string][]string{
		"serve":                                {`unknown command "serve"`, "torusd --help"},
		"--nope":                               {"--nope", "torusd --help"},
		"--size 0":                             {"--size", "size 0", "20GiB"},
		"--size 0%":                            {"--size", "1% to 100%"},
		"--size 101%":                          {"--size", "1% to 100%"},
		"--size lots":                          {"--size", `"lots"`, "1GiB"},
		"--size -1GiB":                         {"--size", "1GiB"},
		"--peer-address 10.0.0.1:40000":        {"--peer-address", "tdp://IP:PORT"},
		"--peer-address tdp://0.0.0.0:40000":   {"--peer-address", "tdp://IP:PORT"},
		"--peer-address tdp://10.0.0.1":        {"--peer-address", "tdp://IP:PORT"},
		"--label zone":                         {`"zone"`, "--label zone=a"},
		"--label zone=a --label zone=b":        {`"zone"`, "twice"},
		"--nbd nowhere":                        {"--nbd", "localhost:10809"},
		"--nbd unix:":                          {"--nbd", "unix:/run/torus.sock"},
		"--etcd a:b:c":                         {"a:b:c", "HOST:2379"},
		"--etcd 127.0.0.1:1 --etcd-wait 300ms": {"127.0.0.1:1", "no answer for 300ms", "-C (--etcd) HOST:2379"},
		"--etcd 127.0.0.1:1 --data-dir /dev/null": {"/dev/null", "--data-dir"},
		"--http 127.0.0.1:99999":                  {"127.0.0.1:99999", "--http"},
		"--profile prod":                          {"config.json", "torusctl config"},
		"--debug=maybe":                           {"--debug", "torusd --help"},
		"dev extra":                               {`"extra"`, "usage: torusd dev"},
		"dev --nodes 0":                           {"--nodes 0", "from 1 to"},
		"dev --nodes 99":                          {"--nodes 99", "from 1 to"},
		"dev --replication 4":                     {"--replication 4", "from 1 to 3"},
		"dev --replication 0":                     {"--replication 0", "from 1 to 3"},
		"dev --volume demo":                       {`"demo"`, "NAME=SIZE"},
		"dev --volume demo=huge":                  {`"huge"`, "1GiB"},
		"dev --volume a/b=1GiB":                   {"--volume", "letters"},
		"dev --nbd nowhere":                       {"--nbd", "localhost:10809"},
		"dev --data-dir /dev/null":                {"/dev/null", "--data-dir"},
		"version extra":                           {`"extra"`},
	})
}

func TestVersion(t *testing.T) {
	clitest.Run(rootCommand(), "--version").CheckSuccess(t, "torusd ")
	clitest.Run(rootCommand(), "version").CheckSuccess(t, "torusd ")
	clitest.Run(rootCommand(), "--completion").CheckSuccess(t, "bash completion")
	clitest.Run(rootCommand(), "--help").CheckSuccess(t, "Usage:", "--peer-address")
}

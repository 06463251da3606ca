package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/coreos/torus/cmd/internal/clitest"
)

// Command lines that cannot be meant fail before anything is done, and say what to do.
func TestBadCommandLines(t *testing.T) {
	t.Setenv("HOME", t.TempDir())
	broken := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(broken, []byte(`{"etcd_config":`), 0o600); err != nil {
		t.Fatal(err)
	}
	clitest.RunBad(t, rootCommand, map[string][]string{
		"":                                           {"what to do is missing", "volume", "--help"},
		"voluem":                                     {`"voluem"`, `did you mean "volume"`, "--help"},
		"volume":                                     {"what to do is missing", "create-block", "torusctl volume --help"},
		"volume lst":                                 {`unknown command "lst"`, `"list"`},
		"volume list --nope":                         {"--nope", "torusctl volume list --help"},
		"volume list extra":                          {`unexpected argument "extra"`, "usage: torusctl volume list"},
		"volume create-block":                        {"NAME is missing", "usage: torusctl volume create-block NAME SIZE"},
		"volume create-block v":                      {"SIZE is missing", "usage:"},
		"volume create-block v 1XB":                  {`"1XB"`, "1GiB"},
		"volume create-block v -- -1":                {`"-1"`, "1GiB"},
		"volume create-block '' 1G":                  {"NAME is empty"},
		"block create v":                             {"SIZE is missing", "usage: torusctl block create NAME SIZE"},
		"volume delete":                              {"NAME is missing"},
		"volume info a b":                            {`"b"`},
		"volume list -o yaml":                        {`"yaml"`, "table, json or csv"},
		"ring set-replication 0":                     {`"0"`, "from 1 to 8"},
		"ring set-replication two":                   {`"two"`, "from 1 to 8"},
		"ring set-replication":                       {"N is missing"},
		"ring get x":                                 {`"x"`},
		"peer add":                                   {"--all-peers", "address or UUID"},
		"peer add --all-peers x":                     {"--all-peers"},
		"peer remove":                                {"address or UUID"},
		"init --block-size many":                     {`"many"`},
		"init --block-size 3MiB":                     {"block size", "power of two"},
		"init --block-size 0":                        {"block size", "power of two"},
		"init --block-size 1GiB":                     {"block size", "64MiB"},
		"init --block-spec raid=5":                   {"raid", "rep=N"},
		"init --block-spec crc,rep=99":               {"rep=99", "from 1 to 8"},
		"status -C host:port:what":                   {"host:port:what", "HOST:2379"},
		"status -C ftp://host:2379":                  {"ftp", "HOST:2379"},
		"status -C ''":                               {"HOST:2379"},
		"status --config /nowhere/config.json":       {"/nowhere/config.json", "torusctl config"},
		"status --config " + broken:                  {broken, "torusctl config"},
		"status --config " + broken + " --profile x": {broken},
		"status --profile prod":                      {"config.json", "torusctl config"},
		"config -C host:0":                           {"host:0", "HOST:2379"},
		"config --view":                              {"config.json", "torusctl config"},
		"completion tcsh":                            {`"tcsh"`, "bash, zsh, fish"},
		"help nope":                                  {`"nope"`, "torusctl --help"},
		"version extra":                              {`"extra"`},
	})
}

// Nobody answers: the message names the address and says what to do.
func TestNoEtcd(t *testing.T) {
	t.Setenv("HOME", t.TempDir())
	for _, args := range [][]string{
		{"status"}, {"volume", "list"}, {"init"}, {"wipe", "--yes-i-am-sure"}, {"wipe"}, {"peer", "add", "--all-peers"}, {"ring", "get"},
	} {
		// Port 1 is tcpmux: nobody listens there.
		r := clitest.Run(rootCommand(), append(args, "-C", "127.0.0.1:1", "--timeout", "300ms")...)
		r.CheckFailure(t, "127.0.0.1:1", "etcd is running", "-C (--etcd) HOST:2379")
	}
}

func TestHelpIsShownWhenAskedFor(t *testing.T) {
	for _, args := range [][]string{{"--help"}, {"volume", "--help"}, {"help", "volume", "list"}, {"init", "-h"}} {
		clitest.Run(rootCommand(), args...).CheckSuccess(t, "Usage:")
	}
}

func TestVersion(t *testing.T) {
	clitest.Run(rootCommand(), "version").CheckSuccess(t, "torusctl ")
}

func TestCompletion(t *testing.T) {
	clitest.Run(rootCommand(), "completion").CheckSuccess(t, "bash completion")
	clitest.Run(rootCommand(), "completion", "zsh").CheckSuccess(t, "#compdef torusctl")
	clitest.Run(rootCommand(), "completion", "fish").CheckSuccess(t, "fish completion")
}

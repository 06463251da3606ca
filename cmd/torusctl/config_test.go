package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/coreos/torus/cmd/internal/clitest"
)

// The file is the one the first Torus wrote: etcd_config, profiles, keys with dashes.
func TestConfig(t *testing.T) {
	home := t.TempDir()
	t.Setenv("HOME", home)
	clitest.Run(rootCommand(), "config", "-C", "10.0.0.1:2379").CheckSuccess(t, `"default"`, "10.0.0.1:2379")
	clitest.Run(rootCommand(), "config", "-C", "10.0.0.2:2379", "--etcd-ca-file", "/ca.pem", "--profile", "prod").CheckSuccess(t, `"prod"`)

	path := filepath.Join(home, ".torus", "config.json")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var file map[string]map[string]map[string]string
	if err := json.Unmarshal(b, &file); err != nil {
		t.Fatal(err)
	}
	if got := file["etcd_config"]["default"]["etcd"]; got != "10.0.0.1:2379" {
		t.Errorf("default profile has %q\n%s", got, b)
	}
	if got := file["etcd_config"]["prod"]["etcd-ca-file"]; got != "/ca.pem" {
		t.Errorf("prod profile has CA %q\n%s", got, b)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	clitest.Run(rootCommand(), "config", "--view").CheckSuccess(t, "prod", "10.0.0.2:2379")

	// What is configured is used; a flag goes before it.
	clitest.Run(rootCommand(), "status", "--timeout", "200ms", "--profile", "other").CheckFailure(t, `"other"`, "default, prod")
	clitest.Run(rootCommand(), "config", "-C", "127.0.0.1:1").CheckSuccess(t)
	clitest.Run(rootCommand(), "status", "--timeout", "200ms").CheckFailure(t, "127.0.0.1:1")
	clitest.Run(rootCommand(), "status", "--timeout", "200ms", "-C", "127.0.0.1:2").CheckFailure(t, "127.0.0.1:2")
}

package torus_test

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// arrows says which packages of ours each may import: one way, from the vocabulary up to the commands. A front end knows
// a device and nothing of what is under it. Packages that only tests and tools use are not listed, and may import all.
var arrows = map[string]string{
	".":                        "models buf",
	"models":                   "",
	"buf":                      "",
	"loop":                     "",
	"device":                   "buf",
	"vfs":                      "",
	"record":                   ".",
	"ring":                     ". models",
	"blockset":                 ".",
	"metadata":                 ". models",
	"metadata/temp":            ". models metadata",
	"metadata/etcd":            ". models metadata metadata/internal/zaplog",
	"metadata/embed":           ". metadata/internal/zaplog",
	"place":                    ". buf vfs",
	"transport":                "buf loop vfs",
	"transport/sock":           ". buf loop transport vfs",
	"transport/mem":            ". buf loop transport vfs",
	"transport/tdp":            ". buf loop record place transport vfs",
	"storage":                  ". buf loop place record vfs",
	"peer":                     ". loop place record vfs",
	"distributor":              ". models buf loop",
	"peer/repair":              ". models loop record distributor file",
	"file":                     ". models buf loop record device distributor",
	"block":                    ". models loop blockset device distributor file",
	"nbd":                      "buf loop transport device",
	"metadata/internal/zaplog": "",
}

func TestArrows(t *testing.T) {
	const module = "github.com/coreos/torus"
	out, err := exec.CommandContext(t.Context(), "go", "list", "-f", `{{.ImportPath}} {{join .Imports " "}}`, "./...").Output()
	if err != nil {
		t.Fatal(err)
	}
	name := func(path string) string {
		if path == module {
			return "."
		}
		return strings.TrimPrefix(path, module+"/")
	}
	seen := 0
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		allowed, ok := arrows[name(f[0])]
		if !ok {
			continue
		}
		seen++
		for _, p := range f[1:] {
			if strings.HasPrefix(p, module) && !slices.Contains(strings.Fields(allowed), name(p)) {
				t.Errorf("%s imports %s", name(f[0]), name(p))
			}
		}
	}
	if seen != len(arrows) {
		t.Errorf("%d packages seen of %d listed", seen, len(arrows))
	}
}

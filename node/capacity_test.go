package node

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/coreos/torus"
)

func TestCapacity(t *testing.T) {
	const gib, block = 1 << 30, 4 << 20
	dir := t.TempDir()
	for name, c := range map[string]struct {
		capacity   Capacity
		free, size uint64
		want       uint64 // 0: refused
		says       string
	}{
		"bytes":            {Capacity{Bytes: 20 * gib}, 50 * gib, 100 * gib, 20 * gib, ""},
		"percent":          {Capacity{Percent: 80}, 90 * gib, 100 * gib, 80 * gib, ""},
		"all that is free": {Capacity{Bytes: 50 * gib}, 50 * gib, 100 * gib, 50 * gib, ""},
		"nothing":          {Capacity{}, 50 * gib, 100 * gib, 0, "too little"},
		"one block":        {Capacity{Bytes: block}, 50 * gib, 100 * gib, 0, "too little"},
		"more than there":  {Capacity{Bytes: 101 * gib}, 100 * gib, 100 * gib, 0, "the file system has"},
		"more than free":   {Capacity{Percent: 80}, 50 * gib, 100 * gib, 0, "are free"},
	} {
		got, err := c.capacity.resolve(dir, c.free, c.size, block)
		if got != c.want || (c.want == 0) != errors.Is(err, torus.ErrInvalid) {
			t.Errorf("%s: %d, %v", name, got, err)
		}
		if c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "--size")) {
			t.Errorf("%s: %v does not say %q and what to do", name, err, c.says)
		}
	}
}

// What a peer has written already is its own: a restart on a disk it has filled must work.
func TestCapacityCountsWhatIsThere(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "sub"), 0o750); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "sub", "slots"), make([]byte, 8<<20), 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := (Capacity{Bytes: 8 << 20}).resolve(dir, 0, 1<<30, 1<<20); err != nil {
		t.Error(err)
	}
	if _, err := (Capacity{Bytes: 16 << 20}).resolve(dir, 0, 1<<30, 1<<20); err == nil {
		t.Error("took twice of what is there")
	}
	link := filepath.Join(t.TempDir(), "data")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	if _, err := (Capacity{Bytes: 8 << 20}).resolve(link, 0, 1<<30, 1<<20); err != nil {
		t.Errorf("through a link: %v", err)
	}
}

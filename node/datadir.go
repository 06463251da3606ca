package node

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/coreos/torus"
	"github.com/coreos/torus/vfs"
)

// dataDir is a directory that belongs to this process until it is closed.
type dataDir struct {
	name   string
	fs     vfs.FS
	unlock func() error
}

// openDataDir makes the directory if need be, and takes it: two processes in one would destroy it.
func openDataDir(name string) (*dataDir, error) {
	fail := func(err error, hint string) (*dataDir, error) {
		return nil, &torus.Error{Op: "open", Obj: "data dir " + name, Err: err, Hint: hint}
	}
	if err := os.MkdirAll(name, 0o750); err != nil {
		return fail(err, "give a directory that can be written with --data-dir")
	}
	d := &dataDir{name: name, fs: vfs.NewOS(name)}
	unlock, err := d.fs.Lock("torusd.lock")
	switch {
	case errors.Is(err, vfs.ErrLocked):
		return fail(fmt.Errorf("in use: %w", err), "stop the other torusd that runs there, or give another --data-dir")
	case err != nil:
		return fail(err, "give a directory that can be written with --data-dir")
	}
	d.unlock = unlock
	return d, nil
}

func (d *dataDir) path(name string) string { return filepath.Join(d.name, name) }

func (d *dataDir) close() error { return d.unlock() }

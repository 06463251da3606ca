package storage_test

import (
	"testing"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/storage"
	"github.com/coreos/torus/storage/storetest"
	"github.com/coreos/torus/vfs"
)

var identity = storage.Identity{
	Peer:      torus.PeerID{1, 2, 3},
	ClusterID: "5f2e1b8e-0000-4000-8000-000000000001",
	BlockSize: storetest.BlockSize,
}

func config(l loop.Loop, fsys vfs.FS) storage.Config {
	return storage.Config{
		Loop: l, FS: fsys, Identity: identity,
		SizeBytes: (storetest.Slots+storetest.Kept)*storetest.BlockSize + 1000, SlotsPerFile: 5, ReserveBytes: 1 << 20,
	}
}

func openNew(t testing.TB, l loop.Loop, fsys vfs.FS) *storage.Disk {
	t.Helper()
	if err := storage.Create(fsys, identity); err != nil {
		t.Fatal(err)
	}
	d, err := storage.Open(config(l, fsys))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestDiskInMemory(t *testing.T) {
	storetest.Run(t, func(t *testing.T, l loop.Loop) torus.Store { return openNew(t, l, vfs.NewMem(1)) })
}

func TestDiskOnRealFiles(t *testing.T) {
	storetest.Run(t, func(t *testing.T, l loop.Loop) torus.Store { return openNew(t, l, vfs.NewOS(t.TempDir())) })
}

func TestMemory(t *testing.T) {
	storetest.Run(t, func(t *testing.T, l loop.Loop) torus.Store {
		m, err := storage.NewMemory(config(l, nil))
		if err != nil {
			t.Fatal(err)
		}
		return m
	})
}

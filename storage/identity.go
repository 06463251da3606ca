package storage

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"github.com/coreos/torus"
	"github.com/coreos/torus/vfs"
)

// Identity says whose data a directory holds. It is written once, by Create, and never changes.
type Identity struct {
	Peer      torus.PeerID
	ClusterID string
	BlockSize uint64 // bytes
}

func (id Identity) String() string {
	return fmt.Sprintf("peer %v of cluster %s with blocks of %d bytes", id.Peer, id.ClusterID, id.BlockSize)
}

const (
	identityFile    = "identity"
	countFile       = "files"
	lockFile        = "lock"
	newSuffix       = ".new" // of a file that is being made; one found at Open is a crash's leftover
	slotsPrefix     = "slots-"
	identityVersion = 1
	maxIdentitySize = 4096
	maxClusterID    = 128
)

// identityJSON is the file "identity" (docs/format/block-slot.md).
type identityJSON struct {
	Version   int          `json:"version"`
	Cluster   string       `json:"cluster"`
	Peer      torus.PeerID `json:"peer"`
	BlockSize uint64       `json:"block_size"`
}

func (id Identity) validate() error {
	switch {
	case id.Peer.IsZero():
		return fmt.Errorf("identity without a peer UUID: %w", torus.ErrInvalid)
	case id.ClusterID == "" || len(id.ClusterID) > maxClusterID:
		return fmt.Errorf("cluster id of %d bytes, want 1 to %d: %w", len(id.ClusterID), maxClusterID, torus.ErrInvalid)
	case id.BlockSize%torus.PageSize != 0 || id.BlockSize < 2*torus.PageSize || id.BlockSize > torus.MaxBlockSize:
		return fmt.Errorf("block size of %d bytes, want a multiple of %d, up to %d: %w", id.BlockSize, torus.PageSize, torus.MaxBlockSize, torus.ErrInvalid)
	}
	return nil
}

// ReadIdentity returns the identity of the directory. The error wraps fs.ErrNotExist if it holds no data yet, so that
// Create may give it one; a directory with data but without an identity is another error.
func ReadIdentity(fsys vfs.FS) (Identity, error) {
	wrong := func(err error) (Identity, error) {
		return Identity{}, &torus.Error{Op: "read identity", Obj: "of the data directory", Err: err}
	}
	f, err := fsys.Open(identityFile)
	if errors.Is(err, fs.ErrNotExist) {
		names, lerr := fsys.List(".")
		if lerr != nil && !errors.Is(lerr, fs.ErrNotExist) {
			return wrong(lerr)
		}
		for _, n := range names {
			if strings.HasPrefix(n, slotsPrefix) {
				return Identity{}, &torus.Error{Op: "read identity", Obj: "of the data directory",
					Err:  fmt.Errorf("the file %q is missing, but there is data (%s): %w", identityFile, n, torus.ErrCorrupt),
					Hint: "Restore the file from the head of a slots file, or empty the directory and let the cluster heal."}
			}
		}
		return wrong(err)
	}
	if err != nil {
		return wrong(err)
	}
	defer f.Close()
	b := make([]byte, maxIdentitySize)
	n, err := f.ReadAt(b, 0)
	if err != nil && err != io.EOF {
		return wrong(err)
	}
	id, err := parseIdentity(b[:n])
	if err != nil {
		return wrong(err)
	}
	return id, nil
}

func parseIdentity(b []byte) (Identity, error) {
	var j identityJSON
	d := json.NewDecoder(bytes.NewReader(b))
	if err := d.Decode(&j); err != nil {
		return Identity{}, fmt.Errorf("%w: %w", torus.ErrCorrupt, err)
	}
	if j.Version != identityVersion {
		return Identity{}, fmt.Errorf("version %d of the data directory, this program knows %d: %w", j.Version, identityVersion, torus.ErrNotSupported)
	}
	id := Identity{Peer: j.Peer, ClusterID: j.Cluster, BlockSize: j.BlockSize}
	return id, id.validate()
}

// Create gives an empty directory its identity, durably. ErrExists if it has one; vfs.ErrLocked if it is in use.
func Create(fsys vfs.FS, id Identity) error {
	if err := create(fsys, id); err != nil {
		return &torus.Error{Op: "create store", Obj: "for " + id.String(), Err: err}
	}
	return nil
}

func create(fsys vfs.FS, id Identity) error {
	if err := id.validate(); err != nil {
		return err
	}
	if err := fsys.MkdirAll("."); err != nil {
		return err
	}
	unlock, err := fsys.Lock(lockFile)
	if err != nil {
		return err
	}
	defer func() { _ = unlock() }()
	old, err := ReadIdentity(fsys)
	if err == nil {
		return fmt.Errorf("the directory belongs to %v: %w", old, torus.ErrExists)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	b, err := json.Marshal(identityJSON{identityVersion, id.ClusterID, id.Peer, id.BlockSize})
	if err != nil {
		return err
	}
	return writeFile(fsys, identityFile, func(f vfs.File) error {
		_, err := f.WriteAt(append(b, '\n'), 0)
		return err
	})
}

// countJSON is the file "files": how many slots files there are, at least, so that a lost one is missed. "I do not have the
// block" must never come from a disk that lost it.
type countJSON struct {
	Version int    `json:"version"`
	Files   uint32 `json:"files"`
}

func writeCount(fsys vfs.FS, n uint32) error {
	b, err := json.Marshal(countJSON{identityVersion, n})
	if err != nil {
		return err
	}
	return writeFile(fsys, countFile, func(f vfs.File) error {
		_, err := f.WriteAt(append(b, '\n'), 0)
		return err
	})
}

func readCount(fsys vfs.FS) (uint32, error) {
	f, err := fsys.Open(countFile)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer f.Close()
	b := make([]byte, maxIdentitySize)
	n, err := f.ReadAt(b, 0)
	if err != nil && err != io.EOF {
		return 0, err
	}
	var j countJSON
	if err := json.NewDecoder(bytes.NewReader(b[:n])).Decode(&j); err != nil || j.Version != identityVersion {
		return 0, fmt.Errorf("the file %q: %w (%v)", countFile, torus.ErrCorrupt, err)
	}
	return j.Files, nil
}

// writeFile makes a file whose name appears only once its contents are durable.
func writeFile(fsys vfs.FS, name string, fill func(vfs.File) error) error {
	tmp := name + newSuffix // one left over from a crash is in the way
	if err := fsys.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := fsys.Create(tmp)
	if err != nil {
		return err
	}
	err = fill(f)
	if err == nil {
		err = f.Datasync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		_ = fsys.Remove(tmp) // its space may be what is missing
		return err
	}
	if err := fsys.Rename(tmp, name); err != nil {
		return err
	}
	return fsys.SyncDir(".")
}

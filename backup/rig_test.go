package backup_test

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/backup"
	"github.com/coreos/torus/file"
)

const page = torus.PageSize

// volume is one that is written as a Torus volume is: what is written lies in a new place.
type volume struct {
	data   []byte
	places []file.Place
	next   uint64
	read   atomic.Int64 // bytes
	fail   error        // of reads
}

func newVolume(pages int) *volume {
	return &volume{data: make([]byte, pages*page), places: make([]file.Place, pages)}
}

func (v *volume) Size() uint64 { return uint64(len(v.data)) }

func (v *volume) ReadAt(b []byte, off int64) (int, error) {
	v.read.Add(int64(len(b)))
	if v.fail != nil {
		return 0, v.fail
	}
	return copy(b, v.data[off:]), nil
}

func (v *volume) Places(first uint64, dst []file.Place) error {
	clear(dst)
	copy(dst, v.places[min(first, uint64(len(v.places))):])
	return nil
}

// move puts a page elsewhere, as a write does, and as compaction does.
func (v *volume) move(p int) {
	v.next++
	v.places[p] = file.Place{Block: torus.BlockRef{Volume: 7, INode: 1, Index: torus.IndexID(v.next / 1000)}, Page: uint32(v.next % 1000)}
}

// write fills a page: half of it random, so that it compresses to about that.
func (v *volume) write(p int, rng *rand.Rand) {
	v.move(p)
	b := v.data[p*page:][:page]
	clear(b)
	for i := 0; i < page/2; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], rng.Uint64())
	}
}

func (v *volume) trim(p int) {
	v.places[p] = file.Place{}
	clear(v.data[p*page:][:page])
}

func open(t *testing.T, where string) *backup.Repository {
	t.Helper()
	r, err := backup.Open(t.Context(), where, true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func create(t *testing.T, r *backup.Repository, v *volume) *backup.Backup {
	t.Helper()
	b, err := r.Create(t.Context(), v, config)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

var config = backup.CreateConfig{Volume: "v", VolumeID: 7, Cluster: "c", Moment: time.Unix(1_700_000_000, 0)}

// restore returns the image of a backup.
func restore(ctx context.Context, r *backup.Repository, name string) ([]byte, error) {
	b, err := r.Find(ctx, name)
	if err != nil {
		return nil, err
	}
	rd := r.NewReader(b)
	defer rd.Close()
	image := make([]byte, 0, b.Size)
	err = rd.Restore(ctx, func(off, n uint64, data []byte) error {
		if off != uint64(len(image)) || data != nil && uint64(len(data)) != n {
			panic("pieces are not in their order")
		}
		if data == nil {
			data = make([]byte, n)
		}
		image = append(image, data...)
		return nil
	})
	return image, err
}

// objects returns the files of a repository in a directory, by kind.
func objects(t *testing.T, dir, kind string) (l []string) {
	t.Helper()
	err := filepath.WalkDir(filepath.Join(dir, kind), func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			l = append(l, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

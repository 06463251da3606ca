package backup

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"gocloud.dev/blob"
	"gocloud.dev/blob/fileblob"
	"gocloud.dev/gcerrors"
	"golang.org/x/sys/unix"

	"github.com/coreos/torus"
)

const (
	markKey   = "torus-backups"
	packsDir  = "packs/"
	mapsDir   = "maps/"
	backupDir = "backups/"
	locksDir  = "locks/"

	format = 1 // of repositories and backups

	// maxObject bounds what is read into memory at once, but for packs, of which only frames are.
	maxObject = 64 << 20
)

// mark is what the object torus-backups holds.
type mark struct {
	Format  int       `json:"format"`
	Created time.Time `json:"created"`
}

// Repository is a place for backups.
type Repository struct {
	bucket *blob.Bucket
	where  string
	dir    string // empty unless it is a directory
}

// Open opens a repository: where is a directory, or the URL of a bucket of an object store (s3://BUCKET?prefix=a/, gs://…, azblob://…; the scheme's driver
// must be linked into the program). create makes it one if there is nothing there yet. Errors: torus.ErrNotExist, torus.ErrInvalid if there is something else.
func Open(ctx context.Context, where string, create bool) (_ *Repository, err error) {
	r := &Repository{where: where}
	if scheme, _, ok := strings.Cut(where, "://"); !ok || scheme == "file" {
		r.dir = strings.TrimPrefix(where, "file://")
		if r.dir, err = filepath.Abs(r.dir); err == nil {
			if _, serr := os.Stat(r.dir); !create && errors.Is(serr, os.ErrNotExist) {
				return nil, notThere(where)
			}
			r.bucket, err = fileblob.OpenBucket(r.dir, &fileblob.Options{CreateDir: create, DirFileMode: 0o700, NoTempDir: true, Metadata: fileblob.MetadataDontWrite})
		}
	} else {
		r.bucket, err = blob.OpenBucket(ctx, where)
	}
	if err != nil {
		return nil, fmt.Errorf("repository %s: %w", where, err)
	}
	if err := r.open(ctx, create); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

func notThere(where string) error {
	return &torus.Error{Op: "open", Obj: "repository " + where, Err: torus.ErrNotExist, Hint: "`torusctl backup create` makes it with the first backup"}
}

func (r *Repository) open(ctx context.Context, create bool) error {
	b, err := r.get(ctx, markKey)
	if errors.Is(err, torus.ErrNotExist) {
		if !create {
			return notThere(r.where)
		}
		err = r.each(ctx, "", func(o *blob.ListObject) error {
			return fmt.Errorf("%s is no repository of backups and not empty: it has %s: %w\nname a place of its own, for example another directory or ?prefix=", r.where, o.Key, torus.ErrInvalid)
		})
		if err != nil {
			return err
		}
		if b, err = json.Marshal(mark{Format: format, Created: time.Now().UTC().Round(time.Second)}); err != nil {
			return err
		}
		if err := r.put(ctx, markKey, b); err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	var m mark
	if err := json.Unmarshal(b, &m); err != nil {
		return fmt.Errorf("repository %s: object %s: %w: %w", r.where, markKey, torus.ErrCorrupt, err)
	}
	if m.Format != format {
		return fmt.Errorf("repository %s is of format %d, and this program knows format %d: %w\nuse a newer version", r.where, m.Format, format, torus.ErrInvalid)
	}
	return nil
}

// Close ends the use of the repository.
func (r *Repository) Close() error { return r.bucket.Close() }

// String is where the repository is.
func (r *Repository) String() string { return r.where }

func (r *Repository) failed(op, key string, err error) error {
	if gcerrors.Code(err) == gcerrors.NotFound {
		err = fmt.Errorf("%w: %w", torus.ErrNotExist, err)
	}
	return fmt.Errorf("repository %s: %s %s: %w", r.where, op, key, err)
}

// get reads a small object.
func (r *Repository) get(ctx context.Context, key string) ([]byte, error) {
	rd, err := r.bucket.NewReader(ctx, key, nil)
	if err != nil {
		return nil, r.failed("read", key, err)
	}
	defer rd.Close()
	b, err := io.ReadAll(io.LimitReader(rd, maxObject+1))
	if err != nil {
		return nil, r.failed("read", key, err)
	}
	if len(b) > maxObject {
		return nil, r.failed("read", key, fmt.Errorf("more than %d bytes: %w", maxObject, torus.ErrCorrupt))
	}
	return b, nil
}

// getRange reads part of an object.
func (r *Repository) getRange(ctx context.Context, key string, off, n int) ([]byte, error) {
	rd, err := r.bucket.NewRangeReader(ctx, key, int64(off), int64(n), nil)
	if err != nil {
		return nil, r.failed("read", key, err)
	}
	defer rd.Close()
	b := make([]byte, n)
	if _, err := io.ReadFull(rd, b); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
			err = fmt.Errorf("it ends before byte %d: %w", off+n, torus.ErrCorrupt)
		}
		return nil, r.failed("read", key, err)
	}
	return b, nil
}

// put writes an object, whole or not at all.
func (r *Repository) put(ctx context.Context, key string, b []byte) error {
	ctx, cancel := context.WithCancel(ctx) // before Close: what was begun is not to be
	defer cancel()
	w, err := r.bucket.NewWriter(ctx, key, &blob.WriterOptions{ContentType: "application/octet-stream"})
	if err != nil {
		return r.failed("write", key, err)
	}
	if _, err := io.Copy(w, bytes.NewReader(b)); err != nil {
		cancel()
		w.Close()
		return r.failed("write", key, err)
	}
	if err := w.Close(); err != nil {
		return r.failed("write", key, err)
	}
	return nil
}

// settle makes what has been put durable. An object store has done so by itself.
func (r *Repository) settle() error {
	if r.dir == "" {
		return nil
	}
	d, err := os.Open(r.dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return fmt.Errorf("repository %s: make durable: %w", r.where, err)
	}
	return nil
}

// each calls fn for every object whose key begins with prefix.
func (r *Repository) each(ctx context.Context, prefix string, fn func(*blob.ListObject) error) error {
	return r.all(ctx, prefix, func(o *blob.ListObject) error {
		if r.unfinished(o.Key) {
			return nil
		}
		return fn(o)
	})
}

// unfinished reports whether an object is what somebody who was killed had begun to write: in a directory it gets its name when it is whole.
func (r *Repository) unfinished(key string) bool {
	return r.dir != "" && strings.HasSuffix(key, ".tmp")
}

// all is each, what is unfinished included.
func (r *Repository) all(ctx context.Context, prefix string, fn func(*blob.ListObject) error) error {
	for it := r.bucket.List(&blob.ListOptions{Prefix: prefix}); ; {
		o, err := it.Next(ctx)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return r.failed("list", prefix, err)
		}
		if err := fn(o); err != nil {
			return err
		}
	}
}

func randomID() string {
	var b [16]byte
	rand.Read(b[:]) //nolint:errcheck // never fails
	return hex.EncodeToString(b[:])
}

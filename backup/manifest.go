package backup

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"gocloud.dev/blob"

	"github.com/coreos/torus"
)

// Backup is what a volume was at a moment.
type Backup struct {
	ID       string    `json:"id"` // unique in the volume, and in the order of time
	Format   int       `json:"format"`
	Volume   string    `json:"volume"`    // name
	VolumeID uint64    `json:"volume_id"` // in the cluster
	Cluster  string    `json:"cluster"`
	Snapshot string    `json:"snapshot,omitempty"` // which one; empty: one taken for the backup
	Moment   time.Time `json:"moment"`             // what it shows
	Created  time.Time `json:"created"`
	Size     uint64    `json:"size_bytes"`
	Base     string    `json:"base,omitempty"` // the backup of the same volume that it was compared with

	ReadBytes   uint64 `json:"read_bytes"`   // of the volume
	NewBytes    uint64 `json:"new_bytes"`    // of those, moved
	StoredBytes uint64 `json:"stored_bytes"` // in the repository, for this one, without this object
	DataBytes   uint64 `json:"data_bytes"`   // that are not zeroes

	Sections []string  `json:"sections"` // names of the objects under maps/, one for each 256 MiB; empty: zeroes
	Packs    []packUse `json:"packs"`
}

// packUse says how much of a pack a backup needs.
type packUse struct {
	ID    string `json:"id"`
	Pages uint32 `json:"pages"` // it holds
	Used  uint32 `json:"used"`
}

// Name is VOL@ID.
func (b *Backup) Name() string { return b.Volume + "@" + b.ID }

func (b *Backup) key() string { return backupDir + b.Volume + "/" + b.ID }

// encode returns the object: a line of JSON and its hash.
func (b *Backup) encode() ([]byte, error) {
	j, err := json.Marshal(b)
	if err != nil {
		return nil, err
	}
	h := sha256.Sum256(j)
	return fmt.Appendf(j, "\n%x\n", h), nil
}

func decodeBackup(o []byte) (*Backup, error) {
	j, sum, _ := bytes.Cut(o, []byte("\n"))
	h := sha256.Sum256(j)
	if want := hex.EncodeToString(h[:]) + "\n"; string(sum) != want {
		return nil, fmt.Errorf("it is not what was written: %w", torus.ErrCorrupt)
	}
	b := &Backup{}
	if err := json.Unmarshal(j, b); err != nil {
		return nil, fmt.Errorf("%w: %w", torus.ErrCorrupt, err)
	}
	if b.Format != format {
		return nil, fmt.Errorf("it is of format %d, and this program knows format %d: %w", b.Format, format, torus.ErrInvalid)
	}
	if uint64(len(b.Sections)) != sectionsOf(b.Size) {
		return nil, fmt.Errorf("%d sections for %d bytes: %w", len(b.Sections), b.Size, torus.ErrCorrupt)
	}
	return b, nil
}

// newID is the name of a backup made at a time.
func newID(at time.Time) string {
	return at.UTC().Format("20060102-150405.000") + "-" + randomID()[:4]
}

// Damage is an object that is missing, or not what was written.
type Damage struct {
	Object string
	Err    error
	Pages  uint64   // that cannot be read, in all of the backups together
	Of     []string // backups that need it, VOL@ID
}

// List returns the backups of a volume, or of all (vol empty), the oldest of each volume first, and the objects that should be backups but cannot be read.
func (r *Repository) List(ctx context.Context, vol string) (l []*Backup, bad []Damage, err error) {
	if vol != "" {
		vol += "/"
	}
	keys, err := r.keys(ctx, vol)
	if err != nil {
		return nil, nil, err
	}
	for _, key := range keys {
		switch b, err := r.load(ctx, key); {
		case err == nil:
			l = append(l, b)
		case ctx.Err() != nil:
			return nil, nil, context.Cause(ctx)
		case damage(err):
			bad = append(bad, Damage{Object: key, Err: err, Of: []string{strings.Replace(strings.TrimPrefix(key, backupDir), "/", "@", 1)}})
		default:
			return nil, nil, err
		}
	}
	return l, bad, nil
}

func (r *Repository) load(ctx context.Context, key string) (*Backup, error) {
	o, err := r.get(ctx, key)
	if err != nil {
		return nil, err
	}
	b, err := decodeBackup(o)
	if err == nil && b.key() != key {
		err = fmt.Errorf("it says that it is %s: %w", b.key(), torus.ErrCorrupt)
	}
	if err != nil {
		return nil, fmt.Errorf("repository %s: object %s: %w", r.where, key, err)
	}
	return b, nil
}

// keys returns those of the backups whose VOL/ID begins with prefix, in the order of volumes and time.
func (r *Repository) keys(ctx context.Context, prefix string) (l []string, err error) {
	err = r.each(ctx, backupDir+prefix, func(o *blob.ListObject) error {
		l = append(l, o.Key)
		return nil
	})
	slices.Sort(l)
	return l, err
}

// Find returns a backup by its name: VOL@ID, VOL@ and the beginning of an ID, or VOL for its newest. Errors: torus.ErrNotExist, torus.ErrInvalid if
// there are several.
func (r *Repository) Find(ctx context.Context, name string) (*Backup, error) {
	vol, id, _ := strings.Cut(name, "@")
	if vol == "" || strings.Contains(vol, "/") || strings.Contains(id, "/") {
		return nil, fmt.Errorf("%q names no backup: %w\nwrite it as VOLUME or VOLUME@ID", name, torus.ErrInvalid)
	}
	keys, err := r.keys(ctx, vol+"/"+id)
	if err != nil {
		return nil, err
	}
	switch {
	case len(keys) == 0:
		return nil, &torus.Error{Op: "find", Obj: "backup " + name, Err: torus.ErrNotExist, Hint: "`torusctl backup list " + r.where + "` shows the backups there are"}
	case id != "" && len(keys) > 1:
		return nil, fmt.Errorf("%s may be any of %d backups: %w\nwrite more of its ID", name, len(keys), torus.ErrInvalid)
	}
	return r.load(ctx, keys[len(keys)-1])
}

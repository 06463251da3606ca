package backup

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"gocloud.dev/blob"

	"github.com/coreos/torus"
)

// Keep says which backups of a volume stay; the rules add up. The zero Keep keeps all.
type Keep struct {
	Last    int           // so many of the newest
	Hourly  int           // the newest of each of so many hours that have one; and so on
	Daily   int           //
	Weekly  int           //
	Monthly int           //
	Within  time.Duration // all that are not older than this, as seen from the newest
	Only    bool          // what no rule keeps goes, even if there is no rule
}

func (k Keep) all() bool {
	return !k.Only && k.Last == 0 && k.Hourly == 0 && k.Daily == 0 && k.Weekly == 0 && k.Monthly == 0 && k.Within == 0
}

// split parts the backups of one volume, the oldest first, into those that stay and those that go.
func (k Keep) split(l []*Backup) (stay, gone []*Backup) {
	if k.all() {
		return l, nil
	}
	keep := map[*Backup]bool{}
	newest := slices.Clone(l)
	slices.Reverse(newest)
	for i, b := range newest {
		if i < k.Last || k.Within > 0 && newest[0].Created.Sub(b.Created) <= k.Within {
			keep[b] = true
		}
	}
	each := func(n int, of func(time.Time) string) {
		last := ""
		for _, b := range newest {
			if p := of(b.Created.UTC()); p != last && n > 0 {
				keep[b] = true
				last = p
				n--
			}
		}
	}
	each(k.Hourly, func(t time.Time) string { return t.Format("2006010215") })
	each(k.Daily, func(t time.Time) string { return t.Format("20060102") })
	each(k.Weekly, func(t time.Time) string {
		y, w := t.ISOWeek()
		return fmt.Sprint(y, w)
	})
	each(k.Monthly, func(t time.Time) string { return t.Format("200601") })
	for _, b := range l {
		if keep[b] {
			stay = append(stay, b)
		} else {
			gone = append(gone, b)
		}
	}
	return stay, gone
}

// PruneConfig says what goes.
type PruneConfig struct {
	Volume  string // empty: all
	Keep    Keep
	Backup  string // VOL@ID: this one goes, whatever Keep says
	Damaged bool   // what should be a backup but cannot be read goes as well
	DryRun  bool   // nothing goes
}

// Pruned is what went, or would go.
type Pruned struct {
	Kept, Removed []*Backup
	Objects       int
	Bytes         uint64
}

// Prune removes backups, and then every object that none of the others needs. Errors: torus.ErrLocked while somebody adds; torus.ErrCorrupt if a backup that
// stays cannot be read, so that nobody knows what it needs: then nothing goes.
func (r *Repository) Prune(ctx context.Context, cfg PruneConfig) (*Pruned, error) {
	ctx, unlock, err := r.lock(ctx, "torusctl backup prune", true)
	if err != nil {
		return nil, err
	}
	defer unlock()
	all, bad, err := r.List(ctx, "")
	if err != nil {
		return nil, err
	}
	var doomed []string
	for _, d := range bad {
		if !cfg.Damaged {
			return nil, fmt.Errorf("repository %s: %s: %w\nnothing was removed, as nobody knows what it needs; --damaged removes it", r.where, d.Object, d.Err)
		}
		doomed = append(doomed, d.Object)
	}
	res := &Pruned{}
	for len(all) > 0 {
		n := slices.IndexFunc(all, func(b *Backup) bool { return b.Volume != all[0].Volume })
		if n < 0 {
			n = len(all)
		}
		stay, gone := all[:n:n], []*Backup(nil)
		if cfg.Volume == "" || cfg.Volume == all[0].Volume {
			stay, gone = cfg.Keep.split(stay)
		}
		if i := slices.IndexFunc(stay, func(b *Backup) bool { return b.Name() == cfg.Backup }); i >= 0 {
			gone = append(gone, stay[i])
			stay = slices.Delete(slices.Clone(stay), i, i+1)
		}
		res.Kept, res.Removed = append(res.Kept, stay...), append(res.Removed, gone...)
		all = all[n:]
	}
	for _, b := range res.Removed {
		doomed = append(doomed, b.key())
	}
	needed, err := r.needed(ctx, res.Kept)
	if err != nil {
		return nil, err
	}
	remove := func(key string) error {
		if cfg.DryRun {
			return nil
		}
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if err := r.bucket.Delete(ctx, key); err != nil {
			return r.failed("delete", key, err)
		}
		return nil
	}
	for _, key := range doomed { // these first: a backup that is there is whole
		if err := remove(key); err != nil {
			return nil, err
		}
	}
	if !cfg.DryRun {
		if err := r.settle(); err != nil {
			return nil, err
		}
	}
	for _, dir := range []string{mapsDir, packsDir, backupDir, locksDir} {
		err := r.all(ctx, dir, func(o *blob.ListObject) error {
			if needed[o.Key] || (dir == backupDir || dir == locksDir) && !r.unfinished(o.Key) {
				return nil
			}
			res.Objects++
			res.Bytes += uint64(o.Size)
			return remove(o.Key)
		})
		if err != nil {
			return nil, err
		}
	}
	return res, nil
}

// needed returns the keys of the objects that backups need.
func (r *Repository) needed(ctx context.Context, l []*Backup) (map[string]bool, error) {
	z := newDecoder()
	defer z.Close()
	keys := map[string]bool{}
	for _, b := range l {
		for _, name := range b.Sections {
			if name == "" || keys[mapKey(name)] {
				continue
			}
			keys[mapKey(name)] = true
			s, err := r.section(ctx, name, z)
			if err != nil {
				if damage(err) {
					err = fmt.Errorf("%w\nnothing was removed, as nobody knows what %s needs; remove that with `torusctl backup prune %s --backup %s`", err, b.Name(), r.where, b.Name())
				}
				return nil, err
			}
			for _, f := range s.frames {
				keys[f.pack.key()] = true
			}
		}
	}
	return keys, nil
}

// Exists fails if there is no backup of a volume.
func (r *Repository) Exists(ctx context.Context, vol string) error {
	keys, err := r.keys(ctx, vol+"/")
	if err != nil || len(keys) > 0 {
		return err
	}
	if keys, err = r.keys(ctx, ""); err != nil {
		return err
	}
	for i, key := range keys {
		keys[i], _, _ = strings.Cut(strings.TrimPrefix(key, backupDir), "/")
	}
	return &torus.Error{Op: "find", Obj: "backups of volume " + vol, Err: torus.ErrNotExist, Hint: "the repository has backups of: " + strings.Join(slices.Compact(keys), ", ")}
}

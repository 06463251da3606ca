package backup_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	_ "gocloud.dev/blob/s3blob"

	"github.com/coreos/torus"
	"github.com/coreos/torus/backup"
	"github.com/coreos/torus/backup/backuptest"
	"github.com/coreos/torus/file"
)

// stores are places for repositories: a directory, and an object store behind its protocol.
func stores(t *testing.T, fn func(t *testing.T, where string)) {
	t.Run("directory", func(t *testing.T) { fn(t, filepath.Join(t.TempDir(), "new")) })
	t.Run("s3", func(t *testing.T) { fn(t, backuptest.S3(t)+"&prefix=some/where/") })
}

// Each of a row of backups of a volume that is overwritten, trimmed, compacted and grown restores as it was, also after others are gone.
func TestRow(t *testing.T) {
	stores(t, func(t *testing.T, where string) {
		r := open(t, where)
		rng := rand.New(rand.NewPCG(1, 1))
		pages := 70_000 // more than a section
		v := newVolume(pages)
		images := map[string][]byte{}
		var names []string
		for round := range 6 {
			for range 2000 {
				p := rng.IntN(pages)
				switch rng.IntN(8) {
				case 0:
					v.trim(p)
				case 1:
					if v.places[p].Block != (torus.BlockRef{}) {
						v.move(p)
					}
				default:
					v.write(p, rng)
				}
			}
			if round == 3 { // grown by what is no whole page
				v.data = append(v.data, make([]byte, 5*page+512)...)
				v.places = append(v.places, make([]file.Place, 6)...)
			}
			b := create(t, r, v)
			names = append(names, b.Name())
			images[b.Name()] = slices.Clone(v.data)
		}
		check := func() {
			t.Helper()
			for name, want := range images {
				got, err := restore(t.Context(), r, name)
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got, want) {
					t.Errorf("%s is not what was backed up", name)
				}
			}
			res, err := r.Verify(t.Context(), nil, nil)
			if err != nil || len(res.Damaged) > 0 || res.Backups != len(images) {
				t.Errorf("verify: %+v, %v", res, err)
			}
		}
		check()
		p, err := r.Prune(t.Context(), backup.PruneConfig{Backup: names[0]})
		if err != nil || len(p.Removed) != 1 || p.Objects == 0 {
			t.Fatalf("prune: %+v, %v", p, err)
		}
		delete(images, names[0])
		check()
		if p, err = r.Prune(t.Context(), backup.PruneConfig{Keep: backup.Keep{Last: 2}}); err != nil || len(p.Removed) != 3 {
			t.Fatalf("prune: %+v, %v", p, err)
		}
		for _, n := range names[1:4] {
			delete(images, n)
		}
		check()
		if p, err = r.Prune(t.Context(), backup.PruneConfig{}); err != nil || p.Objects != 0 || len(p.Removed) != 0 {
			t.Fatalf("a second prune: %+v, %v", p, err)
		}
		if p, err = r.Prune(t.Context(), backup.PruneConfig{Keep: backup.Keep{Only: true}}); err != nil || len(p.Kept) != 0 {
			t.Fatalf("prune of all: %+v, %v", p, err)
		}
	})
}

// One percent of a volume changed: less than three are moved, and little more is read.
func TestIncrement(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir)
	rng := rand.New(rand.NewPCG(2, 2))
	const pages = 16 << 10
	v := newVolume(pages)
	for p := range pages {
		v.write(p, rng)
	}
	first := create(t, r, v)
	if first.NewBytes != pages*page || first.StoredBytes > pages*page*6/10 {
		t.Errorf("the first one: %d bytes new, %d stored", first.NewBytes, first.StoredBytes)
	}
	for range pages / 100 {
		v.write(rng.IntN(pages), rng)
	}
	v.read.Store(0)
	b := create(t, r, v)
	t.Logf("1 %% changed: read %.2f %%, new %.2f %%, stored %.2f %%", percent(v.read.Load(), v), percent(int64(b.NewBytes), v), percent(int64(b.StoredBytes), v))
	if percent(v.read.Load(), v) > 1 || percent(int64(b.StoredBytes), v) > 3 {
		t.Error("too much")
	}
	// Compaction moves what has not changed: it is read, not stored.
	for p := range pages {
		v.move(p)
	}
	b = create(t, r, v)
	t.Logf("all moved: new %.2f %%, stored %.2f %%", percent(int64(b.NewBytes), v), percent(int64(b.StoredBytes), v))
	if b.NewBytes != 0 || percent(int64(b.StoredBytes), v) > 1 {
		t.Error("too much")
	}
	// Nothing has changed: nothing is read, and nothing stored.
	v.read.Store(0)
	if b = create(t, r, v); v.read.Load() != 0 || b.StoredBytes != 0 {
		t.Errorf("nothing changed: %d bytes read, %d stored", v.read.Load(), b.StoredBytes)
	}
	// Another volume of the same name in another cluster: places mean nothing, contents do.
	cfg := config
	cfg.Cluster = "other"
	v.write(17, rng)
	v.places[17] = v.places[18]
	if b, err := r.Create(t.Context(), v, cfg); err != nil || b.NewBytes != page {
		t.Errorf("another cluster: %d bytes new, %v", b.NewBytes, err)
	}
	cfg.Full = true
	if b, err := r.Create(t.Context(), v, cfg); err != nil || b.NewBytes != pages*page || b.Base != "" {
		t.Errorf("a full one: %d bytes new, %v", b.NewBytes, err)
	}
}

func percent(n int64, v *volume) float64 { return float64(n) / float64(v.Size()) * 100 }

// What a repository takes stays within a few times what its newest backup needs, however often the volume is overwritten, if the older ones go.
func TestSpace(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir)
	rng := rand.New(rand.NewPCG(3, 3))
	const pages = 8 << 10
	v := newVolume(pages)
	for p := range pages {
		v.write(p, rng)
	}
	first := create(t, r, v)
	moved := uint64(0)
	for range 40 {
		for range pages / 10 {
			v.write(rng.IntN(pages), rng)
		}
		moved += create(t, r, v).NewBytes
		if _, err := r.Prune(t.Context(), backup.PruneConfig{Keep: backup.Keep{Last: 1}}); err != nil {
			t.Fatal(err)
		}
	}
	stored := int64(0)
	for _, f := range objects(t, dir, "packs") {
		st, err := os.Stat(f)
		if err != nil {
			t.Fatal(err)
		}
		stored += st.Size()
	}
	t.Logf("%.2f times the first backup is stored; %.2f bytes moved for each that changed", float64(stored)/float64(first.StoredBytes), float64(moved)/(4*pages*page))
	if float64(stored) > 4*float64(first.StoredBytes) {
		t.Error("what nobody needs is kept")
	}
	if float64(moved) > 1.5*4*pages*page {
		t.Error("more than half as much again was moved")
	}
	if got, err := restore(t.Context(), r, "v"); err != nil || !bytes.Equal(got, v.data) {
		t.Errorf("the last one is not what was backed up: %v", err)
	}
}

// Whatever object is damaged or missing, verify names it, and no restore brings up anything but what was backed up.
func TestDamage(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir)
	rng := rand.New(rand.NewPCG(4, 4))
	const pages = 2000
	v := newVolume(pages)
	for p := range pages {
		v.write(p, rng)
	}
	create(t, r, v)
	for p := range 100 {
		v.write(p*7, rng)
	}
	b := create(t, r, v)
	all := slices.Concat(objects(t, dir, "packs"), objects(t, dir, "maps"), objects(t, dir, "backups"))
	if len(all) != 2*3 {
		t.Fatalf("%d objects", len(all))
	}
	damage := map[string]func([]byte) []byte{
		"a bit": func(x []byte) []byte { x[len(x)/3] ^= 4; return x },
		"cut":   func(x []byte) []byte { return x[:len(x)/2] },
		"empty": func([]byte) []byte { return nil },
		"gone":  nil,
		"end":   func(x []byte) []byte { x[len(x)-2] ^= 1; return x },
	}
	for _, path := range all {
		good, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		key, _ := filepath.Rel(dir, path)
		for what, do := range damage {
			t.Run(strings.Split(key, "/")[0]+" "+what, func(t *testing.T) {
				if do == nil {
					err = os.Remove(path)
				} else {
					err = os.WriteFile(path, do(slices.Clone(good)), 0o600)
				}
				if err != nil {
					t.Fatal(err)
				}
				res, err := r.Verify(t.Context(), nil, nil)
				if err != nil {
					t.Fatal(err)
				}
				found := slices.ContainsFunc(res.Damaged, func(d backup.Damage) bool { return d.Object == unescape(key) && len(d.Of) > 0 })
				if !found && !(do == nil && strings.HasPrefix(key, "backups/")) { // one that is gone is no backup
					t.Errorf("%s is damaged, and verify names %+v", key, res.Damaged)
				}
				if len(res.Damaged) > 0 && res.Error() == nil {
					t.Error("no error")
				}
				got, err := restore(t.Context(), r, b.Name())
				if err == nil && !bytes.Equal(got, v.data) {
					t.Error("something else was restored")
				}
				if err != nil && !errors.Is(err, torus.ErrCorrupt) && !errors.Is(err, torus.ErrNotExist) {
					t.Errorf("restore: %v", err)
				}
				// The next backup is sound as far as it is told: one that shares nothing is in any case.
				cfg := config
				cfg.Full = true
				full, err := r.Create(t.Context(), v, cfg)
				if err != nil {
					t.Fatal(err)
				}
				if got, err := restore(t.Context(), r, full.Name()); err != nil || !bytes.Equal(got, v.data) {
					t.Errorf("a full backup beside the damage: %v", err)
				}
				if !strings.HasPrefix(key, "packs/") { // these nobody looks at
					inc, err := r.Create(t.Context(), v, config)
					if err != nil {
						t.Fatal(err)
					}
					if got, err := restore(t.Context(), r, inc.Name()); err != nil || !bytes.Equal(got, v.data) {
						t.Errorf("a backup after the damage: %v", err)
					}
					remove(t, dir, inc)
				}
				remove(t, dir, full)
				if err := os.WriteFile(path, good, 0o600); err != nil {
					t.Fatal(err)
				}
			})
		}
	}
	if res, err := r.Verify(t.Context(), nil, nil); err != nil || len(res.Damaged) > 0 {
		t.Errorf("mended: %+v, %v", res, err)
	}
}

// remove takes a backup away; what it needed stays.
func remove(t *testing.T, dir string, b *backup.Backup) {
	t.Helper()
	if err := os.Remove(filepath.Join(dir, "backups", b.Volume, b.ID)); err != nil {
		t.Fatal(err)
	}
}

// unescape is the key of an object by its path: none of ours has characters that file systems do not take.
func unescape(path string) string { return filepath.ToSlash(path) }

// A damaged section, or backup, keeps prune from removing anything, until it is told to.
func TestPruneBesideDamage(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir)
	rng := rand.New(rand.NewPCG(5, 5))
	v := newVolume(100)
	var l []*backup.Backup
	for range 3 {
		v.write(rng.IntN(100), rng)
		l = append(l, create(t, r, v))
	}
	before := len(objects(t, dir, "packs"))
	path := filepath.Join(dir, "maps", l[1].Sections[0][:2], l[1].Sections[0])
	if err := os.WriteFile(path, []byte("?"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Prune(t.Context(), backup.PruneConfig{Keep: backup.Keep{Last: 2}}); !errors.Is(err, torus.ErrCorrupt) || !strings.Contains(err.Error(), l[1].Name()) {
		t.Errorf("prune beside a damaged section: %v", err)
	}
	if n := len(objects(t, dir, "packs")); n != before {
		t.Errorf("%d packs of %d are left", n, before)
	}
	if _, err := r.Prune(t.Context(), backup.PruneConfig{Backup: l[1].Name()}); err != nil {
		t.Errorf("the damaged one cannot be removed: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "backups", "v", l[0].ID), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Prune(t.Context(), backup.PruneConfig{}); !errors.Is(err, torus.ErrCorrupt) {
		t.Errorf("prune beside a damaged backup: %v", err)
	}
	if p, err := r.Prune(t.Context(), backup.PruneConfig{Damaged: true}); err != nil || len(p.Kept) != 1 {
		t.Errorf("prune of the damaged: %+v, %v", p, err)
	}
	if got, err := restore(t.Context(), r, "v"); err != nil || !bytes.Equal(got, v.data) {
		t.Errorf("what is left: %v", err)
	}
}

// A backup that is cut off leaves none; what it has left goes with the next prune; and nobody prunes while one is made.
func TestInterrupted(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir)
	rng := rand.New(rand.NewPCG(6, 6))
	v := newVolume(100_000)
	for p := range 20_000 {
		v.write(p, rng)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cfg := config
	var pruned error
	cfg.Progress = func(at, moved uint64) {
		_, pruned = r.Prune(t.Context(), backup.PruneConfig{})
		cancel()
	}
	if _, err := r.Create(ctx, v, cfg); !errors.Is(err, context.Canceled) {
		t.Fatalf("create: %v", err)
	}
	if !errors.Is(pruned, torus.ErrLocked) {
		t.Errorf("prune while a backup is made: %v", pruned)
	}
	v.fail = errors.New("no such luck")
	if _, err := r.Create(t.Context(), v, config); !errors.Is(err, v.fail) {
		t.Fatalf("create: %v", err)
	}
	v.fail = nil
	if l, bad, err := r.List(t.Context(), ""); len(l)+len(bad) > 0 || err != nil {
		t.Errorf("there are backups: %v %v %v", l, bad, err)
	}
	if len(objects(t, dir, "packs")) == 0 {
		t.Fatal("nothing was stored before it was cut off")
	}
	// What is half written has another name.
	half := filepath.Join(dir, "backups", "v", "20260101-000000.000-0000.1a2b.tmp")
	if err := errors.Join(os.MkdirAll(filepath.Dir(half), 0o700), os.WriteFile(half, []byte("{"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if l, bad, err := r.List(t.Context(), "v"); len(l)+len(bad) > 0 || err != nil {
		t.Errorf("there are backups: %v %v %v", l, bad, err)
	}
	p, err := r.Prune(t.Context(), backup.PruneConfig{})
	if err != nil || p.Objects == 0 || len(objects(t, dir, "packs")) > 0 || len(objects(t, dir, "locks")) > 0 || len(objects(t, dir, "backups")) > 0 {
		t.Errorf("prune: %+v, %v", p, err)
	}
}

// The lock of a process that died beside us is in nobody's way; that of one elsewhere is, until it is stale.
func TestDeadLock(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir)
	v := newVolume(1)
	cfg := config
	var lock []byte
	cfg.Progress = func(uint64, uint64) {
		var err error
		if lock, err = os.ReadFile(objects(t, dir, "locks")[0]); err != nil {
			t.Error(err)
		}
	}
	if _, err := r.Create(t.Context(), v, cfg); err != nil {
		t.Fatal(err)
	}
	var h map[string]any
	if err := json.Unmarshal(lock, &h); err != nil || h["kernel"] == "" || h["started"] == "" {
		t.Fatalf("%s: %v", lock, err)
	}
	left := filepath.Join(dir, "locks", "shared-1")
	leave := func(key string, value any) {
		t.Helper()
		changed := maps.Clone(h)
		changed[key] = value
		b, err := json.Marshal(changed)
		if err == nil {
			err = os.WriteFile(left, b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, x := range []struct {
		key   string
		value any
		want  error
	}{
		{"pid", 1 << 30, nil},            // no such process
		{"started", "1", nil},            // another one has its number
		{"what", "a", torus.ErrLocked},   // it is this one, alive
		{"kernel", "b", torus.ErrLocked}, // somewhere else
	} {
		leave(x.key, x.value)
		if _, err := r.Prune(t.Context(), backup.PruneConfig{}); !errors.Is(err, x.want) {
			t.Errorf("%s %v: %v", x.key, x.value, err)
		}
	}
	old := time.Now().Add(-time.Hour)
	if err := os.Chtimes(left, old, old); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Prune(t.Context(), backup.PruneConfig{}); err != nil {
		t.Errorf("a stale lock: %v", err)
	}
}

func TestKeep(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir)
	v := newVolume(1)
	var l []*backup.Backup
	for range 5 {
		l = append(l, create(t, r, v))
	}
	p, err := r.Prune(t.Context(), backup.PruneConfig{Keep: backup.Keep{Daily: 3}, DryRun: true})
	if err != nil || len(p.Kept) < 1 || len(p.Kept) > 2 || p.Kept[len(p.Kept)-1].ID != l[4].ID { // two if it is midnight
		t.Errorf("one a day: %+v, %v", p, err)
	}
	if p, err = r.Prune(t.Context(), backup.PruneConfig{Keep: backup.Keep{Within: time.Hour}, Volume: "v"}); err != nil || len(p.Removed) != 0 {
		t.Errorf("of the last hour: %+v, %v", p, err)
	}
	if p, err = r.Prune(t.Context(), backup.PruneConfig{Keep: backup.Keep{Last: 1}, Volume: "other"}); err != nil || len(p.Removed) != 0 {
		t.Errorf("of another volume: %+v, %v", p, err)
	}
	if b, err := r.Find(t.Context(), "v"); err != nil || b.ID != l[4].ID {
		t.Errorf("the newest: %+v, %v", b, err)
	}
	if _, err := r.Find(t.Context(), "v@2"); !errors.Is(err, torus.ErrInvalid) {
		t.Errorf("any of five: %v", err)
	}
	if _, err := r.Find(t.Context(), "w"); !errors.Is(err, torus.ErrNotExist) {
		t.Errorf("of no such volume: %v", err)
	}
}

func TestOpenErrors(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "mine"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for where, want := range map[string]error{
		dir:                                 torus.ErrInvalid,
		filepath.Join(dir, "mine"):          nil,
		"nosuch://bucket":                   nil,
		filepath.Join(dir, "mine", "below"): nil,
	} {
		r, err := backup.Open(t.Context(), where, true)
		if err == nil || want != nil && !errors.Is(err, want) {
			t.Errorf("%s: %v", where, err)
		}
		if err == nil {
			r.Close()
		}
	}
	missing := filepath.Join(t.TempDir(), "none")
	if _, err := backup.Open(t.Context(), missing, false); !errors.Is(err, torus.ErrNotExist) {
		t.Errorf("a repository that is not there: %v", err)
	}
	if _, err := os.Stat(missing); err == nil {
		t.Error("it was made")
	}
	newer := t.TempDir()
	if err := os.WriteFile(filepath.Join(newer, "torus-backups"), []byte(`{"format":2}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := backup.Open(t.Context(), newer, true); err == nil || !strings.Contains(err.Error(), "newer version") {
		t.Errorf("a newer format: %v", err)
	}
}

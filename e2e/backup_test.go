package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/coreos/torus/e2e/nbdclient"
)

// Backups of a volume that is being written: each restores to a prefix of the writes with all that were acknowledged before it (C1, W1), by
// whatever way it is read, and after others were killed half way and pruned.
func TestBackups(t *testing.T) {
	c := sharedCluster(t)
	const volume, again = "backedup", "restored"
	c.ctl(t, "volume", "create-block", volume, "128MiB")
	c.forget(t, volume, again)
	b := c.newBlk(t)
	conn := dial(t, b.export(volume), startLimit)
	w := newStamper(72, 0, 4096, 16)
	w.pace = time.Millisecond
	dir := tempDir(t)
	repo := filepath.Join(dir, "repository")
	load := startFio(t, b.export(volume), "64m", "32m", "4m,4m")
	stop := w.start(conn)
	var all []*taken
	var names []string
	killed := 0
	for i := range rounds(t, 6, 30) {
		if i%3 == 2 {
			p := newProcess(dir, fmt.Sprint("killed", i), c.torusctl, "-C", c.etcdURL, "backup", "create", volume, repo, "--full")
			p.start(t)
			time.Sleep(time.Duration(i*40) * time.Millisecond)
			if p.alive() {
				killed++
			}
			p.kill()
		}
		x := &taken{}
		_, x.least, _ = w.counts()
		began := time.Now()
		var made struct {
			Name        string
			NewBytes    uint64 `json:"new_bytes"`
			StoredBytes uint64 `json:"stored_bytes"`
		}
		if err := c.json(t.Context(), &made, "backup", "create", volume, repo); err != nil {
			t.Fatal(err)
		}
		x.top, _, _ = w.counts()
		x.name = made.Name
		all, names = append(all, x), append(names, made.Name)
		t.Logf("BACKUP %s: %v, %d bytes new, %d stored", made.Name, time.Since(began).Round(time.Millisecond), made.NewBytes, made.StoredBytes)
	}
	if killed == 0 {
		t.Error("no backup was killed")
	}
	load.stop()
	if err := stop(); err != nil {
		t.Error(err)
	}
	conn.Close()

	serve := newProcess(dir, "serve", c.torusctl, "backup", "serve", repo, "-l", "unix:"+filepath.Join(dir, "s"))
	serve.start(t)
	t.Cleanup(serve.kill)
	look := func(i int) {
		t.Helper()
		x, out := all[i], filepath.Join(dir, "image")
		defer os.Remove(out) //nolint:errcheck // a temporary file
		if i%2 == 0 {
			c.ctl(t, "backup", "restore", "--file", repo, x.name, out)
		} else {
			export := nbdclient.Unix(filepath.Join(dir, "s"), x.name)
			dial(t, export, startLimit).Close()
			tool(t, "nbdcopy", export.URI(), out)
		}
		x.mustFit(t, w, w.region(t, out))
	}
	for i := range all {
		look(i)
	}
	last := len(all) - 1
	c.ctl(t, "backup", "prune", repo, "--keep", "3") // one that was killed may have been through; the locks of the others are in nobody's way
	for i := last - 1; i <= last; i++ {
		look(i)
	}
	c.ctl(t, "backup", "verify", repo)
	c.ctl(t, "backup", "restore", repo, names[last], again)
	out := filepath.Join(dir, "again")
	tool(t, "nbdcopy", b.export(again).URI(), out)
	want := filepath.Join(dir, "want")
	c.ctl(t, "backup", "restore", "--file", repo, names[last], want)
	sameFile(t, want, out)
	serve.interrupt(t, syscall.SIGTERM, startLimit)
}

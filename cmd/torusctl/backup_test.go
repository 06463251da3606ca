package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/coreos/torus/backup"
	"github.com/coreos/torus/backup/backuptest"
	"github.com/coreos/torus/cmd/internal/clitest"
	"github.com/coreos/torus/e2e/nbdclient"
)

// Backups of a volume in use, by the commands: each restores as the volume was, moves what is new, and is found out when damaged.
func TestBackupCommands(t *testing.T) {
	c := newDevCluster(t)
	dir := filepath.Join(c.dir, "backups")
	const size = 64 << 20
	want := make([]byte, size)
	copy(want[1<<20:], random(1, 16<<20))
	copy(want[60<<20:], random(2, 4<<20))
	c.run("volume", "create-block", "v", "64MiB").CheckSuccess(t)
	n := c.dial(t, "v")
	for off := 0; off < size; off += 1 << 20 {
		if p := want[off:][:1<<20]; !bytes.Equal(p, make([]byte, 1<<20)) {
			c.write(t, n, p, uint64(off))
		}
	}
	var b backupJSON
	c.json(t, &b, "backup", "create", "v", dir)
	if b.NewBytes != 20<<20 || b.DataBytes != 20<<20 || b.StoredBytes < 20<<20 || b.StoredBytes > 21<<20 || b.SizeBytes != size {
		t.Errorf("the first backup: %+v", b)
	}
	first := bytes.Clone(want)
	for i := range 51 { // 1 %
		copy(want[1<<20+i*80*4096:][:4096], random(uint64(10+i), 4096))
		c.write(t, n, want[1<<20+i*80*4096:][:4096], uint64(1<<20+i*80*4096))
	}
	c.run("backup", "create", "v", dir, "-p").CheckSuccess(t, "20.0 MiB, of which 204.0 KiB is new")
	c.run("block", "snapshot", "list", "v").CheckSuccess(t)
	if out := c.run("block", "snapshot", "list", "v", "--csv").Stdout; strings.Count(out, "\n") != 1 {
		t.Errorf("a snapshot was left behind:\n%s", out)
	}
	c.write(t, n, make([]byte, 4096), 1<<20) // not in either
	c.run("block", "snapshot", "create", "v@s").CheckSuccess(t)
	var third backupJSON
	c.json(t, &third, "backup", "create", "v@s", dir)
	if third.Snapshot != "s" || third.NewBytes != 0 || third.DataBytes != 20<<20-4096 {
		t.Errorf("a backup of a snapshot: %+v", third)
	}

	var l []backupJSON
	c.json(t, &l, "backup", "list", dir, "v")
	if len(l) != 3 || l[0].ID != b.ID || l[1].Base != b.ID || l[1].ReadBytes != 51*4096 || l[1].StoredBytes > 1<<20 {
		t.Fatalf("%+v", l)
	}

	// To a volume, to a file, to standard output; the last two without a cluster.
	c.run("backup", "restore", dir, l[0].Name, "was").CheckSuccess(t, "64.0 MiB")
	c.reads(t, "was", first)
	c.run("backup", "restore", dir, l[1].Name, "v").CheckFailure(t, "already exists")
	alone := &cluster{Cluster: &clitest.Cluster{Etcd: "127.0.0.1:1"}} // where nobody listens
	out := filepath.Join(c.dir, "out")
	alone.run("backup", "restore", dir, l[1].Name, out, "--file").CheckSuccess(t, "64.0 MiB")
	if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the file is not what was backed up: %v", err)
	}
	alone.run("backup", "restore", dir, l[1].Name, out, "--file").CheckFailure(t, "already exists")
	if got := alone.run("backup", "restore", dir, l[0].Name, "-", "--file").Stdout; got != string(first) {
		t.Errorf("to standard output: %d bytes", len(got))
	}

	// Served in place.
	sock := filepath.Join(c.dir, "b")
	served := make(chan clitest.Result, 1)
	go func() { served <- alone.run("backup", "serve", dir, "-l", "unix:"+sock) }()
	for name, want := range map[string][]byte{l[0].Name: first, l[1].Name: want} {
		n, err := nbdclient.Unix(sock, name).DialUntil(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, size)
		for off := 0; off < size; off += 4 << 20 {
			if err := n.ReadAt(got[off:][:4<<20], uint64(off)); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s as it is served is not what was backed up", name)
		}
		if err := n.ReadAt(got[:700], 61<<20+4000); err != nil || !bytes.Equal(got[:700], want[61<<20+4000:][:700]) {
			t.Errorf("a part of two pages: %v", err)
		}
		if n.WriteAt(got[:4096], 0, 0) == nil {
			t.Error("a backup was written to")
		}
		n.Close()
	}
	if err := syscall.Kill(os.Getpid(), syscall.SIGTERM); err != nil { // as it is stopped; nobody else here waits for one
		t.Fatal(err)
	}
	r := <-served
	r.CheckSuccess(t, "unix:"+sock)

	// Damaged.
	alone.run("backup", "verify", dir).CheckSuccess(t, "3 backups", "all as they were written")
	var packs []string
	for _, p := range glob(t, dir, "packs/*/*") {
		if st, err := os.Stat(p); err == nil && st.Size() > 1<<20 {
			packs = append(packs, p)
		}
	}
	pack, err := os.ReadFile(packs[0])
	if err != nil {
		t.Fatal(err)
	}
	pack[len(pack)/2] ^= 1
	if err := os.WriteFile(packs[0], pack, 0o600); err != nil {
		t.Fatal(err)
	}
	key, _ := filepath.Rel(dir, packs[0])
	var v struct{ Damaged []damageJSON }
	if r = alone.run("backup", "verify", dir, "-o", "json"); r.Status != 1 || !strings.Contains(r.Stderr, key) {
		t.Errorf("verify: status %d\n%s", r.Status, r.Stderr)
	}
	if err := json.Unmarshal([]byte(r.Stdout), &v); err != nil || len(v.Damaged) != 1 || v.Damaged[0].Object != key || len(v.Damaged[0].Backups) != 3 {
		t.Errorf("%v\n%s", err, r.Stdout)
	}
	if r = alone.run("backup", "verify", dir); r.Status != 1 || !strings.Contains(r.Stdout, key) {
		t.Errorf("verify: status %d\n%s", r.Status, r.Stdout)
	}
	c.run("backup", "restore", dir, l[0].Name, "bad").CheckFailure(t, key, "checksum mismatch")
	c.run("volume", "info", "bad").CheckFailure(t, "does not exist")
	var full backupJSON
	c.json(t, &full, "backup", "create", "v", dir, "--full")
	alone.run("backup", "verify", dir, "v").CheckSuccess(t, "1 backups")
	alone.run("backup", "prune", dir, "v", "--keep", "1").CheckSuccess(t, "3 of 4 backups", "removed")
	alone.run("backup", "verify", dir).CheckSuccess(t, "1 backups")
	c.run("backup", "restore", dir, "v", "again").CheckSuccess(t)
	copy(want[1<<20:], make([]byte, 4096))
	c.reads(t, "again", want)

	// The same in an object store.
	store := backuptest.S3(t)
	c.run("backup", "create", "v", store).CheckSuccess(t)
	c.run("backup", "create", "v", store).CheckSuccess(t, "of which 0 B is new")
	alone.run("backup", "verify", store).CheckSuccess(t, "2 backups")
	c.run("backup", "restore", store, "v", "cloud").CheckSuccess(t)
	c.reads(t, "cloud", want)
	c.released(t, n, "v")
}

func glob(t *testing.T, dir, pattern string) []string {
	t.Helper()
	l, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil || len(l) == 0 {
		t.Fatalf("%s: %v, %v", pattern, l, err)
	}
	return l
}

// What cannot be done is said so, with the next step.
func TestBackupRefusals(t *testing.T) {
	c := initCluster(t)
	dir := t.TempDir()
	r, err := backup.Open(t.Context(), dir, true)
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	c.run("volume", "create-block", "v", "1MiB").CheckSuccess(t)
	for line, want := range map[string][]string{
		"backup create none " + dir:                {"none", "does not exist", "torusctl volume list"},
		"backup create v@t " + dir:                 {"v@t", "does not exist"},
		"backup create v /proc/none":               {"/proc/none"},
		"backup create v nosuch://b":               {"nosuch"},
		"backup create v /etc":                     {"/etc", "not empty"},
		"backup list /nowhere":                     {"/nowhere", "torusctl backup create"},
		"backup list " + dir + " none":             {"none", "does not exist"},
		"backup verify /nowhere":                   {"/nowhere"},
		"backup verify " + dir + " v@1":            {"v@1", "torusctl backup list"},
		"backup restore " + dir + " v new":         {"v", "torusctl backup list"},
		"backup restore " + dir + " @1 new":        {"VOLUME@ID"},
		"backup prune " + dir + " none":            {"none"},
		"backup prune " + dir + " --keep -1":       {"negative"},
		"backup prune " + dir + " --keep-within x": {`"x"`},
		"backup prune " + dir + " --backup v@1":    {"v@1", "torusctl backup list"},
		"backup serve " + dir + " -l nowhere":      {"nowhere"},
		"backup serve /nowhere":                    {"/nowhere"},
	} {
		t.Run(line, func(t *testing.T) { c.run(strings.Fields(line)...).CheckFailure(t, want...) })
	}
}

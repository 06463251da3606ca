package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/coreos/torus"
	"github.com/coreos/torus/file"
)

// flipOnDisk changes a bit in every copy of a page below a directory. It returns how many were found.
func flipOnDisk(t *testing.T, dir string, page []byte) (found int) {
	t.Helper()
	var files []string
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && strings.HasPrefix(d.Name(), "slots-") {
			files = append(files, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 1<<20)
		for off := int64(0); ; off += int64(len(b)) {
			n, err := f.ReadAt(b, off)
			for i := 0; i+4096 <= n; i += 4096 {
				if !bytes.Equal(b[i:i+64], page[:64]) {
					continue
				}
				found++
				if _, err := f.WriteAt([]byte{b[i+100] ^ 1}, off+int64(i)+100); err != nil {
					t.Fatal(err)
				}
			}
			if err != nil {
				break
			}
		}
		f.Close()
	}
	return found
}

func (c *devCluster) fsck(t *testing.T, status int, args ...string) (v fsckJSON) {
	t.Helper()
	r := c.run(append([]string{"-o", "json", "fsck"}, args...)...)
	if r.Status != status {
		t.Fatalf("status %d, want %d\n%s%s", r.Status, status, r.Stdout, r.Stderr)
	}
	if err := json.Unmarshal([]byte(r.Stdout), &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// fsck says what is wrong with a volume, while it is attached and when it is not, by words and by its exit status; --repair mends what has a good copy, and
// nothing else is touched (D1, D3).
func TestFsckCommand(t *testing.T) {
	c := newDevCluster(t)
	data := random(1, 4<<20)
	c.run("volume", "create-block", "v", "64MiB").CheckSuccess(t)
	c.run("fsck", "v").CheckSuccess(t, "nothing has been committed yet")
	n := c.dial(t, "v")
	for off := 0; off < len(data); off += 1 << 20 {
		c.write(t, n, data[off:off+1<<20], uint64(off))
	}
	c.run("block", "snapshot", "create", "v@s").CheckSuccess(t)
	for v := (volumeJSON{}); v.Checkpoint == nil; {
		c.json(t, &v, "volume", "info", "v")
	}
	c.run("fsck", "v").CheckSuccess(t, "nothing is wrong", "attached by")
	c.released(t, n, "v")
	v := c.fsck(t, 0, "v")
	if v.Status != "ok" || v.BlocksChecked == 0 || v.CopiesChecked != 2*v.BlocksChecked || v.PagesChecked != 1024 || len(v.Findings) > 0 || v.Left > 0 {
		t.Fatalf("%+v", v)
	}
	c.run("fsck", "v@s", "--rate", "1GiB", "-p").CheckSuccess(t, "nothing is wrong")
	c.run("fsck", "w").CheckFailure(t, "volume w", "no such device")
	c.run("fsck", "v@t").CheckFailure(t, `"t"`, "no such device")

	page := data[777*4096:][:4096]
	// Damage at one peer. It reads all that it has soon after its start, once: if that is faster, the page is whole again, elsewhere, and damaged once more.
	peers := glob(t, filepath.Join(c.dir, "data"), "*")
	sick := slices.IndexFunc(peers, func(dir string) bool { return flipOnDisk(t, dir, page) > 0 })
	asJSON, r := c.run("-o", "json", "fsck", "v"), c.run("fsck", "v")
	for try := 0; (asJSON.Status == 0 || r.Status == 0) && try < 2; try++ {
		flipOnDisk(t, peers[sick], page)
		asJSON, r = c.run("-o", "json", "fsck", "v"), c.run("fsck", "v")
	}
	v = fsckJSON{}
	if err := json.Unmarshal([]byte(asJSON.Stdout), &v); err != nil {
		t.Fatal(err)
	}
	if v.Status != "damaged" || v.Left != 1 || len(v.Findings) != 1 {
		t.Fatalf("%+v", v)
	}
	f := v.Findings[0]
	if f.Kind != string(file.FindDamaged) || f.Block == "" || f.Peer == nil || f.Peer.Address == "" || len(f.Good) != 1 || f.Good[0].UUID == f.Peer.UUID || !f.Mendable || f.Mended || len(f.Lost) > 0 {
		t.Fatalf("%+v", f)
	}
	for _, want := range []string{f.Block, f.Peer.UUID[:8], "a good copy is on", "torusctl fsck --repair v"} {
		if !strings.Contains(r.Stdout, want) {
			t.Errorf("does not say %q:\n%s", want, r.Stdout)
		}
	}
	if r.Status != 1 || !strings.Contains(r.Stderr, "1 finding") {
		t.Errorf("status %d: %s", r.Status, r.Stderr)
	}
	mended := c.run("fsck", "--repair", "v")
	for try := 0; strings.Contains(mended.Stdout, "nothing is wrong") && try < 2; try++ { // the peer has been faster
		flipOnDisk(t, peers[sick], page)
		mended = c.run("fsck", "--repair", "v")
	}
	mended.CheckSuccess(t, "mended from")
	c.run("fsck", "v").CheckSuccess(t, "nothing is wrong")
	c.reads(t, "v", data)

	if n := flipOnDisk(t, c.dir, page); n < 2 {
		t.Fatalf("%d copies of a page are on disks", n)
	}
	v = c.fsck(t, 1, "--repair", "v")
	if len(v.Findings) != 1 || v.Findings[0].Kind != string(file.FindLost) || v.Findings[0].Mendable || v.Left != 1 {
		t.Fatalf("%+v", v)
	}
	if want := []fsckLost{{"v", 777, 1}, {"v@s", 777, 1}}; !slices.Equal(v.Findings[0].Lost, want) {
		t.Fatalf("%+v", v.Findings[0].Lost)
	}
	r = c.run("fsck", "v@s")
	if r.Status != 1 || !strings.Contains(r.Stdout, "no good copy: page 777 of v@s lost") {
		t.Errorf("status %d: %s", r.Status, r.Stdout)
	}
	n = c.dial(t, "v")
	c.write(t, n, page, 777*4096)
	c.released(t, n, "v")
	r = c.run("fsck", "v")
	if r.Status != 1 || !strings.Contains(r.Stdout, "no good copy: page 777 of v@s lost") {
		t.Errorf("what was written anew is there: status %d: %s", r.Status, r.Stdout)
	}
}

// What a finding means is said for every kind.
func TestFsckMeanings(t *testing.T) {
	for _, kind := range []file.FindingKind{
		file.FindMissing, file.FindShort, file.FindDamaged, file.FindFewer, file.FindDiffer, file.FindLost, file.FindUnknown, file.FindINode, file.FindMap,
		file.FindEntry, file.FindLostPages, file.FindLive, file.FindLog, file.FindMoment,
	} {
		x := file.Finding{Kind: kind, Good: torus.PeerList{{1}}}
		f := fsckFinding{Mendable: x.Mendable(), Good: []fsckPeer{{UUID: "1", Address: "tdp://h:1"}}, Lost: []fsckLost{{"v", 5, 2}, {"v", 9, 1}, {"v@s", 5, 2}}}
		if f.meaning(kind, "v", false) == "" {
			t.Errorf("%s means nothing", kind)
		}
	}
	f := fsckFinding{Lost: []fsckLost{{"v", 5, 2}, {"v", 9, 1}, {"v@s", 5, 2}}}
	if got := f.pages(); got != "pages 5-6, 9 of v and pages 5-6 of v@s " {
		t.Errorf("%q", got)
	}
}

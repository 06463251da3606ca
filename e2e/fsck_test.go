package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

type fsckJSON struct {
	Status    string
	Left      uint64 `json:"findings_left"`
	Copies    uint64 `json:"copies_checked"`
	Unchecked uint64 `json:"copies_unchecked"`
	Findings  []struct {
		Kind, Block string
		Peer        struct{ UUID string }
		Good        []struct{ UUID string }
		Mended      bool
	}
}

// fsck checks a volume; its exit status says whether all is well.
func (c *cluster) fsck(t *testing.T, well bool, args ...string) (v fsckJSON) {
	t.Helper()
	out, err := c.tryCtl(t.Context(), append([]string{"-o", "json", "fsck"}, args...)...)
	if (err == nil) != well {
		t.Fatalf("fsck %v: %v\n%s", args, err, out)
	}
	if i := strings.IndexByte(out, '{'); i >= 0 {
		out = out[i:]
	}
	if err := json.NewDecoder(strings.NewReader(out)).Decode(&v); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return v
}

// scrubbed asks a peer whether it has read all its blocks once.
func (c *cluster) scrubbed(ctx context.Context, p *peer) error {
	page, err := c.get(ctx, "http://"+p.http+"/metrics")
	if err == nil && (!strings.Contains(page, "\ntorus_scrub_rounds_total ") || strings.Contains(page, "\ntorus_scrub_rounds_total 0\n")) {
		err = errors.New("it has not scrubbed")
	}
	return err
}

// What has rotted on the disk of one peer is named by fsck, block and peer, while the volume is in use; --repair has it mended; and a peer that is down is no
// damage (D1).
func TestFsck(t *testing.T) {
	const pages = 4096
	c := ownCluster(t)
	volume, in, img, b := c.filledVolume(t, pages, 9)
	whole := c.fsck(t, true, volume)
	if whole.Status != "ok" || whole.Copies == 0 || len(whole.Findings) > 0 {
		t.Fatalf("%+v", whole)
	}

	// Any of the three may have nothing of what is to be damaged, once in 81 times.
	chosen := func(page uint64) bool { return page%256 == 3 }
	var sick *peer
	copies := 0
	for _, p := range c.peers {
		n := 0
		for _, f := range slotFiles(t, c.peerDir(p.name)) {
			flipBytes(t, f, in, func(page uint64) bool {
				if chosen(page) {
					n++
				}
				return false
			})
		}
		if copies += n; n > 0 && sick == nil {
			sick = p
		}
	}
	if copies < 2*pages/256 {
		t.Fatalf("%d pages found on the peers' disks, %d of two copies each were written", copies, pages/256)
	}
	eventually(t, startLimit, "the first scrub is over, and the next is due in a day", func() error { return c.scrubbed(t.Context(), sick) })
	flipped := 0
	for _, f := range slotFiles(t, c.peerDir(sick.name)) {
		flipped += flipBytes(t, f, in, chosen)
	}
	if flipped == 0 {
		t.Fatal("nothing was flipped")
	}
	b.serve(t)
	conn := dial(t, b.export(volume), startLimit) // the volume is in use
	defer conn.Close()
	found := c.fsck(t, false, volume)
	uuid := ""
	for _, f := range found.Findings {
		if f.Kind != "damaged" || f.Mended || len(f.Good) != 1 || f.Good[0].UUID == f.Peer.UUID || uuid != "" && f.Peer.UUID != uuid {
			t.Fatalf("%+v", found)
		}
		uuid = f.Peer.UUID
	}
	if n := len(found.Findings); n == 0 || n > flipped || found.Status != "damaged" {
		t.Fatalf("%d pages were flipped on one peer: %+v", flipped, found)
	}
	began := time.Now()
	mended := c.fsck(t, true, "--repair", volume)
	if mended.Status != "mended" || mended.Left != 0 {
		t.Fatalf("%+v", mended)
	}
	t.Logf("FSCK %d blocks of %d copies mended in %v", len(mended.Findings), whole.Copies, time.Since(began).Round(time.Millisecond))
	if again := c.fsck(t, true, volume); again.Status != "ok" || again.Unchecked != 0 {
		t.Fatalf("%+v", again)
	}
	sick.kill()
	down := c.fsck(t, false, volume)
	if down.Status != "incomplete" || down.Left != 0 || down.Unchecked == 0 || down.Copies == 0 {
		t.Fatalf("a peer is down: %+v", down)
	}
	sick.start(t)
	c.waitHealthy(t, startLimit)
	out := filepath.Join(c.dir, "out")
	tool(t, "nbdcopy", b.export(volume).URI(), out)
	if err := sameBytes(out, img); err != nil {
		t.Error(err)
	}
}

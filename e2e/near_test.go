package e2e

import (
	"os"
	"regexp"
	"strconv"
	"testing"
	"time"
)

// dropCaches has the machine read from its disks again.
func dropCaches(t *testing.T) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
}

var directReads = regexp.MustCompile(`(?m)^torus_distributor_direct_reads_total (\d+)$`)

// Who reads the files of the peers himself, as they are on his machine, reads what they would have told him (D1), while they are killed and stopped, and while compaction
// has blocks come and go under his feet; and is kept waiting by none of that.
func TestDirectReads(t *testing.T) {
	c := ownCluster(t)
	volume := c.newVolume(t, "256MiB")
	http := freePort(t)
	b := c.newBlk(t, "--utilisation", "0.7", "--http", http)
	read := func() int {
		t.Helper()
		page, err := c.get(t.Context(), "http://"+http+"/metrics")
		if err != nil {
			t.Fatal(err)
		}
		m := directReads.FindStringSubmatch(page)
		if m == nil {
			t.Fatalf("no count of direct reads in\n%s", page)
		}
		n, err := strconv.Atoi(m[1])
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	fill := dial(t, b.export(volume), startLimit)
	w := newStamper(7, 0, 4096, 16)
	w.runFor(t, fill, time.Second)
	w.flush(t, fill)
	load := startFio(t, b.export(volume), "64m", "32m", "24m,24m")
	s := startStream(t, b.export(volume), 32<<8, 1024, time.Millisecond)
	time.Sleep(time.Second)
	s.look()
	files := func() int {
		t.Helper()
		all, err := os.ReadDir("/proc/" + strconv.Itoa(b.pid()) + "/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(all)
	}
	before := files()
	for i := range rounds(t, 6, 60) {
		direct, p, what := read(), c.peers[i%3], "killed"
		if i%2 == 0 {
			p.kill()
			p.start(t) // at once, so that it may use its slots again soon
		} else {
			what = "stopped"
			p.freeze()
			time.Sleep(500 * time.Millisecond)
			dropCaches(t)
			time.Sleep(1500 * time.Millisecond)
			p.thaw()
		}
		dropCaches(t)
		c.waitHealthy(t, 30*time.Second)
		time.Sleep(time.Second)
		x := s.look()
		t.Logf("%s %s: %v; %d direct reads", p.name, what, x, read()-direct)
		if x.own() > 3*time.Second {
			t.Errorf("a %s peer stalled I/O for %v beyond what the machine did", what, x.own())
		}
		if read() == direct {
			t.Error("nothing was read past a peer")
		}
		if !s.running(nil) {
			break
		}
	}
	if err := s.end(); err != nil {
		t.Errorf("I/O error: %v", err)
	}
	load.stop()
	if load.runs.Load() == 0 {
		t.Error("no run of fio was finished")
	}
	w.mustEqual(t, fill)
	if after := files(); after > before+10 {
		t.Errorf("torusblk had %d descriptors open, and has %d", before, after)
	}
}

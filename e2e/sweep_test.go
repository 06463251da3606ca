package e2e

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/coreos/torus/e2e/nbdclient"
)

// sweepLimit is how long peers may take to give space back: a pass is a minute, and finds what was deleted just behind the last one.
const sweepLimit = 150 * time.Second

// used is what all peers say that they have stored.
func (c *cluster) used(t testing.TB) (n uint64) {
	t.Helper()
	peers, err := c.peerList(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range peers {
		n += p.UsedBytes
	}
	return n
}

func (c *cluster) waitUsed(t testing.TB, what string, most uint64) {
	t.Helper()
	before := c.used(t)
	took := eventually(t, sweepLimit, what, func() error {
		if n := c.used(t); n > most {
			time.Sleep(500 * time.Millisecond)
			return fmt.Errorf("the peers use %d MiB, more than %d", n>>20, most>>20)
		}
		return nil
	})
	t.Logf("SWEEP %s: from %d to %d MiB in %v", what, before>>20, c.used(t)>>20, took.Round(time.Second))
}

// fillMiB writes n MiB of contents that follow from mark, and flushes.
func fillMiB(t testing.TB, conn *nbdclient.Conn, mark byte, n int) {
	t.Helper()
	for i := range n {
		if err := conn.WriteAt(mebibyte(mark, i), uint64(i)<<20, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
}

func checkMiB(t testing.TB, conn *nbdclient.Conn, mark byte, n int) {
	t.Helper()
	b := make([]byte, 1<<20)
	for i := range n {
		if err := conn.ReadAt(b, uint64(i)<<20); err != nil {
			t.Fatalf("D3: mebibyte %d cannot be read: %v", i, err)
		}
		if !bytes.Equal(b, mebibyte(mark, i)) {
			t.Fatalf("D3: mebibyte %d holds something else", i)
		}
	}
}

func mebibyte(mark byte, i int) []byte {
	return bytes.Repeat(fmt.Appendf(nil, "%c%015d", 'A'+mark, i), 1<<16)
}

// What is deleted gives its space back, within a pass or two: snapshots, volumes but for what clones need of them, what writers that were
// killed had never committed; and nothing else goes (D3).
func TestSpaceComesBack(t *testing.T) {
	c := ownCluster(t)
	const size, mib = 128, 1 << 20
	const slack = 2 * 12 * 4 * mib // blocks that are open, metadata, what compaction puts up with
	for _, v := range []string{"a", "c"} {
		c.ctl(t, "volume", "create-block", v, fmt.Sprintf("%dMiB", 2*size))
		b := c.newBlk(t)
		conn := dial(t, b.export(v), startLimit)
		fillMiB(t, conn, 1, size)
		c.ctl(t, "block", "snapshot", "create", v+"@s")
		fillMiB(t, conn, 2, size)
		conn.Close()
		c.stopBlks(t)
	}
	eventually(t, startLimit, "the peers say what they store", func() error {
		if n := c.used(t); n < 2*4*size*mib {
			return fmt.Errorf("%d MiB", n/mib)
		}
		return nil
	})
	c.ctl(t, "volume", "clone", "a@s", "b")
	c.ctl(t, "volume", "delete", "--force", "a")
	c.ctl(t, "block", "snapshot", "delete", "c@s")
	c.waitUsed(t, "after a snapshot and the parent of a clone were deleted", 2*2*size*mib+2*slack)

	b := c.newBlk(t, "--force")
	conn := dial(t, b.export("b"), startLimit) // for the first time
	checkMiB(t, conn, 1, size)
	conn.Close()
	conn = dial(t, b.export("c"), startLimit)
	checkMiB(t, conn, 2, size)
	w := newStamper(5, size*mib/pageSize, size*mib/pageSize, 32)
	for i := range rounds(t, 6, 20) {
		stop := w.start(conn)
		time.Sleep(time.Duration(200+i*370%1000) * time.Millisecond)
		b.kill()
		stop() //nolint:errcheck // its server was killed
		conn.Close()
		b.serve(t)
		conn = dial(t, b.export("c"), startLimit)
		w.settle(t, conn, i == 0)
	}
	w.mustBeRight(t)
	fillMiB(t, conn, 3, size)
	conn.Close()
	c.stopBlks(t)
	c.waitUsed(t, "after writers were killed", 2*(2*size*mib*4/3)+2*size*mib+2*slack)
	b = c.newBlk(t)
	for _, x := range []struct {
		volume string
		mark   byte
	}{{"b", 1}, {"c", 3}} {
		conn = dial(t, b.export(x.volume), startLimit)
		checkMiB(t, conn, x.mark, size)
		conn.Close()
	}
	c.stopBlks(t)
	c.ctl(t, "volume", "delete", "b")
	c.ctl(t, "volume", "delete", "c")
	c.waitUsed(t, "after everything was deleted", 0)
}

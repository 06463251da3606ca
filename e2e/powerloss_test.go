package e2e

import (
	"regexp"
	"testing"
	"time"
)

// The power of a peer is cut: it runs in a virtual machine, whose memory and whose disk's write cache are lost. It is the only
// peer of its cluster, so that nobody can help it out. What was flushed is there after the next boot, and the volume is a prefix of
// its history (D1, C1); where the client lives on, it sends again what the peer has lost, and nothing acknowledged is missing.
func TestPowerLoss(t *testing.T) {
	for i, fs := range []string{"ext4", "xfs"} {
		if i > 0 && !soaking() {
			continue // one of the two is enough for a short run
		}
		t.Run(fs, func(t *testing.T) {
			c, g := guestCluster(t, fs)
			volume := c.newVolume(t, "256MiB")
			b := c.newBlk(t, "--force")
			conn := dial(t, b.export(volume), startLimit)
			w := newStamper(uint64(81+i), 0, 2048, 8)
			n := rounds(t, 1, 10)
			for round := range n {
				mark := g.mark()
				stop := w.start(conn)
				time.Sleep(time.Duration(2000+round*311%1000) * time.Millisecond)
				g.powerCut()
				last, acked, flushed := w.counts()
				clientToo := round%2 == 0
				if clientToo {
					b.kill()
					stop() //nolint:errcheck // its server was killed
					conn.Close()
				}
				cut := time.Now()
				g.boot(t)
				c.waitHealthy(t, guestBoots)
				t.Logf("booted and serving %v after the cut", time.Since(cut).Round(time.Millisecond))
				unsynced(t, g.process, mark)
				if clientToo {
					b.serve(t)
					conn = dial(t, b.export(volume), startLimit)
					w.settle(t, conn, false)
				} else {
					eventually(t, 3*resumes, "I/O resumes", func() error {
						if _, a, f := w.counts(); a == acked || f == flushed {
							return errNotYet
						}
						return nil
					})
					if err := stop(); err != nil {
						t.Fatalf("I/O error: %v", err)
					}
					w.mustBeRight(t)
					w.flush(t, conn)
					w.mustEqual(t, conn)
				}
				now, _, _ := w.counts()
				t.Logf("power cut %d on %s, client killed: %v: %d writes, %d acknowledged, %d flushed; %d afterwards", round+1, fs, clientToo, last, acked, flushed, now)
				if flushed == 0 {
					t.Error("nothing was flushed before the cut")
				}
				if t.Failed() {
					return
				}
			}
			conn.Close()
			t.Logf("POWER %d cuts on %s: nothing flushed was lost", n, fs)
		})
	}
	if soaking() { // three boots more
		t.Run("lying disk", testLyingDisk)
	}
}

// The control: a disk that lies about flushes. What was flushed is gone after the cut, and that is noticed.
func testLyingDisk(t *testing.T) {
	c, g := guestCluster(t, "ext4")
	volume := c.newVolume(t, "256MiB")
	b := c.newBlk(t, "--force")
	conn := dial(t, b.export(volume), startLimit)
	w := newStamper(91, 0, 2048, 8)
	w.runFor(t, conn, time.Second)
	w.flush(t, conn)
	b.kill()
	conn.Close()
	g.powerCut()

	g.disk.lies = true
	g.boot(t)
	c.waitHealthy(t, guestBoots)
	b.serve(t)
	conn = dial(t, b.export(volume), startLimit)
	w.settle(t, conn, true)
	w.runFor(t, conn, 2*time.Second)
	w.flush(t, conn)
	b.kill()
	conn.Close()
	g.powerCut()

	g.disk.lies = false
	g.boot(t)
	c.waitHealthy(t, guestBoots)
	b.serve(t)
	err := func() error {
		conn, err := b.export(volume).Dial(t.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		img, err := w.image(conn)
		if err != nil {
			return err
		}
		_, _, flushed := w.counts()
		_, err = w.check(img, flushed)
		return err
	}()
	if err == nil {
		t.Error("D1: forgotten flushes were not noticed")
	}
	t.Logf("noticed: %v", err)
}

// guestCluster is an etcd, and a single peer in a guest, whose file system is fs.
func guestCluster(t *testing.T, fs string) (*cluster, *guest) {
	t.Helper()
	dir := tempDir(t)
	c := &cluster{dir: dir, net: newNetwork(t, dir, clientNode, etcdNode, adminNode), torusctl: program(t, "torusctl")}
	t.Cleanup(c.kill)
	logOnFailure(t, c.processes)
	c.startEtcd(t)
	c.ctl(t, "init", "--block-spec", "crc,rep=1")
	// What the cuts are to take away is there to be seen: a file that was written and not synced, beside one that was.
	g := newGuest(t, dir, peerName(0), c.net, newGuestDisk(t, dir, fs, "3G"), nil, func(ip string) string {
		return `echo "CONTROL synced $(wc -c < /data/synced) unsynced $(wc -c < /data/unsynced)"
rm -f /data/synced /data/unsynced
sync
dd if=/dev/zero of=/data/synced bs=64k count=16 conv=fsync 2> /dev/null
dd if=/dev/zero of=/data/unsynced bs=64k count=16 2> /dev/null
torusd --etcd ` + c.etcdURL + ` --data-dir /data/torus --size 384MiB --peer-address tdp://` + ip + `:7001 --http ` + ip + `:7002
`
	}, "torusd")
	c.peers = []*peer{{process: g.process, http: g.ip + ":7002"}}
	began := time.Now()
	g.boot(t)
	eventually(t, guestBoots, "the guest registers", func() error {
		peers, err := c.peerList(t.Context())
		if err == nil && len(peers) != 1 {
			err = errNotYet
		}
		return err
	})
	c.ctl(t, "peer", "add", "--all-peers")
	c.waitHealthy(t, guestBoots)
	t.Logf("first boot: serving after %v", time.Since(began).Round(time.Millisecond))
	return c, g
}

// unsynced: the cut took the file that was not synced, and left the one that was.
func unsynced(t *testing.T, g *process, mark int64) {
	t.Helper()
	m := regexp.MustCompile(`CONTROL synced (\d*) unsynced (\d*)`).FindStringSubmatch(g.printed(mark))
	if m == nil || m[1] != "1048576" || m[2] == "1048576" {
		t.Errorf("a synced file and one that was not, of 1048576 bytes each, after the power cut: %q", m)
	}
}

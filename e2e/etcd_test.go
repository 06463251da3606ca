package e2e

import (
	"errors"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coreos/torus/e2e/nbdclient"
)

// etcd is not on the path of a read, write or flush: with it away for 20 s (60 s in a long run) under load nothing fails and nobody waits for
// more than a second; when it is back, checkpoints, leases and peers are as before.

func TestEtcdStopped(t *testing.T) {
	testEtcdAway(t, (*process).freeze, (*process).thaw)
}

func TestEtcdKilled(t *testing.T) {
	testEtcdAway(t, (*process).kill, func(p *process) {
		if !p.alive() {
			p.start(t)
		}
	})
}

func testEtcdAway(t *testing.T, away, back func(*process)) {
	const limit = time.Second
	gone := 30 * time.Second
	if soaking() {
		gone = time.Minute
	}
	c := sharedCluster(t)
	volume := c.newVolume(t, "1GiB")
	b := c.newBlk(t)
	s := startStream(t, b.export(volume), 0, 2048, time.Millisecond)
	load := startFio(t, b.export(volume), "256m", "32m", "4m,4m")
	time.Sleep(5 * time.Second) // the window grows with the load
	t.Logf("before: %v", s.look())

	before := c.volume(t, volume)
	t.Cleanup(func() {
		if t.Failed() {
			back(c.etcd) // the volume is to be released
		}
	})
	away(c.etcd)
	time.Sleep(gone)
	out := s.look()
	back(c.etcd)
	t.Logf("STALL etcd away for %v: %v", gone, out)
	if out.own() > limit {
		t.Errorf("etcd away stalled I/O for %v, more than %v, beyond what the machine did", out.own(), limit)
	}
	if out.writes == 0 || out.reads == 0 {
		t.Errorf("nothing went on: %v", out)
	}
	c.waitEtcd(t)
	healthy := c.waitHealthy(t, 30*time.Second)
	took := eventually(t, 45*time.Second, "a checkpoint is made", func() error {
		if v := c.volume(t, volume); v.Checkpoint == nil || before.Checkpoint != nil && v.Checkpoint.Equal(*before.Checkpoint) {
			return errNotYet
		}
		return nil
	})
	t.Logf("all peers healthy after %v, a checkpoint after %v more", healthy.Round(time.Millisecond), took.Round(time.Millisecond))
	time.Sleep(time.Second)
	after := s.look()
	t.Logf("since then: %v", after)
	if after.own() > limit {
		t.Errorf("the return of etcd stalled I/O for %v, more than %v, beyond what the machine did", after.own(), limit)
	}
	// The volume is still locked by who uses it.
	if v := c.volume(t, volume); v.AttachedTo == "" {
		t.Errorf("the volume is %s, attached to nobody", v.Status)
	}
	other := c.newBlk(t)
	var refused *nbdclient.Refused
	if _, err := other.export(volume).Dial(t.Context()); !errors.As(err, &refused) {
		t.Errorf("attach elsewhere, not forced: %v", err)
	}
	if err := s.end(); err != nil {
		t.Errorf("I/O error: %v", err)
	}
	load.stop()
	t.Logf("%d runs of fio verified", load.runs.Load())
	if b, err := os.ReadFile(b.log); err == nil && strings.Contains(string(b), "panic") {
		t.Error("torusblk panicked")
	}
}

// With etcd away, torusblk still ends when it is told to, well before an init system loses its patience (90 s with systemd);
// what it has flushed is there afterwards.
func TestStopWithoutEtcd(t *testing.T) {
	const patience = 30 * time.Second
	c := sharedCluster(t)
	volume := c.newVolume(t, "64MiB")
	b := c.newBlk(t)
	conn := dial(t, b.export(volume), startLimit)
	w := newStamper(61, 0, 4096, 16)
	w.runFor(t, conn, 300*time.Millisecond)
	w.flush(t, conn)
	t.Cleanup(c.etcd.thaw)
	c.etcd.freeze()
	w.runFor(t, conn, 100*time.Millisecond)
	w.flush(t, conn)
	b.signal(syscall.SIGTERM)
	took := eventually(t, patience, "torusblk ends", func() error {
		if b.alive() {
			return errNotYet
		}
		return nil
	})
	t.Logf("torusblk ended %v after SIGTERM: %v", took.Round(time.Millisecond), b.wait())
	conn.Close()
	c.etcd.thaw()
	c.waitEtcd(t)
	conn = dial(t, c.newBlk(t, "--force").export(volume), startLimit)
	defer conn.Close()
	w.settle(t, conn, true)
}

package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/coreos/torus/e2e/nbdclient"
)

// torusblk is killed in mid-write and the volume attached again, by another torusblk or the same: what was flushed is
// there (D1), what was acknowledged too (W1), and the whole is a prefix of what was written (C1). Every other time a peer is lost
// in the same moment and stays away; and before every second of these another peer is silent for a while: a write that only
// waits in a socket for it must not have been acknowledged.
func TestWriterKilled(t *testing.T) {
	c := sharedCluster(t)
	volume := c.newVolume(t, "1GiB")
	forced, plain := c.newBlk(t, "--force"), c.newBlk(t)
	w := newStamper(3, 100, 8192, 32)
	b := forced
	conn := dial(t, b.export(volume), startLimit)
	var slowest, waited time.Duration
	undone, n := uint64(0), rounds(t, 50, 200)
	for i := range n {
		stop := w.start(conn)
		time.Sleep(time.Duration(100+i*37%400) * time.Millisecond)
		var lost, silent *peer
		if i%4 == 1 {
			silent = c.peers[(i/4+1)%3]
			w.setOnlyWrites(true)
			time.Sleep(50 * time.Millisecond)
			silent.freeze()
			time.Sleep(500 * time.Millisecond)
		}
		if i%2 == 1 {
			lost = c.peers[i/4%3]
			lost.signal(syscall.SIGKILL)
		}
		b.kill()
		killed := time.Now()
		if silent != nil {
			silent.thaw()
			w.setOnlyWrites(false)
		}
		stop() //nolint:errcheck // its server was killed
		w.mustBeRight(t)
		conn.Close()
		last, acked, flushed := w.counts()
		b.serve(t)
		if i%20 == 6 {
			// Without --force the attach has to wait for the lease of the one that was killed, and no longer.
			b = plain
			if !plain.alive() {
				plain.serve(t)
			}
			conn = dial(t, b.export(volume), leaseTime+5*time.Second)
			waited = max(waited, time.Since(killed))
		} else {
			b = forced
			began := time.Now()
			conn = dial(t, b.export(volume), startLimit)
			slowest = max(slowest, time.Since(began))
		}
		w.settle(t, conn, true)
		now, _, _ := w.counts()
		undone += last - now
		t.Logf("round %d: %d writes, %d acknowledged, %d flushed; %d after the attach", i+1, last, acked, flushed, now)
		if t.Failed() {
			return
		}
		if lost != nil {
			lost.wait() //nolint:errcheck // it was killed
			lost.start(t)
			c.waitHealthy(t, startLimit)
		}
	}
	conn.Close()
	t.Logf("ATTACH %d kills: at most %v with --force, %v from the kill without; %d unacknowledged writes lost in all",
		n, slowest.Round(time.Millisecond), waited.Round(time.Millisecond), undone)
}

// What an attach has decided stays decided: attached again and again, with nothing written, the volume reads the same (C1).
func TestOutcomeSticks(t *testing.T) {
	c := sharedCluster(t)
	volume := c.newVolume(t, "256MiB")
	b := c.newBlk(t, "--force")
	w := newStamper(5, 0, 4096, 32)
	conn := dial(t, b.export(volume), startLimit)
	stop := w.start(conn)
	time.Sleep(500 * time.Millisecond)
	b.kill()
	stop() //nolint:errcheck // its server was killed
	conn.Close()
	for i := range 3 {
		// A peer less each time: it must not depend on who answers.
		p := c.peers[i]
		b.serve(t)
		conn = dial(t, b.export(volume), startLimit)
		if i == 0 {
			w.settle(t, conn, true)
		} else {
			w.mustEqual(t, conn)
		}
		b.kill()
		conn.Close()
		p.kill()
		b.serve(t)
		conn = dial(t, b.export(volume), startLimit)
		w.mustEqual(t, conn)
		b.kill()
		conn.Close()
		p.start(t)
		c.waitHealthy(t, startLimit)
	}
}

// L1: a writer that was frozen past its lease, while the volume was attached and written elsewhere, lands no byte when it
// wakes; its client gets errors within 2 s, and its log names the epoch that took over.
func TestFrozenWriter(t *testing.T) {
	const knows = 2 * time.Second
	c := sharedCluster(t)
	volume := c.newVolume(t, "256MiB")
	w := newStamper(21, 0, 8192, 32)
	var slowest time.Duration
	n := rounds(t, 2, 100)
	for round := range n {
		how := "force"
		if round%10 == 0 {
			how = "lease"
		}
		old := c.newBlk(t)
		conn := dial(t, old.export(volume), startLimit)
		stop := w.start(conn)
		time.Sleep(500 * time.Millisecond)
		old.freeze()
		frozen := time.Now()
		epoch := c.volume(t, volume).Epoch

		flags := []string{}
		if how == "force" {
			flags = []string{"--force"}
		}
		next := c.newBlk(t, flags...)
		if how == "lease" {
			// It is refused while the lease lives, by an error that says who has it.
			_, err := next.export(volume).Dial(t.Context())
			var refused *nbdclient.Refused
			if !errors.As(err, &refused) || !strings.Contains(refused.Message, "locked") && !strings.Contains(refused.Message, "attached") {
				t.Errorf("attach while the lease lives: %v", err)
			}
		}
		second := dial(t, next.export(volume), leaseTime+5*time.Second)
		t.Logf("attached elsewhere (%s) %v after the first froze", how, time.Since(frozen).Round(time.Millisecond))
		// The old writer's requests are still under way, so where its history ends is looked at, and not decided.
		_, acked, _ := w.counts()
		img, err := w.image(second)
		if err != nil {
			t.Fatal(err)
		}
		w.mu.Lock()
		n, err := w.check(img, acked)
		w.mu.Unlock()
		if err != nil {
			t.Fatal(err)
		}
		// What is written from now on has another seed: nothing of the old writer can pass for it.
		w2 := newStamper(uint64(31+round), 0, 8192, 16)
		w2.overwriteAll(t, second)
		w2.runFor(t, second, 300*time.Millisecond)
		w2.flush(t, second)
		now := c.volume(t, volume)
		if now.Epoch <= epoch {
			t.Errorf("epoch %d after %d", now.Epoch, epoch)
		}

		mark := old.mark()
		woken := time.Now()
		old.thaw()
		eventually(t, knows, "the old writer's client gets an error", func() error {
			w.mu.Lock()
			defer w.mu.Unlock()
			if w.err == nil {
				return errNotYet
			}
			return nil
		})
		stop() //nolint:errcheck // that it failed is known
		w.mu.Lock()
		t.Logf("FENCED (%s): the image was write %d; the old writer's client had %v %v after it woke", how, n, w.err, w.failed.Sub(woken).Round(time.Millisecond))
		d := w.failed.Sub(woken)
		if slowest = max(slowest, d); d > knows {
			t.Errorf("the old writer's client learned of it after %v", d)
		}
		w.mu.Unlock()
		for _, try := range []func(c *nbdclient.Conn) error{
			func(c *nbdclient.Conn) error { return c.WriteAt(make([]byte, pageSize), 0, 0) },
			(*nbdclient.Conn).Flush,
			func(c *nbdclient.Conn) error { return c.WriteAt(make([]byte, pageSize), 0, nbdclient.FUA) },
		} {
			began := time.Now()
			if err := try(conn); err == nil {
				t.Error("L1: the old writer's client was told of a success")
			}
			if took := time.Since(began); took > knows {
				t.Errorf("an error after %v", took)
			}
		}
		old.waitPrinted(t, mark, knows, fmt.Sprintf(`fenced.*epoch %d`, now.Epoch))
		w2.mustEqual(t, second) // not a byte of the old one
		w2.runFor(t, second, 300*time.Millisecond)
		w2.flush(t, second)
		w2.mustEqual(t, second)
		conn.Close()
		second.Close()
		if t.Failed() {
			return
		}
		c.stopBlks(t)
		c.ended = nil
		w = w2 // the next round's first writer goes on with this history
	}
	t.Logf("FENCED %d rounds: the old writer's client knew at most %v after it woke", n, slowest.Round(time.Millisecond))
}

// L1: a writer that is cut off from etcd, and not from the peers, while the volume is attached elsewhere: once that attach serves,
// the old writer's client gets errors within 2 s, and all that it was ever told to be written is part of what is served.
func TestCutOffWriter(t *testing.T) {
	t.Run("steady", func(t *testing.T) { testCutOffWriter(t, 3*time.Millisecond) })
	// As fast as it goes, the registered window is full before the lease has run out, and the writer waits for etcd.
	t.Run("stalled", func(t *testing.T) { testCutOffWriter(t, 0) })
}

func testCutOffWriter(t *testing.T, pace time.Duration) {
	const knows = 2 * time.Second
	c := sharedCluster(t)
	volume := c.newVolume(t, "256MiB")
	toEtcd := startProxy(t, c.etcdURL)
	old := c.newBlkAt(t, toEtcd.addr)
	w := newStamper(51, 0, 8192, 32)
	w.pace = pace
	conn := dial(t, old.export(volume), startLimit)
	defer conn.Close()
	stop := w.start(conn)
	time.Sleep(500 * time.Millisecond)
	toEtcd.set(true)
	cut := time.Now()
	var flags []string
	if pace == 0 {
		time.Sleep(3 * time.Second) // what the lease's end adds is seen in the other one
		flags = []string{"--force"}
	}
	next := c.newBlk(t, flags...)
	second := dial(t, next.export(volume), leaseTime+5*time.Second)
	defer second.Close()
	attached := time.Now()
	w.mu.Lock()
	t.Logf("attached elsewhere %v after the first was cut off from etcd; its last success %v before", attached.Sub(cut).Round(time.Millisecond),
		attached.Sub(w.lastOK).Round(time.Millisecond))
	w.mu.Unlock()
	eventually(t, knows, "the old writer's client gets an error", func() error {
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.err == nil {
			return errNotYet
		}
		return nil
	})
	stop() //nolint:errcheck // that it failed is known
	w.mustBeRight(t)
	last, acked, flushed := w.counts()
	w.mu.Lock()
	t.Logf("FENCED (etcd cut): the old writer's client had %v, %v after the attach", w.err, w.failed.Sub(attached).Round(time.Millisecond))
	w.mu.Unlock()
	old.waitPrinted(t, 0, knows, fmt.Sprintf(`fenced.*epoch %d`, c.volume(t, volume).Epoch))
	w.settle(t, second, true)
	now, _, _ := w.counts()
	t.Logf("%d writes, %d acknowledged, %d flushed; %d served", last, acked, flushed, now)
	w.pace = 0
	for range 3 {
		if err := conn.WriteAt(make([]byte, pageSize), 0, nbdclient.FUA); err == nil {
			t.Error("L1: the old writer's client was told of a success")
		}
		w.runFor(t, second, 300*time.Millisecond)
		w.mustEqual(t, second)
		toEtcd.set(false) // nor does it come back to life
	}
}

// A client that reconnects sends again what was not answered, and nothing else: so what was acknowledged must be there after
// each restart of torusblk (W1), and the client sees no error.
func TestReconnectingClient(t *testing.T) {
	const writes = 60000
	c := sharedCluster(t)
	volume := c.newVolume(t, "256MiB")
	b := c.newBlk(t, "--force")
	dial(t, b.export(volume), startLimit).Close()
	bench := newProcess(c.dir, "qemu-img", "qemu-img", "bench", "-t", "none", "-w", "-c", fmt.Sprint(writes), "-d", "16", "-s", "4096", "--pattern=90",
		"--image-opts", "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path="+b.socket+",file.export="+volume+",file.reconnect-delay=30")
	bench.start(t)
	t.Cleanup(bench.kill)
	restarts := 0
	for bench.alive() && restarts < 10 {
		time.Sleep(300 * time.Millisecond)
		b.kill()
		b.serve(t)
		restarts++
	}
	if err := bench.wait(); err != nil {
		t.Errorf("qemu-img bench: %v\n%s", err, bench.tail(10))
	}
	t.Logf("%d writes over %d restarts", writes, restarts)
	if restarts < 2 {
		t.Error("the client was done too soon to be a test")
	}
	tool(t, "qemu-io", "-f", "raw", "-c", fmt.Sprintf("read -P 90 0 %d", writes*pageSize), b.export(volume).URI())
}

// A front end is told to stop while an attach waits for peers that are all gone: it ends at once, and in order.
func TestStopWhileAttachWaits(t *testing.T) {
	c := &cluster{dir: tempDir(t)}
	c.started(t)
	volume := c.newVolume(t, "64MiB")
	b := c.newBlk(t, "--force")
	conn := dial(t, b.export(volume), startLimit)
	if err := errors.Join(conn.WriteAt(make([]byte, pageSize), 0, 0), conn.Flush()); err != nil {
		t.Fatal(err)
	}
	b.kill()
	conn.Close()
	for _, p := range c.peers {
		p.kill()
	}
	b.serve(t)
	mark := b.mark()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var client sync.WaitGroup
	defer client.Wait()
	client.Go(func() {
		if conn, err := b.export(volume).Dial(ctx); err == nil {
			t.Error("attached without a single peer")
			conn.Close()
		}
	})
	b.waitPrinted(t, mark, startLimit, "attach waits for peers")
	b.interrupt(t, syscall.SIGTERM, 3*time.Second)
}

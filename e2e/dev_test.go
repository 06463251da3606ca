package e2e

import (
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coreos/torus/e2e/nbdclient"
)

// `torusd dev` on an empty directory serves the volume demo of 1 GiB within 3 s, and what is in it is there again after Ctrl-C
// (everything) and after a SIGKILL of the whole cluster (D1, W1: no power was lost).
func TestDev(t *testing.T) {
	const serving = 3 * time.Second
	dir := tempDir(t)
	a := nbdclient.TCP(freePort(t), "demo")
	p := newProcess(dir, "torusd-dev", program(t, "torusd"), "dev", "--data-dir", filepath.Join(dir, "data"), "--nbd", a.Addr)
	logOnFailure(t, func() []*process { return []*process{p} })
	t.Cleanup(p.kill)
	up := func(what string) *nbdclient.Conn {
		t.Helper()
		began := time.Now()
		p.start(t)
		c := dial(t, a, startLimit)
		took := time.Since(began)
		t.Logf("%s: serving after %v", what, took.Round(time.Millisecond))
		if took > serving {
			t.Errorf("%s: serving after %v, not %v", what, took, serving)
		}
		return c
	}
	began := p.mark()
	c := up("first start")
	if c.Size() != 1<<30 {
		t.Errorf("demo has %d bytes", c.Size())
	}
	p.waitPrinted(t, began, startLimit, `nbdinfo 'nbd://\S+/demo'`)
	w := newStamper(1, 1000, 8192, 16)
	w.runFor(t, c, time.Second)
	c.Close()
	p.interrupt(t, syscall.SIGINT, 15*time.Second)

	c = up("after SIGINT")
	w.mustEqual(t, c) // an orderly end loses nothing, flushed or not
	w.runFor(t, c, time.Second)
	c.Close()
	p.interrupt(t, syscall.SIGTERM, 15*time.Second)

	c = up("after SIGTERM")
	w.mustEqual(t, c)
	for i := range rounds(t, 3, 10) {
		stop := w.start(c)
		time.Sleep(500 * time.Millisecond)
		p.kill()
		stop() //nolint:errcheck // its server was killed
		w.mustBeRight(t)
		c.Close()
		// The lease of the one that was killed lives for 10 s; a cluster in one process has nobody else to wait for.
		began := time.Now()
		c = up("after SIGKILL")
		last, acked, flushed := w.counts()
		w.settle(t, c, true)
		now, _, _ := w.counts()
		t.Logf("round %d: attached after %v; %d writes, %d acknowledged, %d flushed, %d recovered", i+1, time.Since(began).Round(time.Millisecond), last, acked, flushed, now)
	}
	c.Close()
	if out := tool(t, "nbdinfo", a.URI()); !strings.Contains(out, "1073741824") {
		t.Errorf("nbdinfo says\n%s", out)
	}
	p.interrupt(t, syscall.SIGINT, 15*time.Second)
}

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coreos/torus/e2e/nbdclient"
)

// fioLoad runs fio with verification over a region of an export, again and again, until stop is called.
type fioLoad struct {
	runs   atomic.Int64
	cancel context.CancelFunc
	wg     sync.WaitGroup
	once   sync.Once
	slow   atomic.Int64 // the slowest request that fio saw, nanoseconds
}

func startFio(t *testing.T, a nbdclient.Address, offset, size, rate string) *fioLoad {
	t.Helper()
	f, dir := &fioLoad{}, tempDir(t)
	ctx, cancel := context.WithCancel(context.Background())
	f.cancel = cancel
	stopped := make(chan struct{})
	f.wg.Go(func() {
		for n := 0; ; n++ {
			select {
			case <-stopped:
				return
			default:
			}
			slow, err := fio(ctx, dir, a, "--rw=randrw", "--bs=4k", "--iodepth=16", "--offset="+offset, "--size="+size, "--rate="+rate,
				fmt.Sprintf("--randseed=%d", n+1), "--verify_backlog=512")
			if ctx.Err() != nil {
				return
			}
			if err != nil {
				t.Error(err)
				return
			}
			f.slow.Store(max(f.slow.Load(), int64(slow)))
			f.runs.Add(1)
		}
	})
	t.Cleanup(func() { cancel(); f.wg.Wait() })
	f.cancel = sync.OnceFunc(func() { close(stopped) })
	return f
}

// stop lets the present run of fio, whose verification counts, end.
func (f *fioLoad) stop() {
	f.once.Do(f.cancel)
	f.wg.Wait()
}

// fio runs a job with verification; the result is the longest that any request took, by fio's own account.
func fio(ctx context.Context, dir string, a nbdclient.Address, job ...string) (time.Duration, error) {
	output := filepath.Join(dir, "fio.json")
	args := []string{"fio", "--name=verify", "--ioengine=nbd", "--uri=" + a.URI(), "--verify=crc32c", "--verify_fatal=1", "--output-format=json", "--output=" + output}
	_, err := try(ctx, append(args, job...)...)
	if err != nil {
		return 0, err
	}
	b, err := os.ReadFile(output)
	if err != nil {
		return 0, err
	}
	b = b[max(0, bytes.IndexByte(b, '{')):] // it may begin with a note
	type side struct {
		Clat struct{ Max float64 } `json:"clat_ns"`
	}
	var r struct {
		Jobs []struct {
			Error       int
			TotalErr    int `json:"total_err"`
			Read, Write side
		}
	}
	if err := json.Unmarshal(b, &r); err != nil || len(r.Jobs) != 1 {
		return 0, fmt.Errorf("fio's output: %w\n%s", err, clip(string(b)))
	}
	j := r.Jobs[0]
	if j.Error != 0 || j.TotalErr != 0 {
		return 0, fmt.Errorf("fio counted error %d, %d in all", j.Error, j.TotalErr)
	}
	return time.Duration(max(j.Read.Clat.Max, j.Write.Clat.Max)), nil
}

// One peer at a time is killed, or stopped and woken, or cut off from everybody without a word, under fio with verification: no
// error, no wrong byte (D1, W1), and nobody waits longer than a second for a peer that is gone, three for one that is silent.
func TestPeerLoss(t *testing.T) {
	c := networkCluster(t)
	volume := c.newVolume(t, "1GiB")
	b := c.newBlk(t)
	fill := dial(t, b.export(volume), startLimit)
	w := newStamper(7, 0, 4096, 16) // what lies on all peers, to be compared at the end
	w.runFor(t, fill, time.Second)
	w.flush(t, fill)

	load := startFio(t, b.export(volume), "256m", "48m", "8m,8m")
	s := startStream(t, b.export(volume), 32<<8, 1024, time.Millisecond)
	time.Sleep(time.Second)
	quiet := s.look()
	t.Logf("before: %v", quiet)

	for _, fault := range []struct {
		name   string
		limit  time.Duration
		rounds int // of a short run
		hurt   func(p *process)
		mend   func(p *process)
	}{
		{"killed", time.Second, 10, (*process).kill, func(p *process) { p.start(t) }},
		{"stopped", 3 * time.Second, 10, (*process).freeze, (*process).thaw},
		{"cut off", 3 * time.Second, 3, func(p *process) { c.net.cut(t, c.net.isolated(p.name)...) }, func(*process) { c.net.heal(t) }},
	} {
		var worst stall
		var own time.Duration // the longest that is not the machine's
		for i := range rounds(t, fault.rounds, 50) {
			p := c.peers[i%3]
			s.look()
			fault.hurt(p.process)
			time.Sleep(2 * time.Second)
			down := s.look()
			fault.mend(p.process)
			healthy := c.waitHealthy(t, 30*time.Second)
			time.Sleep(time.Second)
			back := s.look()
			t.Logf("%s %s: %v; back: longest %v, healthy after %v", p.name, fault.name, down, back.max().Round(time.Millisecond), healthy.Round(time.Millisecond))
			if down.writes == 0 || down.reads == 0 {
				t.Errorf("%s %s: nothing went on: %v", p.name, fault.name, down)
			}
			worst.write, worst.read = max(worst.write, down.write, back.write), max(worst.read, down.read, back.read)
			own = max(own, down.own(), back.own())
			if !s.running(nil) {
				break
			}
		}
		t.Logf("STALL peer %s: writes and flushes %v, reads %v, without the machine's own %v (limit %v)",
			fault.name, worst.write.Round(time.Millisecond), worst.read.Round(time.Millisecond), own.Round(time.Millisecond), fault.limit)
		if own > fault.limit {
			t.Errorf("a %s peer stalled I/O for %v, more than %v, beyond what the machine did", fault.name, own, fault.limit)
		}
	}
	if err := s.end(); err != nil {
		t.Errorf("I/O error: %v", err)
	}
	load.stop()
	t.Logf("%d runs of fio verified, slowest request %v", load.runs.Load(), time.Duration(load.slow.Load()).Round(time.Millisecond))
	if load.runs.Load() == 0 {
		t.Error("no run of fio was finished")
	}
	w.mustEqual(t, fill)
}

// With every peer killed, or all but one, no flush and no write is acknowledged (F1); when they are back, nothing that was is
// lost (D1, W1: the page caches survive), and I/O resumes by itself. Then the client dies too, and the next attach serves the same.
func TestAllPeersKilled(t *testing.T) {
	const resumes = 10 * time.Second
	c := sharedCluster(t)
	volume := c.newVolume(t, "1GiB")
	b := c.newBlk(t)
	conn, late := dial(t, b.export(volume), startLimit), dial(t, b.export(volume), startLimit)
	defer late.Close()
	w := newStamper(11, 0, 8192, 16)
	for round := range rounds(t, 4, 20) {
		dead := c.peers
		if round%2 == 1 {
			dead = []*peer{c.peers[round%3], c.peers[(round+1)%3]}
		}
		stop := w.start(conn)
		time.Sleep(500 * time.Millisecond)
		var wg sync.WaitGroup
		for _, p := range dead {
			wg.Go(p.kill)
		}
		wg.Wait()
		// What is asked for now must wait.
		asked := make(chan error, 2)
		for _, op := range []*nbdclient.Op{
			{Cmd: nbdclient.Write, Off: 512 << 20, Data: make([]byte, pageSize)},
			{Cmd: nbdclient.Write, Off: 513 << 20, Data: make([]byte, pageSize), Flags: nbdclient.FUA},
		} {
			op.Done = func(op *nbdclient.Op) { asked <- op.Err }
			late.Start(op)
		}
		// What was asked for before, and was answered before the last one died, may still be on its way.
		time.Sleep(300 * time.Millisecond)
		_, acked, flushed := w.counts()
		time.Sleep(2 * time.Second)
		if _, a, f := w.counts(); a != acked || f != flushed {
			t.Errorf("F1: with %d peers of 3 dead, acknowledged %d → %d, flushed %d → %d", len(dead), acked, a, flushed, f)
		}
		if n := len(asked); n > 0 {
			t.Errorf("F1: with %d peers of 3 dead, a write was done: %v", len(dead), <-asked)
		}
		for _, p := range dead {
			p.start(t)
		}
		resumed := eventually(t, 3*resumes, "I/O resumes", func() error {
			if _, a, f := w.counts(); a == acked || f == flushed || len(asked) < 2 {
				return errNotYet
			}
			return nil
		})
		t.Logf("RESUME round %d, %d peers killed: %v after they were started", round+1, len(dead), resumed.Round(time.Millisecond))
		if resumed > resumes {
			t.Errorf("I/O resumed after %v, not %v", resumed, resumes)
		}
		for range 2 {
			if err := <-asked; err != nil {
				t.Errorf("I/O error: %v", err)
			}
		}
		time.Sleep(300 * time.Millisecond)
		if err := stop(); err != nil {
			t.Fatalf("I/O error: %v", err)
		}
		w.mustBeRight(t)
		w.flush(t, conn)
		w.mustEqual(t, conn)
		c.waitHealthy(t, startLimit)
	}
	// And with the client dead as well.
	stop := w.start(conn)
	time.Sleep(500 * time.Millisecond)
	for _, p := range c.peers {
		p.kill()
	}
	b.kill()
	stop() //nolint:errcheck // its server was killed
	conn.Close()
	for _, p := range c.peers {
		p.start(t)
	}
	b = c.newBlk(t, "--force")
	conn = dial(t, b.export(volume), startLimit)
	defer conn.Close()
	w.settle(t, conn, true)
	w.runFor(t, conn, 200*time.Millisecond)
	w.mustEqual(t, conn)
}

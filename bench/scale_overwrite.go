package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"
)

// overLoads are what is measured unless something else is asked for: see overLoad.
const overLoads = "uniform-0.75-32,uniform-0.7-32,skewed-0.7-32,uniform-0.7-64"

// overLoad is one way to overwrite a volume: "uniform" or "skewed" (80 % of the writes to 20 % of the places), compaction's target, and the depth.
type overLoad struct {
	skewed      bool
	utilisation string
	depth       int
}

func parseOverLoads(list string) (l []overLoad, err error) {
	for _, s := range strings.Split(list, ",") {
		x := strings.Split(s, "-")
		bad := fmt.Errorf("%q: want uniform or skewed, a utilisation above 0 and below 1, and a depth: uniform-0.7-32", s)
		if len(x) != 3 || x[0] != "uniform" && x[0] != "skewed" {
			return nil, bad
		}
		u, err := strconv.ParseFloat(x[1], 64)
		depth, err2 := strconv.Atoi(x[2])
		if err != nil || err2 != nil || u <= 0 || u >= 1 || depth < 1 {
			return nil, bad
		}
		l = append(l, overLoad{x[0] == "skewed", x[1], depth})
	}
	return l, nil
}

func (x overLoad) String() string {
	if x.skewed {
		return "80 % to 20 %"
	}
	return "uniform"
}

// overTimes is how often a volume is overwritten.
const overTimes = 10

// overwrite overwrites a volume at random, ten times, and watches what compaction does about it.
func (s *scale) overwrite(ctx context.Context) error {
	t := &table{
		title: fmt.Sprintf("A volume of %v overwritten %d times", s.size, overTimes),
		note: "4 KiB random writes, as fast as they go, after the volume was filled. `stored` is what its blocks held by what was alive. `written` is what went to a replica's log, or was moved by compaction, for each byte that the client wrote. `without` is the rate of the same load " +
			"on the same volume afterwards, until as much as it holds has been written, without compaction; `paced` are writes that had to wait for it.",
		head: []string{"writes", "utilisation", "depth", "IOPS", "without", "ratio", "stored / live, most", "at the end", "written / byte", "moved / byte", "paced", "p99.9, µs"},
	}
	for _, x := range s.over {
		if err := s.overwriteOnce(ctx, t, x); err != nil {
			return err
		}
	}
	return s.print(t)
}

func (s *scale) overwriteOnce(ctx context.Context, t *table, x overLoad) error {
	c, remove, err := s.cluster(ctx, clusterOptions{peers: 3, peerSize: 3*s.size + 4<<30})
	if err != nil {
		return err
	}
	defer remove()
	if err := c.create(ctx, s.size, "v1"); err != nil {
		return err
	}
	load := load{title: "overwrite", rw: "randwrite", bs: 4096, depth: x.depth, skew: x.skewed, bytes: overTimes * s.size}
	uris := c.uris("v1")
	if err := c.serve("--utilisation", x.utilisation); err != nil {
		return err
	}
	hold, err := c.attach(ctx, "v1")
	if err != nil {
		return err
	}
	err = c.fill(ctx, uris, s.size)
	var with, without measured
	var most, last float64
	if err == nil {
		w := c.watch(ctx)
		with, err = c.run(ctx, load, uris, s.size, 0, 1)
		var werr error
		most, last, werr = w.end()
		err = errors.Join(err, werr)
	}
	hold.release()
	if err != nil {
		return err
	}
	// And the same without compaction.
	c.client.stop()
	if err := c.serve("--force", "--utilisation", "0"); err != nil {
		return err
	}
	if hold, err = c.attach(ctx, "v1"); err != nil {
		return err
	}
	load.bytes = s.size
	without, err = c.run(ctx, load, uris, s.size, 0, 2)
	hold.release()
	if err != nil {
		return err
	}
	client := func(name string) float64 {
		return with.is.torus[c.client.name].sum(name) - with.was.torus[c.client.name].sum(name)
	}
	bytes := float64(overTimes * s.size)
	moved, log := client("torus_volume_moved_bytes_total")/bytes, client("torus_volume_log_bytes_total")/bytes
	rate, before := with.IOPS, without.IOPS
	s.say("%v at %s, depth %d: %.0f IOPS, %.0f without; stored %.3f, written %.3f", x, x.utilisation, x.depth, rate, before, most, log+moved)
	t.add(x.String(), x.utilisation, strconv.Itoa(x.depth), thousands(rate), thousands(before), hundredths(rate/before), strconv.FormatFloat(most, 'f', 3, 64), hundredths(last), hundredths(log+moved), hundredths(moved),
		thousands(client("torus_volume_paced_writes_total")), thousands(with.LatencyUs.P999))
	return nil
}

func hundredths(v float64) string { return strconv.FormatFloat(v, 'f', 2, 64) }

// watch looks at what volumes store, once a second.
func (c *cluster) watch(ctx context.Context) *watch {
	ctx, stop := context.WithCancel(ctx)
	w := &watch{stop: stop}
	w.wait.Go(func() {
		for {
			m, err := scrape(ctx, c.client.http)
			if ctx.Err() != nil {
				return
			}
			if err != nil {
				w.err = err
				return
			}
			if live := m.sum("torus_volume_live_bytes"); live > 0 {
				w.last = m.sum("torus_volume_stored_bytes") / live
				w.most = max(w.most, w.last)
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Second):
			}
		}
	})
	return w
}

type watch struct {
	stop       func()
	wait       sync.WaitGroup
	most, last float64
	err        error
}

// end returns the most that was stored for each byte alive, and how much it was at the end.
func (w *watch) end() (most, last float64, err error) {
	w.stop()
	w.wait.Wait()
	return w.most, w.last, w.err
}

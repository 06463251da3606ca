package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coreos/torus"
	"github.com/coreos/torus/models"
)

// sizes is the same work on volumes of different sizes: writes, reads, and what an attach takes then.
func (s *scale) sizes(ctx context.Context) error {
	const (
		random = 256 << 20
		run    = 1 << 30
		filled = 192 << 20 // less log than makes a checkpoint
	)
	work := []load{
		{title: "4 KiB random write, 256 MiB over the whole volume", rw: "randwrite", bs: 4 << 10, depth: 32, bytes: random},
		{title: "4 KiB random read of the same pages", rw: "randread", bs: 4 << 10, depth: 32, bytes: random},
		{title: "1 MiB sequential write, 1 GiB", rw: "write", bs: 1 << 20, depth: 8, bytes: run},
	}
	rates := &table{
		title: "Size of the volume: work",
		note: "Nothing but what is written here is in the volumes. CPU seconds for 10,000 operations: of all processes; of torusblk; of the peers together. Bytes peers receive for a byte written, two copies. " +
			"Transactions in etcd for the volume, for a GiB of data, and the size of its state there at the end.",
		head: []string{"load", "volume", "ops/s", "all", "torusblk", "peers", "bytes received / written", "etcd txn / GiB", "state, bytes", "torusblk MiB"},
	}
	attach := &table{
		title: "Size of the volume: attach",
		note: "ms from connecting to torusblk until the first page is read. Fresh: just created. Again: after that work and a detach, median of three. Killed: torusblk was killed with some log since its last checkpoint, " +
			"and another one, which was running already, attaches with --force; without, it waits for the dead one's lease, 10 s at most, first. In parentheses the attach by itself, without the look-up and the read. " +
			"Calls are those of the metadata service for one attach and the detach after it.",
		head: []string{"volume", "fresh", "again", "killed", "records recovered", "calls"},
	}
	c, remove, err := s.cluster(ctx, clusterOptions{peers: 3})
	if err != nil {
		return err
	}
	defer remove()
	mds, err := c.mds(ctx)
	if err != nil {
		return err
	}
	defer mds.Close()
	for _, size := range []byteSize{1 << 30, 100 << 30, 1000 << 30} {
		name := "v" + size.String()
		if err := errors.Join(c.serve(), c.create(ctx, size, name)); err != nil {
			return err
		}
		if err := c.listening(ctx); err != nil {
			return err
		}
		hold, fresh, err := c.firstByte(ctx, name)
		if err != nil {
			return err
		}
		freshAttach, _, err := c.lastAttach()
		if err != nil {
			return err
		}
		for _, l := range work {
			was, _, err := state(ctx, mds, name)
			if err != nil {
				return err
			}
			m, err := c.run(ctx, l, c.uris(name), size, 0, 1)
			if err != nil {
				return err
			}
			if err := hold.Flush(); err != nil {
				return err
			}
			is, bytes, err := state(ctx, mds, name)
			if err != nil {
				return err
			}
			written, txns := none, none
			if l.rw != "randread" {
				written = significant(m.peers("torus_server_tdp_received_bytes_total") / float64(l.bytes))
				txns = significant(float64(is.Txn-was.Txn) / (float64(l.bytes) / (1 << 30)))
			}
			client, _ := m.cpu(kindClient)
			first, _ := m.cpu(kindEtcd)
			others, _ := m.cpu(kindPeer)
			ram, err := c.memory(kindClient)
			if err != nil {
				return err
			}
			s.say("%v: %s: %.0f/s, %.2f CPU s", size, l.title, m.IOPS, m.CPUPer10k)
			rates.add(l.title, size.String(), thousands(m.IOPS), significant(m.CPUPer10k), significant(client/m.Ops*10_000), significant((first+others)/m.Ops*10_000),
				written, txns, fmt.Sprint(bytes), mib(ram.Own))
		}

		var again, againAttach []float64
		var calls span
		for range 3 {
			hold.Close()
			if err := c.released(ctx, mds, name); err != nil {
				return err
			}
			if calls, err = c.begin(ctx); err != nil {
				return err
			}
			var took time.Duration
			if hold, took, err = c.firstByte(ctx, name); err != nil {
				return err
			}
			alone, _, err := c.lastAttach()
			if err != nil {
				return err
			}
			again, againAttach = append(again, ms(took)), append(againAttach, ms(alone))
		}
		hold.Close()
		if err := c.released(ctx, mds, name); err != nil {
			return err
		}
		if err := calls.end(ctx); err != nil {
			return err
		}
		if hold, _, err = c.firstByte(ctx, name); err != nil {
			return err
		}
		l := load{title: "filling the log", rw: "randwrite", bs: 4 << 10, depth: 32, bytes: filled}
		if _, err := c.run(ctx, l, c.uris(name), size, 0, 2); err != nil {
			return err
		}
		c.client.stop()
		hold.Close()
		if err := c.serve("--force"); err != nil {
			return err
		}
		if err := c.listening(ctx); err != nil {
			return err
		}
		hold, killed, err := c.firstByte(ctx, name)
		if err != nil {
			return err
		}
		killedAttach, recovered, err := c.lastAttach()
		if err != nil {
			return err
		}
		hold.Close()
		if err := c.released(ctx, mds, name); err != nil {
			return err
		}
		both := func(a, b float64) string { return fmt.Sprintf("%s (%s)", significant(a), significant(b)) }
		attach.add(size.String(), both(ms(fresh), ms(freshAttach)), both(median(again), median(againAttach)), both(ms(killed), ms(killedAttach)), thousands(float64(recovered)), counted(calls.calls(kindClient)))
		c.client.stop()
	}
	return s.print(rates, attach)
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// counted is a list of calls, but for the lease that is renewed whatever happens.
func counted(calls map[string]float64) string {
	var l []string
	for _, method := range []string{"Volume", "Attach", "VolumeState", "RingAt", "Commit", "WatchVolume", "Relock", "Unlock"} {
		if n := calls[method]; n > 0 {
			l = append(l, fmt.Sprintf("%s %.0f", method, n))
		}
	}
	return strings.Join(l, ", ")
}

// state is that of a volume in the MDS, and how many bytes it takes there.
func state(ctx context.Context, mds torus.MetadataService, name string) (*models.VolumeState, int, error) {
	v, err := mds.Volume(ctx, name)
	if err != nil {
		return nil, 0, err
	}
	st, err := mds.VolumeState(ctx, torus.VolumeID(v.Id))
	if err != nil {
		return nil, 0, err
	}
	return st.VolumeState, proto.Size(st.VolumeState), nil
}

// listening waits until torusblk serves, and is connected to the peers.
func (c *cluster) listening(ctx context.Context) error {
	return eventually(ctx, startLimit, "torusblk serves", c.processes(), func(ctx context.Context) error {
		m, err := scrape(ctx, c.client.http)
		if err == nil && m.sum(`torus_etcd_base_ops_total`) == 0 {
			err = errors.New("it has not begun")
		}
		if err == nil {
			err = get(ctx, "http://"+c.client.http+"/readyz", discard)
		}
		return err
	})
}

// mapMemory is what a GiB of volume costs in the memory of torusblk once its map is there.
func (s *scale) mapMemory(ctx context.Context) error {
	t := &table{
		title: "Memory of the map",
		note: "Growth of torusblk's heap, collected, from the first part of the load to the end, with --cache-size 1GiB. Leaves are counted as the format has them: 2 MiB of the volume each. By default the map of a volume is bounded to 64 MiB, " +
			"and what is not in memory is read when it is needed.",
		head: []string{"load", "MiB of heap", "KiB / GiB of volume touched", "KiB / GiB of data", "bytes / leaf"},
	}
	c, remove, err := s.cluster(ctx, clusterOptions{peers: 3})
	if err != nil {
		return err
	}
	defer remove()
	if err := c.serve("--cache-size", "1GiB"); err != nil {
		return err
	}
	type part struct{ bytes, at, span byteSize } // so much data, from there on, within so much of the volume
	for _, x := range []struct {
		title     string
		rw        string
		bs, depth int
		// The first part makes whatever is made once: buffers, free lists, the map's upper nodes.
		first, rest part
	}{
		{"sequential, 4 GiB", "write", 1 << 20, 8, part{1 << 30, 0, 1 << 30}, part{4 << 30, 1 << 30, 4 << 30}},
		{"random, 128 MiB within 16 GiB", "randwrite", 4 << 10, 32, part{64 << 20, 0, 512 << 20}, part{128 << 20, 1 << 30, 16 << 30}},
		{"random, 128 MiB within 1,000 GiB", "randwrite", 4 << 10, 32, part{32 << 20, 0, 1000 << 30}, part{128 << 20, 0, 1000 << 30}},
	} {
		name := fmt.Sprintf("m%d", len(t.rows)+1)
		if err := c.create(ctx, 1000<<30, name); err != nil {
			return err
		}
		hold, err := c.attach(ctx, name)
		if err != nil {
			return err
		}
		var grown [2]uint64
		for i, p := range []part{x.first, x.rest} {
			l := load{title: x.title, rw: x.rw, bs: x.bs, depth: x.depth, bytes: p.bytes}
			args := append([]string{"--offset=" + strconv.FormatUint(uint64(p.at), 10)}, l.args(c.uris(name), p.span, 0, i+1)...)
			if _, err := runFio(ctx, c.dir, fillLimit, args); err != nil {
				return c.explain(err)
			}
			if err := c.rest(ctx); err != nil {
				return err
			}
			if grown[i], err = heap(ctx, c.client.http); err != nil {
				return err
			}
		}
		const leaf = 2 << 20
		leaves := touched(float64(x.rest.span)/leaf, float64(x.rest.bytes)/float64(x.bs), x.rw == "write")
		growth := float64(grown[1]) - float64(grown[0])
		s.say("%s: %.1f MiB", x.title, growth/(1<<20))
		t.add(x.title, fmt.Sprintf("%.1f", growth/(1<<20)), thousands(growth/1024/(float64(x.rest.span)/(1<<30))), thousands(growth/1024/(float64(x.rest.bytes)/(1<<30))), thousands(growth/leaves))
		hold.release()
	}
	return s.print(t)
}

// touched is how many of n leaves are expected to be touched by so many writes at random, or all by a sequential one.
func touched(n, writes float64, sequential bool) float64 {
	if sequential {
		return n
	}
	return n * (1 - math.Pow(1-1/n, writes))
}

func discard(r io.Reader) error {
	_, err := io.Copy(io.Discard, r)
	return err
}

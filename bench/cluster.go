package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// cluster is a Torus of its own on this machine: peers, the first with etcd inside, and one torusblk.
type cluster struct {
	dir, bin string
	etcd     string // HOST:PORT
	http     bool   // every process serves its metrics and profiles
	peers    []*process
	client   *process // torusblk; nil before serve
	socket   string   // where it serves volumes
}

type clusterOptions struct {
	peers     int
	peerSize  byteSize // of each
	blockSize byteSize // 0: the default
	http      bool
}

// startCluster starts peers, all in the ring. What runs when it fails is ended.
func startCluster(ctx context.Context, dir, bin string, o clusterOptions) (_ *cluster, err error) {
	c := &cluster{dir: dir, bin: bin, http: o.http, socket: filepath.Join(dir, "nbd.sock")}
	defer func() {
		if err != nil {
			c.stop()
		}
	}()
	if c.etcd, err = freeAddress(); err != nil {
		return nil, err
	}
	for i := range o.peers {
		n := strconv.Itoa(i + 1)
		args := []string{"--data-dir", filepath.Join(dir, "data"+n), "--peer-address", "tdp://127.0.0.1:0", "--size", o.peerSize.String()}
		if i == 0 {
			args = append(args, "--embed-etcd")
		}
		p, err := c.start("torusd-"+n, "torusd", args...)
		if err != nil {
			return nil, err
		}
		c.peers = append(c.peers, p)
		if i > 0 {
			continue
		}
		if err := eventually(ctx, startLimit, "torusctl init", c.peers, func(ctx context.Context) error {
			args := []string{"init", "--block-spec", "crc,rep=2"}
			if o.blockSize > 0 {
				args = append(args, "--block-size", o.blockSize.String())
			}
			_, err := c.ctl(ctx, args...)
			return err
		}); err != nil {
			return nil, err
		}
	}
	if err := eventually(ctx, startLimit, fmt.Sprintf("%d peers register", o.peers), c.peers, func(ctx context.Context) error {
		out, err := c.ctl(ctx, "-o", "json", "peer", "list")
		if err != nil {
			return err
		}
		var peers []struct{}
		if err := json.Unmarshal([]byte(out), &peers); err != nil {
			return err
		}
		if len(peers) != o.peers {
			return fmt.Errorf("there are %d", len(peers))
		}
		return nil
	}); err != nil {
		return nil, err
	}
	_, err = c.ctl(ctx, "peer", "add", "--all-peers")
	return c, err
}

func (c *cluster) start(name, program string, args ...string) (*process, error) {
	address := ""
	if c.http {
		var err error
		if address, err = freeAddress(); err != nil {
			return nil, err
		}
		args = append(args, "--http", address)
	}
	p, err := start(name, c.dir, append([]string{filepath.Join(c.bin, program), "--etcd", c.etcd}, args...)...)
	if err != nil {
		return nil, err
	}
	p.http = address
	return p, nil
}

// ctl runs torusctl.
func (c *cluster) ctl(ctx context.Context, args ...string) (string, error) {
	return command(ctx, c.dir, append([]string{filepath.Join(c.bin, "torusctl"), "-C", c.etcd, "--timeout", "2s"}, args...)...)
}

// serve starts torusblk, which attaches a volume when somebody connects to it.
func (c *cluster) serve(flags ...string) (err error) {
	c.client, err = c.start("torusblk", "torusblk", append([]string{"nbdserve", "-l", "unix:" + c.socket}, flags...)...)
	return err
}

// processes are all that run.
func (c *cluster) processes() []*process {
	if c.client == nil {
		return c.peers
	}
	return append(c.peers[:len(c.peers):len(c.peers)], c.client)
}

func (c *cluster) stop() {
	l := c.processes()
	for i := len(l) - 1; i >= 0; i-- {
		l[i].stop()
	}
}

// metrics are what a process says at /metrics: values by name, with the labels as they are printed.
type metrics map[string]float64

const scrapeLimit = 10 * time.Second

func get(ctx context.Context, url string, read func(io.Reader) error) error {
	ctx, cancel := context.WithTimeout(ctx, scrapeLimit)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, resp.Status)
	}
	if err := read(resp.Body); err != nil {
		return fmt.Errorf("%s: %w", url, err)
	}
	return nil
}

// scrape reads the metrics served at HOST:PORT.
func scrape(ctx context.Context, address string) (m metrics, err error) {
	err = get(ctx, "http://"+address+"/metrics", func(r io.Reader) error {
		m, err = parseMetrics(r)
		return err
	})
	return m, err
}

// parseMetrics reads Prometheus' text format, of which no line of ours has a time.
func parseMetrics(r io.Reader) (metrics, error) {
	m := metrics{}
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		line := lines.Text()
		if line == "" || line[0] == '#' {
			continue
		}
		i := strings.LastIndexByte(line, ' ')
		if i < 0 {
			return nil, fmt.Errorf("no value in %q", line)
		}
		v, err := strconv.ParseFloat(line[i+1:], 64)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", line, err)
		}
		m[line[:i]] = v
	}
	return m, lines.Err()
}

// sum adds up a metric over its labels.
func (m metrics) sum(name string) (sum float64) {
	for k, v := range m {
		if base, _, _ := strings.Cut(k, "{"); base == name {
			sum += v
		}
	}
	return sum
}

// heap is what is alive in the heap of a process, bytes: after two collections, as pools survive the first.
func heap(ctx context.Context, address string) (n uint64, err error) {
	if err := get(ctx, "http://"+address+"/debug/pprof/heap?gc=1&debug=1", discard); err != nil {
		return 0, err
	}
	const mark = "# HeapAlloc = "
	err = get(ctx, "http://"+address+"/debug/pprof/heap?gc=1&debug=1", func(r io.Reader) error {
		b, err := io.ReadAll(r)
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(b)) {
			if text, ok := strings.CutPrefix(line, mark); ok {
				n, err = strconv.ParseUint(strings.TrimSpace(text), 10, 64)
				return err
			}
		}
		return errors.New("no " + mark)
	})
	return n, err
}

package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// The processes of a cluster by what they do. The peer with etcd inside is not like the others.
type kind int

const (
	kindClient kind = iota // torusblk
	kindEtcd               // the first torusd
	kindPeer               // the other torusd, together
)

func (c *cluster) kind(name string) kind {
	switch {
	case c.client != nil && name == c.client.name:
		return kindClient
	case name == c.peers[0].name:
		return kindEtcd
	}
	return kindPeer
}

// span is what a cluster spent between two looks at it.
type span struct {
	c             *cluster
	seconds       float64
	before, after usage
	was, is       counters
	began         time.Time
}

// counters are what the processes say of themselves; nil without http.
type counters struct {
	etcd  metrics
	torus map[string]metrics // by process
}

func (c *cluster) usage() (usage, error) { return usageOf(c.processes()) }

func (c *cluster) counters(ctx context.Context) (n counters, err error) {
	if !c.http {
		return n, nil
	}
	if n.etcd, err = scrape(ctx, c.etcd); err != nil {
		return n, err
	}
	n.torus = map[string]metrics{}
	for _, p := range c.processes() {
		if n.torus[p.name], err = scrape(ctx, p.http); err != nil {
			return n, errors.Join(err, p.check())
		}
	}
	return n, nil
}

// begin looks at the counters before the clock starts, and end when it has stopped, since looking costs CPU time.
func (c *cluster) begin(ctx context.Context) (s span, err error) {
	s.c = c
	if s.was, err = c.counters(ctx); err != nil {
		return s, err
	}
	if s.before, err = c.usage(); err != nil {
		return s, err
	}
	s.began = time.Now()
	return s, nil
}

func (s *span) end(ctx context.Context) (err error) {
	s.seconds = time.Since(s.began).Seconds()
	if s.after, err = s.c.usage(); err != nil {
		return err
	}
	s.is, err = s.c.counters(ctx)
	return err
}

// cpu is the CPU seconds of processes of a kind, and how many those are.
func (s *span) cpu(k kind) (seconds float64, n int) {
	for name, after := range s.after {
		if s.c.kind(name) == k {
			seconds += after.cpuSeconds - s.before[name].cpuSeconds
			n++
		}
	}
	return seconds, n
}

// etcd is by how much a counter of etcd grew.
func (s *span) etcd(name string) float64 { return s.is.etcd.sum(name) - s.was.etcd.sum(name) }

// peers is by how much a counter of all peers together grew.
func (s *span) peers(name string) (sum float64) {
	for _, p := range s.c.peers {
		sum += s.is.torus[p.name].sum(name) - s.was.torus[p.name].sum(name)
	}
	return sum
}

// calls counts the calls of the metadata service that processes of a kind made, by method.
func (s *span) calls(k kind) map[string]float64 {
	const name = `torus_etcd_base_ops_total{kind="`
	out := map[string]float64{}
	for process, m := range s.is.torus {
		if s.c.kind(process) != k {
			continue
		}
		for key, v := range m {
			if method, ok := strings.CutPrefix(key, name); ok {
				if n := v - s.was.torus[process][key]; n > 0 {
					out[strings.TrimSuffix(method, `"}`)] += n
				}
			}
		}
	}
	return out
}

// memory of a kind of process: the mean.
func (c *cluster) memory(k kind) (mean memory, err error) {
	n := uint64(0)
	for _, p := range c.processes() {
		if c.kind(p.name) != k {
			continue
		}
		m, err := readMemory(p.cmd.Process.Pid)
		if err != nil {
			return mean, errors.Join(err, p.check())
		}
		mean.RSS += m.RSS
		mean.PSS += m.PSS
		mean.Own += m.Own
		n++
	}
	if n == 0 {
		return mean, fmt.Errorf("no process of kind %d", k)
	}
	return memory{RSS: mean.RSS / n, PSS: mean.PSS / n, Own: mean.Own / n}, nil
}

// rest waits until what is dirty is written and the servers do nothing much.
func (c *cluster) rest(ctx context.Context) error {
	if _, err := command(ctx, c.dir, "sync"); err != nil {
		return err
	}
	return quiet(ctx, func() (sum float64, err error) {
		u, err := c.usage()
		for _, p := range u {
			sum += p.cpuSeconds
		}
		return sum, err
	})
}

func (c *cluster) explain(err error) error { return explain(err, c.processes()) }

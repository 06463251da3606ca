package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

// bench is one run of everything.
type bench struct {
	*options
	dir         string
	progress    io.Writer
	contestants []*contestant
	samples     map[string]map[string][]sample // by cell, then by contestant: one a round
	memory      map[string]map[string]memory   // by contestant, then by process: at the end
}

func (b *bench) close() {
	for _, c := range b.contestants {
		c.stop()
	}
}

func (b *bench) say(format string, args ...any) {
	fmt.Fprintf(b.progress, format+"\n", args...)
}

// measure fills in samples and memory. What it has when it fails is right.
func (b *bench) measure(ctx context.Context) error {
	b.samples, b.memory = map[string]map[string][]sample{}, map[string]map[string]memory{}
	for _, name := range b.options.contestants {
		b.say("starting %s", name)
		c, err := b.start(ctx, name)
		if err != nil {
			return err
		}
		b.contestants = append(b.contestants, c)
	}
	for round := range b.rounds {
		for k, cell := range b.cells {
			for _, c := range b.contestants {
				if c.torus && (k == 0 || cell.fresh) || round == 0 && k == 0 {
					b.say("round %d/%d: writing %v to %s", round+1, b.rounds, b.size, c.name)
					if err := c.fill(ctx, b.dir, b.size); err != nil {
						return err
					}
				}
			}
			for i := range b.contestants {
				c := b.contestants[(i+round)%len(b.contestants)] // none is always the first
				s, err := b.one(ctx, cell, c, round)
				if err != nil {
					return err
				}
				if b.samples[cell.Name] == nil {
					b.samples[cell.Name] = map[string][]sample{}
				}
				b.samples[cell.Name][c.name] = append(b.samples[cell.Name][c.name], s)
				b.say("round %d/%d: %-17s %-5s %9.0f %s", round+1, b.rounds, cell.Name, c.name, cell.rate(s), cell.unit())
			}
		}
	}
	if err := b.remember(func(m *memory, now memory) { *m = now }); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(restFor):
	}
	if err := b.remember(func(m *memory, now memory) { m.Rest = now.RSS }); err != nil {
		return err
	}
	if b.profile != nil {
		return b.profiles(ctx)
	}
	return nil
}

// restFor is how long the servers have nothing to do before it is measured what memory they have at rest: Torus gives back every five seconds what was not used in
// the five seconds before.
var restFor = 11 * time.Second

// remember reads the memory of all servers.
func (b *bench) remember(set func(m *memory, now memory)) error {
	for _, c := range b.contestants {
		if b.memory[c.name] == nil {
			b.memory[c.name] = map[string]memory{}
		}
		for _, p := range c.servers {
			now, err := readMemory(p.cmd.Process.Pid)
			if err != nil {
				return errors.Join(err, p.check())
			}
			m := b.memory[c.name][p.name]
			set(&m, now)
			b.memory[c.name][p.name] = m
		}
	}
	return nil
}

// one measures a cell on a contestant.
func (b *bench) one(ctx context.Context, cell cell, c *contestant, seed int) (sample, error) {
	if err := b.settle(ctx, cell.reads()); err != nil {
		return sample{}, err
	}
	before, err := c.usage()
	if err != nil {
		return sample{}, err
	}
	r, err := runFio(ctx, b.dir, time.Duration(b.seconds)*time.Second+fioGrace, cell.fioArgs(c.target, b.size, b.seconds, seed+1))
	if err != nil {
		return sample{}, c.explain(fmt.Errorf("%s: %w", cell.Name, err))
	}
	after, err := c.usage()
	if err != nil {
		return sample{}, err
	}
	return newSample(r, before, after), nil
}

const (
	quietLook  = 200 * time.Millisecond
	quietLimit = 5 * time.Second
	// quietShare is how much of a CPU all servers together use when they rest: etcd and heartbeats.
	quietShare = 0.1
)

// settle lets nothing of the last measurement reach into the next: what is dirty is written, and the servers are given time
// to come to rest. Cold: then the page cache is dropped.
func (b *bench) settle(ctx context.Context, cold bool) error {
	if _, err := command(ctx, b.dir, "sync"); err != nil {
		return err
	}
	if err := quiet(ctx, b.cpuSeconds); err != nil {
		return err
	}
	if !cold {
		return nil
	}
	if _, err := command(ctx, b.dir, "sync"); err != nil {
		return err
	}
	return os.WriteFile(dropCaches, []byte("3"), 0)
}

// quiet waits, for a while, until the servers whose CPU seconds are given do nothing much.
func quiet(ctx context.Context, cpuSeconds func() (float64, error)) error {
	for began := time.Now(); time.Since(began) < quietLimit; {
		before, err := cpuSeconds()
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(quietLook):
		}
		after, err := cpuSeconds()
		if err != nil {
			return err
		}
		if after-before <= quietShare*quietLook.Seconds() {
			break
		}
	}
	return nil
}

const dropCaches = "/proc/sys/vm/drop_caches"

// cpuSeconds is what all servers have used so far.
func (b *bench) cpuSeconds() (sum float64, err error) {
	for _, c := range b.contestants {
		u, err := c.usage()
		if err != nil {
			return 0, err
		}
		for _, p := range u {
			sum += p.cpuSeconds
		}
	}
	return sum, nil
}

// profiles runs a cell once more, not counted, while every Torus process records its CPU profile.
func (b *bench) profiles(ctx context.Context) error {
	for _, c := range b.contestants {
		if !c.torus {
			continue
		}
		b.say("profiling %s during %s", c.name, b.profile.Name)
		done := make(chan error, len(c.servers))
		for _, p := range c.servers {
			path := filepath.Join(filepath.Dir(b.json), fmt.Sprintf("bench-%s-%s-%s.pprof", b.profile.Name, c.name, p.name))
			go func() { done <- fetchProfile(ctx, p.http, b.seconds, path) }()
		}
		_, err := b.one(ctx, *b.profile, c, b.rounds)
		for range c.servers {
			err = errors.Join(err, <-done)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func fetchProfile(ctx context.Context, address string, seconds int, path string) (err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(seconds)*time.Second+fioGrace)
	defer cancel()
	defer func() {
		if err != nil {
			err = fmt.Errorf("profile %s: %w", filepath.Base(path), err)
		}
	}()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://%s/debug/pprof/profile?seconds=%d", address, seconds), nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, resp.Body)
	return errors.Join(err, f.Close())
}

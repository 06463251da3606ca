package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// process is a server that was started. What it prints goes to a file.
type process struct {
	name   string
	cmd    *exec.Cmd
	log    string
	http   string // HOST:PORT of its profiles; empty: none
	exited chan struct{}
	err    error // after exited
}

// dying is for processes that must not outlive this one, and that end when this one says so, not when a terminal does.
func dying() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
}

// start starts a server in dir.
func start(name, dir string, args ...string) (*process, error) {
	p := &process{name: name, log: filepath.Join(dir, name+".log"), exited: make(chan struct{})}
	log, err := os.Create(p.log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p.cmd = exec.Command(args[0], args[1:]...) //nolint:noctx // stop ends it
	p.cmd.Dir, p.cmd.Stdout, p.cmd.Stderr, p.cmd.SysProcAttr = dir, log, log, dying()
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.exited)
	}()
	return p, nil
}

// check returns why the process has ended, or nil while it runs.
func (p *process) check() error {
	select {
	case <-p.exited:
		return fmt.Errorf("%s has ended (%v); its last words:\n%s", p.name, p.err, p.tail())
	default:
		return nil
	}
}

// tail is the end of what it printed, without what is merely good to know.
func (p *process) tail() string {
	b, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	lines = slices.DeleteFunc(lines, func(s string) bool { return strings.Contains(s, "level=INFO") })
	return strings.Join(lines[max(0, len(lines)-10):], "\n")
}

// stop ends it at once: what it stored is thrown away.
func (p *process) stop() {
	p.cmd.Process.Kill() //nolint:errcheck // it may have ended by itself
	<-p.exited
}

// explain adds what the processes say.
func explain(err error, processes []*process) error {
	for _, p := range processes {
		if ended := p.check(); ended != nil {
			err = errors.Join(err, ended)
		} else if words := p.tail(); words != "" {
			err = fmt.Errorf("%w\n%s says:\n%s", err, p.name, words)
		}
	}
	return err
}

func usageOf(processes []*process) (usage, error) {
	u := usage{}
	for _, p := range processes {
		one, err := readUsage(p.cmd.Process.Pid)
		if err != nil {
			return nil, errors.Join(err, p.check())
		}
		u[p.name] = one
	}
	return u, nil
}

// command runs a program to its end, in dir, and returns its standard output.
func command(ctx context.Context, dir string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	var out, errs bytes.Buffer
	cmd.Dir, cmd.Stdout, cmd.Stderr, cmd.SysProcAttr, cmd.WaitDelay = dir, &out, &errs, dying(), time.Second
	if err := cmd.Run(); err != nil {
		text := strings.TrimSpace(out.String() + errs.String())
		if len(text) > 1000 {
			text = text[:1000] + " …" // what went wrong first
		}
		return out.String(), fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), errors.Join(err, ctx.Err()), text)
	}
	return out.String(), nil
}

// eventually tries check until it succeeds; none of the processes may end meanwhile.
func eventually(ctx context.Context, limit time.Duration, what string, processes []*process, check func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		err := check(ctx)
		if err == nil {
			return nil
		}
		for _, p := range processes {
			if ended := p.check(); ended != nil {
				return ended
			}
		}
		select {
		case <-ctx.Done():
			for _, p := range processes {
				err = fmt.Errorf("%w\n%s says:\n%s", err, p.name, p.tail())
			}
			return fmt.Errorf("%s: not within %v: %w", what, limit, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// freeAddress is one that nobody listens at now. Its port lies below those the kernel gives to outgoing connections.
func freeAddress() (string, error) {
	for range 100 {
		addr := fmt.Sprintf("127.0.0.1:%d", 10_000+rand.IntN(20_000))
		if l, err := net.Listen("tcp", addr); err == nil {
			return addr, l.Close()
		}
	}
	return "", errors.New("no free port on 127.0.0.1")
}

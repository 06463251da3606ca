package e2e

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
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// starter is the one thread that starts processes. They are told to die with it (Pdeathsig), so that nothing is left
// behind even when the test binary panics; hence the thread must never end.
var starter = sync.OnceValue(func() chan func() {
	c := make(chan func())
	go func() {
		runtime.LockOSThread()
		for f := range c {
			f()
		}
	}()
	return c
})

func startDying(cmd *exec.Cmd) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	result := make(chan error)
	starter() <- func() { result <- cmd.Start() }
	return <-result
}

// process is a program that is started, killed and started again. What it prints goes to one file.
type process struct {
	name string
	args []string
	log  string
	net  *namespace // nil: this machine's

	mu     sync.Mutex
	cmd    *exec.Cmd
	exited chan struct{}
	err    error
}

var running struct {
	sync.Mutex
	all map[*process]struct{}
}

// killAll kills every process that still runs.
func killAll() {
	running.Lock()
	var all []*process
	for p := range running.all {
		all = append(all, p)
	}
	running.Unlock()
	for _, p := range all {
		p.kill()
	}
}

// newProcess is a program that is not running yet; its log is in dir.
func newProcess(dir, name string, args ...string) *process {
	return &process{name: name, args: args, log: filepath.Join(dir, name+".log")}
}

func (p *process) start(t testing.TB) {
	t.Helper()
	if err := p.tryStart(); err != nil {
		t.Fatal(err)
	}
}

func (p *process) tryStart() error {
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	fmt.Fprintf(log, "--- %s %s\n", time.Now().Format("15:04:05.000"), strings.Join(p.args, " "))
	args := p.net.enter(p.args)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := startDying(cmd); err != nil {
		return fmt.Errorf("%s: %w", p.name, err)
	}
	exited := make(chan struct{})
	p.mu.Lock()
	p.cmd, p.exited = cmd, exited
	p.mu.Unlock()
	running.Lock()
	if running.all == nil {
		running.all = map[*process]struct{}{}
	}
	running.all[p] = struct{}{}
	running.Unlock()
	go func() {
		err := cmd.Wait()
		p.mu.Lock()
		p.err = err
		p.mu.Unlock()
		running.Lock()
		delete(running.all, p)
		running.Unlock()
		close(exited)
	}()
	return nil
}

func (p *process) state() (*exec.Cmd, chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cmd, p.exited
}

// pid is its process id; it has been started.
func (p *process) pid() int {
	cmd, _ := p.state()
	return cmd.Process.Pid
}

// alive says whether it runs.
func (p *process) alive() bool {
	cmd, exited := p.state()
	if cmd == nil {
		return false
	}
	select {
	case <-exited:
		return false
	default:
		return true
	}
}

func (p *process) signal(sig syscall.Signal) {
	if cmd, _ := p.state(); cmd != nil && p.alive() {
		cmd.Process.Signal(sig) //nolint:errcheck // it may have ended just now
	}
}

// kill ends it at once (SIGKILL) and waits until it is gone.
func (p *process) kill() {
	p.signal(syscall.SIGKILL)
	p.wait()
}

func (p *process) freeze() { p.signal(syscall.SIGSTOP) }
func (p *process) thaw()   { p.signal(syscall.SIGCONT) }

// wait waits for its end and returns what came of it.
func (p *process) wait() error {
	if _, exited := p.state(); exited != nil {
		<-exited
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// interrupt asks it to end and waits for that, no longer than limit.
func (p *process) interrupt(t *testing.T, sig syscall.Signal, limit time.Duration) {
	t.Helper()
	began := time.Now()
	p.signal(sig)
	_, exited := p.state()
	select {
	case <-exited:
	case <-time.After(limit):
		t.Fatalf("%s still runs %v after %v", p.name, limit, sig)
	}
	if err := p.wait(); err != nil {
		t.Errorf("%s after %v: %v", p.name, sig, err)
	}
	t.Logf("%s ended %v after %v", p.name, time.Since(began).Round(time.Millisecond), sig)
}

// mark is a place in the log: what was printed so far lies before it.
func (p *process) mark() int64 {
	st, err := os.Stat(p.log)
	if err != nil {
		return 0
	}
	return st.Size()
}

// printed is what was printed since mark.
func (p *process) printed(mark int64) string {
	b, err := os.ReadFile(p.log)
	if err != nil || int64(len(b)) < mark {
		return ""
	}
	return string(b[mark:])
}

// waitPrinted waits until it has printed something that matches, since mark.
func (p *process) waitPrinted(t *testing.T, mark int64, limit time.Duration, re string) string {
	t.Helper()
	r := regexp.MustCompile(re)
	var found string
	eventually(t, limit, fmt.Sprintf("%s prints %q", p.name, re), func() error {
		if found = r.FindString(p.printed(mark)); found == "" {
			return errNotYet
		}
		return nil
	})
	return found
}

// tail is the end of what was printed.
func (p *process) tail(lines int) string {
	all := strings.Split(strings.TrimRight(p.printed(0), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// logOnFailure prints the tails of logs if the test fails.
func logOnFailure(t *testing.T, processes func() []*process) {
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		for _, p := range processes() {
			t.Logf("the end of %s's log:\n%s", p.name, p.tail(40))
		}
	})
}

// eventually tries check until it returns nil; limit is what fails the test.
func eventually(t testing.TB, limit time.Duration, what string, check func() error) time.Duration {
	t.Helper()
	began := time.Now()
	for {
		err := check()
		took := time.Since(began)
		if err == nil {
			return took
		}
		if took > limit {
			t.Fatalf("%s: not within %v: %v", what, limit, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// tool runs a program that must succeed and returns its standard output.
func tool(t testing.TB, args ...string) string {
	t.Helper()
	out, err := try(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// toolTimeout bounds any one run of a tool that nothing else does.
const toolTimeout = 3 * time.Minute

func try(ctx context.Context, args ...string) (string, error) {
	if _, bounded := ctx.Deadline(); !bounded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, toolTimeout)
		defer cancel()
	}
	cmd := exec.Command(args[0], args[1:]...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.WaitDelay = time.Second
	cmd.Dir = shared.dir
	if err := startDying(cmd); err != nil {
		return "", fmt.Errorf("%s: %w", args[0], err)
	}
	stop := context.AfterFunc(ctx, func() { cmd.Process.Kill() }) //nolint:errcheck // it may have ended just now
	err := cmd.Wait()
	if !stop() {
		err = errors.Join(err, ctx.Err())
	}
	if err != nil {
		return out.String(), fmt.Errorf("%s: %w\n%s%s", strings.Join(args, " "), err, clip(out.String()), clip(errs.String()))
	}
	return out.String(), nil
}

// clip keeps the end of a long text.
func clip(s string) string { return s[max(0, len(s)-4000):] }

// freePort finds a port to listen on. It lies below those the kernel gives to outgoing connections: else one of these
// could take it while its owner is dead.
func freePort(t testing.TB) string {
	t.Helper()
	for range 1000 {
		addr := fmt.Sprintf("127.0.0.1:%d", 10000+rand.IntN(20000))
		l, err := net.Listen("tcp", addr)
		if err != nil {
			continue
		}
		l.Close()
		return addr
	}
	t.Fatal("no free port")
	return ""
}

var errNotYet = errors.New("not yet")

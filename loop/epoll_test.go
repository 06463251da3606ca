package loop

import (
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// startEpoll runs a loop in a goroutine of its own until the test ends.
func startEpoll(t testing.TB) *Epoll {
	t.Helper()
	e, err := NewEpoll(nil)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error)
	go func() { ended <- e.Run() }()
	t.Cleanup(func() {
		e.Stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

// on runs fn on the loop and waits for it.
func on(e *Epoll, fn func()) {
	done := make(chan struct{})
	e.Post(func() { fn(); close(done) })
	<-done
}

// Posts of one goroutine keep their order, none is lost, and the loop runs one at a time.
func TestEpollPost(t *testing.T) {
	e := startEpoll(t)
	const goroutines, each = 8, 2000
	last := make([]int, goroutines) // no lock: the race detector proves the loop is single-threaded
	total := 0
	var wg sync.WaitGroup
	for g := range goroutines {
		wg.Go(func() {
			for i := range each {
				e.Post(func() {
					if last[g] != i {
						t.Errorf("goroutine %d: post %d ran when %d was due", g, i, last[g])
					}
					last[g] = i + 1
					total++
				})
				if i%100 == 0 {
					on(e, func() {}) // so that the loop goes to sleep now and then
				}
			}
		})
	}
	wg.Wait()
	on(e, func() {})
	if total != goroutines*each {
		t.Errorf("%d posts ran, want %d", total, goroutines*each)
	}
}

func TestEpollTimers(t *testing.T) {
	e := startEpoll(t)
	var fired []int
	done := make(chan struct{})
	on(e, func() {
		start := e.Now()
		for _, ms := range []int{20, 5, 10} {
			d := time.Duration(ms) * time.Millisecond
			e.After(d, func() {
				if e.Now()-start < d {
					t.Errorf("the timer of %v fired after %v", d, e.Now()-start)
				}
				fired = append(fired, ms)
			})
		}
		e.After(7*time.Millisecond, func() { t.Error("a stopped timer fired") }).Stop()
		e.After(300*time.Microsecond, func() { fired = append(fired, 0) }) // below a millisecond
		var same *Timer
		e.After(25*time.Millisecond, func() { same.Stop(); same.Stop() })
		same = e.After(25*time.Millisecond, func() { t.Error("a timer stopped at its own instant fired") })
		e.After(26*time.Millisecond, func() { close(done) })
	})
	<-done
	if want := []int{0, 5, 10, 20}; !slices.Equal(fired, want) {
		t.Errorf("fired %v, want %v", fired, want)
	}
}

// What is deferred runs at the end of the turn, in order, along with what it defers itself.
func TestEpollDefer(t *testing.T) {
	e := startEpoll(t)
	var s string
	on(e, func() {
		e.Post(func() { s += "p" })
		e.Defer(func() { s += "1"; e.Defer(func() { s += "3" }) })
		e.Defer(func() { s += "2" })
	})
	on(e, func() {})
	if s != "123p" {
		t.Errorf("order %q", s)
	}
}

// Jobs: each Work and Done once, Done on the loop, never more helpers than the bound.
func TestEpollOffload(t *testing.T) {
	e := startEpoll(t)
	const n = 500
	var running, most, works atomic.Int32
	dones := 0
	finished := make(chan struct{})
	gate := make(chan struct{})
	on(e, func() {
		for range n {
			e.Offload(Func(func() {
				now := running.Add(1)
				for m := most.Load(); now > m && !most.CompareAndSwap(m, now); m = most.Load() {
				}
				works.Add(1)
				<-gate
				running.Add(-1)
			}, func() {
				if dones++; dones == n {
					close(finished)
				}
			}))
		}
	})
	for running.Load() < maxHelpers {
		time.Sleep(100 * time.Microsecond)
	}
	close(gate)
	<-finished
	if works.Load() != n || most.Load() != maxHelpers {
		t.Errorf("%d jobs of %d, at most %d at once, want %d", works.Load(), n, most.Load(), maxHelpers)
	}
	taskOnEpoll(t, e)
}

// Helpers end when idle, and a job that comes at that very moment is not lost.
func TestEpollHelpersEnd(t *testing.T) {
	e := startEpoll(t)
	on(e, func() { e.pool.idleFor = 20 * time.Microsecond })
	r := rand.New(rand.NewPCG(1, 1))
	for round := range 3000 {
		n := 1 + r.IntN(4)
		done := make(chan struct{}, n)
		on(e, func() {
			for range n {
				e.Offload(Func(func() {}, func() { done <- struct{}{} }))
			}
		})
		for range n {
			select {
			case <-done:
			case <-time.After(10 * time.Second):
				t.Fatalf("round %d: a job was lost", round)
			}
		}
		for end := time.Now().Add(time.Duration(r.IntN(100)) * time.Microsecond); time.Now().Before(end); {
			runtime.Gosched()
		}
	}
	e.pool.wg.Wait() // all end
	if e.pool.n != 0 || len(e.pool.idle) != 0 {
		t.Errorf("%d helpers, %d idle", e.pool.n, len(e.pool.idle))
	}
}

// taskOnEpoll runs a task on the real loop.
func taskOnEpoll(t *testing.T, e *Epoll) {
	finished := make(chan struct{})
	on(e, func() {
		Go(e, func(tk *Task) {
			before := e.Now()
			tk.Sleep(2 * time.Millisecond)
			n := 0
			tk.Call(func() { n++ })
			if n != 1 || e.Now()-before < 2*time.Millisecond {
				t.Errorf("n %d after %v", n, e.Now()-before)
			}
			close(finished)
		})
	})
	<-finished
}

// Stop ends Run, what was posted meanwhile runs in the next Run, and after Close nothing runs.
func TestEpollStopClose(t *testing.T) {
	e, err := NewEpoll(nil)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	e.Defer(func() { n++ })
	e.After(0, func() { n++ })
	e.Post(func() { n++; e.Offload(Func(func() {}, func() { n++; e.Stop() })) })
	if err := e.Run(); err != nil {
		t.Fatal(err)
	}
	if n != 4 {
		t.Errorf("%d of 4 callbacks ran", n)
	}
	e.Post(func() { n++; e.Stop() })
	if err := e.Run(); err != nil || n != 5 {
		t.Errorf("second Run: %v, %d callbacks", err, n)
	}
	e.Stop()
	if err := e.Run(); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 1000 {
				e.Post(func() {})
			}
		})
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	wg.Wait()
	e.Post(func() { t.Error("ran after Close") })
	e.Offload(Func(func() { t.Error("worked after Close") }, nil))
	if err := e.Close(); err != nil {
		t.Error("second Close:", err)
	}
}

// readyFunc is an FD made of a function.
type readyFunc func(events uint32)

func (f readyFunc) Ready(events uint32) { f(events) }

func pair(t testing.TB) (a, b int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	return fds[0], fds[1]
}

// A descriptor closed earlier in the same batch gets no event, nor does the one that took its number and slot.
func TestEpollStaleEvent(t *testing.T) {
	e, err := NewEpoll(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	a1, b1 := pair(t)
	a2, b2 := pair(t)
	defer unix.Close(b1)
	defer unix.Close(b2)
	var r [2]*Registration
	events := 0
	var replaced *Registration
	ready := func(self int) readyFunc {
		return func(uint32) {
			events++
			other := r[1-self]
			other.Close()
			other.Close()
			x, y := pair(t) // takes the number
			unix.Write(y, []byte("x"))
			unix.Close(y)
			if x != other.fd {
				t.Fatalf("descriptor %d was not reused, but %d", other.fd, x)
			}
			replaced, err = e.Add(x, unix.EPOLLIN, readyFunc(func(uint32) { e.Stop(); replaced.Remove() }))
			if err != nil {
				t.Fatal(err)
			}
			if replaced.slot != other.slot {
				t.Fatalf("slot %d was not reused, but %d", other.slot, replaced.slot)
			}
			r[self].Remove()
		}
	}
	for i, fd := range []int{a1, a2} {
		if r[i], err = e.Add(fd, unix.EPOLLIN, ready(i)); err != nil {
			t.Fatal(err)
		}
	}
	unix.Write(b1, []byte("x"))
	unix.Write(b2, []byte("x"))
	n, err := e.wait()
	if err != nil || n != 2 {
		t.Fatalf("%d events, %v", n, err)
	}
	early := replaced
	e.turn(n)
	if events != 1 || early != nil || e.stop.Load() {
		t.Errorf("%d descriptors were told, the replacement in the same batch: %v", events, e.stop.Load())
	}
	if err := e.Run(); err != nil { // now the replacement hears of its own
		t.Fatal(err)
	}
	if replaced.Modify(unix.EPOLLOUT) == nil {
		t.Error("a removed registration was modified")
	}
	if _, err := e.Add(1<<20, unix.EPOLLIN, nil); err == nil {
		t.Error("a descriptor that is not open was added")
	}
}

// An idle loop sleeps.
func TestEpollIdle(t *testing.T) {
	e := startEpoll(t)
	on(e, func() { e.After(time.Hour, func() {}) })
	cpu := func() time.Duration {
		var ru syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &ru); err != nil {
			t.Fatal(err)
		}
		return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
	}
	const span = 300 * time.Millisecond
	before := cpu()
	time.Sleep(span)
	if used := cpu() - before; used > span/4 {
		t.Errorf("idle for %v took %v of CPU", span, used)
	}
}

func BenchmarkEpollPost(b *testing.B) {
	b.ReportAllocs()
	e := startEpoll(b)
	back := make(chan struct{})
	fn := func() { back <- struct{}{} }
	for b.Loop() {
		e.Post(fn)
		<-back
	}
}

type benchJob struct {
	e    *Epoll
	left int
	done chan struct{}
}

func (j *benchJob) Work() {}
func (j *benchJob) Done() {
	if j.left--; j.left == 0 {
		close(j.done)
		return
	}
	j.e.Offload(j)
}

func BenchmarkEpollOffload(b *testing.B) {
	b.ReportAllocs()
	e := startEpoll(b)
	j := &benchJob{e: e, left: b.N, done: make(chan struct{})}
	b.ResetTimer()
	e.Post(func() { e.Offload(j) })
	<-j.done
}

func BenchmarkTimer(b *testing.B) {
	b.ReportAllocs()
	e, err := NewEpoll(nil)
	if err != nil {
		b.Fatal(err)
	}
	defer e.Close()
	for i := range 1000 {
		e.After(time.Duration(i)*time.Hour, func() {})
	}
	fn := func() {}
	for b.Loop() {
		e.After(time.Minute, fn).Stop()
	}
}

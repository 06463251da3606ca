package loop

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// scenario runs a busy little world and returns everything that happened, in order.
func scenario(seed uint64) []string {
	v := NewVirtual(seed)
	var log []string
	v.SetTrace(func(e Event) { log = append(log, fmt.Sprintf("%v %s %s", e.At, e.Loop, e.Kind)) })
	var loops []*VirtualLoop
	for i := range 5 {
		loops = append(loops, v.NewLoop(fmt.Sprint("p", i)))
	}
	var hop func(l *VirtualLoop, left int) func()
	hop = func(l *VirtualLoop, left int) func() {
		return func() {
			log = append(log, fmt.Sprintf("hop %s %d", l.Name(), left))
			if left == 0 {
				return
			}
			to := loops[v.Rand().IntN(len(loops))]
			switch left % 3 {
			case 0:
				to.Post(hop(to, left-1))
			case 1:
				to.After(time.Duration(v.Rand().IntN(3))*time.Microsecond, hop(to, left-1))
			default:
				to.Offload(Func(func() {}, hop(to, left-1)))
			}
			l.Defer(func() { log = append(log, "defer "+l.Name()) })
		}
	}
	for range 20 {
		for _, l := range loops {
			l.Post(hop(l, 50))
		}
	}
	v.At(2*time.Millisecond, loops[3].Kill)
	v.Run(nil, time.Minute)
	return log
}

// The same seed gives the same history, another seed another one.
func TestVirtualDeterministic(t *testing.T) {
	a, b, c := scenario(1), scenario(1), scenario(2)
	if len(a) < 2000 {
		t.Fatalf("only %d events: the scenario is not one", len(a))
	}
	if !slices.Equal(a, b) {
		t.Error("two runs of one seed differ")
	}
	if slices.Equal(a, c) {
		t.Error("two seeds gave one history")
	}
}

// Events of one loop keep their order; those of two loops at one instant do not depend on who asked first.
func TestVirtualOrder(t *testing.T) {
	interleavings := map[string]bool{}
	for seed := range uint64(64) {
		v := NewVirtual(seed)
		a, b := v.NewLoop("a"), v.NewLoop("b")
		var s string
		for _, l := range []*VirtualLoop{a, b} {
			for i := range 3 {
				l.Post(func() { s += fmt.Sprint(l.Name(), i, " ") })
			}
		}
		v.Run(nil, 0)
		var order [2]string
		for i := 0; i+2 < len(s)+1; i += 3 {
			order[s[i]-'a'] += s[i+1 : i+2]
		}
		if order != [2]string{"012", "012"} {
			t.Fatalf("seed %d: order within a loop broken: %s", seed, s)
		}
		interleavings[s] = true
	}
	if len(interleavings) < 10 { // of 20
		t.Errorf("64 seeds gave only %d interleavings", len(interleavings))
	}
}

func TestVirtualTimers(t *testing.T) {
	v := NewVirtual(1)
	l := v.NewLoop("l")
	var fired []time.Duration
	for _, ms := range []int{30, 10, 20} {
		l.After(time.Duration(ms)*time.Millisecond, func() { fired = append(fired, l.Now()) })
	}
	if v.Run(nil, 15*time.Millisecond) {
		t.Error("a nil condition held")
	}
	if v.Now() != 15*time.Millisecond || len(fired) != 1 {
		t.Errorf("after 15 ms: now %v, fired %v", v.Now(), fired)
	}
	if !v.Run(func() bool { return len(fired) == 2 }, time.Hour) || v.Now() != 20*time.Millisecond {
		t.Errorf("the condition was met at %v, fired %v", v.Now(), fired)
	}
	v.RunFor(time.Second)
	want := []time.Duration{10 * time.Millisecond, 20 * time.Millisecond, 30 * time.Millisecond}
	if !slices.Equal(fired, want) {
		t.Errorf("fired %v, want %v", fired, want)
	}
	if v.Now() != 1020*time.Millisecond {
		t.Errorf("RunFor ended at %v", v.Now())
	}
	if v.Run(func() bool { return false }, time.Hour); v.Now() != 1020*time.Millisecond {
		t.Errorf("Run moved time to %v with nothing to do", v.Now())
	}
}

func TestVirtualStop(t *testing.T) {
	v := NewVirtual(1)
	l := v.NewLoop("l")
	fail := func() { t.Error("a stopped timer fired") }
	a := l.After(time.Millisecond, fail)
	a.Stop()
	a.Stop()
	var c *Timer
	l.After(time.Millisecond, func() { c.Stop() }) // due at the same instant, before it
	c = l.After(time.Millisecond, fail)
	(*Timer)(nil).Stop()
	fired := 0
	var d *Timer
	d = l.After(time.Millisecond, func() { fired++; d.Stop() })
	v.RunFor(time.Second)
	d.Stop()
	if fired != 1 {
		t.Errorf("the timer not stopped fired %d times", fired)
	}
}

// A killed loop does nothing any more, and nobody else is disturbed.
func TestVirtualKill(t *testing.T) {
	for seed := range uint64(50) {
		v := NewVirtual(seed)
		l, other := v.NewLoop("l"), v.NewLoop("other")
		fail := func() { t.Error("a killed loop ran something") }
		timers, want := 0, 0
		for i := range 40 {
			d := time.Duration(v.Rand().IntN(1000)+10) * time.Microsecond
			if i%3 == 0 {
				l.After(d, fail)
			} else {
				want++
				other.After(d, func() {
					if timers++; other.Now() != v.Now() {
						t.Error("clocks differ")
					}
				})
			}
		}
		for range virtualHelpers + 5 {
			l.Offload(Func(fail, fail))
		}
		l.Post(func() {
			l.Defer(fail)
			l.Post(fail)
			l.Kill()
			l.Kill()
			l.Post(fail)
			l.After(0, fail).Stop()
			l.After(0, fail)
			l.Defer(fail)
			l.Offload(Func(fail, fail))
		})
		v.RunFor(time.Second)
		if timers != want {
			t.Fatalf("seed %d: %d of %d timers of the other loop fired", seed, timers, want)
		}
		if !l.Dead() || other.Dead() {
			t.Fatal("Dead is wrong")
		}
	}
}

// Work takes the time that was set, jobs are started in order, no more than 32 at once, and each is done once.
func TestVirtualOffload(t *testing.T) {
	v := NewVirtual(1)
	v.SetOffloadDelay(func(*rand.Rand) time.Duration { return time.Millisecond })
	l := v.NewLoop("l")
	const n = 100
	var worked, done []int
	for i := range n {
		l.Offload(Func(func() { worked = append(worked, i) }, func() {
			if done = append(done, i); len(worked) < len(done) {
				t.Error("Done before Work")
			}
		}))
	}
	v.RunFor(time.Millisecond)
	if len(done) != virtualHelpers {
		t.Errorf("%d jobs done after one delay, want %d", len(done), virtualHelpers)
	}
	v.RunFor(3 * time.Millisecond)
	if len(done) != n || !slices.IsSorted(worked) || !slices.IsSorted(done) {
		t.Errorf("worked %v, done %v", worked, done)
	}
}

// What is deferred runs at the end of the turn, before any other event of the loop, and may defer more.
func TestVirtualDefer(t *testing.T) {
	v := NewVirtual(1)
	l := v.NewLoop("l")
	var s string
	l.Defer(func() { s += "outside " })
	l.Post(func() {
		l.Post(func() { s += "next" })
		l.Defer(func() { s += "d1 "; l.Defer(func() { s += "d2 " }) })
		s += "turn "
	})
	v.Run(nil, 0)
	if s != "outside turn d1 d2 next" {
		t.Error(s)
	}
}

func TestTask(t *testing.T) {
	v := NewVirtual(1)
	l := v.NewLoop("l")
	var s string
	finished := false
	Go(l, func(t *Task) {
		t.Sleep(time.Millisecond)
		s += fmt.Sprint(t.Loop().Now(), " ")
		t.Wait(func(wake func()) { wake() }) // before start returns
		t.Call(func() { s += "call " })
		t.All(0, nil)
		t.All(3, func(i int, done func()) {
			if i == 1 {
				done() // at once
				return
			}
			l.After(time.Duration(i+1)*time.Millisecond, func() { s += fmt.Sprint(i, " "); done() })
		})
		t.All(2, func(_ int, done func()) { done() })
		finished = true
	})
	if finished || s != "" {
		t.Error("the task did not wait")
	}
	v.RunFor(time.Second)
	if !finished || s != "1ms call 0 2 " {
		t.Errorf("finished %v: %q", finished, s)
	}
}

// Many tasks at once: each sees its own waits in order.
func TestTaskMany(t *testing.T) {
	v := NewVirtual(7)
	left := 200
	for i := range left {
		Go(v.NewLoop(fmt.Sprint(i%3)), func(t *Task) {
			for range 20 {
				t.Sleep(time.Duration(v.Rand().IntN(100)) * time.Microsecond)
				t.Call(func() {})
			}
			left--
		})
	}
	if !v.Run(func() bool { return left == 0 }, time.Minute) {
		t.Errorf("%d tasks did not finish", left)
	}
}

// Close unwinds what waits, finished or killed, and lets no panic of a task go unseen.
func TestVirtualClose(t *testing.T) {
	goroutines := runtime.NumGoroutine()
	v := NewVirtual(1)
	alive, killed := v.NewLoop("alive"), v.NewLoop("killed")
	unwound := 0
	for i := range 30 {
		l := alive
		if i%2 == 0 {
			l = killed
		}
		Go(l, func(t *Task) {
			defer func() {
				unwound++
				t.Sleep(time.Second) // a wait while being unwound ends, too
			}()
			t.Sleep(time.Duration(i) * time.Millisecond)
			for {
				t.Sleep(time.Hour)
			}
		})
	}
	Go(alive, func(t *Task) { t.Sleep(0) })
	v.RunFor(time.Millisecond)
	killed.Kill()
	v.RunFor(time.Second)
	if unwound != 0 || len(v.tasks) != 30 {
		t.Errorf("%d unwound early, %d tasks", unwound, len(v.tasks))
	}
	v.Close()
	v.Close()
	alive.Post(func() { t.Error("ran after Close") })
	alive.After(0, func() { t.Error("ran after Close") }).Stop()
	v.RunFor(time.Hour)
	if unwound != 30 {
		t.Errorf("%d of 30 tasks were unwound", unwound)
	}
	if n := runtime.NumGoroutine(); n > goroutines {
		t.Errorf("%d goroutines, %d before", n, goroutines)
	}

	defer func() {
		if p := recover(); p != "mine" {
			t.Errorf("recovered %v, want the task's panic", p)
		}
	}()
	w := NewVirtual(1)
	Go(w.NewLoop("l"), func(t *Task) { t.Sleep(1); panic("mine") })
	w.RunFor(time.Second)
}

func BenchmarkVirtual(b *testing.B) {
	b.ReportAllocs()
	v := NewVirtual(1)
	left := b.N
	for i := range 10 {
		l := v.NewLoop(fmt.Sprint(i))
		var again func()
		again = func() {
			if left--; left > 0 {
				l.Post(again)
			}
		}
		l.Post(again)
	}
	v.Run(nil, 0)
}

// The heap gives timers back in order, whatever is removed from its middle.
func TestTimerHeap(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		var h timerHeap
		n := r.IntN(100)
		var all []*Timer
		for i := range n {
			tm := &Timer{at: time.Duration(r.IntN(20)), seq: uint64(i)}
			all = append(all, tm)
			h.push(tm)
		}
		removed := 0
		for _, tm := range all {
			if r.IntN(3) == 0 {
				if h.remove(tm.index) != tm {
					t.Fatal("removed another timer")
				}
				removed++
			}
		}
		var last *Timer
		for len(h) > 0 {
			for i, tm := range h {
				if tm.index != i {
					t.Fatal("a timer does not know where it is")
				}
			}
			tm := h.remove(0)
			if last != nil && tm.before(last) {
				t.Fatal("out of order")
			}
			last = tm
			removed++
		}
		if removed != n {
			t.Fatalf("%d of %d timers came back", removed, n)
		}
	}
}

// A paused loop runs nothing, and afterwards everything that has become due, in order; others go on.
func TestVirtualPause(t *testing.T) {
	v := NewVirtual(1)
	a, b := v.NewLoop("a"), v.NewLoop("b")
	var ran []string
	say := func(what string) func() { return func() { ran = append(ran, what) } }
	a.Post(say("posted before"))
	a.After(time.Millisecond, say("timer"))
	a.Offload(Func(say("work"), say("done")))
	a.Pause()
	a.Post(say("posted after"))
	b.After(2*time.Millisecond, say("other"))
	v.RunFor(10 * time.Millisecond)
	if got := strings.Join(ran, ", "); got != "other" {
		t.Fatalf("while paused: %s", got)
	}
	a.Resume()
	v.RunFor(10 * time.Millisecond)
	if got := strings.Join(ran, ", "); got != "other, posted before, posted after, work, timer, done" {
		t.Fatalf("after: %s", got)
	}
	a.Post(say("never"))
	a.Pause()
	a.Kill()
	a.Resume()
	v.RunFor(time.Millisecond)
	if len(ran) != 6 {
		t.Fatal("a killed loop runs")
	}
}

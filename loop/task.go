package loop

import (
	"iter"
	"time"
)

// Task is a coroutine on a Loop: code that reads from top to bottom and waits without blocking the
// loop. For the control path (attach, checkpoint), where order matters more than nanoseconds.
// It runs only while the loop has called it, so it shares the loop's state without locks; between
// two waits nothing else runs.
type Task struct {
	l      Loop
	next   func() (struct{}, bool)
	stop   func()
	yield  func(struct{}) bool
	woken  bool // the wait ended before the task got to yield
	parked bool
	index  int // among those of its keeper
}

// taskKeeper is a loop that ends tasks which would wait for ever: those of simulated processes that were killed.
type taskKeeper interface {
	keep(*Task)
	forget(*Task)
}

// taskEnded unwinds a task that is ended in a wait.
type taskEnded struct{}

// Go starts fn as a task on l, at once, and returns when it first waits. Call it on the loop.
func Go(l Loop, fn func(*Task)) {
	t := &Task{l: l}
	keeper, _ := l.(taskKeeper)
	t.next, t.stop = iter.Pull(func(yield func(struct{}) bool) {
		t.yield = yield
		defer func() {
			if keeper != nil {
				keeper.forget(t)
			}
			if p := recover(); p != nil && p != (any)(taskEnded{}) {
				panic(p)
			}
		}()
		fn(t)
	})
	if keeper != nil {
		keeper.keep(t)
	}
	t.next()
}

// Loop returns the loop the task runs on.
func (t *Task) Loop() Loop { return t.l }

// Wait calls start with a function that ends the wait, and returns when that has been called, on the
// loop, exactly once. It may be called before start returns.
func (t *Task) Wait(start func(wake func())) {
	t.woken, t.parked = false, false
	start(func() {
		if !t.parked {
			t.woken = true
			return
		}
		t.parked = false
		t.next()
	})
	if t.woken {
		return
	}
	t.parked = true
	if !t.yield(struct{}{}) {
		panic(taskEnded{})
	}
}

// Sleep waits for d.
func (t *Task) Sleep(d time.Duration) {
	t.Wait(func(wake func()) { t.l.After(d, wake) })
}

// Call runs work on a helper thread and waits for it.
func (t *Task) Call(work func()) {
	t.Wait(func(wake func()) { t.l.Offload(Func(work, wake)) })
}

// All starts n things and waits for all of them; start(i, done) must call done once.
func (t *Task) All(n int, start func(i int, done func())) {
	if n == 0 {
		return
	}
	t.Wait(func(wake func()) {
		left := n
		for i := range n {
			start(i, func() {
				if left--; left == 0 {
					wake()
				}
			})
		}
	})
}

// Package loop is the event loop that drives every state machine of the data path: events in,
// callbacks out, one at a time, nothing that blocks.
//
// A volume, or a peer's store, belongs to one Loop for its whole life; so there are no locks in it.
// There are two drivers: Epoll (one thread, epoll_wait) in production, and Virtual, where many loops share
// one virtual clock and one seeded order, in tests and in the simulator. Deciding code cannot tell which.
package loop

import "time"

// Loop runs callbacks one at a time. Except for Post, its methods may be called from its own
// callbacks only (or before it runs).
type Loop interface {
	// Now is the time since the loop's epoch, which never goes back. It is read once a turn.
	Now() time.Duration
	// Post runs fn on the loop soon. It may be called from any goroutine. Calls from one goroutine keep their order.
	Post(fn func())
	// Defer runs fn at the end of the present turn, when all input that was ready has been handed
	// out: the place to send what has gathered. What a deferred fn defers runs in the same turn, too.
	Defer(fn func())
	// After runs fn once, d from now, unless stopped.
	After(d time.Duration, fn func()) *Timer
	// Offload runs j.Work on a helper thread, then j.Done on the loop. The number of helpers is bounded; jobs
	// wait for one in order. For what may block: a cold read (see FileIO), a slow fdatasync, an etcd transaction.
	Offload(j Job)
}

// Job is a piece of blocking work. An object that is reused costs no allocation.
type Job interface {
	Work() // on a helper
	Done() // on the loop
}

// funcJob makes a Job of two functions.
type funcJob struct{ work, done func() }

func (j funcJob) Work() { j.work() }
func (j funcJob) Done() { j.done() }

// Func makes a Job of two functions.
func Func(work, done func()) Job { return funcJob{work, done} }

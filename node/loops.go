package node

import (
	"fmt"
	"log/slog"
	"runtime"
	"time"

	"github.com/coreos/torus/loop"
)

// eventLoop is a loop that runs on a goroutine of its own.
type eventLoop struct {
	*loop.Epoll
	done chan error
}

// ReserveProcs lets the Go scheduler use enough processors for a process with n loops: each may keep one busy while
// it sleeps in the kernel, and what helps them needs others.
func ReserveProcs(n int) {
	runtime.GOMAXPROCS(max(runtime.GOMAXPROCS(0), n+2))
}

func startLoop(log *slog.Logger) (*eventLoop, error) {
	e, err := loop.NewEpoll(log)
	if err != nil {
		return nil, err
	}
	l := &eventLoop{Epoll: e, done: make(chan error, 1)}
	go func() { l.done <- e.Run() }()
	return l, nil
}

// call runs fn on the loop and waits for it.
func (l *eventLoop) call(fn func()) {
	done := make(chan struct{})
	l.Post(func() {
		fn()
		close(done)
	})
	<-done
}

// waitFor is call for what ends later: fn is given a function that ends the wait. It reports whether that
// was called in time.
func (l *eventLoop) waitFor(limit time.Duration, fn func(done func())) bool {
	done := make(chan struct{})
	l.Post(func() { fn(func() { close(done) }) })
	select {
	case <-done:
		return true
	case <-time.After(limit):
		return false
	}
}

// stop ends the loop. Nothing may use it any more.
func (l *eventLoop) stop() error {
	l.Stop()
	err := <-l.done
	if cerr := l.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("event loop: %w", err)
	}
	return nil
}

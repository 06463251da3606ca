package node

import (
	"fmt"
	"log/slog"
	"runtime"

	"github.com/coreos/torus/loop"
)

// ReserveProcs lets the Go scheduler use enough processors for a process with n loops: each may keep one busy while
// it sleeps in the kernel, and what helps them needs others.
func ReserveProcs(n int) {
	runtime.GOMAXPROCS(max(runtime.GOMAXPROCS(0), n+2))
}

// eventLoop is a loop and, from start on, the goroutine it runs on.
type eventLoop struct {
	*loop.Epoll
	done chan error // nil before start
}

func newLoop(log *slog.Logger) (*eventLoop, error) {
	e, err := loop.NewEpoll(log)
	if err != nil {
		return nil, err
	}
	return &eventLoop{Epoll: e}, nil
}

// start runs the loop. What belongs to it may be touched by its callbacks only, from now on.
func (l *eventLoop) start() {
	l.done = make(chan error, 1)
	go func() { l.done <- l.Run() }()
}

// call runs fn on the loop and waits for it.
func (l *eventLoop) call(fn func()) {
	if l.done == nil {
		fn()
		return
	}
	done := make(chan struct{})
	l.Post(func() {
		fn()
		close(done)
	})
	<-done
}

// stop ends the loop. Nothing may use it any more.
func (l *eventLoop) stop() error {
	var err error
	if l.done != nil {
		l.Stop()
		err = <-l.done
	}
	if cerr := l.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("event loop: %w", err)
	}
	return nil
}

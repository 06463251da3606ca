package loop

import (
	"sync"
	"time"
)

const (
	maxHelpers     = 32
	helperIdleTime = 5 * time.Second
)

// helpers is the pool of goroutines behind Epoll.Offload: started on demand, ended when idle for long.
type helpers struct {
	loop    *Epoll
	idleFor time.Duration // helperIdleTime, but in tests
	wg      sync.WaitGroup

	mu      sync.Mutex
	waiting fifo[Job]
	idle    []*helper // the last one to come is the first to go, so that a small load keeps few
	n       int       // running and idle
	closed  bool
}

type helper struct {
	wake  chan struct{} // holds one
	timer *time.Timer
}

func (p *helpers) run(j Job) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	p.waiting.push(j)
	if n := len(p.idle); n > 0 {
		h := p.idle[n-1]
		p.idle = p.idle[:n-1]
		h.wake <- struct{}{}
	} else if p.n < maxHelpers {
		p.n++
		p.wg.Add(1)
		go p.help()
	}
}

// help runs jobs until there have been none for a while.
func (p *helpers) help() {
	defer p.wg.Done()
	h := &helper{wake: make(chan struct{}, 1)}
	for {
		p.mu.Lock()
		for p.waiting.len() == 0 {
			if p.closed || !p.sleep(h) {
				p.n--
				p.mu.Unlock()
				return
			}
		}
		j := p.waiting.pop()
		p.mu.Unlock()
		j.Work()
		p.loop.post(incoming{job: j})
	}
}

// sleep waits, with the mutex given up meanwhile, until there may be a job; false when the time is up.
func (p *helpers) sleep(h *helper) bool {
	p.idle = append(p.idle, h)
	p.mu.Unlock()
	if h.timer == nil {
		h.timer = time.NewTimer(p.idleFor)
	} else {
		h.timer.Reset(p.idleFor)
	}
	select {
	case <-h.wake:
		h.timer.Stop()
		p.mu.Lock()
		return true
	case <-h.timer.C:
	}
	p.mu.Lock()
	for i, other := range p.idle {
		if other == h {
			p.idle = append(p.idle[:i], p.idle[i+1:]...)
			return false
		}
	}
	<-h.wake // woken just now
	return true
}

// close drops what waits for a helper, and waits for what runs.
func (p *helpers) close() {
	p.mu.Lock()
	p.closed = true
	p.waiting = fifo[Job]{}
	for _, h := range p.idle {
		h.wake <- struct{}{}
	}
	p.idle = nil
	p.mu.Unlock()
	p.wg.Wait()
}

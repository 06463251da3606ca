package loop

import "time"

// Timer is a pending After.
type Timer struct {
	at    time.Duration
	seq   uint64 // among timers of one instant, the first asked for is the first to fire
	index int    // in the heap, or one of the states below
	fn    func()
	owner timerOwner
	kind  Kind // for the trace of Virtual
}

const (
	timerIdle = -1      // fired or stopped
	timerDue  = 1 << 30 // left the heap, its callback waits for its turn
)

// timerOwner is the loop a timer belongs to.
type timerOwner interface{ stopTimer(*Timer) }

// Stop prevents the timer from firing; harmless if it has fired or was stopped. A nil Timer may be stopped.
func (t *Timer) Stop() {
	if t != nil && t.index >= 0 {
		t.owner.stopTimer(t)
	}
}

// timerHeap is a heap of timers by (at, seq) with four children a node: half the depth of a binary one, and a
// node's children share cache lines. Timers know their index, so that Stop costs no search.
type timerHeap []*Timer

func (a *Timer) before(b *Timer) bool {
	return a.at < b.at || a.at == b.at && a.seq < b.seq
}

func (h *timerHeap) push(t *Timer) {
	*h = append(*h, t)
	h.up(len(*h)-1, t)
}

// remove takes the timer at index i out.
func (h *timerHeap) remove(i int) *Timer {
	s := *h
	t, last := s[i], s[len(s)-1]
	s[len(s)-1] = nil
	*h = s[:len(s)-1]
	if last != t {
		h.up(i, last)
		h.down(last.index, last)
	}
	t.index = timerIdle
	return t
}

// up places t at i or above.
func (h *timerHeap) up(i int, t *Timer) {
	s := *h
	for i > 0 {
		parent := (i - 1) / 4
		if !t.before(s[parent]) {
			break
		}
		s[i] = s[parent]
		s[i].index = i
		i = parent
	}
	s[i] = t
	t.index = i
}

// down places t at i or below.
func (h *timerHeap) down(i int, t *Timer) {
	s := *h
	for {
		first := 4*i + 1
		if first >= len(s) {
			break
		}
		least := first
		for c := first + 1; c < min(first+4, len(s)); c++ {
			if s[c].before(s[least]) {
				least = c
			}
		}
		if !s[least].before(t) {
			break
		}
		s[i] = s[least]
		s[i].index = i
		i = least
	}
	s[i] = t
	t.index = i
}

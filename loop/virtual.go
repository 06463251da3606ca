package loop

import (
	"fmt"
	"math/rand/v2"
	"time"
)

// Virtual drives any number of loops on one virtual clock, in an order drawn from one seed: same
// seed, same history, to the last callback. Time stands still while there is something to do and then jumps to
// the next timer. An event is one callback of one loop and a turn of its own; among loops that are ready at the
// same instant the seed chooses, while the events of one loop keep their order.
//
// A Virtual and its loops belong to one goroutine: the one that calls Run. That holds for
// VirtualLoop.Post, too, as a second goroutine would bring the machine's own order back in.
type Virtual struct {
	now    time.Duration
	seq    uint64
	rand   *rand.Rand
	timers timerHeap
	ready  []*VirtualLoop // those with events, in no particular, but reproducible order
	world  *VirtualLoop   // runs what At was given
	events int            // run since time last moved
	tasks  []*Task        // not finished
	closed bool

	offloadDelay func(*rand.Rand) time.Duration
	trace        func(Event)
}

// Close ends the world: nothing runs any more, and the tasks that still wait, those of killed processes
// included, are unwound, as each would hold on to its goroutine and to all it refers to. Their deferred functions run.
func (v *Virtual) Close() {
	v.closed = true
	v.timers, v.ready = nil, nil
	for len(v.tasks) > 0 {
		v.tasks[len(v.tasks)-1].stop()
	}
}

func (l *VirtualLoop) keep(t *Task) {
	t.index = len(l.v.tasks)
	l.v.tasks = append(l.v.tasks, t)
}

func (l *VirtualLoop) forget(t *Task) {
	last := len(l.v.tasks) - 1
	moved := l.v.tasks[last]
	l.v.tasks[t.index], moved.index = moved, t.index
	l.v.tasks[last] = nil
	l.v.tasks = l.v.tasks[:last]
}

// Kind says where an Event came from.
type Kind uint8

const (
	KindPost  Kind = iota // Post
	KindTimer             // After
	KindWork              // the Work of an Offload
	KindDone              // the Done of an Offload
	KindWorld             // Virtual.At
)

func (k Kind) String() string {
	return [...]string{"post", "timer", "work", "done", "world"}[k]
}

// Event is one callback, for SetTrace.
type Event struct {
	At   time.Duration
	Loop string // "" for what At was given
	Kind Kind
}

const (
	virtualHelpers = 32
	// More events than this without time moving on are a livelock.
	maxEventsPerInstant = 50_000_000
)

// NewVirtual returns a scheduler at time 0.
func NewVirtual(seed uint64) *Virtual {
	v := &Virtual{rand: rand.New(rand.NewPCG(seed, 0x746f727573))}
	v.offloadDelay = func(r *rand.Rand) time.Duration {
		return 50*time.Microsecond + time.Duration(r.Int64N(int64(150*time.Microsecond)))
	}
	v.world = v.NewLoop("")
	return v
}

// NewLoop adds a loop: one process, or one thread of it. The name is for traces.
func (v *Virtual) NewLoop(name string) *VirtualLoop { return &VirtualLoop{v: v, name: name} }

// Now is the virtual time since NewVirtual.
func (v *Virtual) Now() time.Duration { return v.now }

// Rand is the source of all chance, to be used by whatever must be reproducible along with the loops.
func (v *Virtual) Rand() *rand.Rand { return v.rand }

// SetOffloadDelay sets how long the jobs of Offload take; 50 to 200 µs by default.
func (v *Virtual) SetOffloadDelay(f func(*rand.Rand) time.Duration) { v.offloadDelay = f }

// SetTrace has f called before each event; nil for no more.
func (v *Virtual) SetTrace(f func(Event)) { v.trace = f }

// At runs fn once, d from now, outside every loop: for the scenario, which outlives all processes.
func (v *Virtual) At(d time.Duration, fn func()) *Timer {
	return v.world.after(d, KindWorld, fn)
}

// Run runs events until the condition holds, which is asked before the first and after each, and reports
// whether it does. It gives up once `limit` of virtual time has passed (Now is then exactly that) or
// nothing is left to do. A nil condition never holds.
func (v *Virtual) Run(until func() bool, limit time.Duration) bool {
	deadline := v.now + limit
	if until != nil && until() {
		return true
	}
	for v.step(deadline) {
		if until != nil && until() {
			return true
		}
	}
	return false
}

// RunFor runs all events of the next d, and leaves Now at the end of it.
func (v *Virtual) RunFor(d time.Duration) {
	deadline := v.now + d
	for v.step(deadline) {
	}
	v.now = deadline
}

// step runs one event; false if there is none up to the deadline.
func (v *Virtual) step(deadline time.Duration) bool {
	for len(v.ready) == 0 { // more than once if what is due belongs to a paused loop
		if len(v.timers) == 0 {
			return false
		}
		at := v.timers[0].at
		if at > deadline {
			v.now = deadline
			return false
		}
		v.now = max(v.now, at)
		for len(v.timers) > 0 && v.timers[0].at <= v.now {
			t := v.timers.remove(0)
			t.index = timerDue
			t.owner.(*VirtualLoop).enqueue(virtualEvent{kind: t.kind, fn: t.fn, timer: t})
		}
		v.events = 0
	}
	if v.events++; v.events > maxEventsPerInstant {
		panic(fmt.Sprintf("loop: livelock at virtual time %v, last in loop %q", v.now, v.ready[0].name))
	}
	i := 0
	if len(v.ready) > 1 {
		i = v.rand.IntN(len(v.ready))
	}
	l := v.ready[i]
	e := l.queue.pop()
	if l.queue.len() == 0 {
		v.unready(i)
	}
	l.turn(e)
	return true
}

// unready takes the loop at index i out of those with events.
func (v *Virtual) unready(i int) {
	last := len(v.ready) - 1
	v.ready[i] = v.ready[last]
	v.ready[last] = nil
	v.ready = v.ready[:last]
}

// VirtualLoop is a Loop of a Virtual.
type VirtualLoop struct {
	v      *Virtual
	name   string
	dead   bool
	paused bool
	inTurn bool
	queue  fifo[virtualEvent]
	defers []func()

	running int       // jobs on a helper
	waiting fifo[Job] // for a helper
	delay   func(*rand.Rand) time.Duration
}

var _ Loop = (*VirtualLoop)(nil)

type virtualEvent struct {
	kind  Kind
	fn    func()
	timer *Timer // nil if none
}

// Name is what NewLoop was given.
func (l *VirtualLoop) Name() string { return l.name }

// Dead reports whether Kill was called.
func (l *VirtualLoop) Dead() bool { return l.dead }

func (l *VirtualLoop) gone() bool { return l.dead || l.v.closed }

// Kill ends the process the loop stands for, as SIGKILL would: what was posted, deferred, timed or offloaded
// never runs, and neither does what is asked for later. A callback that kills its own loop runs to its end.
func (l *VirtualLoop) Kill() {
	if l.dead {
		return
	}
	l.dead = true
	if l.queue.len() > 0 {
		for i, r := range l.v.ready {
			if r == l {
				l.v.unready(i)
				break
			}
		}
	}
	l.queue, l.waiting, l.defers = fifo[virtualEvent]{}, fifo[Job]{}, nil
	kept := l.v.timers[:0]
	for _, t := range l.v.timers {
		if t.owner == timerOwner(l) {
			t.index = timerIdle
		} else {
			kept = append(kept, t)
		}
	}
	clear(l.v.timers[len(kept):])
	l.v.timers = kept
	for i := (len(kept) - 2) / 4; i >= 0 && i < len(kept); i-- {
		kept[i].index = i
		l.v.timers.down(i, kept[i])
	}
	for i, t := range kept {
		t.index = i
	}
}

// Pause stops the process the loop stands for, as SIGSTOP would: nothing of it runs, helpers included, until Resume;
// what becomes due meanwhile runs then.
func (l *VirtualLoop) Pause() {
	if l.paused || l.gone() {
		return
	}
	l.paused = true
	for i, r := range l.v.ready {
		if r == l {
			l.v.unready(i)
			break
		}
	}
}

// Resume ends a Pause.
func (l *VirtualLoop) Resume() {
	if !l.paused {
		return
	}
	l.paused = false
	if l.queue.len() > 0 && !l.gone() {
		l.v.ready = append(l.v.ready, l)
	}
}

// Paused reports whether the loop is between Pause and Resume.
func (l *VirtualLoop) Paused() bool { return l.paused }

// SetOffloadDelay is that of Virtual for this loop alone: a slow disk. nil: as all others.
func (l *VirtualLoop) SetOffloadDelay(f func(*rand.Rand) time.Duration) { l.delay = f }

// turn runs one event and what it defers.
func (l *VirtualLoop) turn(e virtualEvent) {
	if e.timer != nil {
		if e.timer.index != timerDue {
			return // stopped after its time had come
		}
		e.timer.index = timerIdle
	}
	if l.v.trace != nil {
		l.v.trace(Event{At: l.v.now, Loop: l.name, Kind: e.kind})
	}
	l.inTurn = true
	e.fn()
	for i := 0; i < len(l.defers); i++ { // it may grow, or be gone after a Kill
		l.defers[i]()
	}
	clear(l.defers)
	l.defers = l.defers[:0]
	l.inTurn = false
}

func (l *VirtualLoop) enqueue(e virtualEvent) {
	if l.gone() {
		return
	}
	if l.queue.len() == 0 && !l.paused {
		l.v.ready = append(l.v.ready, l)
	}
	l.queue.push(e)
}

func (l *VirtualLoop) after(d time.Duration, kind Kind, fn func()) *Timer {
	t := &Timer{at: l.v.now + max(d, 0), fn: fn, owner: l, kind: kind, index: timerIdle}
	if !l.gone() {
		l.v.seq++
		t.seq = l.v.seq
		l.v.timers.push(t)
	}
	return t
}

func (l *VirtualLoop) stopTimer(t *Timer) {
	if t.index != timerDue {
		l.v.timers.remove(t.index)
	}
	t.index = timerIdle
}

// Now implements Loop.
func (l *VirtualLoop) Now() time.Duration { return l.v.now }

// Post implements Loop, except that it may be called only from the goroutine of Virtual.Run.
func (l *VirtualLoop) Post(fn func()) { l.enqueue(virtualEvent{kind: KindPost, fn: fn}) }

// Defer implements Loop. Called from outside a turn it asks for one.
func (l *VirtualLoop) Defer(fn func()) {
	if l.gone() {
		return
	}
	if !l.inTurn && len(l.defers) == 0 {
		l.Post(func() {})
	}
	l.defers = append(l.defers, fn)
}

// After implements Loop.
func (l *VirtualLoop) After(d time.Duration, fn func()) *Timer { return l.after(d, KindTimer, fn) }

// Offload implements Loop. Work and Done are two events, so a Kill may fall between them.
func (l *VirtualLoop) Offload(j Job) {
	if l.gone() {
		return
	}
	if l.running == virtualHelpers {
		l.waiting.push(j)
		return
	}
	l.running++
	delay := l.delay
	if delay == nil {
		delay = l.v.offloadDelay
	}
	l.after(delay(l.v.rand), KindWork, func() {
		j.Work()
		l.enqueue(virtualEvent{kind: KindDone, fn: j.Done})
		l.running--
		if l.waiting.len() > 0 {
			l.Offload(l.waiting.pop())
		}
	})
}

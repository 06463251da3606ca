package loop

import (
	"fmt"
	"log/slog"
	"math"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Epoll is the production driver: one goroutine that calls Run, and epoll under it.
//
// A turn is: take what is ready (descriptors, what was posted, timers), hand it out, then run what was
// deferred. A loop with nothing to do sleeps in the kernel and costs no CPU.
//
// A sleeping loop keeps a P of the Go scheduler until sysmon takes it away, so a process should set
// GOMAXPROCS to at least the number of its loops plus two: helpers then start at once.
type Epoll struct {
	log    *slog.Logger
	epfd   int
	wakefd int // an eventfd, edge-triggered, hence never read
	epoch  time.Time
	now    time.Duration
	inTurn bool
	pwait2 bool          // the kernel has epoll_pwait2 (5.11): timeouts in nanoseconds
	ts     unix.Timespec // scratch

	yielded time.Duration // when the Go scheduler last had its way
	quiet   int           // sleeps since the last event

	events [256]unix.EpollEvent
	slots  []*Registration // by the low half of the epoll data, their generation is the high one
	free   []int32         // indices of empty slots

	timers timerHeap
	seq    uint64
	defers []func()
	taken  []incoming // the batch being run

	in   inbox
	pool helpers
	ring *uring // nil: none to be had
	stop atomic.Bool
}

var _ Loop = (*Epoll)(nil)

// incoming is what reaches the loop from elsewhere: a posted function, or a job that is done.
type incoming struct {
	fn  func()
	job Job
}

// inbox is what other goroutines and the loop share.
type inbox struct {
	sync.Mutex
	queue    []incoming
	sleeping bool // the loop is in, or about to enter, a wait that only the eventfd ends
	closed   bool
	wakers   int // goroutines about to write to the eventfd
}

// maxKept is how many entries a queue that grew in a rush may keep room for.
const maxKept = 16 << 10

// NewEpoll makes a loop; log may be nil.
func NewEpoll(log *slog.Logger) (*Epoll, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("event loop: epoll_create1: %w", err)
	}
	wakefd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		unix.Close(epfd)
		return nil, fmt.Errorf("event loop: eventfd: %w", err)
	}
	e := &Epoll{log: log, epfd: epfd, wakefd: wakefd, epoch: time.Now(), pwait2: true}
	e.pool.loop, e.pool.idleFor = e, helperIdleTime
	ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: wakeSlot}
	if err := unix.EpollCtl(epfd, unix.EPOLL_CTL_ADD, wakefd, &ev); err != nil {
		unix.Close(epfd)
		unix.Close(wakefd)
		return nil, fmt.Errorf("event loop: epoll_ctl: %w", err)
	}
	if e.ring, err = newUring(e); err != nil {
		e.ring = nil
		log.Debug("reads are left to helper threads", "err", err)
	}
	return e, nil
}

// Run runs the loop until Stop. To be called from one goroutine at a time; it may be called again.
func (e *Epoll) Run() error {
	for {
		if e.stop.Swap(false) {
			return nil
		}
		n, err := e.wait()
		if err != nil {
			return fmt.Errorf("event loop: epoll_wait: %w", err)
		}
		e.turn(n)
		if e.now-e.yielded >= slice {
			e.yielded = e.now
			runtime.Gosched()
		}
	}
}

// Stop ends Run at the end of the present turn, or the next Run before its first one. From any goroutine.
func (e *Epoll) Stop() {
	e.stop.Store(true)
	e.post(incoming{})
}

// Close frees what the loop holds, after Run has returned: it waits for the helpers' running jobs, and closes
// all descriptors that are still registered. Nothing posted or offloaded from then on runs.
func (e *Epoll) Close() error {
	e.in.Lock()
	if e.in.closed {
		e.in.Unlock()
		return nil
	}
	e.in.closed = true
	e.in.queue = nil
	for e.in.wakers > 0 { // a few instructions and a write of eight bytes
		e.in.Unlock()
		runtime.Gosched()
		e.in.Lock()
	}
	e.in.Unlock()
	e.pool.close()
	if e.ring != nil {
		e.ring.close()
	}
	for _, r := range e.slots {
		if r != nil {
			r.Close()
		}
	}
	e.timers, e.defers = nil, nil
	return os.NewSyscallError("close", firstErr(unix.Close(e.wakefd), unix.Close(e.epfd)))
}

func firstErr(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// wait fills e.events with what is ready and says how many; it sleeps only if there is nothing else to do.
func (e *Epoll) wait() (int, error) {
	if len(e.defers) > 0 { // deferred before Run
		return e.epollWait(0)
	}
	timeout := time.Duration(-1)
	if len(e.timers) > 0 {
		timeout = max(e.timers[0].at-time.Since(e.epoch), 0)
	}
	if timeout != 0 {
		e.in.Lock()
		e.in.sleeping = len(e.in.queue) == 0
		if !e.in.sleeping {
			timeout = 0
		}
		e.in.Unlock()
	}
	return e.epollWait(timeout)
}

// turn hands out n events of e.events, what was posted, the due timers, and then runs what was deferred.
func (e *Epoll) turn(n int) {
	e.now, e.inTurn = time.Since(e.epoch), true
	for i := range n {
		e.dispatch(&e.events[i])
	}

	e.in.Lock()
	e.in.sleeping = false
	e.taken, e.in.queue = e.in.queue, e.taken[:0]
	e.in.Unlock()
	for i := range e.taken {
		if it := &e.taken[i]; it.fn != nil {
			it.fn()
		} else if it.job != nil {
			it.job.Done()
		}
	}
	clear(e.taken)
	if cap(e.taken) > maxKept {
		e.taken = nil
	}

	for len(e.timers) > 0 && e.timers[0].at <= e.now {
		e.timers.remove(0).fn()
	}

	for i := 0; i < len(e.defers); i++ { // it may grow
		e.defers[i]()
	}
	clear(e.defers)
	e.defers = e.defers[:0]
	e.inTurn = false
}

// Now implements Loop.
func (e *Epoll) Now() time.Duration {
	if !e.inTurn { // before Run
		e.now = time.Since(e.epoch)
	}
	return e.now
}

// Post implements Loop. The eventfd is written only if the loop sleeps, so once for many.
func (e *Epoll) Post(fn func()) { e.post(incoming{fn: fn}) }

func (e *Epoll) post(it incoming) {
	e.in.Lock()
	if e.in.closed {
		e.in.Unlock()
		return
	}
	e.in.queue = append(e.in.queue, it)
	if !e.in.sleeping {
		e.in.Unlock()
		return
	}
	e.in.sleeping = false
	e.in.wakers++
	e.in.Unlock()

	one := uint64(1)
	// Fails only if the counter is at its end, after 2⁶⁴ wake-ups.
	_, _, _ = unix.RawSyscall(unix.SYS_WRITE, uintptr(e.wakefd), uintptr(unsafe.Pointer(&one)), 8)

	e.in.Lock()
	e.in.wakers--
	e.in.Unlock()
}

// Defer implements Loop.
func (e *Epoll) Defer(fn func()) { e.defers = append(e.defers, fn) }

// After implements Loop.
func (e *Epoll) After(d time.Duration, fn func()) *Timer {
	e.seq++
	t := &Timer{at: e.Now() + max(d, 0), seq: e.seq, fn: fn, owner: e}
	e.timers.push(t)
	return t
}

func (e *Epoll) stopTimer(t *Timer) { e.timers.remove(t.index) }

// Offload implements Loop.
func (e *Epoll) Offload(j Job) {
	if r, ok := j.(FileIO); ok && e.ring != nil && e.ring.start(r) {
		return
	}
	e.pool.run(j)
}

// Settle waits until no file of a FileIO is in use by the kernel. Their Done is called in a later turn.
func (e *Epoll) Settle() {
	if e.ring != nil {
		e.ring.settle()
	}
}

// sysmon, the Go scheduler's monitor, takes the P away from a goroutine that it finds in an announced system call and that has not been
// scheduled anew for 10 ms. Each time it does that, and each time such a goroutine comes back when all P's were idle, it
// then looks some fifty times, every 20 µs, for more to take: 1.3 ms of CPU time, and tens of times a second in a
// process that is not quite busy. So a loop sleeps unannounced and for short, and has itself scheduled anew between; only
// one that nothing has woken for a while, nor will soon, announces its sleep.
//
// An unannounced sleep does not hold up who stops the world: the signal by which the scheduler asks for it ends the wait.
const (
	slice     = 8 * time.Millisecond // less than 10 ms, with a turn to spare
	quietNaps = 8                    // so many sleeps without an event are a while
	soon      = 200 * time.Millisecond
)

// epollWait waits for events, until the timeout or for shorter, for ever if it is negative.
func (e *Epoll) epollWait(timeout time.Duration) (int, error) {
	announce := false
	if left := max(e.yielded+slice-time.Since(e.epoch), 0); timeout < 0 || timeout > left {
		if announce = e.quiet >= quietNaps && (timeout < 0 || timeout >= soon); !announce {
			timeout = left
			e.quiet++
		}
	}
	n, errno := e.epollPwait(timeout, !announce)
	if n > 0 {
		e.quiet = 0
	}
	return done(n, errno)
}

func done(n int, errno unix.Errno) (int, error) {
	switch errno {
	case 0:
		return n, nil
	case unix.EINTR:
		return 0, nil // a turn without events, which computes the timeout anew
	}
	return 0, errno
}

// epollPwait is epoll_pwait2(2), or epoll_wait(2) where there is none.
func (e *Epoll) epollPwait(timeout time.Duration, raw bool) (int, unix.Errno) {
	call, arg := uintptr(unix.SYS_EPOLL_PWAIT2), uintptr(0)
	switch {
	case timeout < 0:
	case e.pwait2:
		e.ts = unix.NsecToTimespec(int64(timeout))
		arg = uintptr(unsafe.Pointer(&e.ts))
	default:
		arg = uintptr(min(int64((timeout+time.Millisecond-1)/time.Millisecond), math.MaxInt32))
	}
	if !e.pwait2 {
		call = unix.SYS_EPOLL_PWAIT
		if timeout < 0 {
			arg = ^uintptr(0)
		}
	}
	var n uintptr
	var errno unix.Errno
	if raw {
		n, _, errno = unix.RawSyscall6(call, uintptr(e.epfd), uintptr(unsafe.Pointer(&e.events[0])), uintptr(len(e.events)), arg, 0, 0)
	} else {
		n, _, errno = unix.Syscall6(call, uintptr(e.epfd), uintptr(unsafe.Pointer(&e.events[0])), uintptr(len(e.events)), arg, 0, 0)
	}
	if e.pwait2 && (errno == unix.ENOSYS || errno == unix.EPERM) { // EPERM: an old seccomp filter
		e.pwait2 = false
		return e.epollPwait(timeout, raw)
	}
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

// wakeSlot marks the eventfd.
const wakeSlot = -1

// dispatch hands one event to its descriptor, unless that was closed earlier in this batch.
func (e *Epoll) dispatch(ev *unix.EpollEvent) {
	if ev.Fd == wakeSlot {
		return
	}
	if r := e.slots[ev.Fd]; r != nil && r.generation == uint32(ev.Pad) {
		r.h.Ready(ev.Events)
	}
}

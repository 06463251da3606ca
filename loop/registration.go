package loop

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// FD is told when its descriptor is ready.
type FD interface {
	// Ready is called on the loop with the EPOLL* bits that hold.
	Ready(events uint32)
}

// Registration is a descriptor known to an Epoll. Its methods are called on the loop.
type Registration struct {
	e          *Epoll
	fd         int
	slot       int32
	generation uint32 // tells the events of a slot's former user from those of the present one
	events     uint32
	h          FD
}

var errRemoved = errors.New("descriptor is no longer registered")

// Add has h told when any of the events (unix.EPOLL* bits, EPOLLET included, EPOLLERR and EPOLLHUP implied) holds for fd. Whether
// level- or edge-triggered is up to the caller.
func (e *Epoll) Add(fd int, events uint32, h FD) (*Registration, error) {
	r := &Registration{e: e, fd: fd, events: events, h: h}
	if n := len(e.free); n > 0 {
		r.slot = e.free[n-1]
		e.free = e.free[:n-1]
	} else {
		r.slot = int32(len(e.slots))
		e.slots = append(e.slots, nil)
	}
	e.seq++ // unique among the events that one batch can hold, which is all it takes
	r.generation = uint32(e.seq)
	if err := r.control(unix.EPOLL_CTL_ADD); err != nil {
		e.free = append(e.free, r.slot)
		return nil, err
	}
	e.slots[r.slot] = r
	return r, nil
}

// Modify changes the events. What holds already is reported (again), edge-triggered or not.
func (r *Registration) Modify(events uint32) error {
	if r.e == nil {
		return errRemoved
	}
	r.events = events
	return r.control(unix.EPOLL_CTL_MOD)
}

// Remove ends the registration; no event follows, not even one that has been read from the kernel already.
// The descriptor stays open. Removing twice is harmless.
func (r *Registration) Remove() {
	if r.e == nil {
		return
	}
	// Closing would do in most cases, but not if the description has another descriptor, in a child for example.
	_ = unix.EpollCtl(r.e.epfd, unix.EPOLL_CTL_DEL, r.fd, nil)
	r.e.slots[r.slot] = nil
	r.e.free = append(r.e.free, r.slot)
	r.e = nil
}

// Close removes and closes the descriptor, once: after Epoll.Close, or a second time, it does nothing.
func (r *Registration) Close() {
	if r.e != nil {
		r.Remove()
		unix.Close(r.fd)
	}
}

// FD is the descriptor.
func (r *Registration) FD() int { return r.fd }

func (r *Registration) control(op int) error {
	// x/sys names the two halves of the data after what others put there.
	ev := unix.EpollEvent{Events: r.events, Fd: r.slot, Pad: int32(r.generation)}
	if err := unix.EpollCtl(r.e.epfd, op, r.fd, &ev); err != nil {
		return fmt.Errorf("epoll_ctl on descriptor %d: %w", r.fd, err)
	}
	return nil
}

package loop

import (
	"errors"
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// FileIO is a Job that is no more than one read or write of a file, which a loop may leave to the kernel instead of to a helper:
// then, if it could be done as a whole, Done is called and Work was not.
type FileIO interface {
	Job
	// FileIO says what Work would read or write: a descriptor that stays open, and memory that nobody else writes to, until it is over; len(b) bytes
	// at offset off. A descriptor below 0: leave it to Work.
	FileIO() (fd int, write bool, b []byte, off int64)
}

// uring is an io_uring(7) for files. What is queued in a turn is submitted at its end in one system call, and what is done
// shows as readiness of the ring's own descriptor.
type uring struct {
	e   *Epoll
	reg *Registration

	sq, sqes                 []byte // mapped
	sqTail                   *uint32
	cqHead, cqTail           *uint32
	sqArray                  []uint32
	cqEntries                []uringCQE
	entries                  []uringSQE
	sqMask, cqMask           uint32
	queued                   uint32 // entries not submitted yet
	flying                   int    // submitted or queued
	jobs                     []FileIO
	sizes                    []int32
	free                     []int32 // indices of jobs
	flush                    func()
	planned, closed, harvest bool
	settling                 bool
}

// uringDepth bounds the jobs under way; more wait for helpers.
const uringDepth = 256

// The layouts are those of linux/io_uring.h.
type uringSQE struct {
	opcode   uint8
	flags    uint8
	ioprio   uint16
	fd       int32
	off      uint64
	addr     uint64
	len      uint32
	rwFlags  uint32
	userData uint64
	_        [3]uint64
}

type uringCQE struct {
	userData uint64
	res      int32
	flags    uint32
}

type uringParams struct {
	sqEntries, cqEntries, flags, sqThreadCPU, sqThreadIdle, features, wqFD uint32
	_                                                                      [3]uint32
	sqOff                                                                  struct {
		head, tail, ringMask, ringEntries, flags, dropped, array, _ uint32
		_                                                           uint64
	}
	cqOff struct {
		head, tail, ringMask, ringEntries, overflow, cqes, flags, _ uint32
		_                                                           uint64
	}
}

const (
	uringOpRead        = 22
	uringOpWrite       = 23
	uringSetupClamp    = 1 << 4
	uringSetupCoop     = 1 << 8 // no interrupt for a completion: the loop enters the kernel soon enough
	uringFeatSingleMap = 1 << 0
	uringFeatNoDrop    = 1 << 1
	uringOffSQ         = 0
	uringOffSQEs       = 0x10000000
	uringEnterGet      = 1 << 0
)

// newUring makes the ring of a loop. It fails where the kernel has none (before 5.19 for what is used here) or an
// administrator forbids it; helpers then do the jobs.
func newUring(e *Epoll) (_ *uring, err error) {
	p := uringParams{flags: uringSetupClamp | uringSetupCoop}
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uringDepth, uintptr(unsafe.Pointer(&p)), 0)
	if errno != 0 {
		return nil, fmt.Errorf("io_uring_setup: %w", errno)
	}
	u := &uring{e: e}
	defer func() {
		if err != nil {
			u.unmap()
			unix.Close(int(fd))
		}
	}()
	if p.features&uringFeatSingleMap == 0 || p.features&uringFeatNoDrop == 0 {
		return nil, errors.New("io_uring: the kernel is too old")
	}
	size := max(p.sqOff.array+4*p.sqEntries, p.cqOff.cqes+p.cqEntries*uint32(unsafe.Sizeof(uringCQE{})))
	const prot, flags = unix.PROT_READ | unix.PROT_WRITE, unix.MAP_SHARED | unix.MAP_POPULATE
	if u.sq, err = unix.Mmap(int(fd), uringOffSQ, int(size), prot, flags); err != nil {
		return nil, fmt.Errorf("io_uring: mmap: %w", err)
	}
	if u.sqes, err = unix.Mmap(int(fd), uringOffSQEs, int(p.sqEntries)*int(unsafe.Sizeof(uringSQE{})), prot, flags); err != nil {
		return nil, fmt.Errorf("io_uring: mmap: %w", err)
	}
	at := func(off uint32) *uint32 { return (*uint32)(unsafe.Pointer(&u.sq[off])) }
	u.sqTail, u.cqHead, u.cqTail = at(p.sqOff.tail), at(p.cqOff.head), at(p.cqOff.tail)
	u.sqMask, u.cqMask = *at(p.sqOff.ringMask), *at(p.cqOff.ringMask)
	u.sqArray = unsafe.Slice(at(p.sqOff.array), p.sqEntries)
	u.cqEntries = unsafe.Slice((*uringCQE)(unsafe.Pointer(&u.sq[p.cqOff.cqes])), p.cqEntries)
	u.entries = unsafe.Slice((*uringSQE)(unsafe.Pointer(&u.sqes[0])), p.sqEntries)
	u.jobs, u.sizes = make([]FileIO, p.sqEntries), make([]int32, p.sqEntries)
	for i := range p.sqEntries {
		u.free = append(u.free, int32(i))
	}
	u.flush = u.submit
	u.reg, err = e.Add(int(fd), unix.EPOLLIN|unix.EPOLLET, u)
	return u, err
}

// start queues a job; false if it is none for the ring.
func (u *uring) start(j FileIO) bool {
	fd, write, b, off := j.FileIO()
	if fd < 0 || len(b) == 0 || len(u.free) == 0 || u.closed {
		return false
	}
	n := len(u.free) - 1
	slot := u.free[n]
	u.free = u.free[:n]
	u.jobs[slot], u.sizes[slot] = j, int32(len(b))
	// Never more queued than slots, and there are as many of those as entries, so there is room.
	tail := *u.sqTail
	i := tail & u.sqMask
	op := uint8(uringOpRead)
	if write {
		op = uringOpWrite
	}
	u.entries[i] = uringSQE{
		opcode: op, fd: int32(fd), off: uint64(off), addr: uint64(uintptr(unsafe.Pointer(&b[0]))), len: uint32(len(b)), userData: uint64(slot),
	}
	u.sqArray[i] = i
	atomic.StoreUint32(u.sqTail, tail+1)
	u.queued++
	u.flying++
	if !u.planned {
		u.planned = true
		u.e.Defer(u.flush)
	}
	return true
}

// submit hands over what was queued.
func (u *uring) submit() {
	u.planned = false
	for u.queued > 0 {
		// Buffered reads of what is in memory are done at once, but a submission does not wait for the disk.
		n, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(u.reg.fd), uintptr(u.queued), 0, 0, 0, 0)
		switch errno {
		case 0:
			u.queued -= uint32(n)
		case unix.EINTR:
		default: // EAGAIN, EBUSY: short of memory, or of room for what is done
			u.collect()
			u.planned = true
			u.e.After(0, u.flush)
			return
		}
	}
	u.collect() // what was done at once
}

// Ready implements FD.
func (u *uring) Ready(uint32) { u.collect() }

// collect finishes the jobs that are done.
func (u *uring) collect() {
	if u.harvest { // a Done may queue the next read
		return
	}
	u.harvest = true
	for head := *u.cqHead; head != atomic.LoadUint32(u.cqTail); head = *u.cqHead {
		c := u.cqEntries[head&u.cqMask]
		atomic.StoreUint32(u.cqHead, head+1)
		slot := int32(c.userData)
		j, whole := u.jobs[slot], c.res == u.sizes[slot]
		u.jobs[slot] = nil
		u.free = append(u.free, slot)
		u.flying--
		switch {
		case u.closed:
		case !whole:
			u.e.pool.run(j) // an error, or the end of the file: the ordinary way will tell
		case u.settling:
			u.e.Post(j.Done)
		default:
			j.Done()
		}
	}
	u.harvest = false
}

// close waits for the jobs under way, as they use memory of ours, and gives the ring back.
func (u *uring) close() {
	u.closed = true
	u.wait()
	u.reg.Close()
	u.unmap()
}

// settle waits for the jobs under way; their Done is called later.
func (u *uring) settle() {
	u.settling = true
	u.wait()
	u.settling = false
}

func (u *uring) wait() {
	harvest := u.harvest // a Done may be what made us wait
	u.harvest = false
	defer func() { u.harvest = harvest }()
	for u.flying > 0 {
		n, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(u.reg.fd), uintptr(u.queued), 1, uringEnterGet, 0, 0)
		if errno == 0 {
			u.queued -= uint32(n)
		} else if errno != unix.EINTR && errno != unix.EAGAIN && errno != unix.EBUSY {
			break
		}
		u.collect()
	}
}

func (u *uring) unmap() {
	for _, m := range [][]byte{u.sq, u.sqes} {
		if m != nil {
			unix.Munmap(m) //nolint:errcheck // it was mapped
		}
	}
	u.sq, u.sqes = nil, nil
}

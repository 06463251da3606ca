package buf

import (
	"fmt"
	"runtime"
	"strconv"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// area is memory that other processes may be let read: a file without a name (memfd_create(2)), mapped as a whole. Its size is that of its
// addresses; only what is in use takes memory. Addresses are never given back: a buffer that is given up keeps its own, for the next one of its
// class.
type area struct {
	fd     int
	mem    []byte
	used   int // of the addresses
	vacant [largeClasses][]*Buf
}

// areaSize is more than any process will need: buffers of all classes at once, each as often as it ever was in use.
const areaSize = 16 << 30

// SharedSize is how large the file of shared buffers is, of whatever process, in bytes. Nearly all of that are holes.
const SharedSize = areaSize

var (
	theArea atomic.Pointer[area] // nil: none
	// shared holds the free buffers of the area; its lock guards the area, too.
	shared pool
)

// Share has GetShared give out memory that can be shared, from now on and for as long as the process lives. An error if there can be none: all goes on
// as before then. A second call does nothing.
func Share() error {
	shared.Lock()
	defer shared.Unlock()
	if theArea.Load() != nil {
		return nil
	}
	fd, err := unix.MemfdCreate("torus-buffers", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return fmt.Errorf("memfd_create: %w", err)
	}
	mem, err := mapArea(fd)
	if err != nil {
		unix.Close(fd)
		return fmt.Errorf("memory to share: %w", err)
	}
	// Others get a descriptor that they cannot write through. Without /proc it is this one.
	if ro, err := unix.Open("/proc/self/fd/"+strconv.Itoa(fd), unix.O_RDONLY|unix.O_CLOEXEC, 0); err == nil {
		unix.Close(fd)
		fd = ro
	}
	shared.drop = drop
	theArea.Store(&area{fd: fd, mem: mem})
	return nil
}

func mapArea(fd int) ([]byte, error) {
	if err := unix.Ftruncate(fd, areaSize); err != nil {
		return nil, err
	}
	// Who maps it may rely on its size: to read behind the end of a file is fatal.
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		return nil, err
	}
	return unix.Mmap(fd, 0, areaSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
}

// SharedFD is the descriptor of the file that shared buffers lie in; -1 if they are not shared. It stays this package's.
func SharedFD() int {
	if a := theArea.Load(); a != nil {
		return a.fd
	}
	return -1
}

// SharedAt is where in that file b lies; false if it does not.
func SharedAt(b []byte) (at uint64, ok bool) {
	a := theArea.Load()
	if a == nil || len(b) == 0 {
		return 0, false
	}
	off := uintptr(unsafe.Pointer(unsafe.SliceData(b))) - uintptr(unsafe.Pointer(unsafe.SliceData(a.mem)))
	return uint64(off), off < areaSize
}

// GetShared returns a buffer of at least n bytes with arbitrary contents, in memory that can be shared if there is any. The garbage collector does not know that
// memory, only the Buf: whoever uses the bytes has to hold on to that. One that is never released comes back when it is garbage.
func GetShared(n int) *Buf {
	a := theArea.Load()
	if a == nil {
		return Get(n)
	}
	c, size := largeClass(max(n, 1<<maxShift+1))
	if c < 0 {
		return Get(n)
	}
	if b := shared.get(c); b != nil {
		return b
	}
	shared.Lock()
	defer shared.Unlock()
	if l := a.vacant[c]; len(l) > 0 {
		b := l[len(l)-1]
		a.vacant[c] = l[:len(l)-1]
		b.more = 0
		return b
	}
	if areaSize-a.used < size {
		return Get(n)
	}
	a.used += size
	return newShared(a.mem[a.used-size:a.used:a.used], c)
}

func newShared(mem []byte, class int) *Buf {
	b := &Buf{mem: mem, class: class, pool: &shared}
	runtime.AddCleanup(b, func(mem []byte) { renew(newShared(mem, class)) }, mem)
	return b
}

// renew gives back a buffer whose pages are another's: it gets others when it is written to. If that cannot be it is not used any more.
func renew(b *Buf) {
	if unix.Madvise(b.mem, unix.MADV_REMOVE) == nil {
		b.stale = false
		shared.put(b)
	}
}

// drop gives the memory of buffers back, and keeps their addresses. The caller holds the lock of shared.
func drop(l []*Buf) {
	a := theArea.Load()
	for _, b := range l {
		// If that fails they keep their memory, too.
		_ = unix.Madvise(b.mem, unix.MADV_REMOVE)
		a.vacant[b.class] = append(a.vacant[b.class], b)
	}
}

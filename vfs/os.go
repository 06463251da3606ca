package vfs

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// NewOS returns the real file system below dir, which need not exist yet (MkdirAll(".") makes it). It needs Linux.
func NewOS(dir string) FS { return osFS{dir} }

type osFS struct{ dir string }

func (o osFS) path(op, name string) (string, error) {
	if !fs.ValidPath(name) {
		return "", &fs.PathError{Op: op, Path: name, Err: fs.ErrInvalid}
	}
	return filepath.Join(o.dir, filepath.FromSlash(name)), nil
}

func (o osFS) open(op, name string, flags int) (File, error) {
	p, err := o.path(op, name)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(p, flags|os.O_RDWR, 0o640)
	if err != nil {
		return nil, noSpace(err)
	}
	return &osFile{f: f, fd: int(f.Fd())}, nil
}

func (o osFS) Create(name string) (File, error) {
	return o.open("create", name, os.O_CREATE|os.O_EXCL)
}

func (o osFS) Open(name string) (File, error) { return o.open("open", name, 0) }

func (o osFS) Remove(name string) error {
	p, err := o.path("remove", name)
	if err != nil {
		return err
	}
	return os.Remove(p)
}

func (o osFS) Rename(oldname, newname string) error {
	from, err := o.path("rename", oldname)
	if err != nil {
		return err
	}
	to, err := o.path("rename", newname)
	if err != nil {
		return err
	}
	return noSpace(os.Rename(from, to))
}

func (o osFS) MkdirAll(dir string) error {
	p, err := o.path("mkdir", dir)
	if err != nil {
		return err
	}
	return noSpace(os.MkdirAll(p, 0o750))
}

func (o osFS) List(dir string) ([]string, error) {
	p, err := o.path("list", dir)
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(p) // sorted
	if err != nil {
		return nil, err
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, nil
}

func (o osFS) SyncDir(dir string) error {
	p, err := o.path("syncdir", dir)
	if err != nil {
		return err
	}
	d, err := os.Open(p)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// Lock is flock(2): the kernel drops it when the process ends, however it ends.
func (o osFS) Lock(name string) (func() error, error) {
	p, err := o.path("lock", name)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(p, os.O_CREATE|os.O_RDWR, 0o640)
	if err != nil {
		return nil, noSpace(err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrLocked
		}
		return nil, &fs.PathError{Op: "lock", Path: p, Err: err}
	}
	return f.Close, nil
}

func (o osFS) Free() (free, size uint64, err error) {
	var s unix.Statfs_t
	if err := unix.Statfs(o.dir, &s); err != nil {
		return 0, 0, &fs.PathError{Op: "statfs", Path: o.dir, Err: err}
	}
	return s.Bavail * uint64(s.Bsize), s.Blocks * uint64(s.Bsize), nil
}

// Boot implements FS: random(4).
func (o osFS) Boot() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

type osFile struct {
	f        *os.File
	fd       int
	syncTime atomic.Int64

	readOnly  bool
	noDurable atomic.Bool // WriteDurable has no way of its own

	directOnce sync.Once
	directFile *os.File // the same, opened with O_DIRECT; nil where that cannot be
	directFD   int
}

// directBytes is the least that is worth reading past the page cache: what is read in such pieces is read once, and copying
// it twice and evicting other things for it costs more than the disk does.
const directBytes = 256 << 10

// ReadAt reads large aligned pieces from the disk right into b. The kernel writes out first what of them is dirty in memory.
func (f *osFile) ReadAt(b []byte, off int64) (int, error) {
	if d := f.directFor(b, off); d != nil {
		if n, err := d.ReadAt(b, off); err == nil {
			return n, nil
		}
		// Else let the ordinary way say what is wrong.
	}
	return f.f.ReadAt(b, off)
}

// WriteDescriptor implements File.
func (f *osFile) WriteDescriptor() int {
	if f.direct() == nil {
		return -1
	}
	return f.directFD
}

// Descriptor implements File.
func (f *osFile) Descriptor(off int64, n int) int {
	if n >= directBytes && (uintptr(off)|uintptr(n))%directAlign == 0 {
		if d := f.direct(); d != nil {
			return f.directFD
		}
	}
	return f.fd
}

const directAlign = 4096

// directFor is what to read b from past the page cache; nil if it is not worth it, or cannot be.
func (f *osFile) directFor(b []byte, off int64) *os.File {
	if len(b) < directBytes || !isAligned(b, off) {
		return nil
	}
	return f.direct()
}

func isAligned(b []byte, off int64) bool {
	return (uintptr(unsafe.Pointer(unsafe.SliceData(b)))|uintptr(off)|uintptr(len(b)))%directAlign == 0
}

// again opens the file once more, whatever its name is by now.
func (f *osFile) again(flags int) (*os.File, error) {
	return os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.fd), flags, 0)
}

// Reader implements File.
func (f *osFile) Reader() (Reader, error) {
	r, err := f.again(os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	return newReader(r), nil
}

func newReader(f *os.File) Reader { return &osFile{f: f, fd: int(f.Fd()), readOnly: true} }

// FromDescriptor returns a file that another process has opened. The descriptor is the Reader's from here on, or is closed. Only a regular file will do:
// to read others might wait for ever.
func FromDescriptor(fd int) (Reader, error) {
	var st unix.Stat_t
	err := unix.Fstat(fd, &st)
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
		err = errors.New("not a regular file")
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("descriptor %d: %w", fd, err)
	}
	return newReader(os.NewFile(uintptr(fd), "a file of another process")), nil
}

func (f *osFile) direct() *os.File {
	f.directOnce.Do(func() {
		flags := os.O_RDWR
		if f.readOnly {
			flags = os.O_RDONLY
		}
		if d, err := f.again(flags | unix.O_DIRECT); err == nil {
			f.directFile, f.directFD = d, int(d.Fd())
		}
	})
	return f.directFile
}

// ReadAtCached is preadv2(2) with RWF_NOWAIT. Where the kernel or the file system cannot tell, everything would block.
func (f *osFile) ReadAtCached(b []byte, off int64) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	if len(b) >= directBytes && !f.cached(off, len(b)) {
		return 0, ErrWouldBlock // a try would begin to read it into the page cache, and ReadAt goes past that
	}
	vec := unix.Iovec{Base: &b[0], Len: uint64(len(b))}
	// It does not block, so the Go scheduler need not be told.
	n, _, errno := unix.RawSyscall6(unix.SYS_PREADV2, uintptr(f.fd), uintptr(unsafe.Pointer(&vec)), 1,
		uintptr(off), uintptr(uint64(off)>>32), unix.RWF_NOWAIT)
	runtime.KeepAlive(f)
	switch {
	case errno == unix.EAGAIN || errno == unix.EOPNOTSUPP || errno == unix.ENOSYS || errno == unix.EINTR:
		return 0, ErrWouldBlock
	case errno != 0:
		return 0, &fs.PathError{Op: "read", Path: f.f.Name(), Err: errno}
	case int(n) == len(b):
		return len(b), nil
	case n == 0:
		return 0, io.EOF
	}
	return 0, ErrWouldBlock // the rest is not in memory, or beyond the end: ReadAt can tell
}

// cached reports whether all of a range is in the page cache; true if the kernel cannot tell (before 6.5).
func (f *osFile) cached(off int64, n int) bool {
	r := unix.CachestatRange{Off: uint64(off), Len: uint64(n)}
	var st unix.Cachestat_t
	return unix.Cachestat(uint(f.fd), &r, &st, 0) != nil || st.Cache >= uint64(n+os.Getpagesize()-1)/uint64(os.Getpagesize())
}

func (f *osFile) WriteAt(b []byte, off int64) (int, error) {
	n, err := f.f.WriteAt(b, off)
	return n, noSpace(err)
}

// WriteThrough implements File. What the page cache has of the range is written out and dropped by the kernel.
func (f *osFile) WriteThrough(b []byte, off int64) (took time.Duration, err error) {
	begin := time.Now()
	if d := f.direct(); d != nil && isAligned(b, off) {
		if _, err := d.WriteAt(b, off); err == nil {
			return time.Since(begin), nil
		}
		// Else let the ordinary way say what is wrong.
	}
	_, err = f.WriteAt(b, off)
	return time.Since(begin), err
}

// WriteDurable implements File: pwritev2(2) with RWF_DSYNC, where the kernel and the file system have it and O_DIRECT.
func (f *osFile) WriteDurable(b []byte, off int64) (took time.Duration, err error) {
	begin := time.Now()
	n := 0
	if !f.noDurable.Load() && len(b) > 0 && isAligned(b, off) && f.direct() != nil {
		vec := unix.Iovec{Base: &b[0], Len: uint64(len(b))}
		r, _, errno := unix.Syscall6(unix.SYS_PWRITEV2, uintptr(f.directFD), uintptr(unsafe.Pointer(&vec)), 1,
			uintptr(off), uintptr(uint64(off)>>32), unix.RWF_DSYNC)
		runtime.KeepAlive(f)
		switch errno {
		case 0:
			n = int(r)
		case unix.EINVAL, unix.EOPNOTSUPP, unix.ENOSYS:
			f.noDurable.Store(true)
		case unix.EINTR, unix.EAGAIN, unix.ENOMEM:
		default:
			return 0, f.wrap("write", errno)
		}
	}
	if n < len(b) {
		if _, err = f.WriteAt(b[n:], off+int64(n)); err == nil {
			err = f.Datasync()
		}
	}
	return time.Since(begin), err
}

func (f *osFile) Datasync() error {
	begin := time.Now()
	err := retry(func() error { return unix.Fdatasync(f.fd) })
	f.syncTime.Store(int64(time.Since(begin)))
	return f.wrap("fdatasync", err)
}

func (f *osFile) SyncTime() time.Duration { return time.Duration(f.syncTime.Load()) }

func (f *osFile) DropCache(off, n int64) error {
	return f.wrap("fadvise", unix.Fadvise(f.fd, off, n, unix.FADV_DONTNEED))
}

func (f *osFile) Allocate(off, n int64) error {
	return f.wrap("fallocate", retry(func() error { return unix.Fallocate(f.fd, 0, off, n) }))
}

func (f *osFile) Truncate(size int64) error { return noSpace(f.f.Truncate(size)) }

func (f *osFile) Size() (int64, error) {
	st, err := f.f.Stat()
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}

// Map implements File: mmap(2).
func (f *osFile) Map(n int) (Mapping, error) {
	if size, err := f.Size(); err != nil || size < int64(n) {
		return nil, cmp.Or(err, f.wrap("mmap", unix.EINVAL))
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(f.fd, &st); err != nil {
		return nil, f.wrap("statfs", err)
	}
	switch st.Type {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.TMPFS_MAGIC:
	default:
		return nil, fmt.Errorf("mmap on a file system of type %#x: %w", st.Type, errors.ErrUnsupported)
	}
	b, err := unix.Mmap(f.fd, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, f.wrap("mmap", err)
	}
	_ = unix.Mlock(b) // else the kernel may take a page back, and has to read it again
	return &osMapping{b, f}, nil
}

type osMapping struct {
	b []byte
	f *osFile
}

func (m *osMapping) Bytes() []byte { return m.b }

// Prepare implements Mapping: madvise(2). The same happens when a page that is clean is first stored to, but then the scheduler of Go does not know of it, and whoever
// wants to stop the world, as the garbage collector does, waits as well.
func (m *osMapping) Prepare(off, n int) error {
	from := off &^ (os.Getpagesize() - 1)
	err := unix.Madvise(m.b[from:off+n], unix.MADV_POPULATE_WRITE)
	if err == unix.EINVAL || err == unix.ENOSYS || err == unix.EINTR { // before Linux 5.14
		err = nil
	}
	return m.f.wrap("madvise", err)
}

// Write implements Mapping. A page that the kernel cannot provide is a SIGBUS, which is an error here and not the end of the process.
func (m *osMapping) Write(b []byte, off int) (err error) {
	dst := m.b[off : off+len(b)]
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		switch e := recover().(type) {
		case nil:
		case interface{ Addr() uintptr }:
			err = m.f.wrap("write", unix.EIO)
		default:
			panic(e)
		}
	}()
	copy(dst, b)
	return nil
}

func (m *osMapping) Close() error { return unix.Munmap(m.b) }

func (f *osFile) Close() error {
	f.directOnce.Do(func() {}) // who has not needed it so far gets none any more
	if f.directFile != nil {
		f.directFile.Close()
	}
	return f.f.Close()
}

func (f *osFile) wrap(op string, err error) error {
	if err == nil {
		return nil
	}
	return noSpace(&fs.PathError{Op: op, Path: f.f.Name(), Err: err})
}

func retry(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}

// noSpace makes errors.Is(err, ErrNoSpace) hold for a full file system and for an exhausted quota.
func noSpace(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w", ErrNoSpace, err)
	}
	return err
}

package vfs

import (
	"fmt"
	"path"
	"time"
)

// OpKind is a kind of call on an FS or File.
type OpKind uint8

// The kinds of calls. ReadAt and ReadAtCached are both OpRead.
const (
	OpCreate OpKind = iota
	OpOpen
	OpRemove
	OpRename
	OpMkdir
	OpList
	OpSyncDir
	OpLock
	OpFree
	OpRead
	OpWrite
	OpDatasync
	OpAllocate
	OpTruncate
	OpSize
	OpDropCache
	OpMap
)

func (k OpKind) String() string {
	names := [...]string{"create", "open", "remove", "rename", "mkdir", "list", "syncdir", "lock", "free",
		"read", "write", "fdatasync", "fallocate", "truncate", "stat", "fadvise", "mmap"}
	if int(k) < len(names) {
		return names[k]
	}
	return fmt.Sprintf("OpKind(%d)", uint8(k))
}

// Op is a call that is about to be made.
type Op struct {
	Kind OpKind
	Name string // of the file or directory; of a rename, the new name
	Off  int64  // read, write, allocate, dropcache: bytes from the start of the file. Truncate: the size.
	Len  int64  // read, write, allocate, dropcache: bytes
}

// Changes reports whether the call changes what a crash at this moment would leave behind: these are the
// points at which a test of crashes has to cut.
func (o Op) Changes() bool {
	switch o.Kind {
	case OpCreate, OpRemove, OpRename, OpMkdir, OpSyncDir, OpWrite, OpDatasync, OpAllocate, OpTruncate:
		return true
	}
	return false
}

// NewErrors returns fs with fault asked before every call but Close: an error that it returns is the call's result and
// the call is not made. A Datasync that is made to fail over a Mem also loses, as a disk would, what was
// unsynced: it stays readable and never becomes durable. fault may be called concurrently.
func NewErrors(fs FS, fault func(op Op) error) FS { return &errorFS{fs, fault} }

type errorFS struct {
	fs    FS
	fault func(Op) error
}

func (e *errorFS) file(name string, f File, err error) (File, error) {
	if err != nil {
		return nil, err
	}
	return &errorFile{f, e, name}, nil
}

func (e *errorFS) Create(name string) (File, error) {
	if err := e.fault(Op{Kind: OpCreate, Name: name}); err != nil {
		return nil, err
	}
	f, err := e.fs.Create(name)
	return e.file(name, f, err)
}

func (e *errorFS) Open(name string) (File, error) {
	if err := e.fault(Op{Kind: OpOpen, Name: name}); err != nil {
		return nil, err
	}
	f, err := e.fs.Open(name)
	return e.file(name, f, err)
}

func (e *errorFS) Remove(name string) error {
	if err := e.fault(Op{Kind: OpRemove, Name: name}); err != nil {
		return err
	}
	return e.fs.Remove(name)
}

func (e *errorFS) Rename(oldname, newname string) error {
	if err := e.fault(Op{Kind: OpRename, Name: newname}); err != nil {
		return err
	}
	return e.fs.Rename(oldname, newname)
}

func (e *errorFS) MkdirAll(dir string) error {
	if err := e.fault(Op{Kind: OpMkdir, Name: dir}); err != nil {
		return err
	}
	return e.fs.MkdirAll(dir)
}

func (e *errorFS) List(dir string) ([]string, error) {
	if err := e.fault(Op{Kind: OpList, Name: dir}); err != nil {
		return nil, err
	}
	return e.fs.List(dir)
}

func (e *errorFS) SyncDir(dir string) error {
	if err := e.fault(Op{Kind: OpSyncDir, Name: path.Clean(dir)}); err != nil {
		return err
	}
	return e.fs.SyncDir(dir)
}

func (e *errorFS) Lock(name string) (func() error, error) {
	if err := e.fault(Op{Kind: OpLock, Name: name}); err != nil {
		return nil, err
	}
	return e.fs.Lock(name)
}

func (e *errorFS) Free() (free, size uint64, err error) {
	if err := e.fault(Op{Kind: OpFree}); err != nil {
		return 0, 0, err
	}
	return e.fs.Free()
}

func (e *errorFS) Boot() (string, error) { return e.fs.Boot() }

type errorFile struct {
	File
	fs   *errorFS
	name string
}

func (f *errorFile) fault(k OpKind, off, n int64) error {
	return f.fs.fault(Op{Kind: k, Name: f.name, Off: off, Len: n})
}

func (f *errorFile) ReadAt(b []byte, off int64) (int, error) {
	if err := f.fault(OpRead, off, int64(len(b))); err != nil {
		return 0, err
	}
	return f.File.ReadAt(b, off)
}

func (f *errorFile) ReadAtCached(b []byte, off int64) (int, error) {
	if err := f.fault(OpRead, off, int64(len(b))); err != nil {
		return 0, err
	}
	return f.File.ReadAtCached(b, off)
}

// Reader implements File.
func (f *errorFile) Reader() (Reader, error) {
	r, err := f.File.Reader()
	if err != nil {
		return nil, err
	}
	return &errorReader{r, f}, nil
}

type errorReader struct {
	Reader
	f *errorFile
}

func (r *errorReader) ReadAt(b []byte, off int64) (int, error) {
	if err := r.f.fault(OpRead, off, int64(len(b))); err != nil {
		return 0, err
	}
	return r.Reader.ReadAt(b, off)
}

func (r *errorReader) ReadAtCached(b []byte, off int64) (int, error) {
	if err := r.f.fault(OpRead, off, int64(len(b))); err != nil {
		return 0, err
	}
	return r.Reader.ReadAtCached(b, off)
}

func (r *errorReader) Descriptor(int64, int) int { return -1 }

func (f *errorFile) WriteAt(b []byte, off int64) (int, error) {
	if err := f.fault(OpWrite, off, int64(len(b))); err != nil {
		return 0, err
	}
	return f.File.WriteAt(b, off)
}

func (f *errorFile) WriteThrough(b []byte, off int64) (took time.Duration, err error) {
	if err := f.fault(OpWrite, off, int64(len(b))); err != nil {
		return 0, err
	}
	return f.File.WriteThrough(b, off)
}

// Map implements File. A write to the memory is a write to who injects faults.
func (f *errorFile) Map(n int) (Mapping, error) {
	if err := f.fault(OpMap, 0, int64(n)); err != nil {
		return nil, err
	}
	m, err := f.File.Map(n)
	if err != nil {
		return nil, err
	}
	return &errorMapping{m, f}, nil
}

type errorMapping struct {
	Mapping
	f *errorFile
}

func (m *errorMapping) Write(b []byte, off int) error {
	if err := m.f.fault(OpWrite, int64(off), int64(len(b))); err != nil {
		return err
	}
	return m.Mapping.Write(b, off)
}

// WriteDurable is a write and an fdatasync to who injects faults, and to who cuts the power between the two.
func (f *errorFile) WriteDurable(b []byte, off int64) (took time.Duration, err error) {
	if _, err := f.WriteThrough(b, off); err != nil {
		return 0, err
	}
	if err := f.fault(OpDatasync, 0, 0); err != nil {
		f.failSync()
		return 0, err
	}
	return f.File.WriteDurable(b, off)
}

func (f *errorFile) Datasync() error {
	if err := f.fault(OpDatasync, 0, 0); err != nil {
		f.failSync()
		return err
	}
	return f.File.Datasync()
}

// failSync passes the loss on, through further layers of Errors, down to a Mem.
func (f *errorFile) failSync() {
	if m, ok := f.File.(interface{ failSync() }); ok {
		m.failSync()
	}
}

func (f *errorFile) DropCache(off, n int64) error {
	if err := f.fault(OpDropCache, off, n); err != nil {
		return err
	}
	return f.File.DropCache(off, n)
}

func (f *errorFile) Allocate(off, n int64) error {
	if err := f.fault(OpAllocate, off, n); err != nil {
		return err
	}
	return f.File.Allocate(off, n)
}

func (f *errorFile) Truncate(size int64) error {
	if err := f.fault(OpTruncate, size, 0); err != nil {
		return err
	}
	return f.File.Truncate(size)
}

func (f *errorFile) Descriptor(int64, int) int { return -1 }

func (f *errorFile) WriteDescriptor() int { return -1 }

func (f *errorFile) Size() (int64, error) {
	if err := f.fault(OpSize, 0, 0); err != nil {
		return 0, err
	}
	return f.File.Size()
}

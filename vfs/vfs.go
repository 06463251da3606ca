// Package vfs is the file system seam: what the store needs from an operating system, no more. OS is
// the real one; Mem is its twin in memory that can crash, dropping, reordering and tearing whatever was not
// synced, directory entries included; Errors injects failures into either.
package vfs

import (
	"errors"
	"time"
)

// ErrWouldBlock: the bytes are not in memory; reading them would wait for the disk.
var ErrWouldBlock = errors.New("would block")

// ErrNoSpace: the file system is full.
var ErrNoSpace = errors.New("no space left on device")

// ErrLocked: another process holds the lock.
var ErrLocked = errors.New("locked by another process")

// FS is a directory tree. Names are slash-separated and relative to its root, which is ".". Errors wrap fs.ErrNotExist,
// fs.ErrExist and fs.ErrInvalid (for a name that leads out of the tree) where they fit. Safe for concurrent use.
type FS interface {
	// Create makes a new file for reading and writing; fs.ErrExist if there is one. The name is durable after SyncDir.
	Create(name string) (File, error)
	// Open opens an existing file for reading and writing.
	Open(name string) (File, error)
	Remove(name string) error
	// Rename replaces newname, atomically; durable after SyncDir.
	Rename(oldname, newname string) error
	MkdirAll(dir string) error
	// List returns the names in dir, sorted.
	List(dir string) ([]string, error)
	// SyncDir makes the entries of dir durable.
	SyncDir(dir string) error
	// Lock takes an exclusive lock until the returned function is called or the process ends: ErrLocked.
	Lock(name string) (unlock func() error, err error)
	// Free returns the bytes that can still be written, and the size of the file system.
	Free() (free, size uint64, err error)
	// Boot names the time since memory was last lost: while it is the same, files are what processes have written to them, durable or not.
	Boot() (string, error)
}

// Reader is an open file, as far as it can be read. Methods may be called concurrently, except that Close ends all use of it.
type Reader interface {
	// ReadAt is that of io.ReaderAt.
	ReadAt(b []byte, off int64) (int, error)
	// ReadAtCached is ReadAt if that need not wait for the disk, else ErrWouldBlock.
	ReadAtCached(b []byte, off int64) (int, error)
	// Descriptor is an open descriptor from which pread(2) does what ReadAt(b, off) does, for b of n bytes, page-aligned if n is a
	// multiple of the page; below 0 if there is none. It is closed with the file.
	Descriptor(off int64, n int) int
	Close() error
}

// File is an open file for reading and writing.
type File interface {
	Reader
	// Reader opens the file once more, for reading only. What it returns does not end with this one, nor with the process, if it is handed to another.
	Reader() (Reader, error)
	// WriteAt is that of io.WriterAt; ErrNoSpace when the file system is full. Not durable before Datasync.
	WriteAt(b []byte, off int64) (int, error)
	// WriteThrough is WriteAt past the page cache, if that can be, for what is page-aligned, in memory as in the file, so that it waits for
	// the medium. It is no more durable than WriteAt. While it runs nothing else may be written to the same 2 MiB of the file, as large as the kernel's pages
	// get: it would find the rest of one changed when it is done, and call that an I/O error. took is how long it waited for the medium.
	WriteThrough(b []byte, off int64) (took time.Duration, err error)
	// WriteDurable is WriteThrough, and what it has written is durable on return; nothing else need be that was not before. Whatever the error, it is as bad as one of
	// Datasync.
	WriteDurable(b []byte, off int64) (took time.Duration, err error)
	// Datasync makes everything written so far durable. After it has failed once, nothing may be assumed about any
	// byte written since the last success, whatever later calls say.
	Datasync() error
	// SyncTime is how long the last Datasync took, 0 before the first. Whoever decides whether a Datasync may hold up an
	// event loop asks here, as only the file system knows real time.
	SyncTime() time.Duration
	// DropCache forgets those bytes of [off, off+n) in memory that are clean, as far as the system can, so that reading
	// them asks the medium. After a failed Datasync memory may hold, as clean, bytes the medium never got.
	DropCache(off, n int64) error
	// Allocate reserves [off, off+n) on the medium and extends the file: ErrNoSpace.
	Allocate(off, n int64) error
	Truncate(size int64) error
	// WriteDescriptor is an open descriptor to which pwrite(2) does what WriteThrough does; below 0 if there is none. It is closed with the file.
	WriteDescriptor() int
	Size() (int64, error)
	// Map maps the first n bytes, as many as the file has at least, into memory. errors.ErrUnsupported where that cannot be, or where a write to what was written before may find no room
	// on the disk, as on file systems that copy what is written.
	Map(n int) (Mapping, error)
}

// Mapping is a part of a file in memory. What is written to it is in the file, and outlives the process, for the cost of a copy. It is durable after a Datasync of the file, and some of it
// may be before.
type Mapping interface {
	// Bytes is the memory, page-aligned. It is only to be read.
	Bytes() []byte
	// Prepare waits for what writing to n bytes at off might have to wait for: room on the disk for the pages that change, and the journal. After that Write
	// hardly ever does, unless the system has written those pages out meanwhile.
	Prepare(off, n int) error
	// Write copies b to off. An error leaves anything in the range.
	Write(b []byte, off int) error
	// Close ends all use of the memory.
	Close() error
}

// Package device is all that a front end (NBD, FUSE, AoE, TCMU …) knows of what it serves: a block
// device that takes requests, and a directory of such devices.
package device

import (
	"errors"

	"github.com/coreos/torus/buf"
)

// Op is what a Request asks for.
type Op uint8

// The operations of a block device.
const (
	Read Op = iota
	Write
	Flush
	Trim        // may forget the contents; reads as zeroes afterwards
	WriteZeroes // reads as zeroes afterwards, durably as a Write would be
	Status      // replies Extents
	Prefetch    // may be ignored
)

// Flags modify a Request.
type Flags uint8

const (
	// FUA: Done is called only when the request is as durable as after a Flush.
	FUA Flags = 1 << iota
	// NoHole (WriteZeroes): keep the range allocated.
	NoHole
	// FastZero (WriteZeroes): fail with ErrNotSupported rather than be no faster than writing.
	FastZero
	// Sparse (Read): the device may set Zero instead of filling Data, if all of it reads as zeroes.
	Sparse
)

// The errors by which a front end chooses what to tell its client; anything else is an I/O error.
var (
	ErrOutOfSpace   = errors.New("no space left")
	ErrReadOnly     = errors.New("read-only device")
	ErrRange        = errors.New("beyond the end of the device")
	ErrInvalid      = errors.New("invalid request")
	ErrNotSupported = errors.New("not supported")
	ErrShutdown     = errors.New("device is shut down")
	ErrNotExist     = errors.New("no such device")
	ErrBusy         = errors.New("attached elsewhere")
)

// Extent is a run of bytes of one kind.
type Extent struct {
	Len  uint64
	Hole bool // nothing allocated
	Zero bool // reads as zeroes
}

// Request is one operation and its result. It is made for reuse: the front end owns it before
// Submit and after Done, the device in between.
type Request struct {
	Op    Op
	Flags Flags
	Off   uint64 // bytes, any alignment
	Len   uint64 // bytes; for Read and Write len(Data)
	// Data is where a Read puts its bytes (the device's until Done), or what a Write
	// writes (the device has taken a copy when Submit returns).
	Data []byte
	// Buf, of a Read, is the buffer that Data is the beginning of, with nobody else in it, if the device may put another one in its place, along with Data: see torus.Request.
	Buf *buf.Buf

	// Done is called exactly once, on the device's loop, possibly before Submit returns.
	Done func(*Request)

	Err     error
	Zero    bool     // Read with Sparse: everything reads as zeroes, Data was left alone
	Extents []Extent // Status: from Off on, covering at most Len; at least one. The device may use the room that was there
	User    any      // the front end's own
}

// Finish sets the result and calls Done. For implementations of Device.
func (r *Request) Finish(err error) {
	r.Err = err
	r.Done(r)
}

// Device takes requests on one loop. Requests under way at the same time may take effect in any order; a Flush covers
// every write that was done before it was submitted, whoever submitted it.
type Device interface {
	Size() uint64 // bytes
	ReadOnly() bool
	Submit(r *Request)
}

// Info describes a device without opening it.
type Info struct {
	Name        string
	Description string
	Size        uint64
	ReadOnly    bool
}

// Directory finds devices by name. Its methods are called on the loop; done is called there, once, maybe at once.
type Directory interface {
	List(done func([]Info, error))
	// Stat describes a device without attaching it: ErrNotExist.
	Stat(name string, done func(Info, error))
	// Open attaches a device, or takes part in one already attached: ErrNotExist, ErrBusy. Every success must
	// be paired with one Close; the last one releases the device.
	Open(name string, done func(Device, error))
	Close(name string, d Device)
}

// Package nbdclient is a small NBD client for tests: fixed newstyle negotiation, simple replies, any number of
// requests under way on one connection, sent in the order of the calls.
package nbdclient

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Cmd is a command of the transmission phase.
type Cmd uint16

// The commands this client knows.
const (
	Read        Cmd = 0
	Write       Cmd = 1
	disconnect  Cmd = 2
	Flush       Cmd = 3
	Trim        Cmd = 4
	WriteZeroes Cmd = 6
)

func (c Cmd) String() string {
	switch c {
	case Read:
		return "read"
	case Write:
		return "write"
	case Flush:
		return "flush"
	case Trim:
		return "trim"
	case WriteZeroes:
		return "write zeroes"
	}
	return fmt.Sprintf("command %d", uint16(c))
}

// FUA asks that the request is durable when it is done.
const FUA uint16 = 1

// Transmission flags of an export.
const (
	FlagReadOnly        uint16 = 1 << 1
	FlagSendFlush       uint16 = 1 << 2
	FlagSendFUA         uint16 = 1 << 3
	FlagSendTrim        uint16 = 1 << 5
	FlagSendWriteZeroes uint16 = 1 << 6
)

const (
	magicInit    = 0x4e42444d41474943
	magicOption  = 0x49484156454F5054
	magicReply   = 0x3e889045565a9
	magicRequest = 0x25609513
	magicSimple  = 0x67446698

	optGo      = 7
	repAck     = 1
	repInfo    = 3
	infoExport = 0
	// maxOptionReply bounds what a server may say to an option, bytes.
	maxOptionReply = 64 << 10
)

// ErrLost: the connection ended, so whether the request took effect is unknown.
var ErrLost = errors.New("connection lost")

// Refused is the server's answer to a client that asked for an export and does not get it.
type Refused struct {
	Export  string
	Code    uint32 // NBD_REP_ERR_…
	Message string
}

func (e *Refused) Error() string {
	return fmt.Sprintf("export %q refused (%#x): %s", e.Export, e.Code, e.Message)
}

// Address is where an export is.
type Address struct {
	Network string // "unix" or "tcp"
	Addr    string // a path, or HOST:PORT
	Export  string
}

// Unix is an export on a unix socket.
func Unix(path, export string) Address { return Address{"unix", path, export} }

// TCP is an export at HOST:PORT.
func TCP(addr, export string) Address { return Address{"tcp", addr, export} }

// URI is how libnbd's tools and qemu call it.
func (a Address) URI() string {
	if a.Network == "unix" {
		return "nbd+unix:///" + a.Export + "?socket=" + a.Addr
	}
	return "nbd://" + a.Addr + "/" + a.Export
}

// Dial connects once. Errors: *Refused if there is a server that does not give the export.
func (a Address) Dial(ctx context.Context) (*Conn, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, a.Network, a.Addr)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { nc.Close() })
	c, err := handshake(nc, a.Export)
	if err == nil && !stop() {
		err = ctx.Err()
	}
	if err != nil {
		nc.Close()
		return nil, errors.Join(err, ctx.Err())
	}
	go c.receive()
	return c, nil
}

// DialUntil connects, trying again until ctx ends; then the error says what stood in the way last.
func (a Address) DialUntil(ctx context.Context) (*Conn, error) {
	for {
		c, err := a.Dial(ctx)
		if err == nil {
			return c, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("no connection to %s: %w", a.URI(), err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func handshake(nc net.Conn, export string) (*Conn, error) {
	var b [18]byte
	if _, err := io.ReadFull(nc, b[:]); err != nil {
		return nil, fmt.Errorf("greeting: %w", err)
	}
	if binary.BigEndian.Uint64(b[:]) != magicInit || binary.BigEndian.Uint64(b[8:]) != magicOption {
		return nil, fmt.Errorf("greeting is not of a newstyle server: %x", b)
	}
	flags := uint32(binary.BigEndian.Uint16(b[16:]))
	if flags&1 == 0 {
		return nil, errors.New("server does not speak fixed newstyle")
	}
	out := binary.BigEndian.AppendUint32(nil, flags&3)
	out = binary.BigEndian.AppendUint64(out, magicOption)
	out = binary.BigEndian.AppendUint32(out, optGo)
	out = binary.BigEndian.AppendUint32(out, uint32(4+len(export)+2))
	out = binary.BigEndian.AppendUint32(out, uint32(len(export)))
	out = append(out, export...)
	out = append(out, 0, 0) // no particular information wanted
	if _, err := nc.Write(out); err != nil {
		return nil, fmt.Errorf("option: %w", err)
	}
	c := &Conn{nc: nc, pending: map[uint64]*Op{}, ended: make(chan struct{})}
	for {
		var h [20]byte
		if _, err := io.ReadFull(nc, h[:]); err != nil {
			return nil, fmt.Errorf("reply to option: %w", err)
		}
		typ, n := binary.BigEndian.Uint32(h[12:]), binary.BigEndian.Uint32(h[16:])
		if binary.BigEndian.Uint64(h[:]) != magicReply || binary.BigEndian.Uint32(h[8:]) != optGo || n > maxOptionReply {
			return nil, fmt.Errorf("reply to option makes no sense: %x", h)
		}
		body := make([]byte, n)
		if _, err := io.ReadFull(nc, body); err != nil {
			return nil, fmt.Errorf("reply to option: %w", err)
		}
		switch {
		case typ&(1<<31) != 0:
			return nil, &Refused{Export: export, Code: typ, Message: strings.TrimSpace(string(body))}
		case typ == repAck:
			return c, nil
		case typ == repInfo && n == 12 && binary.BigEndian.Uint16(body) == infoExport:
			c.size, c.flags = binary.BigEndian.Uint64(body[2:]), binary.BigEndian.Uint16(body[10:])
		}
	}
}

// Op is one request. The caller owns it before Start and after Done; Data too.
type Op struct {
	Cmd   Cmd
	Flags uint16
	Off   uint64 // bytes
	Len   uint32 // bytes; ignored for Read and Write, which have Data
	Data  []byte
	// Done is called once, on a goroutine of the connection, which reads no other reply meanwhile: it must not wait for one.
	Done func(*Op)

	Err        error // nil, a syscall.Errno that the server sent, or ErrLost, wrapped
	Start, End time.Time
}

// Conn is a connection in its transmission phase. All methods may be called from any goroutine.
type Conn struct {
	nc    net.Conn
	size  uint64
	flags uint16

	sendMu sync.Mutex // held while a request is put on the wire: two never mix
	header [28]byte
	cookie uint64

	mu      sync.Mutex
	pending map[uint64]*Op
	err     error // why the connection has ended

	ended chan struct{}
}

// Size is the size of the export in bytes.
func (c *Conn) Size() uint64 { return c.size }

// Flags are the export's transmission flags.
func (c *Conn) Flags() uint16 { return c.flags }

// Ended is closed once the connection has ended and every request is done.
func (c *Conn) Ended() <-chan struct{} { return c.ended }

// Start sends a request; it blocks while the socket takes no more. Requests are on the wire in the order of the calls.
func (c *Conn) Start(op *Op) {
	n := op.Len
	if op.Cmd == Read || op.Cmd == Write {
		n = uint32(len(op.Data))
	}
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	c.cookie++
	cookie := c.cookie
	op.Start = time.Now()
	c.mu.Lock()
	if err := c.err; err != nil {
		c.mu.Unlock()
		op.finish(err)
		return
	}
	c.pending[cookie] = op
	c.mu.Unlock()
	h := c.header[:]
	binary.BigEndian.PutUint32(h, magicRequest)
	binary.BigEndian.PutUint16(h[4:], op.Flags)
	binary.BigEndian.PutUint16(h[6:], uint16(op.Cmd))
	binary.BigEndian.PutUint64(h[8:], cookie)
	binary.BigEndian.PutUint64(h[16:], op.Off)
	binary.BigEndian.PutUint32(h[24:], n)
	bufs := net.Buffers{h}
	if op.Cmd == Write {
		bufs = append(bufs, op.Data)
	}
	if _, err := bufs.WriteTo(c.nc); err != nil {
		c.nc.Close() // the receiver finds out, and ends everything
	}
}

func (op *Op) finish(err error) {
	op.End = time.Now()
	if err != nil {
		op.Err = fmt.Errorf("%s at %d: %w", op.Cmd, op.Off, err)
	}
	op.Done(op)
}

// receive completes requests until the connection ends.
func (c *Conn) receive() {
	err := c.replies()
	c.nc.Close()
	c.mu.Lock()
	c.err = fmt.Errorf("%w: %w", ErrLost, err)
	lost := c.pending
	c.pending = nil
	c.mu.Unlock()
	for _, op := range lost {
		op.finish(c.err)
	}
	close(c.ended)
}

func (c *Conn) replies() error {
	for {
		var h [16]byte
		if _, err := io.ReadFull(c.nc, h[:]); err != nil {
			return err
		}
		if binary.BigEndian.Uint32(h[:]) != magicSimple {
			return fmt.Errorf("a reply begins with %x", h[:4])
		}
		code, cookie := binary.BigEndian.Uint32(h[4:]), binary.BigEndian.Uint64(h[8:])
		c.mu.Lock()
		op := c.pending[cookie]
		c.mu.Unlock()
		if op == nil {
			return fmt.Errorf("a reply to request %d, which is not under way", cookie)
		}
		if code == 0 && op.Cmd == Read {
			if _, err := io.ReadFull(c.nc, op.Data); err != nil {
				return err
			}
		}
		c.mu.Lock()
		delete(c.pending, cookie)
		c.mu.Unlock()
		if code != 0 {
			op.finish(syscall.Errno(code))
		} else {
			op.finish(nil)
		}
	}
}

// do starts a request and waits for it.
func (c *Conn) do(op *Op) error {
	done := make(chan struct{})
	op.Done = func(*Op) { close(done) }
	c.Start(op)
	<-done
	return op.Err
}

// ReadAt fills b.
func (c *Conn) ReadAt(b []byte, off uint64) error { return c.do(&Op{Cmd: Read, Off: off, Data: b}) }

// WriteAt writes b. flags: 0 or FUA, as for the others.
func (c *Conn) WriteAt(b []byte, off uint64, flags uint16) error {
	return c.do(&Op{Cmd: Write, Flags: flags, Off: off, Data: b})
}

// Flush makes all that was written durable.
func (c *Conn) Flush() error { return c.do(&Op{Cmd: Flush}) }

// Trim gives n bytes up.
func (c *Conn) Trim(off uint64, n uint32, flags uint16) error {
	return c.do(&Op{Cmd: Trim, Flags: flags, Off: off, Len: n})
}

// WriteZeroes makes n bytes read as zeroes.
func (c *Conn) WriteZeroes(off uint64, n uint32, flags uint16) error {
	return c.do(&Op{Cmd: WriteZeroes, Flags: flags, Off: off, Len: n})
}

// Close says good-bye and hangs up. Requests under way end with ErrLost.
func (c *Conn) Close() {
	c.sendMu.Lock()
	h := [28]byte{}
	binary.BigEndian.PutUint32(h[:], magicRequest)
	binary.BigEndian.PutUint16(h[6:], uint16(disconnect))
	c.nc.SetWriteDeadline(time.Now().Add(100 * time.Millisecond)) //nolint:errcheck // it is being closed
	c.nc.Write(h[:])                                              //nolint:errcheck // it is being closed
	c.sendMu.Unlock()
	c.nc.Close()
	<-c.ended
}

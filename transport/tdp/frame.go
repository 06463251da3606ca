package tdp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"github.com/coreos/torus"
	"github.com/coreos/torus/record"
	"github.com/coreos/torus/transport"
)

const (
	// HeaderSize is the size of a frame's header in bytes.
	HeaderSize = 64
	// MaxPayload bounds the payload of every frame, in bytes: four of the largest records.
	MaxPayload = 4 * record.MaxSize
	// MaxTails bounds the tails in one reply.
	MaxTails = MaxPayload / tailSize

	maxHello = 512 // bytes of a hello
	maxText  = 512 // bytes of the text of an error

	magic = 0x31504454 // "TDP1", little endian

	// The ops of the protocol itself, beside those of torus.Op.
	opHello   = 0x40 // the first frame, either way
	opGoodbye = 0x41 // the last frame: why the sender closes
	opReturn  = 0x42 // what was lent in reply to the request of this id is not needed any more
	opWhere   = 0x43 // where does a block lie? (package place)
	opReply   = 0x80 // this bit marks the answer to a request
)

const (
	atMagic   = 0
	atOp      = 4
	atCode    = 5
	atFlags   = 6
	atID      = 8
	atPayload = 12
	atRef     = 16 // requests
	atSeq     = 16 // replies: Committed
	atEpoch   = 40 // requests: Epoch; replies: Fence
	atOff     = 48
	atLen     = 52 // requests: Len; replies: Length
	atSum     = 56
	atCRC     = 60
)

const (
	// flagReserve, of an Append, is torus.Request.Reserve.
	flagReserve = 1
	// flagLent, of an Append or the reply to a Read: length bytes of payload are not sent but lent (transport.Lender). Of a Read: the reply may be.
	flagLent = 2
	// flagFile, of a Where: the file is wanted, too, and comes with the reply.
	flagFile = 4

	// flagDurable, of an Append, is torus.Request.Durable.
	flagDurable = 8

	// lendAtLeast is how much is lent rather than sent, in bytes.
	lendAtLeast = 8 << 10
	// lendReadsAtLeast is the same of replies to reads, of which each has a buffer of its own, and the smallest that can be lent are of this size.
	lendReadsAtLeast = 64 << 10
	// maxLent bounds what a server has lent on one connection at a time. What is more is sent.
	maxLent = 16 << 20
)

// frame is a decoded header. Its fields are those of torus.Request.
type frame struct {
	op        uint8
	code      uint8 // of the error, torus.ErrorCode
	flags     uint16
	id        uint32 // chosen by the client; 0 belongs to no request
	payload   uint32 // bytes that follow the header
	ref       torus.BlockRef
	epoch     uint64
	off       uint32
	len       uint32
	sum       uint32 // CRC32C of the payload, 0 where that consists of pages; of what is lent, the page where it begins
	committed uint64
	fence     uint64
}

// put encodes f into b.
func (f *frame) put(b *[HeaderSize]byte) {
	le := binary.LittleEndian
	le.PutUint32(b[atMagic:], magic)
	b[atOp], b[atCode] = f.op, f.code
	le.PutUint16(b[atFlags:], f.flags)
	le.PutUint32(b[atID:], f.id)
	le.PutUint32(b[atPayload:], f.payload)
	if f.op&opReply == 0 {
		f.ref.AppendTo(b[atRef:atRef])
		le.PutUint64(b[atEpoch:], f.epoch)
	} else {
		le.PutUint64(b[atSeq:], f.committed)
		clear(b[atSeq+8 : atEpoch])
		le.PutUint64(b[atEpoch:], f.fence)
	}
	le.PutUint32(b[atOff:], f.off)
	le.PutUint32(b[atLen:], f.len)
	le.PutUint32(b[atSum:], f.sum)
	le.PutUint32(b[atCRC:], record.Checksum(b[:atCRC]))
}

var (
	errNotTDP   = errors.New("not a TDP frame: is another protocol spoken here?")
	errFrameCRC = fmt.Errorf("frame header: %w", torus.ErrCorrupt)
	errFlags    = errors.New("frame with flags that were not agreed upon")
	errTooLong  = fmt.Errorf("frame with a payload of more than %d bytes", MaxPayload)
)

// parse decodes and verifies the header at b, which is at least HeaderSize long. What it accepts has
// a payload of MaxPayload at most; that the op allows for one is the caller's to check.
func (f *frame) parse(b []byte) error {
	le := binary.LittleEndian
	b = b[:HeaderSize]
	if le.Uint32(b[atMagic:]) != magic {
		return errNotTDP
	}
	if le.Uint32(b[atCRC:]) != record.Checksum(b[:atCRC]) {
		return errFrameCRC
	}
	flags := le.Uint16(b[atFlags:])
	if flags&^flagsOf(b[atOp]) != 0 {
		return errFlags
	}
	*f = frame{
		op:      b[atOp],
		code:    b[atCode],
		flags:   flags,
		id:      le.Uint32(b[atID:]),
		payload: le.Uint32(b[atPayload:]),
		off:     le.Uint32(b[atOff:]),
		len:     le.Uint32(b[atLen:]),
		sum:     le.Uint32(b[atSum:]),
	}
	if f.op&opReply == 0 {
		f.ref = torus.BlockRefFromBytes(b[atRef:])
		f.epoch = le.Uint64(b[atEpoch:])
	} else {
		f.committed = le.Uint64(b[atSeq:])
		f.fence = le.Uint64(b[atEpoch:])
	}
	if f.payload > MaxPayload {
		return errTooLong
	}
	return nil
}

// flagsOf returns the flags that frames of an op may have.
func flagsOf(op uint8) uint16 {
	switch op {
	case uint8(torus.OpAppend):
		return flagReserve | flagLent | flagDurable
	case uint8(torus.OpRead), uint8(torus.OpRead) | opReply:
		return flagLent
	case opWhere:
		return flagFile
	}
	return 0
}

// lend has f say where b is lent, as f's id; false if it has to be sent, and then owner is not needed.
func (f *frame) lend(l transport.Lender, b []byte, owner transport.Releaser) bool {
	if l == nil || len(b) < lendAtLeast {
		return false
	}
	at, ok := l.Lend(b, f.id, owner)
	if !ok {
		return false
	}
	if at%torus.PageSize != 0 || at/torus.PageSize > math.MaxUint32 {
		panic("tdp: what is lent does not begin with a page, or is too far away")
	}
	f.flags |= flagLent
	f.sum = uint32(at / torus.PageSize)
	return true
}

// borrow returns what f says is lent, to be given back to l.
func (f *frame) borrow(l transport.Lender) ([]byte, error) {
	if l == nil {
		return nil, fmt.Errorf("lent memory on a connection without: %w", torus.ErrInvalid)
	}
	return l.Borrow(uint64(f.sum)*torus.PageSize, int(f.len))
}

// clip shortens the text of an error to what a frame may carry.
func clip(text string) string {
	if len(text) > maxText {
		return text[:maxText]
	}
	return text
}

// goodbye encodes the last frame of a connection.
func goodbye(why error) []byte {
	text := clip(why.Error())
	f := frame{op: opGoodbye, code: torus.ErrorCode(why), payload: uint32(len(text)), sum: record.Checksum([]byte(text))}
	var h [HeaderSize]byte
	f.put(&h)
	return append(h[:], text...)
}

// remoteError is an error that came over the wire: its text, and the sentinel it stands for.
type remoteError struct {
	addr string
	text string
	err  error
}

func (e *remoteError) Error() string { return e.addr + ": " + e.text }
func (e *remoteError) Unwrap() error { return e.err }

// newRemoteError makes the error of a frame. Text that does not match its checksum is left out.
func newRemoteError(addr string, f *frame, text []byte) error {
	e := &remoteError{addr: addr, err: torus.ErrorFromCode(f.code)}
	if e.err == nil {
		e.err = torus.ErrIO
	}
	if len(text) > 0 && record.Checksum(text) == f.sum {
		e.text = string(text)
	} else {
		e.text = e.err.Error()
	}
	return e
}

// Package transport is the network seam: byte streams on a loop. Package sock implements it with real
// TCP and unix sockets, package mem in memory with delays, drops and partitions; tdp (and the NBD
// server) speak their protocols over either.
package transport

import (
	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/vfs"
)

// Network makes streams.
type Network interface {
	// Dial starts a connection to addr, such as "tcp://127.0.0.1:40000" or "unix:/run/x.sock". Exactly one of
	// h.Opened and h.Closed follows, later, on l.
	Dial(l loop.Loop, addr string, h Handler) Stream
	// Listen accepts connections on addr until the Listener is closed. accept returns the handler of each;
	// Opened is called on it at once. Port 0 picks a free one, see Listener.Addr.
	Listen(l loop.Loop, addr string, accept func(s Stream) Handler) (Listener, error)
}

// Listener is an open listening socket.
type Listener interface {
	// Addr is the address in the form Dial takes.
	Addr() string
	// Close stops accepting; accepted streams live on.
	Close() error
}

// Handler receives what happens to one stream, on its loop.
type Handler interface {
	// Opened: the stream is connected.
	Opened(s Stream)
	// Data hands over all received bytes not consumed yet; b is valid until it returns. It returns how many bytes it
	// has consumed, and how long b must be at least before calling it again makes sense (0: any longer).
	// A handler may call s.ReadInto and then sees Data again only after that is full.
	Data(s Stream, b []byte) (consumed, need int)
	// Closed is called once, after which no call follows: err is nil when the other side closed in
	// order, else why. It is also called after Stream.Close, with torus.ErrClosed.
	Closed(s Stream, err error)
}

// Releaser is who keeps what is lent: one of both is called, once. Abandon says that another process has ended that had it, for which the disk may still be
// reading the very pages.
type Releaser interface {
	Release()
	Abandon()
}

// Lender is a Stream whose ends may be on one machine, and then can read some of each other's memory: what is lent need not be copied into a socket and
// out of it again. Where it is cannot be seen from the bytes of the stream; the protocol above says it.
type Lender interface {
	Stream
	// Lend lets the other side read b, and returns where it finds it; false if it cannot. b must not change. owner, who sees to that, is
	// released, once, when it is reclaimed; what is not is abandoned when the other side has closed the stream too and given everything back, or has died, which for one that hangs
	// may be never. id is the caller's name for it, and not that of anything else that is lent.
	Lend(b []byte, id uint32, owner Releaser) (at uint64, ok bool)
	// Reclaim ends what was lent as id, as the other side has said that it does not need it any more. False if nothing is.
	Reclaim(id uint32) bool
	// Lent is how many bytes are.
	Lent() int
	// CanBorrow reports whether there is anything that Borrow can find. It may become true until the first Data, and not later.
	CanBorrow() bool
	// Borrow returns n bytes that the other side has lent, to be read until GiveBack, even if the stream closes meanwhile. The error of what is not its memory
	// wraps torus.ErrInvalid, that of a stream that has closed torus.ErrClosed.
	Borrow(at uint64, n int) ([]byte, error)
	// GiveBack is to be called once for each Borrow, before the other side is told so.
	GiveBack()

	// Show lets the other side see b for as long as the stream is open there, and returns where it finds it (Borrow); false if it cannot. b may change all the time.
	Show(b []byte) (at uint64, ok bool)
	// SendFile hands a file to the other side, where it is by the time that what is written next is. It is the stream's from here on, which
	// closes it. False if that cannot be, or another is to be sent first: then it stays the caller's.
	SendFile(f vfs.Reader) bool
	// ExpectFile is to be called before the other side can send a file: one that nobody expects is lost, and may hold up what follows.
	ExpectFile()
	// TakeFile returns the file that has come, for the caller to close; nil if none has. No more are expected.
	TakeFile() vfs.Reader
}

// Stream is one connection. What is written in one turn of the loop leaves in one writev at its end.
type Stream interface {
	// Write queues a copy of b. For headers.
	Write(b []byte)
	// WriteShared queues b without a copy: it must not change until it has been sent or the stream has closed.
	WriteShared(b []byte)
	// WriteBuf queues the first n bytes of b without a copy and releases b when they have been sent or the stream closes.
	WriteBuf(b *buf.Buf, n int)
	// ReadInto directs the next len(dst) bytes of the stream, starting behind what the running call of Data
	// consumes, straight into dst; done is called when it is full. Never called again if the stream closes.
	// To be called from Data or done only.
	ReadInto(dst []byte, done func())
	// Pause stops reading (backpressure) until Resume.
	Pause()
	Resume()
	// Queued is how many bytes wait to be sent.
	Queued() int
	// Close drops what is queued and closes; Handler.Closed follows at the end of the turn.
	Close()
	// CloseAfterWrite closes when what is queued has been sent.
	CloseAfterWrite()
	// RemoteAddr names the other side, for logs.
	RemoteAddr() string
}

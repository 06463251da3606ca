// Package sock is transport.Network over real TCP and unix stream sockets, on a loop.Epoll.
//
// Sockets are non-blocking and edge-triggered for input: no system call is spent on telling epoll what is
// wanted. A stream reads when its socket is ready, into a buffer it holds only while there is something in it, and
// writes once, at the end of the turn; only a full socket makes it ask epoll for more room.
//
//	addr.go    addresses, host names
//	dial.go    becoming connected
//	listen.go  accepting
//	stream.go  life and death of a stream
//	read.go    socket → Handler
//	write.go   queue → socket
//	shortcut.go unix sockets instead of TCP on one machine
//	lend.go    memory that both ends can read
package sock

import (
	"fmt"
	"sync"

	"github.com/coreos/torus"
	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/transport"
	"golang.org/x/sys/unix"
)

const (
	inputSize    = 64 << 10 // an input buffer at first
	maxInputSize = 64 << 20 // and at last: more than a handler may need at once
	chunkSize    = 16 << 10 // of small copied writes
	maxIovecs    = 1024     // IOV_MAX of Linux
)

// Network makes streams of sockets. Its loops must be *loop.Epoll.
type Network struct {
	mu    sync.Mutex
	loops map[*loop.Epoll]*shared

	tcpOnly bool // in tests: no shortcuts
}

var _ transport.Network = (*Network)(nil)

// New returns a Network.
func New() *Network { return &Network{loops: make(map[*loop.Epoll]*shared)} }

// shared is what the streams of one loop share, as only one of them is at work at a time.
type shared struct {
	loop   *loop.Epoll
	iovecs [maxIovecs]unix.Iovec
	input  *buf.Buf // a spare input buffer, still warm
	chunks []*chunk // spare
}

// on returns what the streams of l share; an error if it is no loop with sockets.
func (n *Network) on(l loop.Loop) (*shared, error) {
	e, ok := l.(*loop.Epoll)
	if !ok {
		return nil, fmt.Errorf("%w: sockets need a loop.Epoll, not a %T", torus.ErrInvalid, l)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	sh := n.loops[e]
	if sh == nil {
		sh = &shared{loop: e}
		n.loops[e] = sh
	}
	return sh, nil
}

// chunk is memory for small writes, one behind the other.
type chunk struct {
	used int
	refs int // segments in the queue
	mem  [chunkSize]byte
}

const maxSpareChunks = 64

func (sh *shared) getChunk() *chunk {
	if n := len(sh.chunks); n > 0 {
		c := sh.chunks[n-1]
		sh.chunks = sh.chunks[:n-1]
		return c
	}
	return new(chunk)
}

func (sh *shared) putChunk(c *chunk) {
	if len(sh.chunks) < maxSpareChunks {
		c.used = 0
		sh.chunks = append(sh.chunks, c)
	}
}

func (sh *shared) getInput() *buf.Buf {
	if b := sh.input; b != nil {
		sh.input = nil
		return b
	}
	return buf.Get(inputSize)
}

func (sh *shared) putInput(b *buf.Buf) {
	if sh.input == nil && len(b.Bytes()) == inputSize {
		sh.input = b
		return
	}
	b.Release()
}

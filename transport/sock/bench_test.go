package sock

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/transport"
)

// The round trips below are requests of a header of 64 bytes and a payload that is read into place, answered by a header.
const benchHeader = 64

// benchServer answers each request.
type benchServer struct {
	s       transport.Stream
	payload []byte
	answer  [benchHeader]byte
	filled  func()
}

func (h *benchServer) Opened(s transport.Stream)      { h.s, h.filled = s, h.reply }
func (h *benchServer) Closed(transport.Stream, error) {}
func (h *benchServer) reply()                         { h.s.Write(h.answer[:]) }
func (h *benchServer) Data(s transport.Stream, b []byte) (int, int) {
	n := 0
	for len(b)-n >= benchHeader {
		n += benchHeader
		if len(h.payload) > 0 {
			s.ReadInto(h.payload, h.filled)
			return n, 0
		}
		h.reply()
	}
	return n, benchHeader
}

// benchClient keeps so many requests in flight until all are answered.
type benchClient struct {
	s       transport.Stream
	payload *buf.Buf // sent over and over, as WriteShared
	size    int
	header  [benchHeader]byte
	unsent  int
	pending int
	done    chan struct{}
}

func (c *benchClient) Opened(s transport.Stream)      { c.s = s; c.done <- struct{}{} }
func (c *benchClient) Closed(transport.Stream, error) {}
func (c *benchClient) send() {
	c.unsent--
	c.s.Write(c.header[:])
	if c.size > 0 {
		c.s.WriteShared(c.payload.Bytes()[:c.size])
	}
}

func (c *benchClient) Data(s transport.Stream, b []byte) (int, int) {
	n := len(b) / benchHeader
	for range n {
		if c.pending--; c.pending == 0 {
			c.done <- struct{}{}
		} else if c.unsent > 0 {
			c.send()
		}
	}
	return n * benchHeader, benchHeader
}

func BenchmarkRoundTrip(b *testing.B) {
	for _, network := range []string{"tcp", "unix"} {
		for _, size := range []int{0, 4096, 1 << 20} {
			for _, depth := range []int{1, 32} {
				b.Run(fmt.Sprintf("%s/%dB/depth=%d", network, benchHeader+size, depth), func(b *testing.B) {
					addr := "tcp://127.0.0.1:0"
					if network == "unix" {
						addr = "unix:" + filepath.Join(b.TempDir(), "s")
					}
					server, client := startLoop(b), startLoop(b)
					n := newTCP()
					var ln transport.Listener
					on(server, func() {
						ln = listen(b, server, n, addr, func(transport.Stream) transport.Handler {
							return &benchServer{payload: make([]byte, size)}
						})
					})
					c := &benchClient{payload: buf.Get(max(size, 1)), size: size, done: make(chan struct{}, 1)}
					on(client, func() { n.Dial(client, ln.Addr(), c) })
					<-c.done
					b.ReportAllocs()
					b.SetBytes(int64(size))
					b.ResetTimer()
					client.Post(func() {
						c.pending, c.unsent = b.N, b.N
						for c.unsent > 0 && b.N-c.unsent < depth {
							c.send()
						}
					})
					<-c.done
					b.StopTimer()
					on(server, func() { ln.Close() })
					on(client, c.s.Close)
				})
			}
		}
	}
}

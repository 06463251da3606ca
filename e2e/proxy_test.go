package e2e

import (
	"io"
	"net"
	"sync"
	"testing"
)

// proxy is a TCP proxy that can be cut: connections stay open and nothing passes, as if packets were dropped.
type proxy struct {
	addr   string
	target string

	mu    sync.Mutex
	open  *sync.Cond
	cut   bool
	ended bool
	conns []net.Conn
	wg    sync.WaitGroup
}

func startProxy(t *testing.T, target string) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{addr: l.Addr().String(), target: target}
	p.open = sync.NewCond(&p.mu)
	p.wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", target)
			if err != nil {
				in.Close()
				continue
			}
			if !p.add(in, out) {
				return
			}
			p.wg.Go(func() { p.copy(out, in) })
			p.wg.Go(func() { p.copy(in, out) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		p.mu.Lock()
		p.ended = true
		for _, c := range p.conns {
			c.Close()
		}
		p.open.Broadcast()
		p.mu.Unlock()
		p.wg.Wait()
	})
	return p
}

func (p *proxy) add(in, out net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		in.Close()
		out.Close()
		return false
	}
	p.conns = append(p.conns, in, out)
	return true
}

// set cuts the proxy, or mends it: what was held back then passes.
func (p *proxy) set(cut bool) {
	p.mu.Lock()
	p.cut = cut
	p.open.Broadcast()
	p.mu.Unlock()
}

func (p *proxy) copy(to io.WriteCloser, from io.ReadCloser) {
	defer to.Close()
	defer from.Close()
	b := make([]byte, 32<<10)
	for {
		n, err := from.Read(b)
		if err != nil {
			return
		}
		p.mu.Lock()
		for p.cut && !p.ended {
			p.open.Wait()
		}
		p.mu.Unlock()
		if _, err := to.Write(b[:n]); err != nil {
			return
		}
	}
}

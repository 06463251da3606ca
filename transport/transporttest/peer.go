package transporttest

import (
	"bytes"
	"testing"

	"github.com/coreos/torus/transport"
)

// peer is a Handler that holds the network to the contract of transport.Handler: the order of the calls, how much Data
// gets to see, silence while paused and after the end. What it does is up to its hooks.
type peer struct {
	t    *testing.T
	name string
	s    transport.Stream

	data   func(b []byte) (consumed, need int) // nil: keep everything in got
	open   func()
	closed func()

	got       []byte
	opened    bool
	isClosed  bool
	err       error
	paused    bool
	direct    bool // a ReadInto is not full yet
	rest      int  // bytes seen, but not consumed
	need      int
	dataCalls int
}

func (p *peer) Opened(s transport.Stream) {
	p.t.Helper()
	if p.opened || p.isClosed {
		p.t.Errorf("%s: Opened again, or after Closed", p.name)
	}
	if p.s != nil && p.s != s {
		p.t.Errorf("%s: Opened with another stream than Dial returned", p.name)
	}
	p.s, p.opened = s, true
	if p.open != nil {
		p.open()
	}
}

func (p *peer) Data(s transport.Stream, b []byte) (int, int) {
	p.dataCalls++
	switch {
	case !p.opened || p.isClosed:
		p.t.Errorf("%s: Data before Opened or after Closed", p.name)
	case p.paused:
		p.t.Errorf("%s: Data while paused", p.name)
	case p.direct:
		p.t.Errorf("%s: Data before ReadInto was full", p.name)
	case len(b) == 0:
		p.t.Errorf("%s: Data without data", p.name)
	case len(b) < p.rest, len(b) == p.rest && p.need == 0:
		p.t.Errorf("%s: Data with %d bytes, of which it has seen %d", p.name, len(b), p.rest)
	case len(b) < p.need:
		p.t.Errorf("%s: Data with %d bytes, but it needs %d", p.name, len(b), p.need)
	}
	if p.data == nil {
		p.got = append(p.got, b...)
		p.rest, p.need = 0, 0
		return len(b), 0
	}
	consumed, need := p.data(b)
	p.rest, p.need = len(b)-consumed, need
	if p.direct {
		p.rest, p.need = 0, 0
	}
	return consumed, need
}

func (p *peer) Closed(s transport.Stream, err error) {
	if p.isClosed {
		p.t.Errorf("%s: Closed twice", p.name)
	}
	p.isClosed, p.err = true, err
	if p.closed != nil {
		p.closed()
	}
}

// readInto is Stream.ReadInto under supervision.
func (p *peer) readInto(dst []byte, done func()) {
	p.direct = true
	p.s.ReadInto(dst, func() {
		if !p.direct || p.isClosed {
			p.t.Errorf("%s: ReadInto done twice, or after Closed", p.name)
		}
		p.direct = false
		done()
	})
}

func (p *peer) pause()  { p.paused = true; p.s.Pause() }
func (p *peer) resume() { p.paused = false; p.s.Resume() }

// pattern is an endless stream of bytes, each telling where it belongs.
const patternLen = 65521 // a prime, so that no buffer size divides it

var pattern = func() []byte {
	b := make([]byte, 2*patternLen)
	x := uint32(1)
	for i := range patternLen {
		x = x*1664525 + 1013904223
		b[i] = byte(x >> 24)
	}
	copy(b[patternLen:], b)
	return b
}()

// at fills b with the pattern from offset off on.
func at(off int, b []byte) []byte {
	for n := 0; n < len(b); {
		n += copy(b[n:], pattern[(off+n)%patternLen:])
	}
	return b
}

// is reports whether b is the pattern from offset off on.
func is(off int, b []byte) bool {
	for len(b) > 0 {
		want := pattern[off%patternLen:]
		n := min(len(b), len(want))
		if !bytes.Equal(b[:n], want[:n]) {
			return false
		}
		b, off = b[n:], off+n
	}
	return true
}

package sock

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/transport"
	"github.com/coreos/torus/vfs"
)

// descriptors counts the open ones.
func descriptors(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// giver answers each byte with so many, behind a file, as size says.
type giver struct {
	t    *testing.T
	dir  string
	size func() int
	gave int
}

func (h *giver) Opened(transport.Stream)        {}
func (h *giver) Closed(transport.Stream, error) {}
func (h *giver) Data(s transport.Stream, b []byte) (int, int) {
	for _, what := range b {
		if what == 'f' {
			f := aFile(h.t, h.dir, h.gave)
			if s.(transport.Lender).SendFile(f) {
				h.gave++
			} else {
				f.Close()
			}
		}
		s.Write(bytes.Repeat([]byte{what}, h.size()))
	}
	return len(b), 0
}

// aFile opens a file of one byte.
func aFile(t *testing.T, dir string, n int) vfs.Reader {
	t.Helper()
	name := filepath.Join(dir, "f")
	if err := os.WriteFile(name, []byte{byte(n)}, 0o600); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(name)
	f, err := vfs.NewOS(dir).Open("f")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := f.Reader()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// taker counts what comes.
type taker struct {
	got    int
	closed bool
}

func (h *taker) Opened(s transport.Stream)      { s.Write([]byte{'-'}) }
func (h *taker) Closed(transport.Stream, error) { h.closed = true }
func (h *taker) Data(_ transport.Stream, b []byte) (int, int) {
	h.got += len(b)
	return len(b), 0
}

// A file is there with the bytes that follow it, whatever is still to be sent before and however the socket cuts it, and none is lost track of.
func TestSendFile(t *testing.T) {
	if err := buf.Share(); err != nil {
		t.Fatal(err)
	}
	for _, tcpOnly := range []bool{false, true} {
		l := newLoop(t)
		n := New()
		n.tcpOnly = tcpOnly
		rng := rand.New(rand.NewPCG(1, 1))
		var there transport.Stream
		give := &giver{t: t, dir: t.TempDir(), size: func() int { return 1 + rng.IntN(1<<rng.IntN(20)) }}
		size := 0
		sized := give.size
		give.size = func() int { k := sized(); size += k; return k }
		ln, err := n.Listen(l, "tcp://127.0.0.1:0", func(s transport.Stream) transport.Handler { there = s; return give })
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close() //nolint:errcheck // it does not fail
		take := &taker{}
		here := n.Dial(l, ln.Addr(), take)
		all := func() bool { return size > 0 && take.got == size && !take.closed }
		if !runUntil(t, l, all) {
			t.Fatal("nothing came")
		}
		x := here.(transport.Lender)
		before := descriptors(t)
		for i := range 200 {
			x.ExpectFile()
			if i%2 == 0 { // more than the socket holds is on its way before it
				for range 4 {
					here.Write([]byte{'-'})
				}
			}
			here.Write([]byte{'f'})
			asked, sent := give.gave, size
			if !runUntil(t, l, func() bool { return size > sent && all() }) {
				t.Fatal("no answer")
			}
			f := x.TakeFile()
			if (f == nil) != tcpOnly || (give.gave > asked) == tcpOnly {
				t.Fatalf("file %d: %v", i, f)
			}
			if f == nil {
				continue
			}
			var b [1]byte
			if _, err := f.ReadAt(b[:], 0); err != nil || b[0] != byte(asked) {
				t.Errorf("file %d: %v, %d", i, err, b[0])
			}
			if x.TakeFile() != nil {
				t.Error("taken twice")
			}
			if err := f.Close(); err != nil {
				t.Error(err)
			}
		}
		if after := descriptors(t); after != before {
			t.Errorf("over TCP %v: %d descriptors before, %d after", tcpOnly, before, after)
		}
		if tcpOnly {
			continue
		}

		// One at a time, and none is left behind at the end, neither where it came from nor where it went.
		x.ExpectFile()
		here.Write([]byte{'f'})
		sent := size
		if !runUntil(t, l, func() bool { return size > sent && all() }) {
			t.Fatal("no answer")
		}
		y, f, g := there.(transport.Lender), aFile(t, give.dir, 1), aFile(t, give.dir, 2)
		if !y.SendFile(f) || y.SendFile(g) {
			t.Error("two at once")
		}
		if err := g.Close(); err != nil {
			t.Error(err)
		}
		there.Close()
		if !runUntil(t, l, func() bool { return take.closed }) {
			t.Fatal("not closed")
		}
		if y.SendFile(g) || x.SendFile(g) {
			t.Error("sent on a closed stream")
		}
		if err := ln.Close(); err != nil {
			t.Error(err)
		}
		if after := descriptors(t); after > before-2 {
			t.Errorf("%d descriptors before, %d at the end", before, after)
		}
	}
}

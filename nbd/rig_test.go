package nbd

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/device/devicetest"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/transport"
)

// fakeStream is a transport.Stream driven by a test: what is fed arrives in pieces of at most `split` bytes.
type fakeStream struct {
	l     loop.Loop
	h     transport.Handler
	split int

	in      []byte // arrived, not consumed
	pending []byte // not arrived yet
	need    int
	dst     []byte // ReadInto
	done    func()
	paused  bool
	inData  bool

	out     []byte // sent
	stuck   bool   // the client does not read: out stays queued
	queued  int
	closing bool // CloseAfterWrite
	closed  bool
}

var _ transport.Stream = (*fakeStream)(nil)

func (f *fakeStream) Write(b []byte) {
	if f.closed || f.closing {
		return
	}
	f.out = append(f.out, b...)
	if f.stuck {
		f.queued += len(b)
	}
}
func (f *fakeStream) WriteShared(b []byte)       { f.Write(b) }
func (f *fakeStream) WriteBuf(b *buf.Buf, n int) { f.Write(b.Bytes()[:n]); b.Release() }
func (f *fakeStream) ReadInto(dst []byte, done func()) {
	f.dst, f.done = dst, done
}
func (f *fakeStream) Pause()             { f.paused = true }
func (f *fakeStream) Resume()            { f.paused = false; f.l.Post(f.deliver) }
func (f *fakeStream) Queued() int        { return f.queued }
func (f *fakeStream) RemoteAddr() string { return "test" }
func (f *fakeStream) CloseAfterWrite() {
	f.closing = true
	if !f.stuck {
		f.Close()
	}
}

func (f *fakeStream) Close() { f.shut(torus.ErrClosed) }

func (f *fakeStream) shut(err error) {
	if f.closed {
		return
	}
	f.closed, f.dst = true, nil
	f.l.Post(func() { f.h.Closed(f, err) })
}

// feed lets b arrive.
func (f *fakeStream) feed(b []byte) {
	f.pending = append(f.pending, b...)
	f.deliver()
}

func (f *fakeStream) deliver() {
	if f.inData {
		return
	}
	for !f.closed && !f.paused {
		if f.dst != nil {
			n := copy(f.dst, f.in)
			f.in, f.dst = f.in[n:], f.dst[n:]
			n = copy(f.dst, f.pending[:min(len(f.pending), f.split)])
			f.pending, f.dst = f.pending[n:], f.dst[n:]
			if len(f.dst) == 0 {
				f.dst = nil
				f.need = 0
				f.done()
			} else if len(f.pending) == 0 {
				return
			}
			continue
		}
		n := min(len(f.pending), f.split)
		f.in = append(f.in, f.pending[:n]...)
		f.pending = f.pending[n:]
		if len(f.in) > 0 && len(f.in) >= f.need {
			given := append([]byte(nil), f.in...) // to be overwritten when Data returns
			f.inData = true
			k, need := f.h.Data(f, given)
			f.inData = false
			for i := range given {
				given[i] = 0xEE
			}
			if k > len(given) || k < 0 {
				panic(fmt.Sprintf("Data consumed %d of %d", k, len(given)))
			}
			f.in = f.in[k:]
			switch { // as strict as any stream may be
			case f.dst != nil:
				f.need = 0
			case k > 0 && need > 0:
				f.need = need
			default:
				f.need = max(need, len(f.in)+1)
			}
			continue
		}
		if len(f.pending) == 0 {
			return
		}
	}
}

// rig is a server on a virtual loop, with two volumes: disk (1 MiB), and frozen, read-only.
type rig struct {
	t      testing.TB
	v      *loop.Virtual
	l      *loop.VirtualLoop
	dir    *devicetest.Directory
	disk   *devicetest.Memory
	frozen *devicetest.Memory
	srv    *Server
	split  int
}

const diskSize = 1 << 20

func newRig(t testing.TB, cfg Config) *rig {
	r := &rig{t: t, v: loop.NewVirtual(1), dir: devicetest.NewDirectory(), split: 1 << 30}
	r.l = r.v.NewLoop("server")
	r.disk, r.frozen = devicetest.NewMemory(diskSize, false), devicetest.NewMemory(8192, true)
	r.dir.Add("disk", "a disk", r.disk)
	r.dir.Add("frozen", "", r.frozen)
	cfg.Directory = r.dir
	srv, err := newServer(r.l, cfg)
	if err != nil {
		t.Fatal(err)
	}
	r.srv, srv.ln = srv, fakeListener{}
	return r
}

type fakeListener struct{}

func (fakeListener) Addr() string { return "fake" }
func (fakeListener) Close() error { return nil }

// run lets everything happen that happens without time passing.
func (r *rig) run() { r.v.RunFor(0) }

// client is the other end of a session.
type client struct {
	*rig
	st *fakeStream
}

func (r *rig) dial() *client {
	st := &fakeStream{l: r.l, split: r.split}
	st.h = r.srv.accept(st)
	st.h.Opened(st)
	r.run()
	return &client{rig: r, st: st}
}

// send sends integers big endian in their own size, and strings and bytes as they are.
func (c *client) send(parts ...any) {
	c.t.Helper()
	c.st.feed(pack(parts...))
	c.run()
}

func pack(parts ...any) []byte {
	var b []byte
	for _, p := range parts {
		switch p := p.(type) {
		case string:
			b = append(b, p...)
		case []byte:
			b = append(b, p...)
		default:
			var err error
			if b, err = binary.Append(b, binary.BigEndian, p); err != nil {
				panic(err)
			}
		}
	}
	return b
}

// expect reads what pack(parts) is.
func (c *client) expect(parts ...any) {
	c.t.Helper()
	want := pack(parts...)
	if got := c.st.out[:min(len(want), len(c.st.out))]; !bytes.Equal(got, want) {
		c.t.Fatalf("got  %x\nwant %x", clipped(got), clipped(want))
	}
	c.st.out = c.st.out[len(want):]
}

func clipped(b []byte) []byte { return b[:min(len(b), 200)] }

// recv reads n bytes.
func (c *client) recv(n int) []byte {
	c.t.Helper()
	if len(c.st.out) < n {
		c.t.Fatalf("only %d bytes came, not %d: %x", len(c.st.out), n, clipped(c.st.out))
	}
	b := c.st.out[:n]
	c.st.out = c.st.out[n:]
	return b
}

func (c *client) silent() {
	c.t.Helper()
	c.run()
	if len(c.st.out) > 0 {
		c.t.Fatalf("unexpected: %x", clipped(c.st.out))
	}
}

func (c *client) alive() {
	c.t.Helper()
	if c.run(); c.st.closed {
		c.t.Fatal("the server hung up")
	}
}

func (c *client) hungUp() {
	c.t.Helper()
	if c.run(); !c.st.closed {
		c.t.Fatal("the server did not hang up")
	}
	if c.srv.Sessions() != 0 {
		c.t.Fatalf("%d sessions left", c.srv.Sessions())
	}
}

// greeted is a client that has got through the greeting.
func (c *client) greeted(flags uint32) *client {
	c.t.Helper()
	c.expect("NBDMAGIC", "IHAVEOPT", uint16(flagFixedNewstyle|flagNoZeroes))
	c.send(flags)
	return c
}

// option sends one option.
func (c *client) option(opt uint32, data ...any) {
	c.t.Helper()
	b := pack(data...)
	c.send("IHAVEOPT", opt, uint32(len(b)), b)
}

// rep expects one reply with exactly this data.
func (c *client) rep(opt, typ uint32, data ...any) {
	c.t.Helper()
	b := pack(data...)
	c.expect(uint64(magicOptReply), opt, typ, uint32(len(b)), b)
}

// repErr expects one error reply and returns its text.
func (c *client) repErr(opt, typ uint32) string {
	c.t.Helper()
	c.expect(uint64(magicOptReply), opt, typ)
	return string(c.recv(int(binary.BigEndian.Uint32(c.recv(4)))))
}

// named is a string preceded by its length.
func named(s string) []byte { return pack(uint32(len(s)), s) }

const (
	flagsSimple     uint16 = 0xD6D // HAS_FLAGS FLUSH FUA TRIM WRITE_ZEROES MULTI_CONN CACHE FAST_ZERO
	flagsStructured uint16 = flagsSimple | flagSendDF
)

// mode is how a client negotiates.
type mode struct{ structured, allocation bool }

// attached is a client in transmission on the export name.
func (r *rig) attached(name string, m mode) *client {
	r.t.Helper()
	c := r.dial().greeted(3)
	if m.structured || m.allocation {
		c.option(optStructuredReply)
		c.rep(optStructuredReply, repAck)
	}
	if m.allocation {
		c.option(optSetMetaContext, named(name), uint32(1), named(contextAllocation))
		c.rep(optSetMetaContext, repMetaContext, uint32(contextID), contextAllocation)
		c.rep(optSetMetaContext, repAck)
	}
	c.option(optGo, named(name), uint16(0))
	c.expect(uint64(magicOptReply), uint32(optGo), uint32(repInfo), uint32(12), uint16(infoExport))
	c.recv(10)
	c.rep(optGo, repAck)
	return c
}

// request sends one command.
func (c *client) request(flags, typ uint16, cookie, off uint64, n uint32, payload ...any) {
	c.t.Helper()
	c.send(uint32(magicRequest), flags, typ, cookie, off, n, pack(payload...))
}

// simple expects a simple reply.
func (c *client) simple(err errno, cookie uint64, data ...any) {
	c.t.Helper()
	c.expect(uint32(magicSimple), uint32(err), cookie, pack(data...))
}

// chunk expects a final chunk.
func (c *client) chunk(typ uint16, cookie uint64, data ...any) {
	c.t.Helper()
	b := pack(data...)
	c.expect(uint32(magicStructured), uint16(chunkFlagDone), typ, cookie, uint32(len(b)), b)
}

// chunkErr expects an error chunk and returns its text.
func (c *client) chunkErr(err errno, cookie uint64) string {
	c.t.Helper()
	c.expect(uint32(magicStructured), uint16(chunkFlagDone), uint16(chunkError), cookie)
	n := int(binary.BigEndian.Uint32(c.recv(4)))
	c.expect(uint32(err), uint16(n-6))
	return string(c.recv(n - 6))
}

// pattern is n bytes that differ by position and seed.
func pattern(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = seed + byte(i) + byte(i>>8)*7
	}
	return b
}

// held collects what a device has to do, until it is let go.
type held struct{ finish []func() }

// eventually moves time until the condition holds.
func (r *rig) eventually(what string, cond func() bool) {
	r.t.Helper()
	if !r.v.Run(cond, time.Minute) {
		r.t.Fatalf("%s: not within a minute", what)
	}
}

// testLog logs to the test.
func testLog(t testing.TB) *slog.Logger { return slog.New(slog.NewTextHandler(t.Output(), nil)) }

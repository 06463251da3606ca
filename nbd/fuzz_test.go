package nbd

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/coreos/torus/device/devicetest"
)

// fuzzRig has small limits, and a disk of 64 KiB.
func fuzzRig(t *testing.T, split uint8) *rig {
	r := newRig(t, Config{MaxInFlight: 8, MaxSessionBytes: 256 << 10})
	r.dir = devicetest.NewDirectory()
	r.disk = devicetest.NewMemory(fuzzSize, false)
	r.dir.Add("disk", "d", r.disk)
	r.dir.Add("frozen", "", r.frozen)
	r.srv.cfg.Directory = r.dir
	if split > 0 {
		r.split = int(split)
	}
	return r
}

const fuzzSize = 64 << 10

// over ends a session as the client would and checks that nothing is left of it.
func (c *client) over() {
	c.t.Helper()
	c.st.shut(nil)
	c.run()
	if c.srv.Sessions() != 0 || c.dir.Attached["disk"]+c.dir.Attached["frozen"] != 0 {
		c.t.Fatalf("%d sessions, attached %v after the client has gone", c.srv.Sessions(), c.dir.Attached)
	}
}

// optionReplies reads well-formed option replies off the front of b and says what the last one was.
func optionReplies(t *testing.T, b []byte) (rest []byte, opt, typ uint32) {
	for len(b) >= 8 && binary.BigEndian.Uint64(b) == magicOptReply {
		if len(b) < optReplySize {
			t.Fatalf("half a reply: %x", b)
		}
		opt, typ = binary.BigEndian.Uint32(b[8:]), binary.BigEndian.Uint32(b[12:])
		n := binary.BigEndian.Uint32(b[16:])
		if uint64(len(b)-optReplySize) < uint64(n) {
			t.Fatalf("half a reply: %x", b)
		}
		data := b[optReplySize : optReplySize+n]
		switch typ {
		case repAck:
			if n != 0 {
				t.Fatal("ACK with data")
			}
		case repServer:
			if name, _, ok := cutString(data); !ok || len(name) > maxString {
				t.Fatalf("SERVER %x", data)
			}
		case repInfo:
			if n < 2 {
				t.Fatalf("INFO %x", data)
			}
		case repMetaContext:
			if string(data[4:]) != contextAllocation {
				t.Fatalf("META_CONTEXT %x", data)
			}
		case repErrUnsup, repErrPolicy, repErrInvalid, repErrUnknown, repErrShutdown, repErrTooBig:
			if n > maxString {
				t.Fatal("a message too long")
			}
		default:
			t.Fatalf("reply type %#x", typ)
		}
		b = b[optReplySize+n:]
	}
	return b, opt, typ
}

func FuzzNegotiate(f *testing.F) {
	opt := func(opt uint32, data ...any) []byte {
		b := pack(data...)
		return pack("IHAVEOPT", opt, uint32(len(b)), b)
	}
	flags := pack(uint32(3))
	f.Add(pack(uint32(0), opt(optExportName, "disk")), uint8(0))
	f.Add(pack(flags, opt(optExportName, "frozen"), uint32(magicRequest)), uint8(1))
	f.Add(pack(flags, opt(optList), opt(optAbort)), uint8(3))
	f.Add(pack(flags, opt(optStructuredReply), opt(optListMetaContext, named(""), uint32(0)), opt(optSetMetaContext, named("disk"), uint32(2),
		named("base:"), named(contextAllocation)), opt(optGo, named("disk"), uint16(2), uint16(3), uint16(1))), uint8(5))
	f.Add(pack(flags, opt(optInfo, named("nope"), uint16(0)), opt(optStartTLS), opt(99, "x"), opt(optGo, named(""), uint16(0))), uint8(0))
	f.Add(pack(flags, "IHAVEOPT", uint32(optGo), uint32(70000), make([]byte, 70000), opt(optAbort)), uint8(0))
	f.Add(pack(flags, "IHAVEOPT", uint32(optGo), ^uint32(0)), uint8(0))
	f.Add(pack(uint32(8)), uint8(0))
	f.Fuzz(func(t *testing.T, in []byte, split uint8) {
		r := fuzzRig(t, split)
		c := r.dial()
		c.expect("NBDMAGIC", "IHAVEOPT", uint16(3))
		s := r.srv.sessions[0]
		c.send(in)
		if n := cap(c.st.in); n > 2*(maxOption+optionHeaderSize)+len(in) {
			t.Fatalf("the session wanted %d bytes of input at once", n)
		}
		rest, lastOpt, lastTyp := optionReplies(t, c.st.out)
		if len(rest) > 0 {
			if s.dev == nil && r.dir.Opened == 0 {
				t.Fatalf("no option reply: %x", rest)
			}
			if !(lastOpt == optGo && lastTyp == repAck) {
				n := 10
				if binary.BigEndian.Uint32(in)&flagNoZeroes == 0 {
					n += exportNamePadding
				}
				if len(rest) < n {
					t.Fatalf("half a reply to EXPORT_NAME: %x", rest)
				}
			}
		}
		c.over()
	})
}

// sent is a command as a client knows it.
type sent struct {
	typ     uint16
	len     uint32
	off     uint64
	flags   uint16
	whole   bool
	replied bool
}

// commands reads what the bytes of a client say, independently of the session, and numbers the cookies in place.
func commands(in []byte) (all []*sent) {
	for len(in) >= requestSize && binary.BigEndian.Uint32(in) == magicRequest {
		c := &sent{flags: binary.BigEndian.Uint16(in[4:]), typ: binary.BigEndian.Uint16(in[6:]), off: binary.BigEndian.Uint64(in[16:]), len: binary.BigEndian.Uint32(in[24:]), whole: true}
		if c.typ == cmdDisc {
			return all
		}
		binary.BigEndian.PutUint64(in[8:], uint64(len(all)))
		in = in[requestSize:]
		if c.typ == cmdWrite {
			if uint64(c.len) > uint64(len(in)) {
				c.whole = false
				return append(all, c)
			}
			in = in[c.len:]
		}
		all = append(all, c)
	}
	return all
}

// answer is a reply as a client understands it.
type answer struct {
	cookie uint64
	err    errno
	data   []byte // of a READ
	status []byte
}

// replies reads a server's replies to the commands in all; it fails unless each is well-formed and expected.
func replies(t *testing.T, b []byte, all []*sent, structured bool) (got []answer) {
	t.Helper()
	u16, u32, u64 := binary.BigEndian.Uint16, binary.BigEndian.Uint32, binary.BigEndian.Uint64
	for len(b) > 0 {
		if len(b) < simpleSize {
			t.Fatalf("half a reply: %x", b)
		}
		a := answer{cookie: u64(b[8:])}
		if a.cookie >= uint64(len(all)) || all[a.cookie].replied || !all[a.cookie].whole {
			t.Fatalf("a reply to no command: %x", clipped(b))
		}
		c := all[a.cookie]
		c.replied = true
		switch u32(b) {
		case magicSimple:
			a.err = errno(u32(b[4:]))
			b = b[simpleSize:]
			if c.typ == cmdRead {
				if structured {
					t.Fatal("a simple reply to READ")
				}
				if a.err == 0 {
					if uint64(len(b)) < uint64(c.len) {
						t.Fatal("too little data")
					}
					a.data, b = b[:c.len], b[c.len:]
				}
			}
		case magicStructured:
			if len(b) < chunkSize || uint64(len(b)-chunkSize) < uint64(u32(b[16:])) || !structured || u16(b[4:]) != chunkFlagDone {
				t.Fatalf("a bad chunk: %x", clipped(b))
			}
			n := u32(b[16:])
			data := b[chunkSize : chunkSize+n]
			switch typ := u16(b[6:]); {
			case typ == chunkNone && n == 0 && c.len == 0:
			case typ == chunkOffsetData && n == c.len+8 && c.typ == cmdRead && u64(data) == c.off && c.len > 0:
				a.data = data[8:]
			case typ == chunkOffsetHole && n == 12 && c.typ == cmdRead && u64(data) == c.off && u32(data[8:]) == c.len && c.len > 0:
				a.data = make([]byte, c.len)
			case typ == chunkBlockStatus && n >= 12 && n%8 == 4 && c.typ == cmdBlockStatus && u32(data) == contextID:
				a.status = data[4:]
				var sum uint64
				for d := a.status; len(d) > 0; d = d[8:] {
					if u32(d) == 0 {
						t.Fatal("an empty extent")
					}
					sum += uint64(u32(d))
				}
				if sum > uint64(c.len) || c.flags&cmdFlagReqOne != 0 && n != 12 {
					t.Fatalf("extents %x", data)
				}
			case typ == chunkError && n >= 6 && n == 6+uint32(u16(data[4:])) && n <= 6+maxString:
				a.err = errno(u32(data))
				if a.err == 0 {
					t.Fatal("an error of 0")
				}
			default:
				t.Fatalf("chunk type %#x of %d bytes for %+v", typ, n, *c)
			}
			b = b[chunkSize+n:]
		default:
			t.Fatalf("no reply: %x", clipped(b))
		}
		got = append(got, a)
	}
	return got
}

func FuzzSession(f *testing.F) {
	cmd := func(flags, typ uint16, off uint64, n uint32, payload ...any) []byte {
		return pack(uint32(magicRequest), flags, typ, uint64(0), off, n, pack(payload...))
	}
	for how := range uint8(8) {
		f.Add(pack(cmd(0, cmdWrite, 100, 5, "hello"), cmd(0, cmdRead, 99, 7), cmd(0, cmdDisc, 0, 0)), uint8(0), how)
		f.Add(pack(cmd(1, cmdWrite, 100, 20000, make([]byte, 20000)), cmd(4, cmdRead, 0, 65536), cmd(0, cmdFlush, 0, 0)), uint8(100), how)
		f.Add(pack(cmd(0, cmdWrite, 1<<40, 20000, make([]byte, 20000)), cmd(0, cmdTrim, 4096, 4096), cmd(2, cmdWriteZeroes, 0, 4096)), uint8(0), how)
		f.Add(pack(cmd(0, cmdBlockStatus, 0, 65536), cmd(8, cmdBlockStatus, 1, 100), cmd(16, cmdWriteZeroes, 0, 4096), cmd(0, cmdCache, 0, 0)), uint8(1), how)
		f.Add(bytes.Repeat(cmd(0, cmdRead, 0, 65536), 30), uint8(0), how)
		f.Add(pack(cmd(0, 99, 0, 0), cmd(0, cmdRead, 0, 0xffffffff), cmd(0, cmdWrite, 0, 0xffffffff, "some"), "junk"), uint8(28), how)
	}
	f.Fuzz(func(t *testing.T, in []byte, split, how uint8) {
		r := fuzzRig(t, split)
		m := mode{structured: how&1 != 0, allocation: how&2 != 0}
		c := r.attached("disk", m)
		h := &held{}
		if how&4 != 0 {
			h = r.hold()
		}
		s := r.srv.sessions[0]
		in = bytes.Clone(in)
		all := commands(in)
		c.send(in)
		for {
			if s.inflight > 8 || s.holds() > 256<<10+fuzzSize {
				t.Fatalf("%d requests, %d bytes held", s.inflight, s.holds())
			}
			if len(h.finish) == 0 {
				break
			}
			last := len(h.finish) - 1 // the latest first
			f := h.finish[last]
			h.finish = h.finish[:last]
			f()
			r.run()
		}
		got := replies(t, c.st.out, all, m.structured || m.allocation)
		c.st.out = nil
		for i, x := range all {
			if x.whole && !x.replied && !c.st.closed {
				t.Fatalf("command %d has no reply: %+v (%d replies)", i, *x, len(got))
			}
		}
		c.over()
	})
}

// TestSessionAgainstModel sends random commands of every kind and size and compares every byte and error that comes
// back with a model that is an array.
func TestSessionAgainstModel(t *testing.T) {
	for seed := range uint64(60) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, 1))
			r := fuzzRig(t, uint8(rnd.IntN(256)))
			m := mode{structured: seed%3 > 0, allocation: seed%3 > 1}
			c := r.attached("disk", m)
			want := make([]byte, fuzzSize)
			for range 100 {
				off, n := uint64(rnd.IntN(fuzzSize)), uint32(rnd.IntN(1<<rnd.IntN(17)))
				typ, flags := uint16([]int{cmdRead, cmdWrite, cmdFlush, cmdTrim, cmdCache, cmdWriteZeroes, cmdBlockStatus}[rnd.IntN(7)]), uint16(rnd.IntN(2))
				if typ == cmdFlush {
					off, n = 0, 0
				}
				in := pack(uint32(magicRequest), flags, typ, uint64(0), off, n)
				var payload []byte
				if typ == cmdWrite {
					payload = pattern(int(n), byte(rnd.Int()))
					in = append(in, payload...)
				}
				c.send(in)
				got := replies(t, c.recv(len(c.st.out)), commands(in), m.structured || m.allocation)
				if len(got) != 1 {
					t.Fatalf("%d replies", len(got))
				}
				a, err := got[0], errno(0)
				beyond := off+uint64(n) > fuzzSize
				switch {
				case beyond && (typ == cmdWrite || typ == cmdWriteZeroes):
					err = eNOSPC
				case beyond, typ == cmdBlockStatus && (n == 0 || !m.allocation):
					err = eINVAL
				case typ == cmdWrite:
					copy(want[off:], payload)
				case typ == cmdTrim, typ == cmdWriteZeroes:
					clear(want[off : off+uint64(n)])
				case typ == cmdRead && !bytes.Equal(a.data, want[off:off+uint64(n)]):
					t.Fatalf("read at %d of %d bytes is wrong", off, n)
				case typ == cmdBlockStatus:
					for d, at := a.status, off; len(d) > 0; d = d[8:] {
						n := uint64(binary.BigEndian.Uint32(d))
						if binary.BigEndian.Uint32(d[4:])&stateZero != 0 && bytes.Trim(want[at:at+n], "\x00") != nil {
							t.Fatal("data said to be zero")
						}
						at += n
					}
				}
				if a.err != err {
					t.Fatalf("command %d at %d of %d bytes: error %d, not %d", typ, off, n, a.err, err)
				}
				if flags&cmdFlagFUA != 0 && err == 0 && (typ == cmdWrite || typ == cmdTrim || typ == cmdWriteZeroes) && !bytes.Equal(r.disk.Durable()[off:off+uint64(n)], want[off:off+uint64(n)]) {
					t.Fatal("FUA is not durable (D1)")
				}
			}
			if !bytes.Equal(r.disk.Bytes(), want) {
				t.Error("the device holds something else")
			}
			c.over()
		})
	}
}

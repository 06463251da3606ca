package tdp

import (
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/record"
	"github.com/coreos/torus/transport"
	"github.com/coreos/torus/transport/mem"
)

// raw is the other side of a connection, which says what the fuzzer wants and keeps what it hears.
type raw struct {
	s      transport.Stream
	open   func(transport.Stream)
	got    []byte
	closed bool
}

func (r *raw) Opened(s transport.Stream) {
	r.s = s
	r.open(s)
}
func (r *raw) Data(_ transport.Stream, b []byte) (int, int) {
	r.got = append(r.got, b...)
	return len(b), 0
}
func (r *raw) Closed(transport.Stream, error) { r.closed = true }

// frames checks that what was heard are well-formed frames, and returns their headers.
func (r *raw) frames(t *testing.T) (all []frame) {
	for b := r.got; len(b) > 0; {
		var f frame
		if len(b) < HeaderSize {
			break // cut off by the end of the connection
		}
		if err := f.parse(b); err != nil {
			t.Fatalf("%v after %d frames", err, len(all))
		}
		all = append(all, f)
		b = b[min(len(b), HeaderSize+int(f.payload)):]
	}
	return all
}

// mend makes frames out of noise: wherever a header would be read it gets the magic, an op and the checksum that
// let it pass the first checks, so that the fuzzer gets behind them. The payload length of most is made small.
func mend(b []byte, ops []byte) []byte {
	for at := 0; at+HeaderSize <= len(b); {
		h := b[at:]
		binary.LittleEndian.PutUint32(h, magic)
		if h[4]&0x10 == 0 {
			h[4] = ops[int(h[4])%len(ops)]
		}
		binary.LittleEndian.PutUint16(h[atFlags:], 0)
		n := binary.LittleEndian.Uint32(h[atPayload:])
		switch n % 4 {
		case 0:
			n = 0
		case 1:
			n = n / 4 % 200
		case 2:
			n = torus.PageSize
		}
		binary.LittleEndian.PutUint32(h[atPayload:], n)
		if n%2 == 0 {
			binary.LittleEndian.PutUint32(h[atLen:], n)
		}
		end := min(len(b), at+HeaderSize+int(min(n, MaxPayload)))
		binary.LittleEndian.PutUint32(h[atSum:], record.Checksum(b[at+HeaderSize:end]))
		binary.LittleEndian.PutUint32(h[atCRC:], record.Checksum(h[:atCRC]))
		at = end
	}
	return b
}

// strict is a store that checks what the decoder promises.
type strict struct {
	t *testing.T
	fakeStore
}

func (s *strict) Submit(r *torus.Request) {
	var err error
	switch {
	case r.Op < torus.OpPing || r.Op > torus.OpList:
		err = fmt.Errorf("op %v", r.Op)
	case r.Op == torus.OpAppend && (len(r.Data) == 0 || len(r.Data)%torus.PageSize != 0):
		err = fmt.Errorf("append of %d bytes", len(r.Data))
	case len(r.Data) > MaxPayload:
		err = fmt.Errorf("%d bytes", len(r.Data))
	}
	if err != nil {
		s.t.Error(err)
	}
	r.Len = min(r.Len, 100) // the fake walks the range
	if r.Op == torus.OpAppend {
		r.Off = uint32(len(s.blocks[r.Ref]))
	}
	s.fakeStore.Submit(r)
}

// FuzzServer: whatever arrives, the server does not panic, hands only what is within bounds to the store, answers in
// well-formed frames, and serves the next client.
func FuzzServer(f *testing.F) {
	hello := testHello()
	hello.Role = RoleClient
	f.Add(uint8(0), []byte("GET / HTTP/1.1\r\n\r\n"))
	f.Add(uint8(1), encodeFrame(frame{op: uint8(torus.OpPing)}))
	f.Add(uint8(3), append(encodeFrame(frame{op: uint8(torus.OpAppend), id: 1, len: 4096, payload: 4096}), make([]byte, 4096)...))
	f.Add(uint8(1), encodeFrame(frame{op: uint8(torus.OpRead), id: 1, len: 1 << 31}))
	f.Add(uint8(5), append(encodeFrame(frame{op: uint8(torus.OpList), id: 9, len: 7}), encodeFrame(frame{op: uint8(torus.OpScan), id: 9, len: 70000})...))
	f.Add(uint8(1), goodbye(torus.ErrIO))
	f.Fuzz(func(t *testing.T, mode uint8, b []byte) {
		v := loop.NewVirtual(uint64(mode))
		n := mem.NewNetwork(v)
		ls, lc := v.NewLoop("server"), v.NewLoop("client")
		store := &strict{t: t, fakeStore: *newFakeStore(ls)}
		if mode&4 != 0 {
			store.delay = time.Millisecond
		}
		srv, err := Serve(ls, n.Host("s"), "tdp://s:1", ServerConfig{Hello: testHello(), Store: store, MaxOutstanding: 3, MaxBytes: 100 << 10})
		if err != nil {
			t.Fatal(err)
		}
		b = append([]byte(nil), b...)
		if mode&2 != 0 {
			b = mend(b, []byte{1, 2, 3, 4, 5, 6, 7, 8, 9, opHello, opGoodbye, 2, 6, opWhere})
		}
		r := &raw{}
		r.open = func(s transport.Stream) {
			if mode&1 != 0 {
				s.Write(hello.encode())
			}
			s.Write(b)
		}
		lc.Post(func() { n.Host("c").Dial(lc, "tcp://s:1", r) })
		v.RunFor(3 * time.Second)
		for i, h := range r.frames(t) {
			if mode&1 != 0 && i == 0 && h.op != opHello {
				t.Errorf("first frame is %#x", h.op)
			}
		}
		lc.Post(func() { r.s.Close() })
		v.RunFor(time.Second)
		if srv.Conns() != 0 || srv.calls != 0 {
			t.Errorf("%d connections and %d calls left", srv.Conns(), srv.calls)
		}
		up := false
		c := ClientConfig{Addr: "tdp://s:1", Hello: hello, Up: func(Hello) { up = true }}
		lc.Post(func() { Dial(lc, n.Host("c"), c) })
		v.RunFor(time.Second)
		if !up {
			t.Error("the server does not serve any more")
		}
	})
}

// FuzzClient: whatever a peer answers, the client does not panic, ends each request exactly once and within its
// timeout, and never writes beyond what a Read gave it.
func FuzzClient(f *testing.F) {
	peer := testHello()
	rep := func(op torus.Op, id uint32, n int) []byte {
		return withPayload(frame{op: uint8(op) | opReply, id: id}, make([]byte, n))
	}
	f.Add(uint8(0), []byte("220 smtp ready\r\n"))
	f.Add(uint8(1), rep(torus.OpRead, 1<<16, 8192))
	f.Add(uint8(1), rep(torus.OpRead, 1<<16, 8193))
	f.Add(uint8(1), append(rep(torus.OpScan, 1<<16|1, 77), rep(torus.OpFence, 1<<16|2, 64)...))
	f.Add(uint8(1), append(rep(torus.OpList, 1<<16|3, 96), rep(torus.OpAppend, 1<<16|4, 0)...))
	f.Add(uint8(3), make([]byte, 600))
	f.Add(uint8(1), goodbye(torus.ErrWrongCluster))
	f.Fuzz(func(t *testing.T, mode uint8, b []byte) {
		v := loop.NewVirtual(uint64(mode))
		n := mem.NewNetwork(v)
		ls, lc := v.NewLoop("server"), v.NewLoop("client")
		b = append([]byte(nil), b...)
		if mode&2 != 0 {
			b = mend(b, []byte{0x81, 0x82, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89, opHello, opGoodbye, opWhere | opReply})
			for at := 0; at+HeaderSize <= len(b); { // ids that are under way
				h := b[at:]
				binary.LittleEndian.PutUint32(h[atID:], 1<<16|uint32(h[atID]%6))
				binary.LittleEndian.PutUint32(h[atCRC:], record.Checksum(h[:atCRC]))
				at += HeaderSize + int(min(binary.LittleEndian.Uint32(h[atPayload:]), MaxPayload))
			}
		}
		if _, err := n.Host("s").Listen(ls, "tcp://s:1", func(transport.Stream) transport.Handler {
			return &raw{open: func(s transport.Stream) {
				if mode&1 != 0 {
					s.Write(peer.encode())
				}
				ls.After(time.Millisecond, func() { s.Write(b) })
			}}
		}); err != nil {
			t.Fatal(err)
		}
		hello := testHello()
		hello.Role = RoleClient
		guard := make([]byte, 3*8192)
		for i := range guard {
			guard[i] = 0xaa
		}
		reqs := []*torus.Request{
			{Op: torus.OpRead, Data: guard[8192:16384]},
			{Op: torus.OpScan, Len: 200},
			{Op: torus.OpFence, Len: 3},
			{Op: torus.OpList, Len: 3},
			{Op: torus.OpAppend, Data: make([]byte, 4096)},
			{Op: torus.OpSync},
		}
		ended, sent := 0, false
		var c *Client
		lc.Post(func() {
			c = Dial(lc, n.Host("c"), ClientConfig{Addr: "tdp://s:1", Hello: hello, Up: func(Hello) {
				if sent {
					return
				}
				sent = true
				lc.Post(func() {
					for _, r := range reqs {
						once := false
						r.Done = func(r *torus.Request) {
							if once {
								t.Errorf("%v done twice", r.Op)
							}
							once = true
							ended++
							if r.Op == torus.OpScan && uint32(len(r.Data)) > r.Len || len(r.Tails) > int(r.Len) {
								t.Errorf("%v: more than was asked for", r.Op)
							}
						}
						c.Submit(r)
					}
				})
			}})
		})
		v.RunFor(8 * time.Second)
		if sent && ended != len(reqs) {
			t.Errorf("%d of %d ended", ended, len(reqs))
		}
		for i, x := range guard {
			if (i < 8192 || i >= 16384) && x != 0xaa {
				t.Fatalf("byte %d written", i)
			}
		}
	})
}

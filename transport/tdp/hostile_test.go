package tdp

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/transport"
)

// TestHostileReplies: a reply that is not what was asked for ends the connection, and the request with it; both
// sides learn why.
func TestHostileReplies(t *testing.T) {
	const id = 1 << slotBits // of a connection's first request
	rep := func(op torus.Op, f frame) frame {
		f.op, f.id = uint8(op)|opReply, id
		return f
	}
	for _, c := range []struct {
		what string
		req  torus.Request
		says string
		b    []byte
	}{
		{"read too short", torus.Request{Op: torus.OpRead, Data: make([]byte, 8192)}, "4096 bytes",
			append(encodeFrame(rep(torus.OpRead, frame{payload: 4096})), make([]byte, 4096)...)},
		{"read too long", torus.Request{Op: torus.OpRead, Data: make([]byte, 4096)}, "8192 bytes",
			append(encodeFrame(rep(torus.OpRead, frame{payload: 8192})), make([]byte, 8192)...)},
		{"scan too long", torus.Request{Op: torus.OpScan, Len: 10}, "11 bytes", withPayload(rep(torus.OpScan, frame{}), make([]byte, 11))},
		{"scan damaged", torus.Request{Op: torus.OpScan, Len: 10}, "checksum", append(encodeFrame(rep(torus.OpScan, frame{payload: 5, sum: 1})), 1, 2, 3, 4, 5)},
		{"too many tails", torus.Request{Op: torus.OpFence, Len: 1}, "64 bytes", withPayload(rep(torus.OpFence, frame{}), appendTails(nil, testTails()))},
		{"half a tail", torus.Request{Op: torus.OpList, Len: 9}, "16 bytes", withPayload(rep(torus.OpList, frame{}), make([]byte, 16))},
		{"tail with flags", torus.Request{Op: torus.OpList, Len: 9}, "flags", withPayload(rep(torus.OpList, frame{}), append(make([]byte, 28), 4, 0, 0, 0))},
		{"tails damaged", torus.Request{Op: torus.OpList, Len: 9}, "checksum", append(encodeFrame(rep(torus.OpList, frame{payload: 32, sum: 1})), make([]byte, 32)...)},
		{"sync with payload", torus.Request{Op: torus.OpSync}, "1 bytes", withPayload(rep(torus.OpSync, frame{}), []byte("x"))},
		{"long error", torus.Request{Op: torus.OpSync}, "513 bytes", withPayload(rep(torus.OpSync, frame{code: 3}), make([]byte, 513))},
		{"other op", torus.Request{Op: torus.OpSync}, "answers Sync", encodeFrame(rep(torus.OpSeal, frame{}))},
		{"no reply at all", torus.Request{Op: torus.OpSync}, "answers no request", encodeFrame(frame{op: uint8(torus.OpSync), id: id + 7})},
		{"other slot", torus.Request{Op: torus.OpSync}, "answers no request", encodeFrame(frame{op: uint8(torus.OpSync) | opReply, id: id + 1})},
		{"old generation", torus.Request{Op: torus.OpSync}, "answers no request", encodeFrame(frame{op: uint8(torus.OpSync) | opReply, id: 2 << slotBits})},
		{"second hello", torus.Request{Op: torus.OpSync}, "second hello", (&Hello{Role: RolePeer}).encode()},
		{"goodbye", torus.Request{Op: torus.OpSync}, "out of space", goodbye(torus.ErrOutOfSpace)},
		{"long goodbye", torus.Request{Op: torus.OpSync}, "goodbye of 513", withPayload(frame{op: opGoodbye}, make([]byte, 513))},
	} {
		t.Run(c.what, func(t *testing.T) {
			x := newCluster(t, 1)
			peer := &raw{open: func(s transport.Stream) {
				h := testHello()
				s.Write(h.encode())
			}}
			_, err := x.n.Host("s").Listen(x.ls, "tcp://s:40000", func(transport.Stream) transport.Handler { return peer })
			if err != nil {
				t.Fatal(err)
			}
			x.dial()
			x.wait(func() bool { return x.c.Up() })
			done := x.submit(&c.req)
			x.v.RunFor(time.Millisecond)
			x.ls.Post(func() { peer.s.Write(c.b) })
			x.wait(func() bool { return len(x.downs) > 0 })
			if !strings.Contains(x.downs[0].Error(), c.says) {
				t.Error(x.downs[0])
			}
			if !*done || !errors.Is(c.req.Err, torus.ErrBlockUnavailable) {
				t.Error(*done, c.req.Err)
			}
			x.v.RunFor(10 * time.Millisecond)
			if all := peer.frames(t); c.what != "goodbye" && all[len(all)-1].op != opGoodbye {
				t.Errorf("the peer was told nothing: %v", all)
			}
		})
	}
}

// TestHostileRequests: a frame that no client of ours sends ends the connection, with a reason, and does not reach the store.
func TestHostileRequests(t *testing.T) {
	req := func(op torus.Op, f frame) frame {
		f.op = uint8(op)
		if f.id == 0 {
			f.id = 5
		}
		return f
	}
	hello := testHello()
	hello.Role = RoleClient
	for _, c := range []struct {
		what string
		code error
		b    []byte
	}{
		{"append of nothing", torus.ErrInvalid, encodeFrame(req(torus.OpAppend, frame{}))},
		{"append of half a page", torus.ErrInvalid, append(encodeFrame(req(torus.OpAppend, frame{payload: 2048, len: 2048})), make([]byte, 2048)...)},
		{"append of two lengths", torus.ErrInvalid, append(encodeFrame(req(torus.OpAppend, frame{payload: 4096, len: 8192})), make([]byte, 4096)...)},
		{"append too long", torus.ErrIO, encodeFrame(req(torus.OpAppend, frame{payload: MaxPayload + 4096, len: MaxPayload + 4096}))},
		{"read too long", torus.ErrInvalid, encodeFrame(req(torus.OpRead, frame{len: MaxPayload + 1}))},
		{"scan too long", torus.ErrInvalid, encodeFrame(req(torus.OpScan, frame{len: MaxPayload + 1}))},
		{"list too long", torus.ErrInvalid, encodeFrame(req(torus.OpList, frame{len: MaxTails + 1}))},
		{"sync with payload", torus.ErrInvalid, withPayload(req(torus.OpSync, frame{}), []byte("x"))},
		{"ping with payload", torus.ErrInvalid, withPayload(frame{op: uint8(torus.OpPing)}, []byte("x"))},
		{"unknown flag", torus.ErrIO, encodeFrame(req(torus.OpAppend, frame{flags: 4, len: 4096, payload: 4096}))},
		{"lent and sent", torus.ErrInvalid, withPayload(req(torus.OpAppend, frame{flags: flagLent, len: 4096}), make([]byte, 4096))},
		{"lent by nobody", torus.ErrInvalid, encodeFrame(req(torus.OpAppend, frame{flags: flagLent, len: 4096}))},
		{"lent and too long", torus.ErrInvalid, encodeFrame(req(torus.OpAppend, frame{flags: flagLent, len: MaxPayload + 4096}))},
		{"returned and never lent", torus.ErrInvalid, encodeFrame(req(opReturn, frame{}))},
		{"flag of another op", torus.ErrIO, encodeFrame(req(torus.OpSync, frame{flags: flagReserve, len: 4096}))},
		{"no id", torus.ErrInvalid, encodeFrame(frame{op: uint8(torus.OpSync)})},
		{"unknown op", torus.ErrNotSupported, encodeFrame(req(33, frame{}))},
		{"reply", torus.ErrNotSupported, encodeFrame(frame{op: uint8(torus.OpSync) | opReply, id: 1})},
		{"second hello", torus.ErrInvalid, hello.encode()},
		{"long hello", torus.ErrInvalid, encodeFrame(frame{op: opHello, payload: 513})},
		{"another protocol", torus.ErrIO, []byte("GET / HTTP/1.1\r\nHost: torus.example.com\r\nUser-Agent: a browser\r\n\r\n")},
		{"damaged", torus.ErrCorrupt, append([]byte("TDP1"), make([]byte, 60)...)},
	} {
		for _, first := range []bool{false, true} { // before the hello everything is an offence
			if first && c.what == "second hello" {
				continue
			}
			x := newCluster(t, 1).serve()
			r := &raw{}
			r.open = func(s transport.Stream) {
				if !first {
					s.Write(hello.encode())
				}
				s.Write(c.b)
			}
			x.lc.Post(func() { x.n.Host("c").Dial(x.lc, "tcp://s:40000", r) })
			x.v.RunFor(100 * time.Millisecond)
			all := r.frames(t)
			if len(all) == 0 || all[len(all)-1].op != opGoodbye || !r.closed || x.srv.Conns() != 0 {
				t.Errorf("%s: closed %v, got %+v", c.what, r.closed, all)
				continue
			}
			if got := all[len(all)-1].code; !first && got != torus.ErrorCode(c.code) {
				t.Errorf("%s: goodbye with code %d", c.what, got)
			}
			if len(x.store.seen) > 0 {
				t.Errorf("%s: the store saw %+v", c.what, x.store.seen)
			}
		}
	}
}

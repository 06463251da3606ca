package tdp

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/coreos/torus"
	"github.com/coreos/torus/place"
	"github.com/coreos/torus/record"
)

var update = flag.Bool("update", false, "write the golden frames instead of comparing with them")

func testRef() torus.BlockRef {
	return torus.BlockRef{Type: torus.TypeINode, Volume: 0x123456789a, INode: 0x0102030405060708, Index: 0x1112131415161718}
}

func testHello() Hello {
	return Hello{
		Cluster: "6ba7b810-9dad-11d1-80b4-00c04fd430c8", ID: torus.PeerID{0xaa, 1, 2, 3, 15: 0xff},
		Incarnation: 7, BlockSize: 4 << 20, Name: "torusd on a", Role: RolePeer, MinVersion: 1, MaxVersion: 1,
	}
}

func testTails() []torus.Tail {
	r := testRef()
	a, b := r, r
	b.Index++
	return []torus.Tail{{Ref: a, Length: 8192}, {Ref: b, Length: 4 << 20, Sealed: true}}
}

// withPayload returns a frame whose payload is summed.
func withPayload(f frame, p []byte) []byte {
	f.payload, f.sum = uint32(len(p)), record.Checksum(p)
	return append(encodeFrame(f), p...)
}

func encodeFrame(f frame) []byte {
	var b [HeaderSize]byte
	f.put(&b)
	return b[:]
}

// TestGolden holds the wire format still: whoever changes a byte of it breaks every running cluster.
func TestGolden(t *testing.T) {
	ref := testRef()
	page := bytes.Repeat([]byte{0xc5}, torus.PageSize)
	hello, tails := testHello(), testTails()
	client := testHello()
	client.Role, client.Name = RoleClient, "torusblk on b"
	rec := record.Header{Ref: ref, Seq: 1, Extents: []record.Extent{{Page: 3, Count: 1, Kind: record.Zero}}}
	head := make([]byte, record.HeaderSize)
	rec.Encode(head)
	scan := record.AppendScanEntry(nil, 0, head)
	req := func(op torus.Op, f frame) frame {
		f.op, f.id, f.ref = uint8(op), 0x00010002, ref
		return f
	}
	rep := func(op torus.Op, f frame) frame {
		f.op, f.id = uint8(op)|opReply, 0x00010002
		return f
	}
	located := where{place.Place{File: 3, Off: 5 << 20, Length: 12288, Stamp: 0x0102030405060708, Index: 1030}, 7 << 16}
	if got := decodeWhere(located.encode()); got != located {
		t.Errorf("%+v became %+v", located, got)
	}
	for name, b := range map[string][]byte{
		"hello.peer":     hello.encode(),
		"hello.client":   client.encode(),
		"goodbye":        goodbye(fmt.Errorf("peer %w", torus.ErrWrongCluster)),
		"ping.request":   encodeFrame(frame{op: uint8(torus.OpPing)}),
		"ping.reply":     encodeFrame(frame{op: uint8(torus.OpPing) | opReply}),
		"append.request": append(encodeFrame(req(torus.OpAppend, frame{epoch: 9, off: 4096, len: 4096, payload: 4096})), page...),
		"append.reserve": append(encodeFrame(req(torus.OpAppend, frame{flags: flagReserve, epoch: 9, off: 4096, len: 4096, payload: 4096})), page...),
		"append.durable": append(encodeFrame(req(torus.OpAppend, frame{flags: flagDurable, epoch: 9, off: 4096, len: 4096, payload: 4096})), page...),
		"append.reply":   encodeFrame(rep(torus.OpAppend, frame{len: 8192})),
		"append.fenced":  withPayload(rep(torus.OpAppend, frame{code: torus.ErrorCode(torus.ErrFenced), fence: 10}), []byte("fenced")),
		"where.request":  encodeFrame(req(opWhere, frame{flags: flagFile})),
		"where.reply":    withPayload(rep(opWhere, frame{}), located.encode()),
		"sync.request":   encodeFrame(req(torus.OpSync, frame{epoch: 9, len: 8192})),
		"sync.reply":     encodeFrame(rep(torus.OpSync, frame{len: 8192})),
		"fence.request":  encodeFrame(req(torus.OpFence, frame{epoch: 10, len: 32})),
		"fence.reply":    withPayload(rep(torus.OpFence, frame{fence: 10, committed: 0x77}), appendTails(nil, tails)),
		"seal.request":   encodeFrame(req(torus.OpSeal, frame{epoch: 9, len: 8192})),
		"seal.reply":     encodeFrame(rep(torus.OpSeal, frame{})),
		"read.request":   encodeFrame(req(torus.OpRead, frame{off: 4096, len: 4096})),
		"read.reply":     append(encodeFrame(rep(torus.OpRead, frame{payload: 4096})), page...),
		"scan.request":   encodeFrame(req(torus.OpScan, frame{epoch: 9, len: 65536})),
		"scan.reply":     withPayload(rep(torus.OpScan, frame{}), scan),
		"delete.request": encodeFrame(req(torus.OpDelete, frame{epoch: 9})),
		"delete.reply":   encodeFrame(rep(torus.OpDelete, frame{})),
		"verify.request": encodeFrame(req(torus.OpVerify, frame{})),
		"verify.reply":   encodeFrame(rep(torus.OpVerify, frame{})),
		"list.request":   encodeFrame(req(torus.OpList, frame{len: 100})),
		"list.reply":     withPayload(rep(torus.OpList, frame{}), appendTails(nil, tails)),
		"list.suspect":   withPayload(rep(torus.OpList, frame{}), appendTails(nil, []torus.Tail{{Ref: ref, Length: 4096, Suspect: true}})),
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join("testdata", "v1", name+".hex")
			if *update {
				if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(hex.Dump(squeeze(b))), 0o666); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if got := hex.Dump(squeeze(b)); got != string(want) {
				t.Errorf("the frame has changed:\n%s\nwas\n%s", got, want)
			}
			var f frame
			if err := f.parse(b); err != nil {
				t.Fatal(err)
			}
			if int(f.payload) != len(b)-HeaderSize {
				t.Errorf("payload of %d bytes, not %d", f.payload, len(b)-HeaderSize)
			}
			if again := encodeFrame(f); !bytes.Equal(again, b[:HeaderSize]) {
				t.Errorf("decoded and encoded again:\n%s", hex.Dump(again))
			}
		})
	}
}

// squeeze leaves most of the pages out of the files.
func squeeze(b []byte) []byte { return b[:min(len(b), 512)] }

func TestHelloRoundTrip(t *testing.T) {
	h := testHello()
	b := h.encode()
	var f frame
	if err := f.parse(b); err != nil {
		t.Fatal(err)
	}
	got, err := decodeHello(&f, b[HeaderSize:])
	if err != nil || !reflect.DeepEqual(got, h) {
		t.Fatalf("got %+v, %v", got, err)
	}
	longer := withPayload(frame{op: opHello}, append(b[HeaderSize:], "from the future"...))
	if err := f.parse(longer); err != nil {
		t.Fatal(err)
	}
	if got, err := decodeHello(&f, longer[HeaderSize:]); err != nil || !reflect.DeepEqual(got, h) {
		t.Fatalf("what a later version adds is to be ignored: %+v, %v", got, err)
	}
}

func TestTailsRoundTrip(t *testing.T) {
	b := withPayload(frame{op: uint8(torus.OpList) | opReply}, appendTails(nil, testTails()))
	var f frame
	if err := f.parse(b); err != nil {
		t.Fatal(err)
	}
	got, err := decodeTails(&f, b[HeaderSize:])
	if err != nil || !reflect.DeepEqual(got, testTails()) {
		t.Fatalf("got %v, %v", got, err)
	}
	b[HeaderSize+3] ^= 1
	if _, err := decodeTails(&f, b[HeaderSize:]); !errors.Is(err, torus.ErrCorrupt) {
		t.Fatalf("a flipped bit passed: %v", err)
	}
}

// TestEveryBitOfAHeaderCounts: no single flipped bit goes unnoticed.
func TestEveryBitOfAHeaderCounts(t *testing.T) {
	good := encodeFrame(frame{op: uint8(torus.OpSync), id: 5, ref: testRef(), epoch: 3, len: 4096})
	for i := range 8 * HeaderSize {
		b := bytes.Clone(good)
		b[i/8] ^= 1 << (i % 8)
		var f frame
		if err := f.parse(b); err == nil {
			t.Fatalf("bit %d flipped and accepted", i)
		}
	}
}

func TestAgree(t *testing.T) {
	mine := testHello()
	for _, c := range []struct {
		what   string
		change func(*Hello)
		is     error
		says   string
	}{
		{"same", func(h *Hello) {}, nil, ""},
		{"cluster", func(h *Hello) { h.Cluster = "other" }, torus.ErrWrongCluster, "another cluster"},
		{"version", func(h *Hello) { h.MinVersion, h.MaxVersion = 2, 3 }, torus.ErrNotSupported, "2 to 3 there"},
		{"role", func(h *Hello) { h.Role = RolePeer }, torus.ErrInvalid, "both sides"},
		{"block size", func(h *Hello) { h.BlockSize = 1 << 20 }, torus.ErrInvalid, "1048576 there"},
	} {
		theirs := testHello()
		theirs.Role = RoleClient
		c.change(&theirs)
		err := agree(&mine, &theirs)
		if !errors.Is(err, c.is) || err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", c.what, err)
		}
	}
}

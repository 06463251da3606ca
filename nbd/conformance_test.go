package nbd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/coreos/torus/device"
)

// TestConformance holds one line per demand of the NBD specification (doc/proto.md) on a server, by section. Every
// line runs with the client's bytes arriving whole, in pieces of 7 and one at a time.
func TestConformance(t *testing.T) {
	for _, split := range []int{1 << 30, 7, 1} {
		for _, x := range conformance {
			t.Run(fmt.Sprintf("%s/%s/split=%d", x.section, strings.ReplaceAll(x.must, " ", "_"), split), func(t *testing.T) {
				r := newRig(t, Config{})
				r.split = split
				x.test(r)
				r.run()
				for _, s := range r.srv.copySessions() {
					s.hangup()
				}
				r.run()
				if n := r.dir.Attached["disk"] + r.dir.Attached["frozen"]; n != 0 || r.srv.Sessions() != 0 {
					t.Errorf("%d devices attached, %d sessions after everybody left", n, r.srv.Sessions())
				}
			})
		}
	}
}

var (
	simply     = mode{}
	structured = mode{structured: true}
	allocation = mode{structured: true, allocation: true}
)

var conformance = []struct {
	section, must string
	test          func(r *rig)
}{
	// Handshake.
	{"newstyle", "greets with NBDMAGIC IHAVEOPT and its flags", func(r *rig) {
		c := r.dial()
		c.expect("NBDMAGIC", "IHAVEOPT", uint16(3))
		c.silent()
	}},
	{"newstyle", "closes on unknown client flags", func(r *rig) { c := r.dial().greeted(4); c.hungUp() }},
	{"newstyle", "closes on a bad option magic", func(r *rig) {
		c := r.dial().greeted(3)
		c.send("IHAVEOPTX"[1:], uint32(optList), uint32(0))
		c.hungUp()
	}},
	{"newstyle", "EXPORT_NAME replies size flags and 124 zeroes", func(r *rig) {
		c := r.dial().greeted(flagFixedNewstyle)
		c.option(optExportName, "disk")
		c.expect(uint64(diskSize), flagsSimple, make([]byte, 124))
		c.request(0, cmdFlush, 1, 0, 0)
		c.simple(0, 1)
	}},
	{"newstyle", "EXPORT_NAME with NO_ZEROES sends none", func(r *rig) {
		c := r.dial().greeted(3)
		c.option(optExportName, "disk")
		c.expect(uint64(diskSize), flagsSimple)
		c.silent()
		c.request(0, cmdFlush, 1, 0, 0)
		c.simple(0, 1)
	}},
	{"newstyle", "non-fixed newstyle client is served", func(r *rig) {
		c := r.dial().greeted(0)
		c.option(optExportName, "disk")
		c.expect(uint64(diskSize), flagsSimple, make([]byte, 124))
	}},
	{"newstyle", "EXPORT_NAME of an unknown export terminates", func(r *rig) {
		c := r.dial().greeted(3)
		c.option(optExportName, "nope")
		c.silent()
		c.hungUp()
	}},
	{"string", "a name longer than 4096 bytes is invalid", func(r *rig) {
		c := r.dial().greeted(3)
		c.option(optGo, named(strings.Repeat("x", 4097)), uint16(0))
		c.repErr(optGo, repErrInvalid)
		c.option(optInfo, named(strings.Repeat("x", 4096)), uint16(0))
		c.repErr(optInfo, repErrUnknown)
		c.alive()
	}},
	{"string", "a name with NUL or bad UTF-8 is invalid", func(r *rig) {
		c := r.dial().greeted(3)
		c.option(optGo, named("di\x00sk"), uint16(0))
		c.repErr(optGo, repErrInvalid)
		c.option(optGo, named("di\xffsk"), uint16(0))
		c.repErr(optGo, repErrInvalid)
		c.option(optExportName, "di\x00sk")
		c.hungUp()
	}},

	// Options.
	{"options", "an unknown option is UNSUP and the next is parsed", func(r *rig) {
		c := r.dial().greeted(3)
		for _, opt := range []uint32{0, 4, optExtendedHeaders, 12, 0xffffffff} {
			c.option(opt, "whatever data")
			c.repErr(opt, repErrUnsup)
		}
		c.option(99, make([]byte, maxOption+5)) // skipped by its length, however long
		c.repErr(99, repErrUnsup)
		c.option(optAbort)
		c.rep(optAbort, repAck)
	}},
	{"options", "an option too long to be data is TOO_BIG and the next is parsed", func(r *rig) {
		c := r.dial().greeted(3)
		c.option(optGo, make([]byte, maxOption+1))
		c.repErr(optGo, repErrTooBig)
		c.option(optList, make([]byte, maxOption+1))
		c.repErr(optList, repErrInvalid)
		c.option(optAbort, make([]byte, maxOption+1))
		c.rep(optAbort, repAck)
		c.hungUp()
	}},
	{"options", "an absurd option length ends the session", func(r *rig) {
		c := r.dial().greeted(3)
		c.send("IHAVEOPT", uint32(optGo), uint32(0xffffffff))
		c.hungUp()
		c = r.dial().greeted(3)
		c.send("IHAVEOPT", uint32(optExportName), uint32(maxOption+1))
		c.hungUp()
	}},
	{"ABORT", "is acknowledged even with data, then closed", func(r *rig) {
		c := r.dial().greeted(3)
		c.option(optAbort, "bye")
		c.rep(optAbort, repAck)
		c.hungUp()
	}},
	{"LIST", "one SERVER reply per export, then ACK", func(r *rig) {
		c := r.dial().greeted(3)
		c.option(optList)
		c.rep(optList, repServer, named("disk"), "a disk")
		c.rep(optList, repServer, named("frozen"))
		c.rep(optList, repAck)
	}},
	{"LIST", "with data is INVALID", func(r *rig) {
		c := r.dial().greeted(3)
		c.option(optList, "x")
		c.repErr(optList, repErrInvalid)
		c.alive()
	}},
	{"STARTTLS", "NOTLS mode answers UNSUP, never TLS_REQD", func(r *rig) {
		c := r.dial().greeted(3)
		c.option(optStartTLS)
		c.repErr(optStartTLS, repErrUnsup)
		c.option(optStartTLS, "x")
		c.repErr(optStartTLS, repErrInvalid)
		c.option(optGo, named("disk"), uint16(0))
		c.rep(optGo, repInfo, uint16(infoExport), uint64(diskSize), flagsSimple)
	}},
	{"INFO", "sends EXPORT, then ACK, and does not attach", func(r *rig) {
		c := r.dial().greeted(3)
		c.option(optInfo, named("disk"), uint16(0))
		c.rep(optInfo, repInfo, uint16(infoExport), uint64(diskSize), flagsSimple)
		c.rep(optInfo, repAck)
		c.silent()
		if r.dir.Opened != 0 {
			r.t.Error("INFO attached the device")
		}
	}},
	{"INFO", "answers what is asked, once, and ignores what it does not know", func(r *rig) {
		c := r.dial().greeted(3)
		c.option(optInfo, named("disk"), uint16(7), []uint16{infoBlockSize, infoName, infoDescription, infoName, 4, 77, 0xffff})
		c.rep(optInfo, repInfo, uint16(infoExport), uint64(diskSize), flagsSimple)
		c.rep(optInfo, repInfo, uint16(infoName), "disk")
		c.rep(optInfo, repInfo, uint16(infoDescription), "a disk")
		c.rep(optInfo, repInfo, uint16(infoBlockSize), uint32(1), uint32(4096), uint32(32<<20))
		c.rep(optInfo, repAck)
	}},
	{"INFO", "GO after INFO sends the same information", func(r *rig) {
		c := r.dial().greeted(3)
		asked := pack(named("disk"), uint16(3), []uint16{infoBlockSize, infoName, infoDescription})
		c.option(optInfo, asked)
		told := bytes.ReplaceAll(c.recv(len(c.st.out)), pack(uint64(magicOptReply), uint32(optInfo)), pack(uint64(magicOptReply), uint32(optGo)))
		c.option(optGo, asked)
		c.expect(told)
		c.silent()
	}},
	{"INFO", "unknown export is ERR_UNKNOWN without any INFO", func(r *rig) {
		c := r.dial().greeted(3)
		for _, opt := range []uint32{optInfo, optGo} {
			c.option(opt, named("nope"), uint16(1), uint16(infoName))
			if text := c.repErr(opt, repErrUnknown); !strings.Contains(text, "nope") {
				r.t.Errorf("the error says %q, not which export", text)
			}
		}
		c.silent()
		c.alive()
	}},
	{"INFO", "malformed data is INVALID", func(r *rig) {
		c := r.dial().greeted(3)
		for _, data := range [][]byte{
			nil, {0, 0, 0}, pack(uint32(0)), pack(uint32(5), "disk"), pack(uint32(0xffffffff), uint16(0)),
			pack(named("disk"), uint16(1)), pack(named("disk"), uint16(0), uint16(0)), pack(named("disk"), uint16(2), uint16(0)),
		} {
			for _, opt := range []uint32{optInfo, optGo} {
				c.option(opt, data)
				c.repErr(opt, repErrInvalid)
			}
		}
		c.option(optGo, named("disk"), uint16(0))
		c.expect(uint64(magicOptReply), uint32(optGo), uint32(repInfo))
	}},
	{"INFO", "the empty name is the default export, named by INFO_NAME", func(r *rig) {
		c := r.dial().greeted(3)
		c.option(optGo, named(""), uint16(1), uint16(infoName))
		c.rep(optGo, repInfo, uint16(infoExport), uint64(diskSize), flagsSimple)
		c.rep(optGo, repInfo, uint16(infoName), "disk")
		c.rep(optGo, repAck)
		if r.dir.Attached["disk"] != 1 {
			r.t.Error("not attached")
		}
	}},
	{"GO", "enters transmission without padding, and attaches", func(r *rig) {
		c := r.dial().greeted(flagFixedNewstyle)
		c.option(optGo, named("disk"), uint16(0))
		c.rep(optGo, repInfo, uint16(infoExport), uint64(diskSize), flagsSimple)
		c.rep(optGo, repAck)
		c.silent()
		if r.dir.Attached["disk"] != 1 {
			r.t.Error("not attached")
		}
		c.request(0, cmdRead, 9, 0, 1)
		c.simple(0, 9, byte(0))
	}},
	{"GO", "an error of the directory is told, and the client may go on", func(r *rig) {
		for err, why := range map[error]uint32{
			fmt.Errorf("attached to host b: %w", device.ErrBusy): repErrPolicy,
			errors.New("etcd is away"):                           repErrUnknown,
			device.ErrShutdown:                                   repErrShutdown,
		} {
			c := r.dial().greeted(3)
			r.dir.Fail = func(what, _ string) error {
				if what == "open" {
					return err
				}
				return nil
			}
			c.option(optGo, named("disk"), uint16(0))
			if text := c.repErr(optGo, why); text != err.Error() {
				r.t.Errorf("the client is told %q", text)
			}
			r.dir.Fail = nil
			c.option(optGo, named("disk"), uint16(0))
			c.expect(uint64(magicOptReply), uint32(optGo), uint32(repInfo))
			c.alive()
		}
	}},
	{"GO", "what follows in the same packet belongs to transmission", func(r *rig) {
		c := r.dial().greeted(3)
		goes := pack(named("disk"), uint16(0))
		c.send("IHAVEOPT", uint32(optGo), uint32(len(goes)), goes, uint32(magicRequest), uint16(0), uint16(cmdFlush), uint64(5), uint64(0), uint32(0))
		c.recv(20 + 12 + 20)
		c.simple(0, 5)
	}},

	// Transmission flags.
	{"transmission flags", "SEND_DF only with structured replies", func(r *rig) {
		c := r.dial().greeted(3)
		c.option(optStructuredReply)
		c.rep(optStructuredReply, repAck)
		c.option(optInfo, named("disk"), uint16(0))
		c.rep(optInfo, repInfo, uint16(infoExport), uint64(diskSize), flagsStructured)
	}},
	{"transmission flags", "READ_ONLY without TRIM, WRITE_ZEROES, FAST_ZERO", func(r *rig) {
		c := r.dial().greeted(3)
		c.option(optInfo, named("frozen"), uint16(0))
		want := uint16(flagHasFlags | flagReadOnly | flagSendFlush | flagSendFUA | flagCanMultiConn | flagSendCache)
		c.rep(optInfo, repInfo, uint16(infoExport), uint64(8192), want)
	}},

	// Structured replies and metadata contexts.
	{"STRUCTURED_REPLY", "with data is INVALID and changes nothing", func(r *rig) {
		c := r.dial().greeted(3)
		c.option(optStructuredReply, "x")
		c.repErr(optStructuredReply, repErrInvalid)
		c.option(optGo, named("disk"), uint16(0))
		c.rep(optGo, repInfo, uint16(infoExport), uint64(diskSize), flagsSimple)
		c.rep(optGo, repAck)
		c.request(0, cmdRead, 1, 0, 2)
		c.simple(0, 1, uint16(0))
	}},
	{"META_CONTEXT", "need structured replies", func(r *rig) {
		c := r.dial().greeted(3)
		for _, opt := range []uint32{optListMetaContext, optSetMetaContext} {
			c.option(opt, named("disk"), uint32(1), named(contextAllocation))
			c.repErr(opt, repErrInvalid)
		}
	}},
	{"META_CONTEXT", "LIST without queries and with base: lists all, with id 0", func(r *rig) {
		c := r.dial().greeted(3)
		c.option(optStructuredReply)
		c.rep(optStructuredReply, repAck)
		for _, queries := range [][]byte{pack(uint32(0)), pack(uint32(1), named("base:")), pack(uint32(2), named("base:allocation"), named("base:allocation"))} {
			c.option(optListMetaContext, named("disk"), queries)
			c.rep(optListMetaContext, repMetaContext, uint32(0), contextAllocation)
			c.rep(optListMetaContext, repAck)
		}
	}},
	{"META_CONTEXT", "unknown namespaces and leaves are ignored", func(r *rig) {
		c := r.dial().greeted(3)
		c.option(optStructuredReply)
		c.rep(optStructuredReply, repAck)
		for _, opt := range []uint32{optListMetaContext, optSetMetaContext} {
			c.option(opt, named("disk"), uint32(3), named("qemu:dirty-bitmap:x"), named("base:nope"), named("x-y:"))
			c.rep(opt, repAck)
		}
	}},
	{"META_CONTEXT", "SET ignores base: and selects nothing without queries", func(r *rig) {
		c := r.dial().greeted(3)
		c.option(optStructuredReply)
		c.rep(optStructuredReply, repAck)
		for _, queries := range [][]byte{pack(uint32(0)), pack(uint32(1), named("base:"))} {
			c.option(optSetMetaContext, named("disk"), queries)
			c.rep(optSetMetaContext, repAck)
		}
	}},
	{"META_CONTEXT", "malformed data is INVALID", func(r *rig) {
		c := r.dial().greeted(3)
		c.option(optStructuredReply)
		c.rep(optStructuredReply, repAck)
		for _, opt := range []uint32{optListMetaContext, optSetMetaContext} {
			for _, data := range [][]byte{
				nil, named("disk"), pack(named("disk"), uint32(1)), pack(named("disk"), uint32(1), uint32(9), "base:"),
				pack(named("disk"), uint32(0), byte(0)), pack(named("disk"), uint32(0xffffffff), named("base:")),
				pack(named("disk"), uint32(1), named("base:\x00")), pack(named("disk"), uint32(1), named(strings.Repeat("x", 4097))),
			} {
				c.option(opt, data)
				c.repErr(opt, repErrInvalid)
			}
		}
	}},
	{"META_CONTEXT", "of an unknown export is ERR_UNKNOWN", func(r *rig) {
		c := r.dial().greeted(3)
		c.option(optStructuredReply)
		c.rep(optStructuredReply, repAck)
		c.option(optSetMetaContext, named("nope"), uint32(1), named(contextAllocation))
		c.repErr(optSetMetaContext, repErrUnknown)
	}},
	{"META_CONTEXT", "SET replaces what was set, also when it fails", func(r *rig) {
		for name, fail := range map[string]func(*client){
			"none": func(c *client) {
				c.option(optSetMetaContext, named("disk"), uint32(0))
				c.rep(optSetMetaContext, repAck)
			},
			"invalid": func(c *client) { c.option(optSetMetaContext, "x"); c.repErr(optSetMetaContext, repErrInvalid) },
			"too big": func(c *client) {
				c.option(optSetMetaContext, make([]byte, maxOption+1))
				c.repErr(optSetMetaContext, repErrTooBig)
			},
		} {
			c := r.dial().greeted(3)
			c.option(optStructuredReply)
			c.rep(optStructuredReply, repAck)
			c.option(optSetMetaContext, named("disk"), uint32(1), named(contextAllocation))
			c.rep(optSetMetaContext, repMetaContext, uint32(contextID), contextAllocation)
			c.rep(optSetMetaContext, repAck)
			fail(c)
			c.option(optGo, named("disk"), uint16(0))
			c.recv(20 + 12 + 20)
			c.request(0, cmdBlockStatus, 1, 0, 512)
			if c.chunkErr(eINVAL, 1); r.t.Failed() {
				r.t.Error(name)
			}
		}
	}},
	{"META_CONTEXT", "holds for the export it was set for only, however that is called", func(r *rig) {
		for _, x := range []struct {
			set, enter string
			ok         bool
		}{{"disk", "disk", true}, {"disk", "frozen", false}, {"", "disk", true}, {"disk", "", true}} {
			c := r.dial().greeted(3)
			c.option(optStructuredReply)
			c.rep(optStructuredReply, repAck)
			c.option(optSetMetaContext, named(x.set), uint32(1), named(contextAllocation))
			c.rep(optSetMetaContext, repMetaContext, uint32(contextID), contextAllocation)
			c.rep(optSetMetaContext, repAck)
			c.option(optGo, named(x.enter), uint16(0))
			c.recv(20 + 12 + 20)
			c.request(0, cmdBlockStatus, 1, 0, 512)
			if x.ok {
				c.chunk(chunkBlockStatus, 1, uint32(contextID), uint32(512), uint32(stateHole|stateZero))
			} else {
				c.chunkErr(eINVAL, 1)
			}
		}
	}},

	// Requests and replies.
	{"request", "a bad magic ends the session", func(r *rig) {
		c := r.attached("disk", simply)
		c.send(uint32(magicRequest+1), make([]byte, 24))
		c.hungUp()
	}},
	{"request", "replies carry the request's cookie", func(r *rig) {
		c := r.attached("disk", simply)
		c.request(0, cmdFlush, 0xfedcba9876543210, 0, 0)
		c.simple(0, 0xfedcba9876543210)
	}},
	{"request", "replies in the order in which they are done", func(r *rig) {
		c := r.attached("disk", simply)
		h := &held{}
		r.disk.Deliver = func(_ *device.Request, f func()) { h.finish = append(h.finish, f) }
		copy(r.disk.Bytes(), "abcdef")
		for i := range uint64(3) {
			c.request(0, cmdRead, i, 2*i, 2)
		}
		c.silent()
		for _, i := range []uint64{1, 2, 0} {
			h.finish[i]()
			c.simple(0, i, "abcdef"[2*i:2*i+2])
		}
	}},
	{"simple reply", "READ carries the data, an error carries none", func(r *rig) {
		c := r.attached("disk", simply)
		copy(r.disk.Bytes()[99:], "hello")
		c.request(0, cmdRead, 1, 99, 5)
		c.simple(0, 1, "hello")
		r.disk.Fail = func(*device.Request) error { return errors.New("broken") }
		c.request(0, cmdRead, 2, 99, 5)
		c.simple(eIO, 2)
		c.silent()
		c.alive()
	}},
	{"simple reply", "is used for every request without structured replies", func(r *rig) {
		c := r.attached("disk", simply)
		for typ := uint16(0); typ < 20; typ++ {
			if typ == cmdDisc {
				continue
			}
			c.request(cmdFlagDF, typ, 7, 0, 0) // a flag none of them may carry
			c.simple(eINVAL, 7)
		}
		c.silent()
	}},
	{"structured reply", "READ is one DATA chunk that is DONE", func(r *rig) {
		c := r.attached("disk", structured)
		c.request(0, cmdWrite, 1, 99, 5, "hello")
		c.simple(0, 1)
		c.request(0, cmdRead, 2, 98, 7)
		c.chunk(chunkOffsetData, 2, uint64(98), "\x00hello\x00")
	}},
	{"structured reply", "READ of a hole is one HOLE chunk, with DF too", func(r *rig) {
		c := r.attached("disk", structured)
		c.request(cmdFlagDF, cmdRead, 2, 8192, 65536)
		c.chunk(chunkOffsetHole, 2, uint64(8192), uint32(65536))
	}},
	{"structured reply", "READ with DF of data and holes is one DATA chunk", func(r *rig) {
		c := r.attached("disk", structured)
		c.request(0, cmdWrite, 1, 0, 1, "x")
		c.simple(0, 1)
		c.request(cmdFlagDF, cmdRead, 2, 0, 65536)
		c.chunk(chunkOffsetData, 2, uint64(0), "x", make([]byte, 65535))
	}},
	{"structured reply", "READ errors are chunks, also early ones, with text", func(r *rig) {
		c := r.attached("disk", structured)
		c.request(cmdFlagReqOne, cmdRead, 1, 0, 512)
		c.chunkErr(eINVAL, 1)
		c.request(0, cmdRead, 2, diskSize, 1)
		c.chunkErr(eINVAL, 2)
		r.disk.Fail = func(*device.Request) error { return errors.New("bad\x00 news \xff" + strings.Repeat("é", 5000)) }
		c.request(0, cmdRead, 3, 0, 512)
		text := c.chunkErr(eIO, 3)
		if !strings.HasPrefix(text, "bad news ?é") || len(text) > 4096 || strings.Contains(text, "\x00") {
			r.t.Errorf("text %q", text)
		}
		c.silent()
		c.alive()
	}},
	{"structured reply", "READ of nothing succeeds without a content chunk", func(r *rig) {
		c := r.attached("disk", structured)
		c.request(0, cmdRead, 1, 5, 0)
		c.chunk(chunkNone, 1)
		c.request(0, cmdRead, 2, diskSize, 0)
		c.chunk(chunkNone, 2)
	}},

	// Commands.
	{"READ", "any offset and length down to one byte, to the very end", func(r *rig) {
		copy(r.disk.Bytes(), pattern(diskSize, 3))
		c := r.attached("disk", simply)
		for _, x := range [][2]int{{0, 1}, {1, 1}, {511, 3}, {4095, 2}, {diskSize - 1, 1}, {diskSize - 513, 513}, {0, diskSize}} {
			c.request(0, cmdRead, 1, uint64(x[0]), uint32(x[1]))
			c.simple(0, 1, r.disk.Bytes()[x[0]:x[0]+x[1]])
		}
		c.request(0, cmdRead, 2, 77, 0)
		c.simple(0, 2)
	}},
	{"READ", "beyond the end is EINVAL", func(r *rig) {
		c := r.attached("disk", simply)
		for _, x := range [][2]uint64{{diskSize, 1}, {diskSize - 1, 2}, {1 << 63, 1}, {^uint64(0), 1}, {^uint64(0), 0xffffffff}, {diskSize + 1, 0}} {
			c.request(0, cmdRead, 1, x[0], uint32(x[1]))
			c.simple(eINVAL, 1)
		}
		c.alive()
	}},
	{"WRITE", "any offset and length down to one byte, to the very end", func(r *rig) {
		c := r.attached("disk", simply)
		want := make([]byte, diskSize)
		for i, x := range [][2]int{{0, 1}, {1, 1}, {511, 3}, {4095, 2}, {100, smallWrite}, {5, smallWrite + 1}, {diskSize - 1, 1}, {diskSize - 200001, 200000}} {
			b := pattern(x[1], byte(i)*31)
			copy(want[x[0]:], b)
			c.request(0, cmdWrite, uint64(i), uint64(x[0]), uint32(x[1]), b)
			c.simple(0, uint64(i))
		}
		c.request(0, cmdWrite, 2, 77, 0)
		c.simple(0, 2)
		if !bytes.Equal(r.disk.Bytes(), want) {
			r.t.Error("the device holds something else")
		}
	}},
	{"WRITE", "the device has its copy before the input is used again", func(r *rig) {
		c := r.attached("disk", simply)
		h := &held{}
		r.disk.Deliver = func(_ *device.Request, f func()) { h.finish = append(h.finish, f) }
		a, b := pattern(5000, 1), pattern(40000, 2)
		c.request(0, cmdWrite, 1, 0, uint32(len(a)), a)
		c.request(0, cmdWrite, 2, 5000, uint32(len(b)), b)
		c.request(0, cmdWrite, 3, 45000, 5, "third")
		c.silent()
		for i := range h.finish {
			h.finish[len(h.finish)-1-i]()
		}
		if !bytes.Equal(r.disk.Bytes()[:45005], pack(a, b, "third")) {
			r.t.Error("the device holds something else")
		}
	}},
	{"WRITE", "beyond the end is ENOSPC, its payload skipped", func(r *rig) {
		c := r.attached("disk", simply)
		for i, x := range [][2]uint64{{diskSize, 1}, {diskSize - 1, 2}, {^uint64(0), 100000}, {diskSize + 1, 0}} {
			c.request(0, cmdWrite, uint64(i), x[0], uint32(x[1]), pattern(int(x[1]), 1))
			c.simple(eNOSPC, uint64(i))
		}
		c.request(0, cmdFlush, 9, 0, 0)
		c.simple(0, 9)
	}},
	{"WRITE", "a refusal follows the whole payload, not its first byte", func(r *rig) {
		c := r.attached("disk", simply)
		c.request(0, cmdWrite, 1, diskSize, 1000, pattern(999, 1))
		c.silent()
		c.send("x")
		c.simple(eNOSPC, 1)
	}},
	{"WRITE", "longer than the maximum payload is refused, its payload skipped", func(r *rig) {
		big := device.Device(nothing(1 << 40))
		r.dir.Add("big", "", big)
		c := r.attached("big", simply)
		c.st.split = max(c.st.split, 4096)
		c.request(0, cmdWrite, 1, 0, maxPayload+1, make([]byte, maxPayload+1))
		c.simple(eINVAL, 1)
		c.request(0, cmdWrite, 2, 0, maxPayload, make([]byte, maxPayload))
		c.simple(0, 2)
		c.request(0, cmdRead, 3, 0, maxPayload+1)
		c.simple(eOVERFLOW, 3)
		c.request(0, cmdRead, 4, 0, 0xffffffff)
		c.simple(eOVERFLOW, 4)
		c.request(0, cmdRead, 5, 0, maxPayload)
		c.simple(0, 5, make([]byte, maxPayload))
	}},
	{"WRITE", "an error of the device is told by its kind", func(r *rig) {
		c := r.attached("disk", simply)
		for err, want := range map[error]errno{
			device.ErrOutOfSpace: eNOSPC, device.ErrReadOnly: ePERM, device.ErrRange: eNOSPC, device.ErrInvalid: eINVAL,
			device.ErrShutdown: eSHUTDOWN, errors.New("fenced"): eIO, device.ErrNotSupported: eINVAL,
		} {
			r.disk.Fail = func(*device.Request) error { return fmt.Errorf("wrapped: %w", err) }
			c.request(0, cmdWrite, 1, 0, 1, "x")
			c.simple(want, 1)
		}
	}},
	{"DISC", "finishes and answers what is under way, then closes", func(r *rig) {
		c := r.attached("disk", simply)
		h := &held{}
		r.disk.Deliver = func(_ *device.Request, f func()) { h.finish = append(h.finish, f) }
		c.request(0, cmdWrite, 1, 0, 1, "x")
		c.request(0, cmdRead, 2, 0, 1)
		c.request(0, cmdDisc, 3, 0, 0)
		c.request(0, cmdFlush, 4, 0, 0) // not to be served any more
		c.silent()
		c.alive()
		h.finish[0]()
		c.alive()
		c.simple(0, 1)
		h.finish[1]()
		c.simple(0, 2, "x")
		c.silent()
		c.hungUp()
		if r.dir.Attached["disk"] != 0 {
			r.t.Error("still attached")
		}
	}},
	{"DISC", "has no reply", func(r *rig) {
		c := r.attached("disk", structured)
		c.request(0, cmdDisc, 3, 0, 0)
		c.silent()
		c.hungUp()
	}},
	{"FLUSH", "covers what was acknowledged before (D1)", func(r *rig) {
		c := r.attached("disk", simply)
		c.request(0, cmdWrite, 1, 10, 5, "hello")
		c.simple(0, 1)
		if !bytes.Equal(r.disk.Durable()[10:15], make([]byte, 5)) {
			r.t.Fatal("the test device is durable without a flush")
		}
		c.request(0, cmdFlush, 2, 0, 0)
		c.simple(0, 2)
		r.disk.Crash()
		c.request(0, cmdRead, 3, 10, 5)
		c.simple(0, 3, "hello")
	}},
	{"FLUSH", "is not answered before the device has done it", func(r *rig) {
		c := r.attached("disk", simply)
		var finish func()
		r.disk.Deliver = func(_ *device.Request, f func()) { finish = f }
		c.request(0, cmdFlush, 2, 0, 0)
		c.silent()
		finish()
		c.simple(0, 2)
	}},
	{"FLUSH", "with an offset or a length is EINVAL", func(r *rig) {
		c := r.attached("disk", simply)
		c.request(0, cmdFlush, 2, 1, 0)
		c.simple(eINVAL, 2)
		c.request(0, cmdFlush, 3, 0, 1)
		c.simple(eINVAL, 3)
	}},
	{"FUA", "reaches the device with all that write, and is durable (D1)", func(r *rig) {
		c := r.attached("disk", simply)
		c.request(cmdFlagFUA, cmdWrite, 1, 0, 4, "fua!")
		c.simple(0, 1)
		c.request(cmdFlagFUA, cmdWriteZeroes, 2, 1, 1)
		c.simple(0, 2)
		c.request(cmdFlagFUA, cmdTrim, 3, 2, 1)
		c.simple(0, 3)
		r.disk.Crash()
		c.request(0, cmdRead, 4, 0, 4)
		c.simple(0, 4, "f\x00\x00!")
	}},
	{"FUA", "is accepted on every command", func(r *rig) {
		c := r.attached("disk", allocation)
		for _, typ := range []uint16{cmdFlush, cmdTrim, cmdCache, cmdWriteZeroes} {
			c.request(cmdFlagFUA, typ, 1, 0, 0)
			c.simple(0, 1)
		}
		c.request(cmdFlagFUA, cmdRead, 1, 0, 512)
		c.chunk(chunkOffsetHole, 1, uint64(0), uint32(512))
		c.request(cmdFlagFUA, cmdBlockStatus, 1, 0, 512)
		c.chunk(chunkBlockStatus, 1, uint32(contextID), uint32(512), uint32(stateHole|stateZero))
		if r.disk.Last.Flags&device.FUA != 0 {
			r.t.Error("FUA on a query")
		}
	}},
	{"TRIM", "frees", func(r *rig) {
		c := r.attached("disk", allocation)
		c.request(0, cmdWrite, 1, 0, 8192, pattern(8192, 1))
		c.simple(0, 1)
		c.request(0, cmdTrim, 2, 4096, 4096)
		c.simple(0, 2)
		c.request(0, cmdBlockStatus, 3, 0, 8192)
		c.chunk(chunkBlockStatus, 3, uint32(contextID), uint32(4096), uint32(0), uint32(4096), uint32(3))
	}},
	{"TRIM", "beyond the end is EINVAL; of nothing a success", func(r *rig) {
		c := r.attached("disk", simply)
		c.request(0, cmdTrim, 2, diskSize-1, 2)
		c.simple(eINVAL, 2)
		c.request(0, cmdTrim, 3, 0, 0)
		c.simple(0, 3)
	}},
	{"TRIM", "may be as long as the export", func(r *rig) {
		r.dir.Add("big", "", nothing(1<<40))
		c := r.attached("big", simply)
		for _, typ := range []uint16{cmdTrim, cmdWriteZeroes, cmdCache} {
			c.request(0, typ, 1, 5, 0xffffffff)
			c.simple(0, 1)
		}
	}},
	{"CACHE", "succeeds, refuses flags it does not know, EINVAL beyond the end", func(r *rig) {
		c := r.attached("disk", simply)
		c.request(0, cmdCache, 1, 0, diskSize)
		c.simple(0, 1)
		c.request(cmdFlagNoHole, cmdCache, 2, 0, 1)
		c.simple(eINVAL, 2)
		c.request(0, cmdCache, 3, diskSize, 1)
		c.simple(eINVAL, 3)
	}},
	{"WRITE_ZEROES", "reads back as zero", func(r *rig) {
		c := r.attached("disk", simply)
		copy(r.disk.Bytes(), pattern(100, 9))
		c.request(0, cmdWriteZeroes, 1, 10, 50)
		c.simple(0, 1)
		c.request(0, cmdRead, 2, 10, 50)
		c.simple(0, 2, make([]byte, 50))
	}},
	{"WRITE_ZEROES", "NO_HOLE keeps it allocated, else it need not be", func(r *rig) {
		c := r.attached("disk", allocation)
		c.request(cmdFlagNoHole, cmdWriteZeroes, 1, 0, 4096)
		c.simple(0, 1)
		c.request(0, cmdWriteZeroes, 2, 4096, 4096)
		c.simple(0, 2)
		c.request(0, cmdBlockStatus, 3, 0, 8192)
		c.chunk(chunkBlockStatus, 3, uint32(contextID), uint32(4096), uint32(0), uint32(4096), uint32(3))
	}},
	{"WRITE_ZEROES", "FAST_ZERO fails with ENOTSUP if slow, and only then", func(r *rig) {
		c := r.attached("disk", simply)
		c.request(cmdFlagFastZero, cmdWriteZeroes, 1, 0, 4096)
		c.simple(0, 1)
		r.disk.SlowZeroes = true
		c.request(cmdFlagFastZero, cmdWriteZeroes, 2, 0, 4096)
		c.simple(eNOTSUP, 2)
		c.request(0, cmdWriteZeroes, 3, 0, 4096)
		c.simple(0, 3)
		r.disk.Fail = func(*device.Request) error { return device.ErrNotSupported }
		c.request(0, cmdWriteZeroes, 4, 0, 4096)
		c.simple(eINVAL, 4)
	}},
	{"WRITE_ZEROES", "beyond the end is ENOSPC; of nothing a success", func(r *rig) {
		c := r.attached("disk", simply)
		c.request(0, cmdWriteZeroes, 2, diskSize-1, 2)
		c.simple(eNOSPC, 2)
		c.request(0, cmdWriteZeroes, 3, 0, 0)
		c.simple(0, 3)
	}},
	{"READ_ONLY", "EPERM for all that write, payload skipped", func(r *rig) {
		c := r.attached("frozen", simply)
		c.request(0, cmdWrite, 1, 0, 50000, make([]byte, 50000))
		c.simple(ePERM, 1)
		c.request(0, cmdWrite, 2, 0, 5, "hello")
		c.simple(ePERM, 2)
		c.request(0, cmdTrim, 3, 0, 5)
		c.simple(ePERM, 3)
		c.request(0, cmdWriteZeroes, 4, 0, 5)
		c.simple(ePERM, 4)
		c.request(0, cmdFlush, 5, 0, 0)
		c.simple(0, 5)
		c.request(0, cmdRead, 6, 0, 5)
		c.simple(0, 6, make([]byte, 5))
	}},
	{"BLOCK_STATUS", "extents from the offset on, merged, inside the request", func(r *rig) {
		c := r.attached("disk", allocation)
		c.request(0, cmdWrite, 1, 8192, 8192, make([]byte, 8192))
		c.simple(0, 1)
		c.request(0, cmdBlockStatus, 2, 100, 20000)
		c.chunk(chunkBlockStatus, 2, uint32(contextID), uint32(8092), uint32(3), uint32(8192), uint32(0), uint32(3716), uint32(3))
	}},
	{"BLOCK_STATUS", "REQ_ONE gets one extent, not longer than asked", func(r *rig) {
		c := r.attached("disk", allocation)
		c.request(0, cmdWrite, 1, 8192, 8192, make([]byte, 8192))
		c.simple(0, 1)
		c.request(cmdFlagReqOne, cmdBlockStatus, 2, 0, 20000)
		c.chunk(chunkBlockStatus, 2, uint32(contextID), uint32(8192), uint32(3))
		c.request(cmdFlagReqOne, cmdBlockStatus, 3, 0, 100)
		c.chunk(chunkBlockStatus, 3, uint32(contextID), uint32(100), uint32(3))
	}},
	{"BLOCK_STATUS", "a device that says too much or too little does no harm", func(r *rig) {
		r.dir.Add("odd", "", &odd{nothing(1 << 40), []device.Extent{{Len: 0}, {Len: 5, Hole: true}, {Len: 7, Hole: true}, {Len: 1 << 50, Zero: true}, {Len: 1}}})
		r.dir.Add("mute", "", &odd{nothing(1 << 40), nil})
		c := r.attached("odd", allocation)
		c.request(0, cmdBlockStatus, 2, 0, 0xffffffff)
		c.chunk(chunkBlockStatus, 2, uint32(contextID), uint32(12), uint32(1), uint32(0xffffffff-12), uint32(2))
		c = r.attached("mute", allocation)
		c.request(0, cmdBlockStatus, 2, 0, 0xffffffff)
		c.chunkErr(eIO, 2)
	}},
	{"BLOCK_STATUS", "not more extents than one reply should have", func(r *rig) {
		many := make([]device.Extent, 3*maxExtents)
		for i := range many {
			many[i] = device.Extent{Len: 512, Hole: i%2 == 0}
		}
		r.dir.Add("odd", "", &odd{nothing(1 << 40), many})
		c := r.attached("odd", allocation)
		c.request(0, cmdBlockStatus, 2, 0, 0xffffffff)
		c.expect(uint32(magicStructured), uint16(chunkFlagDone), uint16(chunkBlockStatus), uint64(2), uint32(4+8*maxExtents), uint32(contextID))
		c.recv(8 * maxExtents)
		c.silent()
	}},
	{"BLOCK_STATUS", "EINVAL without a context, beyond the end, of nothing", func(r *rig) {
		c := r.attached("disk", structured)
		c.request(0, cmdBlockStatus, 1, 0, 512)
		c.chunkErr(eINVAL, 1)
		c = r.attached("disk", allocation)
		c.request(0, cmdBlockStatus, 1, diskSize, 1)
		c.chunkErr(eINVAL, 1)
		c.request(0, cmdBlockStatus, 1, 0, 0)
		c.chunkErr(eINVAL, 1)
		c.alive()
	}},
	{"errors", "unknown commands and flags are EINVAL and the session goes on", func(r *rig) {
		c := r.attached("disk", structured)
		for _, typ := range []uint16{8, 9, 255, 0xffff} {
			c.request(0, typ, 1, 0, 0)
			c.chunkErr(eINVAL, 1)
		}
		for typ, flags := range map[uint16]uint16{
			cmdRead: ^uint16(cmdFlagDF | cmdFlagFUA), cmdWrite: ^uint16(cmdFlagFUA), cmdFlush: ^uint16(cmdFlagFUA), cmdTrim: ^uint16(cmdFlagFUA),
			cmdCache: ^uint16(cmdFlagFUA), cmdWriteZeroes: ^uint16(cmdFlagFUA | cmdFlagNoHole | cmdFlagFastZero),
		} {
			for bit := range 16 {
				if flags&(1<<bit) == 0 {
					continue
				}
				n := uint32(512)
				payload := []byte{}
				switch typ {
				case cmdFlush:
					n = 0
				case cmdWrite:
					payload = make([]byte, n)
				}
				c.request(1<<bit, typ, 1, 0, n, payload)
				c.chunkErr(eINVAL, 1)
			}
		}
		c.request(0, cmdFlush, 5, 0, 0)
		c.simple(0, 5)
	}},
	{"shutdown", "options are ERR_SHUTDOWN, ABORT is acknowledged", func(r *rig) {
		c := r.dial().greeted(3)
		done := false
		r.srv.Shutdown(func() { done = true })
		for _, opt := range []uint32{optList, optInfo, optGo, 99} {
			c.option(opt)
			c.repErr(opt, repErrShutdown)
		}
		if r.run(); done {
			r.t.Error("done with a session left")
		}
		c.option(optAbort)
		c.rep(optAbort, repAck)
		c.hungUp()
		if !done {
			r.t.Error("not done with no session left")
		}
	}},
	{"shutdown", "what is under way is answered, what comes is ESHUTDOWN", func(r *rig) {
		c, idle := r.attached("disk", simply), r.attached("disk", simply)
		h := &held{}
		r.disk.Deliver = func(_ *device.Request, f func()) { h.finish = append(h.finish, f) }
		c.request(0, cmdWrite, 1, 0, 1, "x")
		done := false
		r.srv.Shutdown(func() { done = true })
		r.run()
		if !idle.st.closed {
			r.t.Error("an idle session lives on")
		}
		c.request(0, cmdWrite, 2, 0, 40000, make([]byte, 40000))
		c.simple(eSHUTDOWN, 2)
		c.request(0, cmdRead, 3, 0, 1)
		c.simple(eSHUTDOWN, 3)
		if r.run(); done || r.dir.Attached["disk"] != 1 {
			r.t.Error("done with a request under way")
		}
		h.finish[0]()
		c.simple(0, 1)
		c.hungUp()
		if !done || r.dir.Attached["disk"] != 0 {
			r.t.Error("not done, or the device is still attached")
		}
	}},
	{"security", "a handshake that takes too long ends", func(r *rig) {
		c := r.dial().greeted(3)
		for range 29 {
			c.send("I"[:1]) // drop by drop
			c.st.in = nil   // never a whole header
			r.v.RunFor(time.Second)
		}
		c.alive()
		r.v.RunFor(time.Second)
		c.hungUp()
	}},
	{"security", "an attached client may idle", func(r *rig) {
		c := r.attached("disk", simply)
		r.v.RunFor(24 * time.Hour)
		c.request(0, cmdFlush, 1, 0, 0)
		c.simple(0, 1)
	}},
}

// nothing is a device of zeroes that keeps nothing.
type nothing uint64

func (n nothing) Size() uint64   { return uint64(n) }
func (n nothing) ReadOnly() bool { return false }
func (n nothing) Submit(r *device.Request) {
	if r.Op == device.Read {
		clear(r.Data)
	}
	r.Finish(nil)
}

// odd is a device whose extents are nonsense.
type odd struct {
	nothing
	extents []device.Extent
}

func (o *odd) Submit(r *device.Request) {
	r.Extents = append(r.Extents, o.extents...)
	r.Finish(nil)
}

// Sanity of the rig itself: what pack makes is big endian.
func TestPack(t *testing.T) {
	if got := pack(uint16(1), "x", uint64(2)); binary.BigEndian.Uint64(got[3:]) != 2 || string(got[:3]) != "\x00\x01x" {
		t.Errorf("%x", got)
	}
}

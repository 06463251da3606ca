package nbd

import (
	"encoding/binary"

	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/device"
)

// Without structured replies every answer is a simple one. With them a READ is always answered by chunks, an error by a
// chunk with its text, and whatever else has no payload by a simple reply, which is shorter.

// reply answers a call that the device has done.
func (s *session) reply(c *call) {
	r := &c.req
	switch {
	case r.Err != nil:
		s.replyError(c.cmd, errnoOf(r.Err, c.cmd), r.Err.Error())
	case c.cmd.typ == cmdRead:
		s.replyRead(c)
	case c.cmd.typ == cmdBlockStatus:
		s.replyStatus(c.cmd, r.Extents)
	default:
		s.simple(c.cmd, 0)
	}
}

// replyRead sends what was read, without a copy.
func (s *session) replyRead(c *call) {
	cmd := c.cmd
	switch {
	case !s.structured:
		s.simple(cmd, 0)
	case c.req.Zero:
		b := s.chunk(cmd, chunkOffsetHole, 12)
		b = binary.BigEndian.AppendUint64(b, cmd.off)
		s.st.Write(binary.BigEndian.AppendUint32(b, cmd.len))
		return
	default:
		b := s.chunk(cmd, chunkOffsetData, 8+cmd.len)
		s.st.Write(binary.BigEndian.AppendUint64(b, cmd.off))
	}
	s.st.WriteBuf(c.req.Buf, int(cmd.len))
	c.req.Buf = nil
}

// replyEmpty answers a command of no bytes, which succeeds without doing anything.
func (s *session) replyEmpty(cmd command) {
	if s.structured && cmd.typ == cmdRead {
		s.st.Write(s.chunk(cmd, chunkNone, 0))
		return
	}
	s.simple(cmd, 0)
}

// replyStatus sends extents: runs of one kind merged, cut at the end of what was asked, one only if the client
// wants one.
func (s *session) replyStatus(cmd command, extents []device.Extent) {
	most := maxExtents
	if cmd.flags&cmdFlagReqOne != 0 {
		most = 1
	}
	b := buf.Get(4 + 8*min(len(extents), most))
	out := binary.BigEndian.AppendUint32(b.Bytes()[:0], contextID)
	left := uint64(cmd.len)
	var run uint64
	var runState uint32
	n := 0
	for _, e := range extents {
		k := min(e.Len, left)
		if k == 0 {
			continue
		}
		state := stateOf(e)
		if run > 0 && state != runState {
			out, n, run = appendExtent(out, run, runState), n+1, 0
			if n == most {
				break
			}
		}
		run, runState, left = run+k, state, left-k
	}
	if run > 0 {
		out, n = appendExtent(out, run, runState), n+1
	}
	if n == 0 {
		b.Release()
		s.replyError(cmd, eIO, "the device knows no extents")
		return
	}
	s.st.Write(s.chunk(cmd, chunkBlockStatus, uint32(len(out))))
	s.st.WriteBuf(b, len(out))
	s.srv.held += len(out) // a READ's was counted when it was let in
}

func stateOf(e device.Extent) (state uint32) {
	if e.Hole {
		state |= stateHole
	}
	if e.Zero {
		state |= stateZero
	}
	return state
}

func appendExtent(b []byte, n uint64, state uint32) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(n)) // at most what was asked, which has 32 bits
	return binary.BigEndian.AppendUint32(b, state)
}

// replyError answers a command with an error, and its text where there is room for one.
func (s *session) replyError(cmd command, err errno, text string) {
	if !s.structured {
		s.simple(cmd, err)
		return
	}
	text = clip(text, maxMessage)
	b := s.chunk(cmd, chunkError, uint32(6+len(text)))
	b = binary.BigEndian.AppendUint32(b, uint32(err))
	s.st.Write(binary.BigEndian.AppendUint16(b, uint16(len(text))))
	if text != "" {
		s.st.Write([]byte(text))
	}
}

// simple sends a simple reply, or the header of one.
func (s *session) simple(cmd command, err errno) {
	b := binary.BigEndian.AppendUint32(s.scratch[:0], magicSimple)
	b = binary.BigEndian.AppendUint32(b, uint32(err))
	s.st.Write(binary.BigEndian.AppendUint64(b, cmd.cookie))
}

// chunk begins the one chunk of a structured reply; n is the length of its payload in bytes.
func (s *session) chunk(cmd command, typ uint16, n uint32) []byte {
	b := binary.BigEndian.AppendUint32(s.scratch[:0], magicStructured)
	b = binary.BigEndian.AppendUint16(b, chunkFlagDone)
	b = binary.BigEndian.AppendUint16(b, typ)
	b = binary.BigEndian.AppendUint64(b, cmd.cookie)
	return binary.BigEndian.AppendUint32(b, n)
}

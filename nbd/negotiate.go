package nbd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/coreos/torus/device"
)

// Options are answered one at a time, as the protocol demands: while the Directory is asked, the session's input is
// paused. Every continuation of such a question starts with answered, which tells it whether anybody still listens.

// greet opens the handshake.
func (s *session) greet() {
	b := binary.BigEndian.AppendUint64(s.scratch[:0], magicInit)
	b = binary.BigEndian.AppendUint64(b, magicOption)
	b = binary.BigEndian.AppendUint16(b, flagFixedNewstyle|flagNoZeroes)
	s.st.Write(b)
}

// clientFlags takes the client's answer to the greeting.
func (s *session) clientFlags(b []byte) (consumed, need int) {
	if len(b) < 4 {
		return 0, 4
	}
	flags := binary.BigEndian.Uint32(b)
	if flags&^(flagFixedNewstyle|flagNoZeroes) != 0 {
		s.fail(fmt.Sprintf("unknown client flags %#x", flags))
		return 4, 0
	}
	s.noZeroes = flags&flagNoZeroes != 0
	s.phase = phaseOptions
	return 4, 0
}

// option takes one option, header and data.
func (s *session) option(b []byte) (consumed, need int) {
	if len(b) < optionHeaderSize {
		return 0, optionHeaderSize
	}
	if magic := binary.BigEndian.Uint64(b); magic != magicOption {
		s.fail(fmt.Sprintf("bad option magic %#x", magic))
		return optionHeaderSize, 0
	}
	opt, length := binary.BigEndian.Uint32(b[8:]), binary.BigEndian.Uint32(b[12:])
	if length > maxOption {
		s.oversized(opt, length)
		return optionHeaderSize, 0
	}
	end := optionHeaderSize + int(length)
	if len(b) < end {
		return 0, end
	}
	s.dispatch(opt, b[optionHeaderSize:end])
	return end, 0
}

// oversized begins to discard the data of an option that is too long to be looked at.
func (s *session) oversized(opt, length uint32) {
	switch {
	case opt == optExportName:
		s.fail("an export name that is too long")
	case length > maxDiscard:
		s.fail(fmt.Sprintf("option %d of %d bytes", opt, length))
	default:
		s.skip, s.skipped = int(length), refusal{opt: opt}
	}
}

// dispatchOversized answers an option whose data was discarded.
func (s *session) dispatchOversized(opt uint32) {
	switch opt {
	case optSetMetaContext:
		s.contextFor, s.allocation = "", false // even if it fails
		fallthrough
	case optInfo, optGo, optListMetaContext:
		s.refuse(opt, repErrTooBig, fmt.Sprintf("an option may have %d bytes of data", maxOption))
	default: // takes no data, or is unknown: the same as with any data
		s.dispatch(opt, make([]byte, 1))
	}
}

// dispatch answers the option opt. data is valid until it returns.
func (s *session) dispatch(opt uint32, data []byte) {
	if s.srv.drain != nil && opt != optAbort {
		if opt == optExportName {
			s.hangup()
			return
		}
		s.refuse(opt, repErrShutdown, "the server is shutting down")
		return
	}
	switch opt {
	case optExportName:
		name, ok := validString(data)
		if !ok {
			s.fail("an invalid export name")
			return
		}
		s.exportName(name)
	case optAbort:
		s.optReply(opt, repAck, nil, "")
		s.finish()
	case optList:
		if len(data) != 0 {
			s.refuse(opt, repErrInvalid, "LIST takes no data")
			return
		}
		s.list()
	case optInfo, optGo:
		name, infos, ok := parseInfo(data)
		if !ok {
			s.refuse(opt, repErrInvalid, "malformed option")
			return
		}
		s.info(opt, name, infos)
	case optStructuredReply:
		if len(data) != 0 {
			s.refuse(opt, repErrInvalid, "STRUCTURED_REPLY takes no data")
			return
		}
		s.structured = true
		s.optReply(opt, repAck, nil, "")
	case optListMetaContext, optSetMetaContext:
		if opt == optSetMetaContext {
			s.contextFor, s.allocation = "", false
		}
		q, ok := parseContexts(data)
		switch {
		case !s.structured:
			s.refuse(opt, repErrInvalid, "metadata contexts need structured replies; negotiate them first")
		case !ok:
			s.refuse(opt, repErrInvalid, "malformed option")
		default:
			s.contexts(opt, q)
		}
	case optStartTLS:
		if len(data) != 0 {
			s.refuse(opt, repErrInvalid, "STARTTLS takes no data")
			return
		}
		s.refuse(opt, repErrUnsup, "TLS is not supported")
	default:
		s.refuse(opt, repErrUnsup, fmt.Sprintf("option %d is not supported", opt))
	}
}

// wait pauses the handshake until the Directory has answered; each wait is ended by one call of answered.
func (s *session) wait() {
	s.waiting = true
}

// answered ends a wait. If it returns false the client has gone, or goes, and nothing is to be sent.
func (s *session) answered() bool {
	s.waiting = false
	return s.open()
}

// list answers LIST.
func (s *session) list() {
	s.wait()
	s.srv.cfg.Directory.List(func(all []device.Info, err error) {
		defer s.settle()
		switch {
		case !s.answered():
		case s.srv.drain != nil:
			s.refuse(optList, repErrShutdown, "the server is shutting down")
		case err != nil:
			s.refuseErr(optList, err)
		default:
			for _, d := range all {
				if len(d.Name) > maxString {
					continue // no client could ask for it
				}
				n := binary.BigEndian.AppendUint32(s.scratch[:0], uint32(len(d.Name)))
				s.optReply(optList, repServer, n, d.Name+clip(d.Description, maxString))
			}
			s.optReply(optList, repAck, nil, "")
		}
	})
}

// stat finds the export a client means, the first one if it names none, and calls then unless the client has gone.
func (s *session) stat(name string, then func(name string, i device.Info, err error)) {
	s.wait()
	one := func(name string) {
		s.srv.cfg.Directory.Stat(name, func(i device.Info, err error) {
			defer s.settle()
			if s.answered() {
				if s.srv.drain != nil && err == nil {
					err = device.ErrShutdown
				}
				then(name, i, err)
			}
		})
	}
	if name != "" {
		one(name)
		return
	}
	s.srv.cfg.Directory.List(func(all []device.Info, err error) {
		if err == nil && len(all) == 0 {
			err = fmt.Errorf("there is no export: %w", device.ErrNotExist)
		}
		if err == nil && s.open() {
			one(all[0].Name)
			return
		}
		defer s.settle()
		if s.answered() {
			then("", device.Info{}, err)
		}
	})
}

// enter opens the device of an export, remembers it as the session's and calls then unless the client has gone.
func (s *session) enter(name string, then func(err error)) {
	s.wait()
	s.srv.cfg.Directory.Open(name, func(d device.Device, err error) {
		defer s.settle()
		listening := s.answered()
		if err == nil && (!listening || s.srv.drain != nil) {
			s.srv.cfg.Directory.Close(name, d)
			err = device.ErrShutdown
		}
		if !listening {
			return
		}
		if err == nil {
			s.name, s.dev = name, d
			s.size, s.readOnly = d.Size(), d.ReadOnly()
			s.allocation = s.allocation && s.contextFor == name
		}
		then(err)
	})
}

// exportName answers EXPORT_NAME, which knows no error but the end of the session.
func (s *session) exportName(name string) {
	s.stat(name, func(name string, _ device.Info, err error) {
		if err != nil {
			s.fail(fmt.Sprintf("export %q: %v", name, err))
			return
		}
		s.enter(name, func(err error) {
			if err != nil {
				s.fail(fmt.Sprintf("export %q: %v", name, err))
				return
			}
			var b [10 + exportNamePadding]byte
			binary.BigEndian.PutUint64(b[:], s.size)
			binary.BigEndian.PutUint16(b[8:], s.transmissionFlags(s.readOnly))
			if s.noZeroes {
				s.st.Write(b[:10])
			} else {
				s.st.Write(b[:])
			}
			s.transmit()
		})
	})
}

// info answers INFO, which must not attach anything, and GO.
func (s *session) info(opt uint32, name string, infos uint8) {
	s.stat(name, func(name string, i device.Info, err error) {
		switch {
		case err != nil:
			s.refuseErr(opt, err)
		case opt == optInfo:
			s.describe(opt, i, infos)
			s.optReply(opt, repAck, nil, "")
		default:
			s.enter(name, func(err error) {
				if err != nil {
					s.refuseErr(opt, err)
					return
				}
				i.Size, i.ReadOnly = s.size, s.readOnly
				s.describe(opt, i, infos)
				s.optReply(opt, repAck, nil, "")
				s.transmit()
			})
		}
	})
}

// describe sends the information about an export that was asked for, and what always must be.
func (s *session) describe(opt uint32, i device.Info, infos uint8) {
	b := s.scratch[:0]
	b = binary.BigEndian.AppendUint16(b, infoExport)
	b = binary.BigEndian.AppendUint64(b, i.Size)
	b = binary.BigEndian.AppendUint16(b, s.transmissionFlags(i.ReadOnly))
	s.optReply(opt, repInfo, b, "")
	if infos&(1<<infoName) != 0 {
		s.optReply(opt, repInfo, binary.BigEndian.AppendUint16(b[:0], infoName), clip(i.Name, maxString))
	}
	if infos&(1<<infoDescription) != 0 && i.Description != "" {
		s.optReply(opt, repInfo, binary.BigEndian.AppendUint16(b[:0], infoDescription), clip(i.Description, maxString))
	}
	if infos&(1<<infoBlockSize) != 0 {
		b = binary.BigEndian.AppendUint16(b[:0], infoBlockSize)
		b = binary.BigEndian.AppendUint32(b, minBlock)
		b = binary.BigEndian.AppendUint32(b, preferredBlock)
		b = binary.BigEndian.AppendUint32(b, maxPayload)
		s.optReply(opt, repInfo, b, "")
	}
}

// transmissionFlags is what an export can do for this session. Several connections to one export share one
// device, whose Flush covers what was done through any of them: CAN_MULTI_CONN.
func (s *session) transmissionFlags(readOnly bool) uint16 {
	flags := uint16(flagHasFlags | flagSendFlush | flagSendFUA | flagSendCache | flagCanMultiConn)
	if readOnly {
		flags |= flagReadOnly
	} else {
		flags |= flagSendTrim | flagSendWriteZeroes | flagSendFastZero
	}
	if s.structured {
		flags |= flagSendDF
	}
	return flags
}

// contexts answers LIST_META_CONTEXT and SET_META_CONTEXT.
func (s *session) contexts(opt uint32, q contextQuery) {
	s.stat(q.name, func(name string, _ device.Info, err error) {
		if err != nil {
			s.refuseErr(opt, err)
			return
		}
		id, found := uint32(0), q.exact || q.all || q.none
		if opt == optSetMetaContext {
			id, found = contextID, q.exact
			s.contextFor, s.allocation = name, found
		}
		if found {
			b := binary.BigEndian.AppendUint32(s.scratch[:0], id)
			s.optReply(opt, repMetaContext, b, contextAllocation)
		}
		s.optReply(opt, repAck, nil, "")
	})
}

// refuseErr answers an option with the error of a Directory.
func (s *session) refuseErr(opt uint32, err error) {
	why := uint32(repErrUnknown) // not available, for whatever reason
	switch {
	case errors.Is(err, device.ErrBusy):
		why = repErrPolicy
	case errors.Is(err, device.ErrInvalid):
		why = repErrInvalid
	case errors.Is(err, device.ErrShutdown):
		why = repErrShutdown
	}
	s.refuse(opt, why, err.Error())
}

func (s *session) refuse(opt, why uint32, message string) {
	s.optReply(opt, why, nil, clip(message, maxMessage))
}

// optReply sends one reply to an option: its data is b followed by text.
func (s *session) optReply(opt, typ uint32, b []byte, text string) {
	var h [optReplySize]byte
	binary.BigEndian.PutUint64(h[:], magicOptReply)
	binary.BigEndian.PutUint32(h[8:], opt)
	binary.BigEndian.PutUint32(h[12:], typ)
	binary.BigEndian.PutUint32(h[16:], uint32(len(b)+len(text)))
	s.st.Write(h[:])
	if len(b) > 0 {
		s.st.Write(b)
	}
	if text != "" {
		s.st.Write([]byte(text))
	}
}

// parseInfo reads the data of INFO and GO: a name and the information types asked for, as a set of bits.
func parseInfo(b []byte) (name string, infos uint8, ok bool) {
	raw, b, ok := cutString(b)
	if !ok || len(b) < 2 {
		return "", 0, false
	}
	name, ok = validString(raw)
	n := int(binary.BigEndian.Uint16(b))
	b = b[2:]
	if !ok || len(b) != 2*n {
		return "", 0, false
	}
	for ; len(b) > 0; b = b[2:] {
		if t := binary.BigEndian.Uint16(b); t < 8 {
			infos |= 1 << t
		}
	}
	return name, infos, true
}

// contextQuery is what LIST_META_CONTEXT and SET_META_CONTEXT ask: about which export, and whether base:allocation
// is meant by its name, by the wildcard "base:", or by asking nothing.
type contextQuery struct {
	name             string
	exact, all, none bool
}

// parseContexts reads the data of LIST_META_CONTEXT and SET_META_CONTEXT. Queries that mean nothing here are ignored.
func parseContexts(b []byte) (q contextQuery, ok bool) {
	raw, b, ok := cutString(b)
	if !ok || len(b) < 4 {
		return q, false
	}
	if q.name, ok = validString(raw); !ok {
		return q, false
	}
	n := binary.BigEndian.Uint32(b)
	b = b[4:]
	q.none = n == 0
	for ; n > 0; n-- {
		if raw, b, ok = cutString(b); !ok {
			return q, false
		}
		query, ok := validString(raw)
		if !ok {
			return q, false
		}
		switch query {
		case contextAllocation:
			q.exact = true
		case "base:":
			q.all = true
		}
	}
	return q, len(b) == 0
}

// cutString cuts a string, preceded by its length in 32 bits, off the front of b.
func cutString(b []byte) (s, rest []byte, ok bool) {
	if len(b) < 4 {
		return nil, nil, false
	}
	n := binary.BigEndian.Uint32(b)
	if uint64(n) > uint64(len(b)-4) {
		return nil, nil, false
	}
	return b[4 : 4+n], b[4+n:], true
}

// validString checks what the protocol demands of every string.
func validString(b []byte) (string, bool) {
	if len(b) > maxString || !utf8.Valid(b) || bytes.IndexByte(b, 0) >= 0 {
		return "", false
	}
	return string(b), true
}

// clip makes a text fit to be sent: valid UTF-8 without NUL, at most n bytes.
func clip(text string, n int) string {
	text = strings.ToValidUTF8(strings.ReplaceAll(text, "\x00", ""), "?")
	if len(text) <= n {
		return text
	}
	for n > 0 && !utf8.RuneStart(text[n]) {
		n--
	}
	return text[:n]
}

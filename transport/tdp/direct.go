package tdp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/coreos/torus"
	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/place"
	"github.com/coreos/torus/vfs"
)

// A client that shares memory with the peer can read its blocks from the file where they lie. What it needs to know it asks for once for each block, beside
// the first Read of it (Where), and the file itself once for each file. A read that finds the stamp of its place changed afterwards, or fails, or wants more
// than was there when the client asked, goes to the peer like any other.
//
// Reads with an epoch are not for this: only the peer can refuse them.

const (
	// maxPlaces bounds what is known of the blocks of one peer. The oldest are forgotten first.
	maxPlaces = 1 << 16
	// maxFiles bounds the files of one peer that are open. Blocks in others are read through the peer.
	maxFiles = 512

	whereSize = 40 // bytes
)

var errIndex = fmt.Errorf("a stamp outside of the ledger: %w", torus.ErrInvalid)

// places is what a link knows of where blocks lie.
type places struct {
	of      map[torus.BlockRef]*spot
	order   []torus.BlockRef // a ring, when it is full
	next    int              // in that
	files   map[uint32]vfs.Reader
	ledger  map[uint64][]byte // pages of it, borrowed
	reading int               // lookups under way, which use files
	waits   bool              // a file has been asked for
	over    bool              // the link is gone
}

// spot is where a block lies, as far as known.
type spot struct {
	file   vfs.Reader // nil: not known, or not to be read
	off    int64
	length uint32
	stamp  uint64
	page   []byte // of the ledger
	index  uint32
	asked  uint64 // in which tick, so that it is not asked again in the same; 0: never
}

// good reports whether the block still lies there.
func (s *spot) good() bool { return place.Look(s.page, s.index) == s.stamp }

// look reads r from the file of its block. False if that cannot be; then nothing has happened.
func (k *link) look(r *torus.Request) bool {
	s := k.places.of[r.Ref]
	if s == nil || s.file == nil || uint64(r.Off)+uint64(len(r.Data)) > uint64(s.length) || !s.good() {
		k.where(r.Ref, s)
		return false
	}
	if len(r.Data) == 0 {
		return false
	}
	off := s.off + int64(r.Off)
	_, err := s.file.ReadAtCached(r.Data, off)
	switch {
	case errors.Is(err, vfs.ErrWouldBlock):
	case err == nil && s.good():
		k.c.hasRead(r)
		return true
	default:
		s.file = nil
		return false
	}
	id, ok := k.c.slots.take(r, k.c.ticks)
	if !ok {
		r.Finish(errTooMany)
		return true
	}
	k.c.slots.setOwn(id, true)
	l := k.c.newLookup()
	l.k, l.id, l.spot, l.off, l.buf, l.n = k, id, *s, off, buf.Get(len(r.Data)), len(r.Data)
	k.places.reading++
	k.c.l.Offload(l)
	return true
}

// hasRead finishes r at the end of the turn: who submits need not reckon with being called back.
func (c *Client) hasRead(r *torus.Request) {
	if len(c.read) == 0 {
		c.l.Defer(c.readFn)
	}
	c.read = append(c.read, r)
}

func (c *Client) finishRead() {
	for i := 0; i < len(c.read); i++ { // it may become longer meanwhile
		r := c.read[i]
		c.read[i] = nil
		if c.cfg.Direct != nil {
			c.cfg.Direct.Inc()
		}
		r.Finish(nil)
	}
	c.read = c.read[:0]
}

// lookup is a read that waits for the disk. It has memory of its own: that of the request may be the caller's again before the disk has answered. If it is
// not, and if the request allows it, they exchange their memory in the end.
type lookup struct {
	k    *link
	id   uint32 // of the request's slot
	spot spot   // as it was
	off  int64
	buf  *buf.Buf
	n    int
	err  error
}

var _ loop.FileIO = (*lookup)(nil)

func (c *Client) newLookup() *lookup {
	if n := len(c.lookups); n > 0 {
		l := c.lookups[n-1]
		c.lookups = c.lookups[:n-1]
		return l
	}
	return &lookup{}
}

func (l *lookup) data() []byte { return l.buf.Bytes()[:l.n] }

// FileIO implements loop.FileIO.
func (l *lookup) FileIO() (fd int, write bool, b []byte, off int64) {
	return l.spot.file.Descriptor(l.off, l.n), false, l.data(), l.off
}

// Work implements loop.Job.
func (l *lookup) Work() {
	if _, l.err = l.spot.file.ReadAt(l.data(), l.off); l.err == io.EOF {
		l.err = io.ErrUnexpectedEOF
	}
}

// Done implements loop.Job.
func (l *lookup) Done() {
	k, c := l.k, l.k.c
	k.places.reading--
	if k.places.over {
		k.closeFiles()
	} else if r := c.slots.get(l.id); r != nil && k.why == nil { // else the link is about to be gone
		if l.err == nil && l.spot.good() {
			if r.Buf != nil {
				r.Buf, l.buf = l.buf, r.Buf
				r.Data = r.Buf.Bytes()[:l.n]
			} else {
				copyPieces(r.Data, l.data())
			}
			c.slots.drop(l.id)
			c.hasRead(r)
		} else {
			if s := k.places.of[r.Ref]; s != nil && s.stamp == l.spot.stamp {
				s.file = nil
			}
			c.slots.setOwn(l.id, false)
			c.send(l.id, r)
		}
	}
	l.buf.Release()
	*l = lookup{}
	if len(c.lookups) < 64 {
		c.lookups = append(c.lookups, l)
	}
}

// where asks where a block lies, of which s is known.
func (k *link) where(ref torus.BlockRef, s *spot) {
	if s == nil {
		s = k.places.add(ref)
	}
	if now := k.c.ticks + 1; s.asked != now {
		s.asked = now
		k.ask(ref, 0)
	}
}

func (k *link) ask(ref torus.BlockRef, flags uint16) {
	r := &torus.Request{Op: opWhere, Ref: ref, Reserve: flags&flagFile != 0, Done: k.located}
	id, ok := k.c.slots.take(r, k.c.ticks)
	if !ok {
		return
	}
	k.send(&frame{op: opWhere, id: id, ref: ref, flags: flags})
}

// add makes room for what is to be known of one more block.
func (p *places) add(ref torus.BlockRef) *spot {
	if p.of == nil {
		p.of, p.files, p.ledger = map[torus.BlockRef]*spot{}, map[uint32]vfs.Reader{}, map[uint64][]byte{}
	}
	s := &spot{}
	p.of[ref] = s
	if len(p.order) < maxPlaces {
		p.order = append(p.order, ref)
		return s
	}
	delete(p.of, p.order[p.next])
	p.order[p.next] = ref
	p.next = (p.next + 1) % maxPlaces
	return s
}

// located takes the reply to a Where.
func (k *link) located(r *torus.Request) {
	if k.c.link != k || k.why != nil {
		return
	}
	p := &k.places
	var file vfs.Reader
	if r.Reserve {
		p.waits = false
		file = k.lender.TakeFile()
	}
	if errors.Is(r.Err, torus.ErrNotSupported) {
		k.looks = false
	}
	s := p.of[r.Ref]
	if r.Err != nil || s == nil {
		if file != nil {
			file.Close()
		}
		return
	}
	w := decodeWhere(r.Data)
	switch {
	case p.files[w.File] != nil:
		if file != nil {
			file.Close()
		}
		file = p.files[w.File]
	case file != nil:
		p.files[w.File] = file
	case r.Reserve: // it was lost, as this process has too many open; ask for no more
		return
	default:
		if !p.waits && len(p.files) < maxFiles {
			p.waits = true
			k.lender.ExpectFile()
			k.ask(r.Ref, flagFile)
		}
		return
	}
	if w.Index >= place.Stamps {
		k.refuse(errIndex)
		return
	}
	page := p.ledger[w.at]
	if page == nil {
		var err error
		if page, err = k.lender.Borrow(w.at, place.PageSize); err != nil {
			k.refuse(err)
			return
		}
		p.ledger[w.at] = page
	}
	s.file, s.length, s.off = file, w.Length, w.Off
	s.page, s.index, s.stamp = page, w.Index, w.Stamp
}

// forgetPlaces is for a link that is gone.
func (k *link) forgetPlaces() {
	p := &k.places
	for range p.ledger {
		k.lender.GiveBack()
	}
	p.of, p.ledger, p.order, p.over = nil, nil, nil, true
	k.closeFiles()
}

// closeFiles closes the files of a link that is gone, when nobody reads from them any more.
func (k *link) closeFiles() {
	if k.places.reading > 0 {
		return
	}
	for _, f := range k.places.files {
		f.Close()
	}
	k.places.files = nil
}

// where answers a Where.
func (c *conn) where(f *frame) {
	reply := frame{op: opWhere | opReply, id: f.id}
	b, err := c.find(f)
	if err != nil {
		c.sendError(&reply, err)
	} else {
		c.sendSummed(&reply, b)
	}
	if c.full() { // a client that asks and does not listen
		c.pause()
	}
}

func (c *conn) find(f *frame) ([]byte, error) {
	if c.srv.places == nil || c.lender == nil {
		return nil, torus.ErrNotSupported
	}
	p, err := c.srv.places.Locate(f.ref)
	if err != nil {
		return nil, err
	}
	at, ok := c.lender.Show(p.Page.Bytes()[:place.PageSize])
	if !ok {
		return nil, torus.ErrNotSupported
	}
	if f.flags&flagFile != 0 {
		file, err := c.srv.places.OpenFile(p.File)
		if err != nil {
			return nil, err
		}
		if !c.lender.SendFile(file) {
			file.Close()
			return nil, torus.ErrAgain
		}
	}
	w := where{p, at}
	return w.encode(), nil
}

// where is the payload of the reply to a Where.
type where struct {
	place.Place        // but for Page
	at          uint64 // where that is in the peer's memory
}

func (w *where) encode() []byte {
	le := binary.LittleEndian
	b := make([]byte, 0, whereSize)
	b = le.AppendUint32(b, w.File)
	b = le.AppendUint32(b, w.Length)
	b = le.AppendUint64(b, uint64(w.Off))
	b = le.AppendUint64(b, w.at)
	b = le.AppendUint32(b, w.Index)
	b = le.AppendUint32(b, 0)
	return le.AppendUint64(b, w.Stamp)
}

// decodeWhere reads whereSize bytes.
func decodeWhere(b []byte) where {
	le := binary.LittleEndian
	return where{place.Place{
		File: le.Uint32(b), Length: le.Uint32(b[4:]), Off: int64(le.Uint64(b[8:])), Index: le.Uint32(b[24:]), Stamp: le.Uint64(b[32:]),
	}, le.Uint64(b[16:])}
}

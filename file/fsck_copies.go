package file

import (
	"errors"
	"fmt"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/record"
)

const (
	// copyPiece is how many bytes of a copy are asked for at a time.
	copyPiece = 1 << 20
	// fsckBlocks bounds the blocks that are read at a time.
	fsckBlocks = 64
	// copyTries is how often a peer is asked again that is busy, or was away for a moment.
	copyTries = 5
	// maxOdd bounds the blocks of which it is remembered in detail what is wrong with them.
	maxOdd = 1 << 12
)

// lostBlock is a block of which something is lost, or which is not what maps say.
type lostBlock struct {
	v       *verdict
	finding *Finding
}

// wanted is a block whose copies are to be read.
type wanted struct {
	ref    torus.BlockRef
	set    torus.PeerList // registered
	home   torus.PeerList
	length uint32
	number int // of copies that there are to be
	claims *claims
	copies []*blockCopy
	v      *verdict
}

func (c *fsck) want(slot uint32) *wanted {
	e := &c.f.table.e[slot]
	return &wanted{ref: e.ref, set: e.peers, home: c.cfg.Dist.Home(e.ref, e.peers), length: e.length * pageSize, number: max(len(e.peers), c.cfg.Replication), claims: c.claims[slot]}
}

// reckon sums up how much there is to be read.
func (c *fsck) reckon() {
	c.total = 0
	for i := range c.f.table.e {
		e := &c.f.table.e[i]
		if c.needed(uint32(i)) {
			c.total += uint64(e.length) * pageSize * uint64(len(e.peers))
		}
		if e.used && !isData(e.ref.Type) && c.at == nil {
			c.total += uint64(e.live) * pageSize
		}
	}
}

// checkBlocks reads all copies of all blocks that are needed.
func (c *fsck) checkBlocks() error {
	most := fsckBytes
	if c.cfg.Rate > 0 {
		most = int(min(fsckBytes, c.cfg.Rate/4))
	}
	n := len(c.f.table.e) // what is added from now on is younger than the check
	for i := 0; i < n && i < len(c.f.table.e); {
		if err := c.stopped(); err != nil {
			return err
		}
		var batch []*wanted
		bytes := 0
		for ; i < n && i < len(c.f.table.e); i++ {
			if !c.needed(uint32(i)) {
				continue
			}
			w := c.want(uint32(i))
			size := int(w.length) * len(w.home)
			if len(batch) == fsckBlocks || len(batch) > 0 && bytes+size > most {
				break
			}
			batch, bytes = append(batch, w), bytes+size
		}
		c.readAll(batch)
		if err := c.judgeAll(batch); err != nil {
			return err
		}
		c.progress()
		c.pace(bytes)
	}
	for i := range c.bad {
		if err := c.stopped(); err != nil {
			return err
		}
		if f := c.judgeBad(&c.bad[i]); f != nil {
			c.add(f)
		}
	}
	return nil
}

// readAll reads the copies of some blocks at the peers that are to hold them, and judges them.
func (c *fsck) readAll(batch []*wanted) {
	var jobs []func(*loop.Task)
	for _, w := range batch {
		w.copies = nil
		for _, p := range w.home {
			x := &blockCopy{peer: p, home: true}
			w.copies = append(w.copies, x)
			jobs = append(jobs, func(t *loop.Task) { c.readCopy(t, w, x) })
		}
	}
	c.inParallel(jobs)
	for _, w := range batch {
		w.v = examine(w.ref, w.length, w.copies, w.claims)
	}
}

func (c *fsck) inParallel(jobs []func(*loop.Task)) {
	c.t.All(len(jobs), func(i int, done func()) {
		loop.Go(c.cfg.Loop, func(t *loop.Task) {
			jobs[i](t)
			c.cfg.Loop.Defer(done)
		})
	})
}

// readCopy reads what a peer has of a block.
func (c *fsck) readCopy(t *loop.Task, w *wanted, x *blockCopy) {
	x.data = make([]byte, w.length)
	for off := uint32(0); off < w.length; {
		b := x.data[off:min(off+copyPiece, w.length)]
		err := c.readPiece(t, w, x.peer, off, b)
		switch {
		case err == nil:
			off += uint32(len(b))
			x.have = off
			c.report.Bytes += uint64(len(b))
		case errors.Is(err, torus.ErrBlockNotExist):
			x.none = true
			return
		case len(b) > pageSize && (errors.Is(err, torus.ErrGap) || errors.Is(err, torus.ErrIO) || errors.Is(err, torus.ErrCorrupt)):
			if !c.readPages(t, w, x, off, b) {
				return
			}
			off += uint32(len(b))
			x.have = off
		case errors.Is(err, torus.ErrGap):
			return
		case errors.Is(err, torus.ErrIO), errors.Is(err, torus.ErrCorrupt):
			c.unread(w, x, off)
			off += pageSize
			x.have = off
		default:
			x.away = err
			return
		}
	}
}

// readPages reads a piece that cannot be read as one, page by page. false: that is all there is of the copy.
func (c *fsck) readPages(t *loop.Task, w *wanted, x *blockCopy, off uint32, b []byte) bool {
	for len(b) > 0 {
		err := c.readPiece(t, w, x.peer, off, b[:pageSize])
		switch {
		case err == nil:
			c.report.Bytes += pageSize
		case errors.Is(err, torus.ErrIO), errors.Is(err, torus.ErrCorrupt):
			c.unread(w, x, off)
		case errors.Is(err, torus.ErrGap):
			return false
		case errors.Is(err, torus.ErrBlockNotExist):
			x.none = true
			return false
		default:
			x.away = err
			return false
		}
		off, b = off+pageSize, b[pageSize:]
		x.have = off
	}
	return true
}

func (c *fsck) unread(w *wanted, x *blockCopy, off uint32) {
	if x.unread == nil {
		x.unread = newPageBits(int(w.length / pageSize))
	}
	x.unread.set(int(off / pageSize))
}

// readPiece reads some of a copy; a peer that is busy or was away for a moment is asked again.
func (c *fsck) readPiece(t *loop.Task, w *wanted, p torus.PeerID, off uint32, b []byte) error {
	for tries := 0; ; tries++ {
		if err := c.stopped(); err != nil {
			return err
		}
		if !c.cfg.Dist.Healthy(p) {
			if tries == 0 || tries >= copyTries {
				return torus.ErrNoPeer
			}
			t.Sleep(fsckRetry)
			continue
		}
		q := &torus.Request{Op: torus.OpRead, Ref: w.ref, Off: off, Len: uint32(len(b)), Data: b, Peer: p}
		t.Wait(func(wake func()) {
			q.Done = func(*torus.Request) { wake() }
			c.cfg.Dist.Submit(p, q)
		})
		gone := errors.Is(q.Err, torus.ErrNoPeer) || errors.Is(q.Err, torus.ErrBlockUnavailable) || errors.Is(q.Err, torus.ErrClosed) || errors.Is(q.Err, torus.ErrAgain)
		if q.Err == nil || !gone || tries >= copyTries {
			return q.Err
		}
		t.Sleep(fsckRetry)
	}
}

// fine reports whether nothing is wrong with a block, as far as its peers could be asked.
func (w *wanted) fine() bool {
	if !w.v.whole() || !w.v.claimed || len(w.home) < w.number {
		return false
	}
	for _, x := range w.copies {
		if x.away == nil && (x.none || x.bad > 0) {
			return false
		}
	}
	return true
}

// count counts the copies of a block.
func (c *fsck) count(w *wanted) {
	c.report.Blocks++
	for _, x := range w.copies {
		switch {
		case !x.home:
		case x.away != nil:
			c.report.Unchecked[x.peer]++
		case !x.none:
			c.report.Copies++
		}
	}
}

// judgeAll counts the blocks that are fine, and says what is wrong with the others, if they are still needed by a state that is read now: what has been seen of them
// was true before.
func (c *fsck) judgeAll(batch []*wanted) error {
	looked := false
	for _, w := range batch {
		c.done += uint64(w.length) * uint64(len(w.home))
		if !w.fine() {
			if !w.v.whole() { // perhaps somebody else has what they lack
				c.readOthers(w)
			}
			if stopped := c.stopped(); stopped != nil {
				return stopped
			}
			if !looked {
				looked = true
				if _, err := c.refresh(); err != nil {
					return err
				}
			}
			if slot, ok := c.f.table.byRef[w.ref]; !ok || !c.needed(slot) {
				continue
			}
			c.judge1(w)
		}
		c.count(w)
	}
	return nil
}

// readOthers reads the copies of peers that are not to hold the block, and may have it.
func (c *fsck) readOthers(w *wanted) {
	list := c.cfg.Dist.Candidates(w.ref, w.set)
	list = append(append(torus.PeerList{}, list...), c.cfg.Dist.Others(list)...)
	var jobs []func(*loop.Task)
	for _, p := range list {
		if w.home.Has(p) {
			continue
		}
		x := &blockCopy{peer: p}
		w.copies = append(w.copies, x)
		jobs = append(jobs, func(t *loop.Task) { c.readCopy(t, w, x) })
	}
	if len(jobs) > 0 {
		c.inParallel(jobs)
		w.v = examine(w.ref, w.length, w.copies, w.claims)
	}
}

// judge1 says what is wrong with a block.
func (c *fsck) judge1(w *wanted) {
	var good, parts, away torus.PeerList
	for _, x := range w.copies {
		switch {
		case x.away != nil:
			if c.cfg.Dist.Known(x.peer) {
				away = append(away, x.peer)
			}
		case x.none:
		case x.bad == 0:
			good = append(good, x.peer)
		default:
			parts = append(parts, x.peer)
		}
	}
	if len(good) == 0 {
		good = parts // each has what the others lack
	}
	if len(w.home) < w.number {
		what := fmt.Sprintf("it is to be on %d peers, and the ring has only %d to hold it", w.number, len(w.home))
		if len(w.set) < w.number {
			what = fmt.Sprintf("it was written to %d peers, and the volume is to have %d copies", len(w.set), w.number)
		}
		c.add(&Finding{Kind: FindFewer, Ref: w.ref, What: what, Good: good})
	}
	if w.v.differ {
		c.add(&Finding{Kind: FindDiffer, Ref: w.ref, What: fmt.Sprintf("copies are intact and say different things from byte %d on: %s", w.v.differsAt, c.peerNames(append(append(torus.PeerList{}, good...), parts...)))})
		return
	}
	if w.v.missing > 0 {
		x := &Finding{Kind: FindLost, Ref: w.ref, What: fmt.Sprintf("%d of its %d pages are intact nowhere: %s", w.v.missing, w.length/pageSize, c.describe(w)), Away: away}
		if len(away) > 0 {
			x.Kind = FindUnknown
			x.What = fmt.Sprintf("%d of its %d pages are intact at nobody who could be asked: %s", w.v.missing, w.length/pageSize, c.describe(w))
		}
		c.add(x)
		if len(c.lost) < maxOdd {
			w.v.layout = nil
			c.lost[w.ref] = &lostBlock{w.v, x}
		}
		return
	}
	for _, x := range w.copies {
		if !x.home || x.away != nil {
			continue
		}
		f := &Finding{Ref: w.ref, Peer: x.peer, Good: good}
		switch {
		case x.none:
			f.Kind, f.What = FindMissing, "there is no copy"
		case x.bad == 0:
			continue
		case x.first*pageSize >= int(x.have):
			f.Kind, f.What = FindShort, fmt.Sprintf("it has %d of %d bytes", x.have, w.length)
		default:
			f.Kind, f.What = FindDamaged, x.damage(w.length)
		}
		c.add(f)
	}
	if !w.v.claimed {
		x := &Finding{Kind: FindEntry, Ref: w.ref, What: "maps point to pages of it that are not what they should be, or not there"}
		c.add(x)
		if len(c.odd) < maxOdd/16 {
			c.odd[w.ref] = &lostBlock{w.v, x}
		}
	}
}

func (x *blockCopy) damage(length uint32) string {
	return fmt.Sprintf("%d of %d pages are damaged, page %d first: %s", x.bad, length/pageSize, x.first, x.why)
}

// describe says what each copy of a block lacks.
func (c *fsck) describe(w *wanted) (s string) {
	for _, x := range w.copies {
		what := ""
		switch {
		case x.away != nil:
			what = "could not be asked"
		case x.none && !x.home:
			continue
		case x.none:
			what = "has no copy"
		case x.bad > 0:
			what = x.damage(w.length)
		}
		if s != "" {
			s += "; "
		}
		s += c.cfg.Dist.Describe(x.peer) + ": " + what
	}
	return s
}

// readPage reads one page as whoever reads the volume would; an error: nobody has it.
func (c *fsck) readPage(f *File, e entry) error {
	c.deadline = c.cfg.Loop.Now() + time.Second
	var err error
	c.t.Wait(func(wake func()) {
		rd := f.dist.NewRead()
		b := &f.table.e[e.slot()]
		rd.Ref, rd.Off, rd.Data, rd.Set = b.ref, e.page()*pageSize, make([]byte, pageSize), b.peers
		rd.Verify = func(rd *read) bool { return record.Checksum(rd.Data)&0xffffff == e.crc() }
		rd.Done = func(rd *read) {
			err = rd.Err
			rd.Release()
			wake()
		}
		rd.Start()
	})
	return err
}

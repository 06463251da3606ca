package repair

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/record"
)

var (
	// errNoCopy: all who may have a copy were asked, and none has a good one.
	errNoCopy = errors.New("no good copy is left")
	// errHere: this peer's store takes nothing more.
	errHere  = errors.New("the store of this peer")
	errStale = fmt.Errorf("the volume has changed since: %w", torus.ErrAgain)
)

// execute mends the blocks of a plan, some at a time, until it is through or something has changed that makes for another plan. The
// error is one that may pass soon.
func (r *Repairer) execute(t *loop.Task, plan []item) (passing error) {
	x := &execution{r: r, plan: plan, until: r.cfg.Loop.Now() + r.cfg.Every}
	t.All(min(r.cfg.InFlight, len(plan)), func(_ int, done func()) {
		loop.Go(r.cfg.Loop, func(t *loop.Task) {
			x.work(t)
			r.cfg.Loop.Defer(done)
		})
	})
	if x.next < len(plan) && !x.stuck {
		r.changed = true // more is known to be missing
	}
	if x.failures > maxComplaints {
		r.log.Warn("more blocks that cannot be made whole", "blocks", x.failures-maxComplaints)
	}
	return x.passing
}

// maxComplaints is how many blocks that cannot be made whole are named by one pass.
const maxComplaints = 5

// execution is a plan being carried out.
type execution struct {
	r        *Repairer
	plan     []item
	next     int
	until    time.Duration
	stuck    bool // nothing more can be stored here
	failures int
	passing  error
}

func (x *execution) work(t *loop.Task) {
	r := x.r
	for x.next < len(x.plan) && !r.closing && !r.changed && !x.stuck && r.cfg.Loop.Now() < x.until {
		it := &x.plan[x.next]
		x.next++
		if err := r.mend(t, it); err != nil {
			x.failed(it, err)
		} else {
			r.mended(it)
		}
	}
}

func (r *Repairer) mended(it *item) {
	delete(r.damaged, it.ref)
	delete(r.told, it.ref)
	if it.seal {
		return
	}
	if v := r.volumes[it.volume]; v != nil && it.damaged {
		v.corrupt--
	} else if v != nil {
		v.short--
	}
	r.stats.Repaired++
	r.m.repaired.Inc()
	r.m.set(r.Stats())
}

func (x *execution) failed(it *item, err error) {
	r := x.r
	r.m.failures.Inc()
	log := r.log.With("block", it.ref.String(), "bytes", it.length, "err", err)
	switch {
	case r.closing:
	case errors.Is(err, errNoCopy):
		if _, told := r.told[it.ref]; !told && len(r.told) < maxDamaged {
			r.told[it.ref] = struct{}{}
			log.Error("no good copy of a block is left on any peer: reads of what is damaged in it fail; nothing was changed")
		}
		return
	case errors.Is(err, torus.ErrFenced), errors.Is(err, torus.ErrAgain):
		log.Debug("a block cannot be made whole now")
		x.passing = err
		return
	case errors.Is(err, torus.ErrBlockUnavailable):
		x.passing = err
	case errors.Is(err, errHere):
		x.stuck = true
	}
	if x.failures++; x.failures <= maxComplaints {
		log.Warn("a block cannot be made whole, trying again")
	}
}

// mend makes this peer's copy of a block whole.
func (r *Repairer) mend(t *loop.Task, it *item) error {
	tail, here, err := r.tail(t, it.ref)
	if err != nil {
		return err
	}
	switch {
	case it.seal:
		return r.seal(t, it)
	case !it.damaged && here && tail.Length >= it.length:
		return nil // the writer was faster
	case !it.damaged && here && !tail.Sealed && tail.Length > 0:
		err := r.extend(t, it, tail.Length)
		if !errors.Is(err, torus.ErrSealed) && !errors.Is(err, torus.ErrIO) && !errors.Is(err, torus.ErrInvalid) {
			return err
		}
		// It cannot be appended to after all: it needs another copy in its place.
	}
	var sources torus.PeerList
	if here {
		sources = torus.PeerList{r.cfg.ID} // parts of it may be the only good ones
	}
	g := r.gather(it, sources)
	data := make([]byte, it.length)
	if err := g.fill(t, data, 0); err != nil {
		return err
	}
	if here && tail.Length >= it.length && !g.others {
		return r.seal(t, it) // it is good as it is
	}
	most := uint32(math.MaxUint32)
	if it.growing {
		most = it.length
	}
	// In place of a copy that is there it needs a slot for a moment only, and may have one that is kept back.
	return r.change(t, &torus.Request{Op: torus.OpPut, Ref: it.ref, Epoch: it.epoch, Len: most, Data: data, Reserve: here})
}

// change asks the peer's own service.
func (r *Repairer) change(t *loop.Task, q *torus.Request) error {
	err := r.ask(t, r.cfg.ID, q)
	if errors.Is(err, torus.ErrOutOfSpace) || errors.Is(err, torus.ErrIO) {
		return fmt.Errorf("%w: %w", errHere, err)
	}
	return err
}

// seal makes a block that is all there immutable at the listed length; a longer tail was never acknowledged.
func (r *Repairer) seal(t *loop.Task, it *item) error {
	if it.growing {
		return nil
	}
	err := r.change(t, &torus.Request{Op: torus.OpSeal, Ref: it.ref, Epoch: it.epoch, Len: it.length})
	if errors.Is(err, torus.ErrSealed) || errors.Is(err, torus.ErrBlockNotExist) {
		return nil // longer than that already, or deleted meanwhile
	}
	return err
}

// extend appends what a good but short copy lacks from byte off on.
func (r *Repairer) extend(t *loop.Task, it *item, off uint32) error {
	g := r.gather(it, nil)
	data := make([]byte, it.length-off)
	if err := g.fill(t, data, off); err != nil {
		return err
	}
	for len(data) > 0 {
		n := wholeRecords(it.ref, off, data[:min(len(data), record.MaxSize)], &g.hdr)
		if err := r.change(t, &torus.Request{Op: torus.OpAppend, Ref: it.ref, Epoch: it.epoch, Off: off, Len: uint32(n), Data: data[:n]}); err != nil {
			return err
		}
		off, data = off+uint32(n), data[n:]
	}
	if err := r.change(t, &torus.Request{Op: torus.OpSync, Ref: it.ref, Epoch: it.epoch, Len: it.length}); err != nil {
		return err
	}
	return r.seal(t, it)
}

// gathering reads a block record by record from whoever has a good one, and page by page what nobody has whole.
type gathering struct {
	r      *Repairer
	it     *item
	from   torus.PeerList // in order of preference
	away   bool           // somebody who may have a copy cannot be asked
	others bool           // something came from another peer
	hdr    record.Header
}

// gather prepares for reading a block from first, then from all who may have it.
func (r *Repairer) gather(it *item, first torus.PeerList) *gathering {
	g := &gathering{r: r, it: it, from: slices.Clone(first)}
	candidates := r.cfg.Dist.Candidates(it.ref, it.set)
	for _, p := range candidates {
		switch {
		case p == r.cfg.ID:
		case r.cfg.Dist.Healthy(p):
			g.from = append(g.from, p)
		case r.cfg.Dist.Known(p):
			g.away = true
		}
	}
	for _, p := range r.cfg.Dist.Others(candidates) {
		if p != r.cfg.ID {
			g.from = append(g.from, p)
		}
	}
	return g
}

// fill reads the block from byte off on into data, all of it verified.
func (g *gathering) fill(t *loop.Task, data []byte, off uint32) error {
	for len(data) > 0 {
		n, err := g.some(t, data[:min(len(data), record.MaxSize)], off)
		if err != nil {
			return err
		}
		data, off = data[n:], off+uint32(n)
	}
	return nil
}

// some reads as many records as lie in b from the first that has the next one intact.
func (g *gathering) some(t *loop.Task, b []byte, off uint32) (int, error) {
	r := g.r
	var last error
	for _, p := range g.from {
		if r.closing {
			return 0, torus.ErrClosed
		}
		r.sleep(t, r.copy.take(r.cfg.Loop.Now(), len(b)))
		n, err := g.read(t, p, b, off)
		if n == 0 { // perhaps only what lies behind the next record is missing there
			n, err = g.one(t, p, b, off)
		}
		if n > 0 {
			g.others = g.others || p != r.cfg.ID
			return n, nil
		}
		last = err
		if unreachable(err) {
			g.away = true
		}
	}
	if n := g.assemble(t, b, off); n > 0 {
		g.others = true
		return n, nil
	}
	if g.away {
		return 0, fmt.Errorf("peers that may have a copy are not there: %w", torus.ErrBlockUnavailable)
	}
	if st, err := r.state(t, g.it.volume); err != nil || st.Head == nil || st.Head.Number != g.it.head {
		return 0, errStale // perhaps it was deleted in the meantime, and rightly so
	}
	if last == nil {
		last = torus.ErrBlockNotExist
	}
	return 0, fmt.Errorf("at byte %d: %w: %w", off, errNoCopy, last)
}

func unreachable(err error) bool {
	return errors.Is(err, torus.ErrNoPeer) || errors.Is(err, torus.ErrBlockUnavailable) || errors.Is(err, torus.ErrClosed) || errors.Is(err, torus.ErrAgain)
}

// read reads b from p and returns how many bytes at its beginning are whole records.
func (g *gathering) read(t *loop.Task, p torus.PeerID, b []byte, off uint32) (int, error) {
	g.r.m.copied.Add(float64(len(b)))
	if err := g.r.ask(t, p, &torus.Request{Op: torus.OpRead, Ref: g.it.ref, Off: off, Len: uint32(len(b)), Data: b}); err != nil {
		return 0, err
	}
	n := wholeRecords(g.it.ref, off, b, &g.hdr)
	if n == 0 {
		return 0, torus.ErrCorrupt
	}
	return n, nil
}

// one reads a single record from p: its header first, which says how long it is.
func (g *gathering) one(t *loop.Task, p torus.PeerID, b []byte, off uint32) (int, error) {
	head := b[:record.HeaderSize]
	if err := g.r.ask(t, p, &torus.Request{Op: torus.OpRead, Ref: g.it.ref, Off: off, Len: uint32(len(head)), Data: head}); err != nil {
		return 0, err
	}
	if err := g.hdr.Decode(head); err != nil {
		return 0, err
	}
	if g.hdr.Size() > len(b) {
		return 0, torus.ErrCorrupt
	}
	return g.read(t, p, b[:g.hdr.Size()], off)
}

// assemble makes a record of which no copy is whole out of the pages that are, each by the checksum that the header has of it.
func (g *gathering) assemble(t *loop.Task, b []byte, off uint32) int {
	var crcs []uint32
	for _, p := range g.from {
		head := b[:record.HeaderSize]
		q := &torus.Request{Op: torus.OpRead, Ref: g.it.ref, Off: off, Len: uint32(len(head)), Data: head}
		if g.r.ask(t, p, q) == nil && g.hdr.Decode(head) == nil && g.hdr.Ref == g.it.ref && g.hdr.Offset == off && g.hdr.Size() <= len(b) {
			g.hdr.Encode(head) // with nothing behind it
			crcs = slices.Clone(g.hdr.CRCs)
			break
		}
	}
	if len(crcs) == 0 {
		return 0
	}
	got := make([]bool, len(crcs))
	left := len(crcs)
	page := make([]byte, torus.PageSize)
	for _, p := range g.from {
		for i, crc := range crcs {
			if got[i] {
				continue
			}
			at := record.HeaderSize + i*torus.PageSize
			g.r.sleep(t, g.r.copy.take(g.r.cfg.Loop.Now(), len(page)))
			q := &torus.Request{Op: torus.OpRead, Ref: g.it.ref, Off: off + uint32(at), Len: torus.PageSize, Data: page}
			if g.r.ask(t, p, q) == nil && record.Checksum(page) == crc {
				copy(b[at:], page)
				got[i] = true
				left--
			}
		}
	}
	if left > 0 {
		return 0
	}
	return wholeRecords(g.it.ref, off, b[:record.HeaderSize+len(crcs)*torus.PageSize], &g.hdr)
}

// wholeRecords returns how many bytes at the beginning of b, which is byte off of the block, are whole, verified records.
func wholeRecords(ref torus.BlockRef, off uint32, b []byte, h *record.Header) (n int) {
	for n < len(b) {
		size, err := record.Check(ref, off+uint32(n), b[n:], h)
		if err != nil {
			break
		}
		n += size
	}
	return n
}

package repair

import (
	"errors"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/record"
)

// scrubPage is how many tails a scrub asks for at a time: what it has read of them is old by the time it comes to the last.
const scrubPage = 64

// scrub is the task that reads everything, round and round. Where it is it remembers in memory only.
func (r *Repairer) scrub(t *loop.Task) {
	r.sleep(t, settle)
	for !r.closing {
		began := r.cfg.Loop.Now()
		if r.scrubAll(t) {
			r.stats.Scrubs++
			r.m.scrubs.Inc()
		}
		r.sleep(t, max(began+r.cfg.ScrubEvery-r.cfg.Loop.Now(), settle))
	}
}

// scrubAll reads every block of this peer once; false if it was not to be.
func (r *Repairer) scrubAll(t *loop.Task) bool {
	buf := make([]byte, record.MaxSize)
	q := &torus.Request{Op: torus.OpList, Off: torus.ListEveryVolume, Len: scrubPage}
	for !r.closing {
		if err := r.ask(t, r.cfg.ID, q); err != nil {
			return false
		}
		for _, tail := range q.Tails {
			if err := r.scrubBlock(t, tail, buf); err != nil {
				r.m.found.Inc()
				r.Damaged(tail.Ref)
			}
		}
		if len(q.Tails) < scrubPage {
			return !r.closing
		}
		q.Ref = q.Tails[len(q.Tails)-1].Ref
	}
	return false
}

// scrubBlock reads and verifies a block as far as it was said to reach. An error means damage.
func (r *Repairer) scrubBlock(t *loop.Task, tail torus.Tail, buf []byte) error {
	var h record.Header
	for off := uint32(0); off < tail.Length && !r.closing; {
		b := buf[:min(len(buf), int(tail.Length-off))]
		r.sleep(t, r.read.take(r.cfg.Loop.Now(), len(b)))
		err := r.ask(t, r.cfg.ID, &torus.Request{Op: torus.OpRead, Ref: tail.Ref, Off: off, Len: uint32(len(b)), Data: b})
		switch {
		case errors.Is(err, torus.ErrIO):
			return err
		case err != nil:
			return nil //nolint:nilerr // it was deleted or cut short meanwhile, or the store is closed: no damage
		}
		r.m.scrubbed.Add(float64(len(b)))
		n := wholeRecords(tail.Ref, off, b, &h)
		if n == 0 {
			return torus.ErrCorrupt
		}
		off += uint32(n)
	}
	return nil
}

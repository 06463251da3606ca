package distributor

import (
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/buf"
)

// A read whose replica is slow, or stopped and not yet given up, does not wait for it: when it takes much longer than reads have
// taken lately, the next replica is asked as well, and the first good answer is taken.
//
// The load this can make is bounded: by a share of all reads, so that a cluster in which everything is slow is not asked
// for everything twice; and a peer that owes an overdue answer is not asked first until it has given it.
const (
	// hedgeLeast is the least time before another replica is asked.
	hedgeLeast = 5 * time.Millisecond
	// hedgeFactor times what the slowest hundredth of reads takes is the time before another is asked, if that is more.
	hedgeFactor = 4
	// hedgeShare of reads, and hedgeBurst at once, are asked for twice.
	hedgeShare = 0.05
	hedgeBurst = 64
	// hedgeLarge is from how many bytes on reads are a class of their own, as they take longer.
	hedgeLarge = 128 << 10
)

// Replacer is a Conn that can put another request in the place of one that is under way: what is answered to old is answered to
// with instead, old is the caller's again and its Data is not touched any more. False, and nothing has changed, if the answer is
// arriving already, or old is not under way here.
type Replacer interface {
	Replace(old, with *torus.Request) bool
}

// hedging is a Distributor's view of how long reads take. It has no memory of single reads but those under way.
type hedging struct {
	slowest [2]time.Duration // estimate of the 99th percentile, by class
	tokens  float64          // further requests that may be made now
	// Reads under way of which no other replica has been asked, by the time they were asked for, the oldest first; by class.
	first, last [2]*Read
	timer       [2]func()
	armed       [2]bool
}

func (d *Distributor) initHedging() {
	h := &d.hedging
	h.tokens = hedgeBurst
	for class := range h.slowest {
		h.slowest[class] = hedgeLeast
		h.timer[class] = func() {
			h.armed[class] = false
			d.hedgeOverdue(class)
		}
	}
}

func (h *hedging) delay(class int) time.Duration {
	return max(hedgeLeast, hedgeFactor*h.slowest[class])
}

// took corrects the estimate by what one read took: it settles where one in a hundred takes longer.
func (h *hedging) took(class int, t time.Duration) {
	const step = 0.05
	if q := &h.slowest[class]; t > *q {
		*q += time.Duration(0.99 * step * float64(*q))
	} else {
		*q = max(*q-time.Duration(0.01*step*float64(*q)), 10*time.Microsecond)
	}
}

// await notes that r has asked a replica just now.
func (d *Distributor) await(r *Read) {
	h := &d.hedging
	r.class = 0
	if len(r.Data) >= hedgeLarge {
		r.class = 1
	}
	r.since = d.loop.Now()
	h.tokens = min(h.tokens+hedgeShare, hedgeBurst)
	r.newer, r.older = nil, h.last[r.class]
	if r.older != nil {
		r.older.newer = r
	} else {
		h.first[r.class] = r
	}
	h.last[r.class] = r
	r.awaited = true
	d.armHedge(r.class)
}

// unawait takes r off the list of those under way.
func (d *Distributor) unawait(r *Read) {
	if !r.awaited {
		return
	}
	h := &d.hedging
	if r.older != nil {
		r.older.newer = r.newer
	} else {
		h.first[r.class] = r.newer
	}
	if r.newer != nil {
		r.newer.older = r.older
	} else {
		h.last[r.class] = r.older
	}
	r.older, r.newer, r.awaited = nil, nil, false
}

// armHedge sets the timer for the oldest read of a class, unless it is set: then that is for an older one.
func (d *Distributor) armHedge(class int) {
	h := &d.hedging
	if r := h.first[class]; r != nil && !h.armed[class] {
		h.armed[class] = true
		d.loop.After(r.since+h.delay(class)-d.loop.Now(), h.timer[class])
	}
}

// hedgeOverdue asks another replica for every read that has been waiting for too long.
func (d *Distributor) hedgeOverdue(class int) {
	h := &d.hedging
	now := d.loop.Now()
	for r := h.first[class]; r != nil && now-r.since >= h.delay(class); r = h.first[class] {
		d.unawait(r)
		r.overdue()
	}
	d.armHedge(class)
}

// hedge is the request to a second replica. It has memory of its own, which it keeps until it is answered, whether
// the read still wants that or not.
type hedge struct {
	req torus.Request
	d   *Distributor
	r   *Read // nil: not wanted any more
	buf *buf.Buf
	// owed is the peer that owes an overdue answer until this is answered; nil in a true hedge.
	owed *peer
	got  bool // a good answer is here, and the first replica's answer is arriving
}

func (d *Distributor) newHedge() *hedge {
	if n := len(d.hedges); n > 0 {
		h := d.hedges[n-1]
		d.hedges = d.hedges[:n-1]
		return h
	}
	h := &hedge{d: d}
	h.req.Done = h.answer
	return h
}

func (h *hedge) free() {
	h.buf.Release()
	h.buf, h.req.Data, h.r, h.got = nil, nil, nil, false
	if len(h.d.hedges) < hedgeBurst {
		h.d.hedges = append(h.d.hedges, h)
	}
}

// overdue: the replica that was asked has not answered in time.
func (r *Read) overdue() {
	d := r.d
	if x := d.peers[r.req.Peer]; x != nil {
		x.owes++
		r.owed = x
	}
	if d.hedging.tokens < 1 {
		return
	}
	for r.tried < len(r.Set) {
		p := r.at(r.tried)
		if !d.Healthy(p) {
			r.down = r.down || d.Known(p)
			r.tried++
			continue
		}
		r.tried++
		d.hedging.tokens--
		d.m.hedged.Inc()
		h := d.newHedge()
		h.r, h.buf = r, buf.Get(len(r.Data))
		r.hedge = h
		q := &h.req
		q.Op, q.Ref, q.Off, q.Len, q.Peer, q.Epoch = torus.OpRead, r.Ref, r.Off, uint32(len(r.Data)), p, r.Epoch
		q.Data = h.buf.Bytes()[:len(r.Data)]
		d.Submit(p, q)
		return
	}
}

// answer takes what the second replica says.
func (h *hedge) answer(q *torus.Request) {
	r := h.r
	if r == nil {
		if h.owed != nil {
			h.owed.owes--
			h.owed = nil
		}
		h.free()
		return
	}
	if q.Err == nil {
		data := r.Data
		r.Data = q.Data
		good := r.Verify == nil || r.Verify(r)
		r.Data = data
		if good {
			if r.asking && !r.replaceFirst() {
				h.got = true // in case that the one that is arriving does not
				return
			}
			r.takeHedge()
			return
		}
	}
	r.hedge = nil
	r.note(q)
	h.free()
	if !r.asking {
		r.next()
	}
}

// takeHedge ends r with the answer of the second replica.
func (r *Read) takeHedge() {
	h := r.hedge
	r.hedge = nil
	copy(r.Data, h.req.Data)
	h.free()
	r.d.m.hedgesWon.Inc()
	r.finish(nil)
}

// replaceFirst takes r's own request, and so the caller's memory, back from the first replica, which is slow.
func (r *Read) replaceFirst() bool {
	d := r.d
	x := d.peers[r.req.Peer]
	if x == nil {
		return false
	}
	conn, ok := x.conn.(Replacer)
	if !ok {
		return false
	}
	// A hedge that nobody wants is just what has to wait in its place.
	w := d.newHedge()
	w.buf = buf.Get(len(r.Data))
	done := w.req.Done
	w.req = r.req
	w.req.Done, w.req.Data, w.req.Buf = done, w.buf.Bytes()[:len(r.Data)], nil
	if !conn.Replace(&r.req, &w.req) {
		w.free()
		return false
	}
	w.owed, r.owed = r.owed, nil
	r.asking = false
	return true
}

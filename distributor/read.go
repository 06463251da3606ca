package distributor

import (
	"errors"
	"log/slog"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/buf"
)

const (
	// retryEvery is how often a read that no replica can answer at the moment is tried again.
	retryEvery = 100 * time.Millisecond
	// askAllEvery is in how many of these tries everybody is asked, not only those who should have the block.
	askAllEvery = 10
)

// Read is a read of a run of bytes from whichever replica has them. It is made for reuse (NewRead); the caller
// owns it before Start and after Done.
type Read struct {
	Ref  torus.BlockRef
	Off  uint32
	Data []byte // where to put them
	// Buf, if set, is what Data is the beginning of, and may be another one afterwards, along with Data: see torus.Request.
	Buf *buf.Buf
	// Set is the block's registered set. When nobody in it has the bytes, the other candidates are asked, and in the end everybody.
	Set torus.PeerList
	// Verify says whether Data is what it should be; a replica whose answer is not is passed over. While it runs Data may be other
	// memory than the caller's, of the same length.
	Verify func(*Read) bool
	Done   func(*Read)
	Err    error
	// Wait: while a replica that might have the bytes is unreachable, keep trying rather than fail.
	Wait bool
	// Epoch, if not 0, is that of who reads from its own volume: a peer that has been promised to a newer one ends the read with ErrFenced.
	Epoch uint64
	// Until, if set, is asked before each round; an error ends the read with it.
	Until func() error
	User  any

	d       *Distributor
	req     torus.Request
	tried   int
	first   int
	more    torus.PeerList // beside the set: nil as long as that will do
	all     bool           // more is everybody
	rounds  int
	down    bool // a replica was unreachable in this round
	corrupt bool
	fenced  bool

	// See hedge.go.
	asking       bool   // req is under way
	hedge        *hedge // a second replica is asked as well
	owed         *peer  // owes an overdue answer to req
	class        int
	since        time.Duration // loop time when req was sent
	awaited      bool          // in the list of those that another replica may be asked for
	older, newer *Read
}

// NewRead returns a free Read. Release gives it back.
func (d *Distributor) NewRead() *Read {
	if n := len(d.reads); n > 0 {
		r := d.reads[n-1]
		d.reads = d.reads[:n-1]
		return r
	}
	r := &Read{d: d}
	r.req.Done = r.answer
	return r
}

// Release gives a finished Read back for reuse.
func (r *Read) Release() {
	r.Data, r.Buf, r.Set, r.User, r.Err = nil, nil, nil, nil, nil
	r.Verify, r.Done, r.Wait, r.Until, r.Epoch = nil, nil, false, nil, 0
	r.d.reads = append(r.d.reads, r)
}

// Start begins the read at the first healthy replica of the set, at one of this machine if there is one; but for that the order of the set is the order of
// preference, so that a block is cached by one peer rather than by all.
func (r *Read) Start() {
	r.d.m.blockRequests.Inc()
	r.corrupt, r.fenced, r.Err, r.rounds = false, false, nil, 0
	r.round()
}

func (r *Read) round() {
	if r.Until != nil {
		if err := r.Until(); err != nil {
			r.finish(err)
			return
		}
	}
	r.tried, r.down, r.more, r.all = 0, false, nil, false
	r.first = r.d.preferred(r.Set)
	r.next()
}

// preferred is which of a set to ask first: of those that are healthy and owe no overdue answer one that is near, if there is one, else the first; else the first
// that is healthy.
func (d *Distributor) preferred(set torus.PeerList) int {
	healthy, prompt := -1, -1
	for i, p := range set {
		x := d.peers[p]
		switch {
		case x == nil || !x.up:
			continue
		case x.owes == 0 && x.near:
			return i
		case x.owes == 0 && prompt < 0:
			prompt = i
		case healthy < 0:
			healthy = i
		}
	}
	if prompt >= 0 {
		return prompt
	}
	return max(healthy, 0)
}

func (r *Read) next() {
	if r.fenced {
		r.finish(r.Err)
		return
	}
	for r.tried < len(r.Set)+len(r.more) || r.widen() {
		p := r.at(r.tried)
		r.tried++
		if !r.d.Healthy(p) {
			r.down = r.down || r.d.Known(p)
			continue
		}
		r.req.Op, r.req.Ref, r.req.Off, r.req.Len = torus.OpRead, r.Ref, r.Off, uint32(len(r.Data))
		r.req.Data, r.req.Buf, r.req.Peer, r.req.Epoch = r.Data, r.Buf, p, r.Epoch
		r.asking = true
		r.d.await(r)
		r.d.Submit(p, &r.req)
		return
	}
	if r.down && r.Wait {
		r.rounds++
		r.d.loop.After(retryEvery, r.round)
		return
	}
	r.d.m.blockFailures.Inc()
	switch {
	case r.corrupt:
		r.finish(torus.ErrCorrupt)
	case r.Err == nil:
		r.finish(torus.ErrBlockUnavailable)
	default:
		r.finish(r.Err)
	}
}

func (r *Read) at(i int) torus.PeerID {
	if n := len(r.Set); i >= n {
		return r.more[i-n]
	}
	return r.Set[(r.first+i)%len(r.Set)]
}

// widen adds peers to ask when those asked so far do not have the bytes; false if there are none.
func (r *Read) widen() bool {
	if r.more == nil {
		if r.more = r.d.Candidates(r.Ref, r.Set)[len(r.Set):]; len(r.more) > 0 {
			return true
		}
	}
	if r.all || r.rounds%askAllEvery != 0 {
		return false
	}
	r.all = true
	asked := append(append(torus.PeerList{}, r.Set...), r.more...)
	others := r.d.Others(asked)
	r.more = append(append(torus.PeerList{}, r.more...), others...)
	return len(others) > 0
}

func (r *Read) finish(err error) {
	r.more = nil
	r.Err = err
	r.Done(r)
}

// answer takes what a replica says that was asked first, or after others had failed.
func (r *Read) answer(q *torus.Request) {
	d := r.d
	r.asking = false
	r.Data, r.Buf = q.Data, q.Buf
	d.unawait(r)
	if r.owed != nil {
		r.owed.owes--
		r.owed = nil
	}
	if q.Err == nil {
		d.hedging.took(r.class, d.loop.Now()-r.since)
		if r.Verify == nil || r.Verify(r) {
			if r.hedge != nil {
				if r.hedge.got {
					r.hedge.free()
				} else {
					r.hedge.r = nil // it frees itself when it is answered
				}
				r.hedge = nil
			}
			r.finish(nil)
			return
		}
	}
	r.note(q)
	switch {
	case r.hedge == nil:
		r.next()
	case r.hedge.got:
		r.takeHedge()
	}
}

// note remembers why a replica could not answer.
func (r *Read) note(q *torus.Request) {
	switch {
	case q.Err == nil:
		r.corrupt = true
		r.d.m.corrupt.Inc()
		r.d.complain(q.Peer, slog.LevelError, "replica answered wrong bytes", "block", r.Ref.String(), "offset", r.Off, "length", len(r.Data))
	case r.fenced:
	case errors.Is(q.Err, torus.ErrFenced):
		r.fenced, r.Err = true, q.Err
	case errors.Is(q.Err, torus.ErrNoPeer), errors.Is(q.Err, torus.ErrBlockUnavailable), errors.Is(q.Err, torus.ErrClosed), errors.Is(q.Err, torus.ErrAgain):
		r.down = true
	case errors.Is(q.Err, torus.ErrBlockNotExist): // it may be lost there, or have moved
		if r.Err == nil {
			r.Err = q.Err
		}
	default:
		r.Err = q.Err
		r.d.complain(q.Peer, slog.LevelWarn, "replica cannot answer a read", "block", r.Ref.String(), "offset", r.Off, "err", q.Err)
	}
	r.d.m.peerFailures.Inc()
}

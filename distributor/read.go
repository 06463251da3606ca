package distributor

import (
	"errors"
	"time"

	"github.com/coreos/torus"
)

// How often a read that no replica can answer at the moment is tried again.
const retryEvery = 100 * time.Millisecond

// Read is a read of a run of bytes from whichever replica has them. It is made for reuse (NewRead); the caller
// owns it before Start and after Done.
type Read struct {
	Ref  torus.BlockRef
	Off  uint32
	Data []byte // where to put them
	Set  torus.PeerList
	// Verify says whether Data is what it should be; a replica whose answer is not is passed over.
	Verify func(*Read) bool
	Done   func(*Read)
	Err    error
	// Wait: while a replica that might have the bytes is unreachable, keep trying rather than fail.
	Wait bool
	// Until, if set, is asked before each round; an error ends the read with it.
	Until func() error
	User  any

	d       *Distributor
	req     torus.Request
	tried   int
	first   int
	down    bool // a replica was unreachable in this round
	corrupt bool
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
	r.Data, r.Set, r.User, r.Err = nil, nil, nil, nil
	r.Verify, r.Done, r.Wait, r.Until = nil, nil, false, nil
	r.d.reads = append(r.d.reads, r)
}

// Start begins the read at the first healthy replica of the set; the order of the set is the order of
// preference, so that a block is cached by one peer rather than by all.
func (r *Read) Start() {
	r.d.m.blockRequests.Inc()
	r.corrupt, r.Err = false, nil
	r.round()
}

func (r *Read) round() {
	if r.Until != nil {
		if err := r.Until(); err != nil {
			r.finish(err)
			return
		}
	}
	r.tried, r.down = 0, false
	r.first = 0
	for i, p := range r.Set {
		if r.d.Healthy(p) {
			r.first = i
			break
		}
	}
	r.next()
}

func (r *Read) next() {
	for r.tried < len(r.Set) {
		p := r.Set[(r.first+r.tried)%len(r.Set)]
		r.tried++
		if !r.d.Healthy(p) {
			r.down = true
			continue
		}
		r.req.Op, r.req.Ref, r.req.Off, r.req.Len = torus.OpRead, r.Ref, r.Off, uint32(len(r.Data))
		r.req.Data, r.req.Peer, r.req.Epoch = r.Data, p, 0
		r.d.Submit(p, &r.req)
		return
	}
	if r.down && r.Wait {
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

func (r *Read) finish(err error) {
	r.Err = err
	r.Done(r)
}

func (r *Read) answer(q *torus.Request) {
	switch {
	case q.Err == nil && (r.Verify == nil || r.Verify(r)):
		r.finish(nil)
		return
	case q.Err == nil:
		r.corrupt = true
		r.d.m.corrupt.Inc()
		r.d.log.Error("replica answered wrong bytes", "peer", q.Peer, "block", r.Ref.String(), "offset", r.Off, "length", len(r.Data))
	case errors.Is(q.Err, torus.ErrNoPeer), errors.Is(q.Err, torus.ErrBlockUnavailable), errors.Is(q.Err, torus.ErrClosed), errors.Is(q.Err, torus.ErrAgain):
		r.down = true
	default:
		r.Err = q.Err
		r.d.log.Warn("replica cannot answer a read", "peer", q.Peer, "block", r.Ref.String(), "offset", r.Off, "err", q.Err)
	}
	r.d.m.peerFailures.Inc()
	r.next()
}

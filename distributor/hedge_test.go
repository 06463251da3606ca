package distributor_test

import (
	"bytes"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/buf/buftest"
	"github.com/coreos/torus/distributor"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/models"
)

// slow is peers that answer reads when the test says so; a stopped one does not.
type slow struct {
	t     *testing.T
	v     *loop.Virtual
	l     *loop.VirtualLoop
	d     *distributor.Distributor
	peers map[torus.PeerID]*slowPeer
	n     int // reads done

	exchanged int // of these, how many came in other memory
}

type slowPeer struct {
	s        *slow
	latency  time.Duration
	stopped  bool
	value    byte
	err      error
	arriving bool // bytes of the answers have begun to arrive: nothing can be replaced any more
	open     []**torus.Request
	asked    int
}

func (p *slowPeer) Close() {}

func (p *slowPeer) Submit(q *torus.Request) {
	p.asked++
	at := &q
	p.open = append(p.open, at)
	p.s.l.After(p.latency, func() { p.answer(at) })
}

func (p *slowPeer) answer(at **torus.Request) {
	if p.stopped {
		p.s.l.After(time.Millisecond, func() { p.answer(at) })
		return
	}
	for i, x := range p.open {
		if x == at {
			p.open = append(p.open[:i], p.open[i+1:]...)
			break
		}
	}
	q := *at
	if p.err == nil {
		buftest.Exchange(&q.Buf, &q.Data)
		for i := range q.Data {
			q.Data[i] = p.value
		}
	}
	q.Finish(p.err)
}

func (p *slowPeer) Replace(old, with *torus.Request) bool {
	for _, x := range p.open {
		if *x == old && !p.arriving {
			*x = with
			return true
		}
	}
	return false
}

func newSlow(t *testing.T, n int) *slow {
	s := &slow{t: t, v: loop.NewVirtual(1), peers: map[torus.PeerID]*slowPeer{}}
	s.l = s.v.NewLoop("c")
	s.d = distributor.New(distributor.Config{Loop: s.l, Dial: func(p torus.PeerID, _ string, up func(), _ func(error)) distributor.Conn {
		s.peers[p] = &slowPeer{s: s, latency: 100 * time.Microsecond, value: 7}
		s.l.Post(up)
		return s.peers[p]
	}})
	var list []*models.Peer
	for i := 1; i <= n; i++ {
		list = append(list, &models.Peer{Uuid: id(i).String(), Address: "x"})
	}
	s.l.Post(func() { s.d.SetPeers(list) })
	s.v.RunFor(time.Millisecond)
	return s
}

// start begins a read of peers 1 and 2. When it is done its memory is the caller's: filled with 9, which nobody may change.
func (s *slow) start(done func(took time.Duration, err error)) {
	s.l.Post(func() {
		r := s.d.NewRead()
		b := buf.Get(16)
		data := b.Bytes()[:16]
		began := s.l.Now()
		if s.n%2 == 0 {
			r.Buf = b
		}
		r.Ref, r.Data, r.Set = torus.BlockRef{Volume: 1, INode: 1}, data, torus.PeerList{id(1), id(2)}
		r.Verify = func(r *distributor.Read) bool { return r.Data[0] == 7 }
		r.Done = func(r *distributor.Read) {
			s.n++
			if r.Buf != nil && r.Buf != b {
				b, data = r.Buf, r.Data
				s.exchanged++
			}
			if &data[0] != &b.Bytes()[0] {
				s.t.Error("the data is not the beginning of its buffer")
			}
			if r.Err == nil && !bytes.Equal(data, bytes.Repeat([]byte{7}, 16)) {
				s.t.Errorf("read %v", data)
			}
			for i := range data {
				data[i] = 9
			}
			s.l.After(time.Minute, func() {
				if !bytes.Equal(data, bytes.Repeat([]byte{9}, 16)) {
					s.t.Errorf("memory given back to the caller was written to: %v", data)
				}
				b.Release()
			})
			err := r.Err
			r.Release()
			done(s.l.Now()-began, err)
		}
		r.Start()
	})
}

// read is one read after the other, n of them; the longest of them, and the last error.
func (s *slow) read(n int) (longest time.Duration, failed error) {
	s.t.Helper()
	want := s.n + n
	var next func(time.Duration, error)
	next = func(took time.Duration, err error) {
		longest = max(longest, took)
		if err != nil {
			failed = err
		}
		if s.n < want {
			s.start(next)
		}
	}
	s.start(next)
	if !s.v.Run(func() bool { return s.n >= want }, 10*time.Minute) {
		s.t.Fatalf("%d of %d reads did not end", want-s.n, n)
	}
	return longest, failed
}

func (s *slow) asked(i int) int { return s.peers[id(i)].asked }

// A stopped replica costs a few milliseconds once, and then nothing. What it answers in the end is nobody's.
func TestHedgeStopped(t *testing.T) {
	s := newSlow(t, 2)
	s.read(10000)
	if s.asked(2) != 0 {
		t.Errorf("%d hedges while all was well", s.asked(2))
	}
	if s.exchanged != 5000 {
		t.Errorf("%d of 5000 reads came in other memory", s.exchanged)
	}
	s.peers[id(1)].stopped = true
	took, err := s.read(1)
	if err != nil || took < 5*time.Millisecond || took > 6*time.Millisecond {
		t.Errorf("with a stopped replica: %v, %v", took, err)
	}
	if took, err = s.read(1000); err != nil || took > time.Millisecond {
		t.Errorf("after that: %v, %v", took, err)
	}
	if s.asked(1) != 10001 || s.asked(2) != 1001 {
		t.Errorf("asked %d and %d times", s.asked(1)-10000, s.asked(2))
	}
	s.peers[id(1)].stopped = false
	s.v.RunFor(10 * time.Millisecond)
	if s.read(100); s.asked(1) != 10101 {
		t.Errorf("the first replica answers again, and is not asked")
	}
	s.v.RunFor(2 * time.Minute)
}

// The first replica's answer is arriving, into the caller's memory, when the second has answered: it is waited for; and if
// it does not arrive, the second's is there.
func TestHedgeArriving(t *testing.T) {
	for _, failure := range []error{nil, torus.ErrBlockUnavailable, torus.ErrIO} {
		s := newSlow(t, 2)
		s.read(1000)
		p := s.peers[id(1)]
		p.stopped, p.arriving, p.err = true, true, failure
		s.l.After(50*time.Millisecond, func() { p.stopped = false })
		if took, err := s.read(1); err != nil || took < 50*time.Millisecond || took > 52*time.Millisecond || s.asked(2) != 1 {
			t.Errorf("%v: took %v, %v, the second was asked %d times", failure, took, err, s.asked(2))
		}
		s.v.RunFor(2 * time.Minute)
	}
}

// A second replica that fails, or answers nonsense, changes nothing.
func TestHedgeFails(t *testing.T) {
	for _, failure := range []error{nil, torus.ErrBlockUnavailable, torus.ErrIO} {
		s := newSlow(t, 2)
		s.read(1000)
		s.peers[id(1)].latency = 30 * time.Millisecond
		s.peers[id(2)].value, s.peers[id(2)].err = 8, failure
		if took, err := s.read(1); err != nil || took != 30*time.Millisecond || s.asked(2) != 1 {
			t.Errorf("%v: took %v, %v, the second was asked %d times", failure, took, err, s.asked(2))
		}
		s.v.RunFor(2 * time.Minute)
	}
	// Both fail, the second first: that is an error, once.
	s := newSlow(t, 2)
	s.read(1000)
	s.peers[id(1)].latency, s.peers[id(1)].err = 30*time.Millisecond, torus.ErrIO
	s.peers[id(2)].err = torus.ErrIO
	if _, err := s.read(1); err == nil || s.n != 1001 {
		t.Errorf("%v, %d ends of 1001 reads", err, s.n)
	}
}

// Where everything is slow, nothing is asked for twice, but for a small share; and what is slow for good is not slow any more.
func TestHedgeBounded(t *testing.T) {
	s := newSlow(t, 2)
	s.read(1000)
	for i := range 2 {
		s.peers[id(i+1)].latency = 100 * time.Millisecond
	}
	first, second := s.asked(1), s.asked(2)
	const reads = 5000
	s.read(reads)
	if extra := s.asked(1) - first + s.asked(2) - second - reads; extra > 64+reads/20 {
		t.Errorf("%d reads were asked for twice, of %d", extra, reads)
	}
	first, second = s.asked(1), s.asked(2)
	s.read(reads)
	if extra := s.asked(1) - first + s.asked(2) - second - reads; extra > reads/1000 {
		t.Errorf("%d reads were asked for twice, of %d, when that was how long they take", extra, reads)
	}
	s.v.RunFor(2 * time.Minute)
}

// Many at once: a stopped replica, and then both slow.
func TestHedgeMany(t *testing.T) {
	s := newSlow(t, 2)
	s.read(10000)
	s.peers[id(1)].stopped = true
	var longest time.Duration
	for range 32 {
		s.start(func(took time.Duration, err error) {
			longest = max(longest, took)
			if err != nil {
				t.Error(err)
			}
		})
	}
	if !s.v.Run(func() bool { return s.n == 10032 }, time.Second) || longest > 6*time.Millisecond {
		t.Errorf("%d of 32 reads, %v", s.n-10000, longest)
	}
	s.peers[id(1)].stopped = false
	s.v.RunFor(2 * time.Minute)
	if n := len(s.peers[id(1)].open); n != 0 {
		t.Errorf("%d requests are still open", n)
	}
}

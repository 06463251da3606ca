package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/coreos/torus/e2e/nbdclient"
	"github.com/coreos/torus/sim"
)

const (
	pageSize = sim.PageSize
	// atomicPages: a write of so many pages is in the log as a whole or not at all (file/write.go).
	atomicPages = 16
	maxPages    = 48 // of the writer's largest write
)

// stamper writes stamped pages at random to a region of a volume, over one connection, and keeps the history.
//
// Requests enter the log in the order in which one connection sends them, so one goroutine numbers and sends them; two
// writes to one page are never under way at once.
type stamper struct {
	first, pages uint64        // the region, in pages
	depth        int           // requests under way
	pace         time.Duration // between a request and the next
	onlyWrites   bool          // no reads, no flushes: nothing that waits for the slowest peer. Guarded by mu

	rng *rand.Rand

	mu     sync.Mutex
	hist   *sim.History
	last   uint64   // number in it
	whole  []span   // data writes of at most atomicPages, ascending
	busy   []bool   // pages with a request under way
	newest []uint64 // per page, the number of the last write; 0: zeroes
	used   []bool   // pages ever written
	err    error    // the first
	wrong  error    // a read that showed something else than was written
	ackers int      // completed since the start
	lastOK time.Time
	failed time.Time // when the first error came

	slots chan struct{}
	free  sync.Pool
}

// span is the numbers of one write's pages.
type span struct{ lo, hi uint64 }

func newStamper(seed uint64, first, pages uint64, depth int) *stamper {
	return &stamper{
		first: first, pages: pages, depth: depth, rng: rand.New(rand.NewPCG(seed, 1)), hist: sim.NewHistory(seed),
		busy: make([]bool, pages), newest: make([]uint64, pages), used: make([]bool, pages), free: sync.Pool{New: func() any { b := make([]byte, maxPages*pageSize); return &b }},
	}
}

// start writes until stop is called or the connection fails; stop waits for all that is under way.
func (s *stamper) start(c *nbdclient.Conn) (stop func() error) {
	quit, done := make(chan struct{}), make(chan struct{})
	s.mu.Lock()
	s.err = nil
	s.mu.Unlock()
	s.slots = make(chan struct{}, s.depth)
	go func() {
		defer close(done)
		for s.next(c, quit) {
		}
		for range s.depth {
			s.slots <- struct{}{}
		}
	}()
	var once sync.Once
	return func() error {
		once.Do(func() { close(quit) })
		<-done
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.err
	}
}

func (s *stamper) setOnlyWrites(on bool) {
	s.mu.Lock()
	s.onlyWrites = on
	s.mu.Unlock()
}

// runFor writes for some time without any error.
func (s *stamper) runFor(t testing.TB, c *nbdclient.Conn, d time.Duration) {
	t.Helper()
	stop := s.start(c)
	time.Sleep(d)
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	s.mustBeRight(t)
}

func (s *stamper) mustBeRight(t testing.TB) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.wrong != nil {
		t.Error(s.wrong)
	}
}

// next sends one request.
func (s *stamper) next(c *nbdclient.Conn, quit chan struct{}) bool {
	select {
	case <-quit:
		return false
	default:
	}
	select {
	case <-quit:
		return false
	case s.slots <- struct{}{}:
	}
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		<-s.slots
		return false
	}
	op := s.plan()
	s.mu.Unlock()
	if op == nil {
		<-s.slots // all pages busy; rare
	} else {
		c.Start(op)
	}
	if s.pace > 0 {
		time.Sleep(s.pace)
	}
	return true
}

// plan chooses the next request and notes it in the history. nil: no free pages were found.
func (s *stamper) plan() *nbdclient.Op {
	kind := s.rng.IntN(100)
	if s.onlyWrites {
		kind = 28 + kind%72
	}
	if kind < 6 {
		acked := s.hist.Acked()
		return &nbdclient.Op{Cmd: nbdclient.Flush, Done: func(op *nbdclient.Op) {
			s.finish(op, 0, 0, func() { s.hist.Flush(acked) })
		}}
	}
	n := uint64(1)
	switch r := s.rng.IntN(100); {
	case r < 70:
	case r < 95:
		n = 2 + s.rng.Uint64N(atomicPages-1)
	default:
		n = atomicPages + 1 + s.rng.Uint64N(maxPages-atomicPages)
	}
	at, ok := s.pick(n)
	if !ok {
		return nil
	}
	off := (s.first + at) * pageSize
	switch {
	case kind < 16:
		return s.planRead(at, n, off)
	case kind < 24:
		cmd := nbdclient.WriteZeroes
		if kind < 20 {
			cmd = nbdclient.Trim
		}
		var last uint64
		for i := range n {
			last = s.write(at+i, nil, true)
		}
		op := &nbdclient.Op{Cmd: cmd, Off: off, Len: uint32(n * pageSize)}
		s.writeDone(op, at, n, last)
		return op
	}
	buf := s.free.Get().(*[]byte)
	data := (*buf)[:n*pageSize]
	lo := s.hist.Last() + 1
	var last uint64
	for i := range n {
		last = s.write(at+i, data[i*pageSize:(i+1)*pageSize], false)
	}
	if n > 1 && n <= atomicPages {
		s.whole = append(s.whole, span{lo, last})
	}
	op := &nbdclient.Op{Cmd: nbdclient.Write, Off: off, Data: data}
	if kind < 28 {
		op.Flags = nbdclient.FUA
	}
	s.writeDone(op, at, n, last)
	done := op.Done
	op.Done = func(op *nbdclient.Op) {
		done(op)
		s.free.Put(buf)
	}
	return op
}

// write notes a write of one page and stamps it.
func (s *stamper) write(at uint64, b []byte, zero bool) uint64 {
	if zero {
		b = nil
	}
	n := s.hist.Write(s.first+at, b)
	s.last = n
	s.used[at], s.newest[at] = true, n
	if zero {
		s.newest[at] = 0
	}
	return n
}

func (s *stamper) writeDone(op *nbdclient.Op, at, n, last uint64) {
	op.Done = func(op *nbdclient.Op) {
		s.finish(op, at, n, func() {
			// Writes are acknowledged in order, so every lower one is too; a flushed one means that all before it are.
			s.hist.Ack(last)
			if op.Flags&nbdclient.FUA != 0 {
				s.hist.Flush(last)
			}
		})
	}
}

// planRead reads pages with no write under way: they must hold what was written last.
func (s *stamper) planRead(at, n, off uint64) *nbdclient.Op {
	want := slices.Clone(s.newest[at : at+n])
	return &nbdclient.Op{Cmd: nbdclient.Read, Off: off, Data: make([]byte, n*pageSize), Done: func(op *nbdclient.Op) {
		s.finish(op, at, n, func() {
			for i, w := range want {
				page := s.first + at + uint64(i)
				got, err := sim.ReadStamp(op.Data[i*pageSize:(i+1)*pageSize], s.hist.Seed, page)
				if err == nil && got != w {
					err = fmt.Errorf("page %d holds write %d, but write %d was acknowledged before it was read", page, got, w)
				}
				if err != nil && s.wrong == nil {
					s.wrong = err
				}
			}
		})
	}}
}

// pick finds n pages in a row that nothing is under way to, and marks them.
func (s *stamper) pick(n uint64) (uint64, bool) {
	for range 20 {
		at := s.rng.Uint64N(s.pages - n + 1)
		taken := false
		for i := at; i < at+n; i++ {
			taken = taken || s.busy[i]
		}
		if !taken {
			for i := at; i < at+n; i++ {
				s.busy[i] = true
			}
			return at, true
		}
	}
	return 0, false
}

func (s *stamper) finish(op *nbdclient.Op, at, n uint64, ok func()) {
	s.mu.Lock()
	for i := at; i < at+n; i++ {
		s.busy[i] = false
	}
	if op.Err == nil {
		s.ackers++
		s.lastOK = op.End
		ok()
	} else if s.err == nil {
		s.err = op.Err
		s.failed = op.End
	}
	s.mu.Unlock()
	<-s.slots
}

// flush makes everything acknowledged durable.
func (s *stamper) flush(t testing.TB, c *nbdclient.Conn) {
	t.Helper()
	s.mu.Lock()
	acked := s.hist.Acked()
	s.mu.Unlock()
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	s.hist.Flush(acked)
	s.mu.Unlock()
}

// counts are how far the history has got.
func (s *stamper) counts() (last, acked, flushed uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last, s.hist.Acked(), s.hist.Flushed()
}

// image reads the region.
func (s *stamper) image(c *nbdclient.Conn) ([]byte, error) {
	const chunk = 1 << 20
	img := make([]byte, s.pages*pageSize)
	var wg sync.WaitGroup
	var mu sync.Mutex
	var errs []error
	slots := make(chan struct{}, 16)
	for off := 0; off < len(img); off += chunk {
		slots <- struct{}{}
		wg.Add(1)
		c.Start(&nbdclient.Op{Cmd: nbdclient.Read, Off: s.first*pageSize + uint64(off), Data: img[off:min(off+chunk, len(img))], Done: func(op *nbdclient.Op) {
			if op.Err != nil {
				mu.Lock()
				errs = append(errs, op.Err)
				mu.Unlock()
			}
			<-slots
			wg.Done()
		}})
	}
	wg.Wait()
	return img, errors.Join(errs...)
}

// check says whether an image is a prefix of the history (C1) that contains write atLeast (Flushed for D1, Acked for
// W1), and where it ends.
func (s *stamper) check(img []byte, atLeast uint64) (uint64, error) {
	page := func(p uint64) []byte { return img[(p-s.first)*pageSize : (p-s.first+1)*pageSize] }
	n, err := s.hist.Check(func(p uint64) ([]byte, error) { return page(p), nil }, atLeast)
	if err != nil {
		return 0, err
	}
	for p := s.first; p < s.first+s.pages; p++ {
		if !s.used[p-s.first] && !zeroes(page(p)) {
			return 0, fmt.Errorf("C1: page %d was never written and is not zero", p)
		}
	}
	for _, w := range s.whole {
		if w.lo <= n && n < w.hi {
			return 0, fmt.Errorf("C1: the image ends at write %d, within one request of pages %d to %d", n, w.lo, w.hi)
		}
	}
	return n, nil
}

var zeroPage [pageSize]byte

func zeroes(b []byte) bool { return bytes.Equal(b, zeroPage[:]) }

// settle reads the volume after an attach, checks it, and goes on from there: D1 and C1 always, W1 if acked.
func (s *stamper) settle(t testing.TB, c *nbdclient.Conn, acked bool) {
	t.Helper()
	img, err := s.image(c)
	if err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	atLeast := s.hist.Flushed()
	if acked {
		atLeast = s.hist.Acked()
	}
	n, err := s.check(img, atLeast)
	if err != nil {
		t.Fatalf("%v\nthe history has %d writes, %d acknowledged, %d flushed", err, s.last, s.hist.Acked(), s.hist.Flushed())
	}
	if err := s.decide(n, img); err != nil {
		t.Fatal(err)
	}
}

// decide drops what came after write n: an attach has served img, so it never was.
func (s *stamper) decide(n uint64, img []byte) error {
	if err := s.hist.Decide(n, func(p uint64) ([]byte, error) { return img[(p-s.first)*pageSize : (p-s.first+1)*pageSize], nil }); err != nil {
		return err
	}
	s.last = n
	for i := range s.newest {
		s.newest[i], _ = sim.ReadStamp(img[i*pageSize:(i+1)*pageSize], s.hist.Seed, s.first+uint64(i)) // checked just now
	}
	for len(s.whole) > 0 && s.whole[len(s.whole)-1].hi > n {
		s.whole = s.whole[:len(s.whole)-1]
	}
	return nil
}

// mustEqual: the volume holds the whole history, and nothing else.
func (s *stamper) mustEqual(t testing.TB, c *nbdclient.Conn) {
	t.Helper()
	img, err := s.image(c)
	if err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.check(img, s.last); err != nil {
		t.Fatal(err)
	}
}

// overwriteAll stamps every page of the region, whatever was there, and flushes.
func (s *stamper) overwriteAll(t testing.TB, c *nbdclient.Conn) {
	t.Helper()
	const n = maxPages
	for at := uint64(0); at < s.pages; at += n {
		count := min(n, s.pages-at)
		b := make([]byte, count*pageSize)
		s.mu.Lock()
		var last uint64
		for i := range count {
			last = s.write(at+i, b[i*pageSize:(i+1)*pageSize], false)
		}
		s.mu.Unlock()
		if err := c.WriteAt(b, (s.first+at)*pageSize, 0); err != nil {
			t.Fatal(err)
		}
		s.mu.Lock()
		s.hist.Ack(last)
		s.mu.Unlock()
	}
	s.flush(t, c)
}

package e2e

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/coreos/torus/e2e/nbdclient"
	"github.com/coreos/torus/sim"
)

// stream is what a user of the volume would notice of a fault: one client that writes and flushes, and one that reads,
// each one request after the other without a pause, and the longest time either waited between two completions.
type stream struct {
	conns [2]*nbdclient.Conn
	first uint64 // of the region, in pages
	pages uint64
	seed  uint64
	pace  time.Duration // between a write and the next

	quit chan struct{}
	wg   sync.WaitGroup

	mu     sync.Mutex
	paths  [4]path // writes and flushes, reads, and how long the machine alone makes everybody wait: sleeps of a millisecond, writes to a file
	newest []uint64
	err    error
}

// path is one of the four.
type path struct {
	last time.Time // of the last completion
	gap  time.Duration
	when time.Time // the longest gap ended
	done int
}

// stall is what a stream saw between two looks.
type stall struct {
	write, read   time.Duration // the longest gap
	writes, reads int
	noise         time.Duration // the longest wait for the processor or for the disk that everything here shares
	when          time.Time     // the longest gap of all ended
}

func (s stall) max() time.Duration { return max(s.write, s.read) }

// own is the part of the longest stall that the machine cannot be blamed for.
func (s stall) own() time.Duration { return max(0, s.max()-s.noise) }

func (s stall) String() string {
	return fmt.Sprintf("longest stall of writes and flushes %v (%d done), of reads %v (%d done), until %s; the machine alone %v",
		s.write.Round(time.Millisecond), s.writes, s.read.Round(time.Millisecond), s.reads, s.when.Format("15:04:05.000"), s.noise.Round(time.Millisecond))
}

// startStream begins on a region of pages of an export. It ends with the test, at the latest.
func startStream(t *testing.T, a nbdclient.Address, first, pages uint64, pace time.Duration) *stream {
	t.Helper()
	s := &stream{first: first, pages: pages, seed: 0x57 + first, pace: pace, quit: make(chan struct{}), newest: make([]uint64, pages)}
	for i := range s.conns {
		s.conns[i] = dial(t, a, startLimit)
	}
	now := time.Now()
	for i := range s.paths {
		s.paths[i].last = now
	}
	s.wg.Go(s.write)
	s.wg.Go(s.read)
	s.wg.Go(func() {
		for s.running(nil) {
			time.Sleep(time.Millisecond)
			s.completed(2)
		}
	})
	f, err := os.Create(filepath.Join(tempDir(t), "alone"))
	if err != nil {
		t.Fatal(err)
	}
	s.wg.Go(func() {
		defer f.Close()
		b := make([]byte, pageSize)
		for i := int64(0); s.running(nil); i++ {
			if _, err := f.WriteAt(b, i%256*pageSize); err != nil {
				s.running(err)
			}
			if err := syscall.Fdatasync(int(f.Fd())); err != nil {
				s.running(err)
			}
			s.completed(3)
			time.Sleep(5 * time.Millisecond)
		}
	})
	t.Cleanup(func() {
		for _, c := range s.conns {
			c.Close()
		}
		s.end() //nolint:errcheck // who wants to know has called it before
	})
	return s
}

// end stops it and returns the first error.
func (s *stream) end() error {
	s.mu.Lock()
	select {
	case <-s.quit:
	default:
		close(s.quit)
	}
	s.mu.Unlock()
	s.wg.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// look returns what was seen since the last look, a gap that has not ended yet included.
func (s *stream) look() stall {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	var out [4]path
	for i := range s.paths {
		p := &s.paths[i]
		p.wait(now)
		out[i] = *p
		p.gap, p.done = 0, 0
	}
	all := stall{write: out[0].gap, read: out[1].gap, writes: out[0].done, reads: out[1].done, noise: max(out[2].gap, out[3].gap), when: out[0].when}
	if all.read > all.write {
		all.when = out[1].when
	}
	return all
}

// wait notes that nothing has been completed since the last time.
func (p *path) wait(now time.Time) {
	if d := now.Sub(p.last); d > p.gap {
		p.gap, p.when = d, now
	}
}

func (s *stream) completed(i int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := &s.paths[i]
	now := time.Now()
	p.wait(now)
	p.last = now
	p.done++
}

func (s *stream) running(err error) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
	}
	select {
	case <-s.quit:
		return false
	default:
		return s.err == nil
	}
}

func (s *stream) write() {
	c := s.conns[0]
	rng := rand.New(rand.NewPCG(s.seed, 1))
	b := make([]byte, pageSize)
	for n := uint64(1); s.running(nil); n++ {
		at := rng.Uint64N(s.pages)
		s.mu.Lock()
		s.newest[at] = reserved
		s.mu.Unlock()
		sim.Stamp(b, s.seed, s.first+at, n)
		err := c.WriteAt(b, (s.first+at)*pageSize, 0)
		if err == nil {
			s.mu.Lock()
			s.newest[at] = n
			s.mu.Unlock()
			s.completed(0)
			err = c.Flush()
		}
		if !s.running(err) {
			return
		}
		s.completed(0)
		if s.pace > 0 {
			time.Sleep(s.pace)
		}
	}
}

// reserved marks a page that is being written: the reader leaves it alone.
const reserved = ^uint64(0)

func (s *stream) read() {
	c := s.conns[1]
	rng := rand.New(rand.NewPCG(s.seed, 2))
	b := make([]byte, pageSize)
	for s.running(nil) {
		at := rng.Uint64N(s.pages)
		s.mu.Lock()
		before := s.newest[at]
		s.mu.Unlock()
		if before == reserved {
			continue
		}
		err := c.ReadAt(b, (s.first+at)*pageSize)
		if err == nil {
			s.completed(1)
			var n uint64
			n, err = sim.ReadStamp(b, s.seed, s.first+at)
			s.mu.Lock()
			after := s.newest[at]
			s.mu.Unlock()
			if err == nil && n != before && after == before {
				err = fmt.Errorf("page %d holds write %d, not %d", s.first+at, n, before)
			}
		}
		if !s.running(err) {
			return
		}
		if s.pace > 0 {
			time.Sleep(s.pace)
		}
	}
}

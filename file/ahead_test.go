package file_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
)

// stampPages returns n pages, each of which says which it is and of what generation.
func stampPages(page, n uint64, generation byte) []byte {
	b := make([]byte, n*4096)
	for i := range n {
		p := b[i*4096:][:4096]
		for j := range p {
			p[j] = generation
		}
		binary.LittleEndian.PutUint64(p, page+i)
	}
	return b
}

// stamped calls fn with each stamped page of a generation below limit that a peer has.
func (p *fakePeer) stamped(limit uint64, generation byte, fn func(page uint64, b []byte)) {
	for ref, x := range p.blocks {
		for off := 0; off < len(x.data) && ref.Type == torus.TypeBlock; off += 4096 {
			b := x.data[off:][:4096]
			if page := binary.LittleEndian.Uint64(b); page < limit && b[8] == generation && b[4095] == generation {
				fn(page, b)
			}
		}
	}
}

// writeStamped writes pages in pieces of 64, and flushes.
func (c *client) writeStamped(page, n uint64, generation byte) {
	c.r.t.Helper()
	for k := uint64(0); k < n; k += 64 {
		c.must(&device.Request{Op: device.Write, Off: (page + k) * 4096, Data: stampPages(page+k, min(64, n-k), generation)})
	}
	c.must(&device.Request{Op: device.Flush})
}

// readStamped reads pages, which are to be of that generation.
func (c *client) readStamped(page, n uint64, generation byte) {
	c.r.t.Helper()
	b := make([]byte, n*4096)
	c.must(&device.Request{Op: device.Read, Off: page * 4096, Data: b})
	want := stampPages(page, n, generation)
	for i := range n {
		if !bytes.Equal(b[i*4096:][:4096], want[i*4096:][:4096]) {
			c.r.t.Fatalf("page %d: %d of generation %d, want generation %d", page+i, binary.LittleEndian.Uint64(b[i*4096:]), b[i*4096+8], generation)
		}
	}
}

// countReads returns how many reads peers have served since.
func (r *rig) countReads() *int {
	n := new(int)
	for _, p := range r.peers {
		p.drop = func(q *torus.Request) error {
			if q.Op == torus.OpRead && len(q.Data) > 0 {
				*n++
			}
			return nil
		}
	}
	return n
}

// Who reads in order is served from memory for the most part, also if there are several, and if what they read is in pieces.
func TestReadAhead(t *testing.T) {
	const pages, piece = 2048, 4
	r := newRig(t, 1, 3, 2, pages*4096)
	c := r.attach(nil)
	c.writeStamped(0, pages, 1)
	c.detach()
	c = r.attach(nil)
	asked := r.countReads()
	for page := uint64(0); page < pages; page += piece {
		c.readStamped(page, piece, 1)
	}
	if s := c.f.Stats(); *asked > pages/piece/4 || s.AheadBytes > pages*4096 || s.AheadUsed < pages*4096*9/10 {
		t.Errorf("%d pieces of %d pages in order: the peers were asked %d times, %d bytes were read ahead, %d of them used", pages/piece, piece, *asked, s.AheadBytes, s.AheadUsed)
	}
	before := c.f.Stats().AheadUsed
	*asked = 0
	for k := uint64(0); k < pages/3/piece*piece; k += piece { // three at a time
		for i := range uint64(3) {
			c.readStamped(i*(pages/3/piece*piece)+k, piece, 1)
		}
	}
	if s := c.f.Stats(); *asked > pages/piece/3 || s.AheadUsed-before < pages*4096*8/10 {
		t.Errorf("three readers in order: the peers were asked %d times, %d bytes were used", *asked, s.AheadUsed-before)
	}
	before = c.f.Stats().AheadBytes
	for range 1000 { // at random
		c.readStamped(r.rng.Uint64N(pages-piece), piece, 1)
	}
	if s := c.f.Stats(); s.AheadBytes-before > 256<<10 {
		t.Errorf("%d bytes were read ahead for who reads at random", s.AheadBytes-before)
	}
	c.detach()
}

// What has been read ahead is not what somebody reads who comes for it after it was written.
func TestReadAheadForgets(t *testing.T) {
	write := func(page uint64) *device.Request {
		return &device.Request{Op: device.Write, Off: page * 4096, Data: stampPages(page, 1, 2)}
	}
	for _, x := range []struct {
		name string
		q    func(page uint64) *device.Request
	}{
		{"write", write},
		{"part", func(page uint64) *device.Request {
			return &device.Request{Op: device.Write, Off: page*4096 + 512, Data: bytes.Repeat([]byte{2}, 512)}
		}},
		{"trim", func(page uint64) *device.Request {
			return &device.Request{Op: device.Trim, Off: page * 4096, Len: 4096}
		}},
		{"zeroes", func(page uint64) *device.Request {
			return &device.Request{Op: device.WriteZeroes, Off: page * 4096, Len: 4096}
		}},
	} {
		for _, loading := range []bool{false, true} {
			for _, flush := range []bool{false, true} {
				t.Run(fmt.Sprint(x.name, " loading ", loading, " flush ", flush), func(t *testing.T) {
					const pages = 256
					r := newRig(t, 1, 3, 2, pages*4096)
					c := r.attach(nil)
					c.writeStamped(0, pages, 1)
					c.detach()
					c = r.attach(nil)
					held := loading
					for _, p := range r.peers {
						p.hold = func(q *torus.Request) bool { return held && q.Op == torus.OpRead && len(q.Data) >= 64<<10 }
					}
					for page := range uint64(3) {
						c.readStamped(page, 1, 1)
					}
					if c.f.Stats().AheadBytes == 0 {
						t.Fatal("nothing was read ahead")
					}
					if !loading {
						r.v.RunFor(100 * time.Millisecond) // it is there
					}
					const page = 10
					q := x.q(page)
					data := q.Data
					if loading && x.name == "part" {
						held = false // it waits for the page itself
					}
					c.must(q)
					if flush {
						c.must(&device.Request{Op: device.Flush})
					}
					want := stampPages(page, 1, 1)
					if q.Op == device.Write {
						copy(want[q.Off-page*4096:], data)
					} else {
						clear(want)
					}
					got := make([]byte, 4096)
					over := false
					q = &device.Request{Op: device.Read, Off: page * 4096, Len: 4096, Data: got, Done: func(*device.Request) { over = true }}
					c.l.Post(func() { c.f.Submit(q) })
					r.v.RunFor(10 * time.Millisecond)
					held = false
					if !r.v.Run(func() bool { return over }, time.Minute) || q.Err != nil {
						t.Fatalf("over: %v, %v", over, q.Err)
					}
					if !bytes.Equal(got, want) {
						t.Errorf("read generation %d", got[600])
					}
					for p := uint64(3); p < pages; p++ {
						if p != page {
							c.readStamped(p, 1, 1)
						}
					}
					c.detach()
				})
			}
		}
	}
}

// What fails to be read ahead fails nobody; who comes for it hears of it.
func TestReadAheadFails(t *testing.T) {
	const pages, bad = 256, 100
	r := newRig(t, 1, 3, 2, pages*4096)
	c := r.attach(nil)
	c.writeStamped(0, pages, 1)
	c.detach()
	for _, p := range r.peers {
		p.stamped(pages, 1, func(page uint64, b []byte) {
			if page == bad {
				b[100] ^= 1
			}
		})
	}
	c = r.attach(nil)
	for page := range uint64(pages) {
		if page != bad {
			c.readStamped(page, 1, 1)
			continue
		}
		if err := c.do(&device.Request{Op: device.Read, Off: page * 4096, Data: make([]byte, 4096)}); !errors.Is(err, torus.ErrCorrupt) {
			t.Errorf("the bad page reads as %v", err)
		}
	}
	c.detach()
}

// Pages that lie near each other in a block are asked for together, whatever is in between; and what is in between may be as damaged
// as it likes.
func TestReadGaps(t *testing.T) {
	const pages = 256
	r := newRig(t, 1, 3, 2, pages*4096)
	c := r.attach(nil)
	c.writeStamped(0, pages, 1)
	for page := uint64(0); page < pages; page += 3 {
		c.must(&device.Request{Op: device.Write, Off: page * 4096, Data: stampPages(page, 1, 2)})
	}
	c.must(&device.Request{Op: device.Flush})
	c.detach()
	for _, x := range []struct {
		name   string
		damage func(*fakePeer)
		most   int
	}{
		{"well", func(*fakePeer) {}, 40},
		{"obsolete pages are damaged", func(p *fakePeer) {
			p.stamped(pages, 1, func(page uint64, b []byte) {
				if page%3 == 0 {
					b[100] ^= 1
				}
			})
		}, 40},
		{"obsolete pages cannot be read", func(p *fakePeer) {
			p.drop = func(q *torus.Request) error {
				b := p.blocks[q.Ref]
				if q.Op != torus.OpRead || b == nil {
					return nil
				}
				for off := q.Off; off < q.Off+uint32(len(q.Data)); off += 4096 {
					if page := binary.LittleEndian.Uint64(b.data[off:]); page < pages && page%3 == 0 && b.data[off+4095] == 1 {
						return torus.ErrIO
					}
				}
				return nil
			}
		}, 2 * pages},
	} {
		t.Run(x.name, func(t *testing.T) {
			asked := r.countReads()
			for _, p := range r.peers {
				x.damage(p)
			}
			c := r.attach(nil)
			*asked = 0
			for _, off := range []uint64{0, 512, 4096, 5 * 4096, 100*4096 + 3*512} {
				n := uint64(pages)*4096 - off - 1024
				got := make([]byte, n)
				c.must(&device.Request{Op: device.Read, Off: off, Data: got})
				want := stampPages(0, pages, 1)
				for page := uint64(0); page < pages; page += 3 {
					copy(want[page*4096:], stampPages(page, 1, 2))
				}
				if !bytes.Equal(got, want[off:off+n]) {
					t.Errorf("wrong bytes from %d on", off)
				}
			}
			if *asked > 5*x.most {
				t.Errorf("the peers were asked %d times for five reads", *asked)
			}
			c.kill()
		})
	}
}

// What cannot be read ahead, as its peers are away, holds nobody up who does not want it.
func TestReadAheadOfWhatIsAway(t *testing.T) {
	const pages = 512
	r := newRig(t, 1, 3, 2, pages*4096)
	c := r.attach(nil)
	c.writeStamped(0, pages, 1)
	c.detach()
	c = r.attach(nil)
	c.readStamped(0, 1, 1) // the map is in memory
	r.peers[1].crash(false)
	r.peers[2].crash(false)
	r.v.RunFor(10 * time.Millisecond)
	there := map[uint64]bool{}
	r.peers[0].stamped(pages, 1, func(page uint64, _ []byte) { there[page] = true })
	if n := len(there); n < pages/3 || n == pages {
		t.Fatalf("%d pages of %d can be read", n, pages)
	}
	for range 2 {
		for page := range uint64(pages) {
			if there[page] {
				c.readStamped(page, 1, 1) // within a minute, or the test fails
			}
		}
	}
	if c.f.Stats().AheadBytes == 0 {
		t.Error("nothing was read ahead")
	}
	c.kill()
}

package tdp

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/transport/mem"
)

func ref(index uint64) torus.BlockRef {
	return torus.BlockRef{Volume: 5, INode: 3, Index: torus.IndexID(index)}
}

// memory is something to lend.
type memory struct {
	b    []byte
	more int
	free func() // called when nobody needs it any more
}

func newMemory(n int, fill byte) *memory { return &memory{b: pages(n, fill)} }

func (m *memory) Retain()  { m.more++ }
func (m *memory) Abandon() { m.Release() }
func (m *memory) Release() {
	if m.more--; m.more < 0 && m.free != nil {
		m.free()
	}
}

// lending is a cluster whose connections lend, over a line on which whatever is sent takes its time: a megabyte a second.
func lending(t *testing.T, seed uint64, lend bool) *cluster {
	x := newCluster(t, seed)
	x.n.Lending = 0
	if lend {
		x.n.Lending = 1
	}
	slow := mem.LinkConfig{Delay: 50 * time.Microsecond, Bandwidth: 1 << 20}
	x.n.SetLink("c", "s", slow)
	x.n.SetLink("s", "c", slow)
	return x.start()
}

// What is large is lent rather than sent, both ways, and given back.
func TestLend(t *testing.T) {
	for _, lend := range []bool{true, false} {
		x := lending(t, 1, lend)
		data := newMemory(256, 7)
		for i := range data.b {
			data.b[i] += byte(i / torus.PageSize)
		}
		start := x.v.Now()
		if err := x.do(&torus.Request{Op: torus.OpAppend, Ref: ref(1), Data: data.b, Owner: data}); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(data.b))
		if err := x.do(&torus.Request{Op: torus.OpRead, Ref: ref(1), Data: got}); err != nil || !bytes.Equal(got, data.b) {
			t.Errorf("lend %v: read %v, equal %v", lend, err, bytes.Equal(got, data.b))
		}
		if d := x.v.Now() - start; lend == (d > 10*time.Millisecond) {
			t.Errorf("lend %v: a megabyte there and back took %v", lend, d)
		}
		// An error has nothing to lend, and small things are sent.
		if err := x.do(&torus.Request{Op: torus.OpRead, Ref: ref(1), Off: 4096, Data: got}); !errors.Is(err, torus.ErrGap) {
			t.Errorf("read beyond the end: %v", err)
		}
		small := make([]byte, torus.PageSize)
		if err := x.do(&torus.Request{Op: torus.OpRead, Ref: ref(1), Off: 4096, Data: small}); err != nil || small[0] != 8 {
			t.Errorf("a page: %v, %d", err, small[0])
		}
		x.v.RunFor(time.Second)
		if here, there := x.c.link.lender.Lent(), x.srv.conns[0].lender.Lent(); here != 0 || there != 0 || data.more != 0 {
			t.Errorf("%d and %d bytes are still lent, %d times retained", here, there, data.more)
		}
		if here, there := x.c.link.s.(*mem.Stream).Borrowed(), x.srv.conns[0].s.(*mem.Stream).Borrowed(); here != 0 || there != 0 {
			t.Errorf("%d and %d pieces are still borrowed", here, there)
		}
	}
}

// No more is lent at a time than is good; the rest is sent, and all of it arrives.
func TestLendMuch(t *testing.T) {
	x := lending(t, 1, true)
	x.n.SetLink("s", "c", mem.LinkConfig{Delay: time.Millisecond, Bandwidth: 100 << 20})
	data := pages(512, 3)
	if err := x.do(&torus.Request{Op: torus.OpAppend, Ref: ref(1), Data: data, Owner: newMemory(1, 1)}); err != nil {
		t.Fatal(err)
	}
	var reads []*torus.Request
	var dones []*bool
	for range 20 {
		r := &torus.Request{Op: torus.OpRead, Ref: ref(1), Data: make([]byte, len(data))}
		reads, dones = append(reads, r), append(dones, x.submit(r))
	}
	most := 0
	for i, done := range dones {
		x.wait(func() bool { most = max(most, x.srv.conns[0].lender.Lent()); return *done })
		if reads[i].Err != nil || !bytes.Equal(reads[i].Data, data) {
			t.Errorf("read %d: %v", i, reads[i].Err)
		}
	}
	if most < maxLent || most >= maxLent+2*len(data) {
		t.Errorf("%d bytes were lent at once, the bound is %d", most, maxLent)
	}
}

// A server that has as much under way as it may does not take more, though what is lent needs no memory of its own.
func TestBorrowWaits(t *testing.T) {
	x := newCluster(t, 1)
	x.n.Lending = 1
	x.scfg.MaxBytes = 4 << 20
	x.store.delay = 10 * time.Millisecond
	x.start()
	var dones []*bool
	for i := range 64 {
		m := newMemory(256, 1)
		dones = append(dones, x.submit(&torus.Request{Op: torus.OpAppend, Ref: ref(uint64(i)), Data: m.b, Owner: m}))
	}
	most := 0
	for _, done := range dones {
		x.wait(func() bool {
			n := 0
			for q := x.srv.conns[0].first; q != nil; q = q.next {
				n++
			}
			most = max(most, x.srv.conns[0].calls+n)
			return *done
		})
	}
	if len(x.store.blocks) != 64 || most < 4 || most > 6 {
		t.Errorf("%d blocks; %d of a megabyte under way or borrowed at once, 4 MiB are allowed", len(x.store.blocks), most)
	}
}

// However a connection ends, what is lent on it stays as it is until the other side has done with it: what the store gets, however slow it is, and what
// a read returns, is what was lent; and then it comes back.
func TestLentAndGone(t *testing.T) {
	appended, read, failed := 0, 0, 0
	for seed := range uint64(400) {
		x := newCluster(t, seed)
		x.n.Lending = 1
		x.store.delay = time.Duration(seed%5) * 100 * time.Microsecond
		x.start()
		good, bad := pages(16, 'x'), pages(16, '!')
		if err := x.do(&torus.Request{Op: torus.OpAppend, Ref: ref(1), Data: append([]byte(nil), good...)}); err != nil {
			t.Fatal(err)
		}
		m := newMemory(16, 'x')
		freed := false
		m.free = func() { freed = true; copy(m.b, bad) }
		w := &torus.Request{Op: torus.OpAppend, Ref: ref(2), Data: m.b, Owner: m}
		w.Done = func(*torus.Request) { m.Release() }
		r := &torus.Request{Op: torus.OpRead, Ref: ref(1), Data: make([]byte, len(good))}
		done := false
		r.Done = func(*torus.Request) { done = true }
		x.lc.Post(func() { x.c.Submit(w); x.c.Submit(r) })
		wait := time.Duration(seed) * 2 * time.Microsecond
		switch seed % 3 {
		case 0:
			x.v.At(wait, func() { x.lc.Post(x.c.Close) })
		case 1:
			x.v.At(wait, func() { x.n.Reset("c", "s") })
		case 2:
			x.v.At(wait, func() { x.ls.Post(func() { x.srv.Close(func() {}) }) })
		}
		x.wait(func() bool { return done })
		x.wait(func() bool { return freed })
		x.v.RunFor(10 * time.Millisecond) // the store may have it still
		if b, ok := x.store.blocks[ref(2)]; ok {
			appended++
			if !bytes.Equal(b, good) {
				t.Fatalf("seed %d: the store got what had been lent after the lender had used it again", seed)
			}
		}
		switch {
		case r.Err != nil:
			failed++
		case !bytes.Equal(r.Data, good):
			t.Fatalf("seed %d: a read returned something else", seed)
		default:
			read++
		}
	}
	if appended < 50 || appended > 380 || read < 50 || failed < 50 {
		t.Errorf("%d appended, %d read, %d failed: the test tests nothing", appended, read, failed)
	}
}

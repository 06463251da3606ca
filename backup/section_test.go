package backup

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/coreos/torus"
)

func anySection(seed uint64, pages int) *section {
	rng := rand.New(rand.NewPCG(seed, 1))
	s := newSection()
	for range pages {
		f := frame{pack: packID{byte(rng.IntN(3))}, off: uint32(rng.IntN(1 << 24)), size: uint32(1 + rng.IntN(1<<17)), pages: framePages}
		at := place{torus.BlockRef{Volume: 1, INode: torus.INodeID(rng.IntN(5)), Index: torus.IndexID(rng.IntN(9))}, uint32(rng.IntN(1 << 14))}
		if rng.IntN(10) == 0 {
			at = place{}
		}
		s.set(rng.IntN(sectionPages), f, uint8(rng.IntN(framePages)), hash{byte(rng.Uint32()), 7}, at)
	}
	return s
}

func TestSection(t *testing.T) {
	e, d := newEncoder(), newDecoder()
	defer e.Close()
	defer d.Close()
	for seed := range uint64(20) {
		s := anySection(seed, int(seed*seed*10))
		o, name := s.encode(e)
		got, err := decodeSection(o, d)
		if err != nil {
			t.Fatal(err)
		}
		for i := range s.pages {
			x, y := &s.pages[i], &got.pages[i]
			if x.frame > 0 != (y.frame > 0) || x.frame > 0 && (s.frames[x.frame-1] != got.frames[y.frame-1] || x.index != y.index || x.hash != y.hash || s.place(i) != got.place(i)) {
				t.Fatalf("seed %d: page %d: %+v, %+v", seed, i, x, y)
			}
		}
		if _, again := got.encode(e); again != name {
			t.Errorf("seed %d: it is encoded otherwise the second time", seed)
		}
	}
}

// Whatever is decoded is sound: every index is within its table.
func FuzzSection(f *testing.F) {
	e, d := newEncoder(), newDecoder()
	for seed := range uint64(4) {
		o, _ := anySection(seed, int(seed*20)).encode(e)
		raw, err := d.DecodeAll(o, nil)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		s, err := decodeSection(e.EncodeAll(raw, nil), d)
		if err != nil {
			return
		}
		for i := range s.pages {
			if p := &s.pages[i]; p.frame > 0 {
				if x := s.frames[p.frame-1]; p.index >= x.pages || x.pages > framePages || x.size == 0 {
					t.Errorf("page %d: %+v in %+v", i, p, x)
				}
				s.place(i)
			}
		}
	})
}

func FuzzBackup(f *testing.F) {
	b := &Backup{ID: "x", Format: format, Volume: "v", Size: 5, Sections: []string{""}}
	o, err := b.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(o)
	f.Fuzz(func(t *testing.T, o []byte) {
		b, err := decodeBackup(o)
		if err != nil {
			return
		}
		again, err := b.encode()
		if err != nil {
			t.Fatal(err)
		}
		if c, err := decodeBackup(again); err != nil || c.Name() != b.Name() || !bytes.Equal([]byte(c.Volume), []byte(b.Volume)) {
			t.Errorf("%v, %v", c, err)
		}
	})
}

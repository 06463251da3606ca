package record

import (
	"bytes"
	"errors"
	"flag"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/coreos/torus"
)

var update = flag.Bool("update", false, "write the golden files anew: only when the format gets a new version")

// build returns a whole record.
func build(h *Header, fill byte) []byte {
	pages := 0
	for _, x := range h.Extents {
		if x.Kind.HasPages() {
			pages += int(x.Count)
		}
	}
	b := make([]byte, HeaderSize+pages*torus.PageSize)
	h.CRCs = h.CRCs[:0]
	for i := range pages {
		p := b[HeaderSize+i*torus.PageSize:][:torus.PageSize]
		for j := range p {
			p[j] = fill + byte(i) + byte(j*j>>4)
		}
		h.CRCs = append(h.CRCs, Checksum(p))
	}
	h.Encode(b[:HeaderSize])
	return b
}

var golden = map[string]Header{
	"data.v1": {
		Ref: torus.BlockRef{Type: torus.TypeBlock, Volume: 0x0102030405, INode: 6, Index: 7}, Seq: 8, Flushed: 5, Offset: 12288,
		Extents: []Extent{{Page: 100, Count: 2, Kind: Data}, {Page: 1 << 40, Count: 1000, Kind: Trim}, {Page: 9, Count: 1, Kind: Data}},
	},
	"zero.v1": {
		Ref: torus.BlockRef{Volume: torus.VolumeMax, INode: 1<<64 - 1, Index: 1<<64 - 1}, Seq: 1<<64 - 1, Flushed: 1<<64 - 2,
		Extents: []Extent{{Page: 0, Count: 1 << 31, Kind: Zero}},
	},
	"node.v1": {
		Ref:     torus.BlockRef{Type: torus.TypeINode, Volume: 1, INode: 2, Index: 3},
		Extents: []Extent{{Page: 3, Count: 1, Kind: Node}},
	},
	"empty.v1": {Ref: torus.BlockRef{Volume: 1, INode: 1}, Seq: 1},
}

// Records written by every version that ever shipped are read by this one, and written the same.
func TestGolden(t *testing.T) {
	for name, h := range golden {
		t.Run(name, func(t *testing.T) {
			b := build(&h, 3)
			file := filepath.Join("testdata", name)
			if *update {
				if err := os.WriteFile(file, b, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(b, want) {
				t.Fatal("the format has changed: a record is not written as it was")
			}
			var got Header
			n, err := Check(h.Ref, h.Offset, want, &got)
			if err != nil || n != len(want) {
				t.Fatalf("read %d bytes, %v", n, err)
			}
			if got.Seq != h.Seq || got.Flushed != h.Flushed || !reflect.DeepEqual(got.Extents, h.Extents[:len(h.Extents):len(h.Extents)]) && len(h.Extents) > 0 {
				t.Fatalf("read %+v, want %+v", got, h)
			}
		})
	}
}

// Any single flipped bit is found (D2).
func TestEveryFlippedBitIsFound(t *testing.T) {
	h := golden["data.v1"]
	b := build(&h, 1)
	var got Header
	for i := range b {
		if i >= HeaderSize && i%97 != 0 {
			continue // pages: a sample
		}
		for bit := range 8 {
			b[i] ^= 1 << bit
			if _, err := Check(h.Ref, h.Offset, b, &got); !errors.Is(err, torus.ErrCorrupt) {
				t.Fatalf("bit %d of byte %d flipped: %v", bit, i, err)
			}
			b[i] ^= 1 << bit
		}
	}
	if _, err := Check(h.Ref, h.Offset, b, &got); err != nil {
		t.Fatal(err)
	}
}

// A record is accepted in its own place only: no leftover of a slot's former occupant passes (D2).
func TestWrongPlace(t *testing.T) {
	h := golden["data.v1"]
	b := build(&h, 1)
	var got Header
	other := h.Ref
	other.Index++
	for _, c := range []struct {
		ref torus.BlockRef
		off uint32
		b   []byte
	}{{other, h.Offset, b}, {h.Ref, h.Offset + torus.PageSize, b}, {h.Ref, h.Offset, b[:len(b)-1]}, {h.Ref, h.Offset, b[:HeaderSize-1]}, {h.Ref, h.Offset, nil}} {
		if _, err := Check(c.ref, c.off, c.b, &got); !errors.Is(err, torus.ErrCorrupt) {
			t.Errorf("%v at %d, %d bytes: %v", c.ref, c.off, len(c.b), err)
		}
	}
}

func TestScanEntries(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	var b []byte
	var want []Header
	off := uint32(0)
	for i := range 100 {
		h := Header{Ref: torus.BlockRef{Volume: 1, INode: 2, Index: 3}, Seq: uint64(i + 1), Flushed: uint64(i), Offset: off}
		for range rng.IntN(MaxExtents + 1) {
			h.Extents = append(h.Extents, Extent{rng.Uint64(), uint32(rng.IntN(1000)), Trim})
		}
		h.Extents = append(h.Extents[:min(len(h.Extents), MaxExtents-1)], Extent{1, uint32(rng.IntN(4)), Data})
		r := build(&h, byte(i))
		before := len(b)
		b = AppendScanEntry(b, off, r)
		if len(b)-before != ScanEntrySize(r) {
			t.Fatalf("entry of %d bytes, not %d", len(b)-before, ScanEntrySize(r))
		}
		want = append(want, h)
		off += uint32(len(r))
	}
	var h Header
	rest := b
	for i := range want {
		var err error
		if rest, err = NextScanEntry(rest, &h); err != nil {
			t.Fatal(i, err)
		}
		if h.Seq != want[i].Seq || h.Offset != want[i].Offset || h.Size() != want[i].Size() || len(h.Extents) != len(want[i].Extents) {
			t.Fatalf("entry %d: %+v", i, h)
		}
	}
	if len(rest) != 0 {
		t.Fatal("bytes left")
	}
	if _, err := NextScanEntry(b[:len(b)-1], &h); err != nil {
		t.Fatal(err) // the first is whole
	}
	if _, err := NextScanEntry(b[:20], &h); !errors.Is(err, torus.ErrCorrupt) {
		t.Fatal(err)
	}
}

func seeds(f *testing.F) [][]byte {
	var all [][]byte
	for name := range golden {
		b, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			f.Fatal(err)
		}
		all = append(all, b)
	}
	return append(all, nil, make([]byte, HeaderSize))
}

// Whatever the bytes: no panic, and a header that is accepted is within the bounds and is encoded the same again.
func FuzzDecode(f *testing.F) {
	for _, b := range seeds(f) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var h Header
		if err := h.Decode(b); err != nil {
			if !errors.Is(err, torus.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		if len(h.Extents) > MaxExtents || h.Pages() > MaxPages || h.Size() > MaxSize || Used(b) > len(b) {
			t.Fatalf("accepted: %+v", h)
		}
		page := make([]byte, HeaderSize)
		h.Encode(page)
		var again Header
		if err := again.Decode(page); err != nil || again.Seq != h.Seq || again.Ref != h.Ref || len(again.Extents) != len(h.Extents) {
			t.Fatalf("%+v, %v", again, err)
		}
	})
}

func FuzzCheck(f *testing.F) {
	for _, b := range seeds(f) {
		f.Add(b, uint32(0))
		f.Add(b, uint32(12288))
	}
	f.Fuzz(func(t *testing.T, b []byte, off uint32) {
		var h Header
		ref := torus.BlockRef{Volume: 1, INode: 1}
		if h.Decode(b) == nil {
			ref = h.Ref
		}
		n, err := Check(ref, off, b, &h)
		if err == nil && (n > len(b) || n != h.Size() || h.Offset != off || h.Ref != ref) {
			t.Fatalf("accepted %d bytes of %d: %+v", n, len(b), h)
		}
		if err != nil && !errors.Is(err, torus.ErrCorrupt) {
			t.Fatal(err)
		}
	})
}

func FuzzNextScanEntry(f *testing.F) {
	for _, b := range seeds(f) {
		var h Header
		if h.Decode(b) == nil {
			f.Add(AppendScanEntry(AppendScanEntry(nil, h.Offset, b), h.Offset, b))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var h Header
		for len(b) > 0 {
			rest, err := NextScanEntry(b, &h)
			if err != nil {
				if !errors.Is(err, torus.ErrCorrupt) {
					t.Fatal(err)
				}
				return
			}
			if len(rest) >= len(b) {
				t.Fatal("no progress")
			}
			b = rest
		}
	})
}

func BenchmarkCheck(b *testing.B) {
	h := Header{Ref: torus.BlockRef{Volume: 1, INode: 1}, Seq: 1, Extents: []Extent{{Page: 1, Count: 1, Kind: Data}}}
	r := build(&h, 1)
	b.SetBytes(int64(len(r)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Check(h.Ref, 0, r, &h); err != nil {
			b.Fatal(err)
		}
	}
}

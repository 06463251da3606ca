package sim

import (
	"errors"
	"maps"
	"testing"

	"github.com/coreos/torus/record"
)

func whose(err error) string {
	var v *Violation
	if errors.As(err, &v) {
		return v.Checker
	}
	return ""
}

type image map[uint64][]byte

func (i image) read(p uint64) ([]byte, error) {
	if b := i[p]; b != nil {
		return b, nil
	}
	return make([]byte, PageSize), nil
}

// The checker must be able to fail: each case is an image and what it should say.
func TestHistoryCheck(t *testing.T) {
	h := NewHistory(7)
	images := []image{{}}
	for i, p := range []uint64{1, 2, 1, 3, 2, 1} {
		b := make([]byte, PageSize)
		h.Write(p, b)
		next := maps.Clone(images[i])
		next[p] = b
		images = append(images, next)
	}
	h.Flush(3)
	h.Ack(5)
	for n, img := range images {
		got, err := h.Check(img.read, 0)
		if err != nil || got != uint64(n) {
			t.Errorf("prefix %d: got %d, %v", n, got, err)
		}
		want := ""
		if n < 3 {
			want = "D1"
		}
		if _, err := h.Check(img.read, h.Flushed()); whose(err) != want {
			t.Errorf("prefix %d, flushed %d: %v, want %q", n, h.Flushed(), err, want)
		}
		if n >= 3 && n < 5 {
			want = "W1"
		}
		if _, err := h.Check(img.read, h.Acked()); whose(err) != want {
			t.Errorf("prefix %d, acked %d: %v, want %q", n, h.Acked(), err, want)
		}
	}
	mixed := image{1: images[6][1], 2: images[2][2], 3: images[4][3]}
	if _, err := h.Check(mixed.read, 0); whose(err) != "C1" {
		t.Errorf("C1: a page missing in the middle was not noticed: %v", err)
	}
	torn := append([]byte(nil), images[6][1]...)
	copy(torn[2048:], images[3][1][2048:])
	if _, err := h.Check(image{1: torn}.read, 0); whose(err) != "C1" {
		t.Error("a torn page was not noticed")
	}
	if err := h.Decide(4, images[4].read); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Check(images[6].read, 0); whose(err) != "C1" {
		t.Error("C1: what was decided against came back unnoticed")
	}
	if n, err := h.Check(images[4].read, 4); err != nil || n != 4 {
		t.Errorf("after a decision: %d, %v", n, err)
	}
}

// Zeroes fit before the first write and after those that wrote zeroes; failed writes fit both ways.
func TestHistoryZeroesAndFailures(t *testing.T) {
	h := NewHistory(7)
	a, b, c := make([]byte, PageSize), make([]byte, PageSize), make([]byte, PageSize)
	h.Write(1, a)   // 1
	h.Write(1, nil) // 2
	h.Write(2, b)   // 3
	h.Write(1, c)   // 4
	h.Fail(1, 4)
	h.Ack(3)
	for _, x := range []struct {
		img  image
		n    uint64
		whom string
	}{
		{image{2: b}, 4, ""},
		{image{1: c, 2: b}, 4, ""},
		{image{1: a, 2: b}, 0, "C1"},
		{image{}, 0, "W1"},
	} {
		n, err := h.Check(x.img.read, h.Acked())
		if n != x.n || whose(err) != x.whom {
			t.Errorf("%d pages: %d, %v; want %d, %q", len(x.img), n, err, x.n, x.whom)
		}
	}
	// Acknowledgements that come after a decision.
	g := NewHistory(7)
	g.Write(1, make([]byte, PageSize))
	g.Write(1, make([]byte, PageSize))
	if err := g.Decide(1, image{}.read); err != nil {
		t.Fatal(err)
	}
	if g.Late(1) != nil || whose(g.Late(2)) != "L1" {
		t.Error("L1: a late acknowledgement of what had been decided against was not noticed")
	}
	h.AckPage(1, 2)
	if err := h.Read(1, a, h.Floor(1)); whose(err) != "C1" {
		t.Error("a read returned what had been overwritten, unnoticed")
	}
	if err := h.Read(1, c, h.Floor(1)); err != nil {
		t.Error(err)
	}
	if err := h.Read(1, make([]byte, PageSize), h.Floor(1)); whose(err) != "C1" {
		t.Error("a result once read un-happened, unnoticed")
	}
}

// Stamped pages have checksums of their own, or what is checked with those would pass for anything.
func TestStampsDiffer(t *testing.T) {
	sums := map[uint32]bool{}
	for n := range uint64(100) {
		b := make([]byte, PageSize)
		Stamp(b, 7, 1, n+1)
		sums[record.Checksum(b)] = true
	}
	if len(sums) < 100 {
		t.Fatalf("100 pages have %d checksums", len(sums))
	}
}

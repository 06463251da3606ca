package sim

import "testing"

// The checker must be able to fail: each case is an image and what it should say.
func TestHistoryCheck(t *testing.T) {
	h := NewHistory(7)
	var page [PageSize]byte
	images := []map[uint64][]byte{{}}
	for i, p := range []uint64{1, 2, 1, 3, 2, 1} {
		h.Write(p, page[:], false)
		next := map[uint64][]byte{}
		for k, v := range images[i] {
			next[k] = v
		}
		next[p] = append([]byte(nil), page[:]...)
		images = append(images, next)
	}
	h.Flush(3)
	check := func(img map[uint64][]byte, atLeast uint64) (uint64, error) {
		return h.Check(func(p uint64) ([]byte, error) {
			if b := img[p]; b != nil {
				return b, nil
			}
			return make([]byte, PageSize), nil
		}, atLeast)
	}
	for n, img := range images {
		got, err := check(img, 0)
		if err != nil || got != uint64(n) {
			t.Errorf("prefix %d: got %d, %v", n, got, err)
		}
		if _, err := check(img, h.Flushed()); (err == nil) != (n >= 3) {
			t.Errorf("D1: prefix %d, flushed %d: %v", n, h.Flushed(), err)
		}
	}
	mixed := map[uint64][]byte{1: images[6][1], 2: images[2][2], 3: images[4][3]}
	if _, err := check(mixed, 0); err == nil {
		t.Error("C1: a page missing in the middle was not noticed")
	}
	torn := append([]byte(nil), images[6][1]...)
	copy(torn[2048:], images[3][1][2048:])
	if _, err := check(map[uint64][]byte{1: torn}, 0); err == nil {
		t.Error("a torn page was not noticed")
	}
}

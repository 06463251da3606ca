package file

import "testing"

// A volume of any block size that a cluster may have can be written to its last page.
func TestMaxSize(t *testing.T) {
	for _, block := range []uint64{256 << 10, 4 << 20, 64 << 20} {
		t.Logf("blocks of %d KiB: %d GiB", block>>10, MaxSize(block)>>30)
		if MaxSize(block) < 64<<30 || MaxSize(block)%(1<<30) != 0 {
			t.Errorf("blocks of %d bytes make volumes of %d bytes at most", block, MaxSize(block))
		}
	}
}

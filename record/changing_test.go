//go:build !race

package record

import (
	"encoding/binary"
	"testing"
	"time"

	"github.com/coreos/torus"
)

// A record that changes while it is checked, as another process may have it, is refused or not, but does no harm.
func TestCheckOfWhatChanges(t *testing.T) {
	h := Header{Ref: torus.BlockRef{Type: torus.TypeBlock, Volume: 1, INode: 1}, Seq: 1}
	b := make([]byte, HeaderSize)
	h.Encode(b)
	good := binary.LittleEndian.Uint16(b[offUsed:])
	end := time.Now().Add(300 * time.Millisecond)
	go change(b, good, end)
	var x Header
	refused := 0
	for time.Now().Before(end) {
		if _, err := Check(h.Ref, 0, b, &x); err != nil {
			refused++
		}
	}
	if refused == 0 {
		t.Error("it never changed when it mattered")
	}
}

// change is another process, as far as Go can tell.
func change(b []byte, good uint16, end time.Time) {
	for time.Now().Before(end) {
		for range 100 {
			binary.LittleEndian.PutUint16(b[offUsed:], 0xffff)
			for range 50 {
			}
			binary.LittleEndian.PutUint16(b[offUsed:], good)
			for range 500 {
			}
		}
	}
}

package file_test

import (
	"testing"

	"github.com/coreos/torus/file"
	"github.com/coreos/torus/models"
)

// D3: a volume that is deleted keeps what its pins need, and nothing for rewinding, so that no clone may begin there any more.
func TestKeptOfDeleted(t *testing.T) {
	at := func(number, seq uint64) *models.Moment {
		return &models.Moment{Base: &models.Head{Number: number, Seq: 10 * number}, Seq: seq}
	}
	s := &models.VolumeState{Head: at(9, 90).Base, KeptFrom: 3, Pins: []*models.Pin{{Clone: 7, At: at(5, 52)}}}
	for _, c := range []struct {
		m             *models.Moment
		kept, deleted bool
	}{
		{at(2, 20), false, false}, {at(4, 40), true, false}, {at(5, 52), true, true}, {at(5, 50), true, true}, {at(5, 53), true, false}, {at(9, 90), true, false},
	} {
		for _, s.Deleted = range []bool{false, true} {
			if want := c.kept && (!s.Deleted || c.deleted); file.Kept(s, c.m) != want {
				t.Errorf("INode %d, record %d, deleted %v: kept is not %v", c.m.Base.Number, c.m.Seq, s.Deleted, want)
			}
		}
	}
}

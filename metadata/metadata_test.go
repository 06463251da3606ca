package metadata

import (
	"errors"
	"strings"
	"testing"

	"github.com/coreos/torus"
	"github.com/coreos/torus/models"
)

func TestCheckVolumeName(t *testing.T) {
	for _, good := range []string{"demo", "pg-data.1", "a", "größe", "a:b+c=d_e", strings.Repeat("x", MaxVolumeName)} {
		if err := CheckVolumeName(good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
	for _, bad := range []string{"", "a b", "a@b", "a/b", "a,b", "a\\b", "-a", ".", "..", "a\x00", "a\n", "\xff", "a\u200bb", strings.Repeat("x", MaxVolumeName+1)} {
		if err := CheckVolumeName(bad); !errors.Is(err, torus.ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// L1: the answer to "was it made?" is never wrong; where it cannot be known it says so.
func TestSettle(t *testing.T) {
	state := func(rev int64, epoch, txn, head uint64) torus.VolumeState {
		return torus.VolumeState{Revision: rev, VolumeState: &models.VolumeState{Epoch: epoch, Txn: txn, Head: &models.Head{Number: head}}}
	}
	from, to := state(10, 3, 7, 1), state(0, 3, 0, 2).VolumeState
	for _, c := range []struct {
		name string
		now  torus.VolumeState
		want Fate
	}{
		{"nothing happened yet", from, Pending},
		{"made", state(11, 3, 8, 2), Made},
		{"made, then another attach", state(12, 4, 8, 2), Made},
		{"another attach came first", state(11, 4, 7, 1), Void},
		{"another commit of the same state came first", state(11, 3, 8, 9), Void},
		{"another attach and its commit", state(13, 4, 9, 5), Unclear},
	} {
		if got := Settle(from, to, c.now); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

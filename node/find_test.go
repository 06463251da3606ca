package node

import (
	"errors"
	"testing"

	"github.com/coreos/torus"
	"github.com/coreos/torus/models"
)

func TestFindPeer(t *testing.T) {
	a := &models.Peer{Uuid: "aaaaaaaa-0000-4000-8000-000000000001", Address: "tdp://10.0.0.1:40000", Alive: true}
	b := &models.Peer{Uuid: "bbbbbbbb-0000-4000-8000-000000000002", Address: "tdp://10.0.0.2:40000", Alive: true}
	old := &models.Peer{Uuid: "cccccccc-0000-4000-8000-000000000003", Address: "tdp://10.0.0.2:40000"} // b's predecessor, its disk lost
	c := &models.Peer{Uuid: "bbbbbbbb-0000-4000-8000-000000000004", Address: "tdp://10.0.0.4:40000"}
	peers := []*models.Peer{a, b, old, c}
	for name, want := range map[string]*models.Peer{
		a.Uuid: a, "AAAAAAAA-0000-4000-8000-000000000001": a, "aaaaaaaa": a, "tdp://10.0.0.1:40000": a, "10.0.0.1:40000": a,
		"10.0.0.2:40000": b, old.Uuid: old, "bbbbbbbb-0000-4000-8000-000000000004": c, "10.0.0.4:40000": c,
	} {
		if got, err := FindPeer(peers, name); err != nil || got != want {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	for name, want := range map[string]error{"10.0.0.9:40000": torus.ErrNoPeer, "aaaaaaa": torus.ErrNoPeer, "": torus.ErrNoPeer, "zzz": torus.ErrNoPeer} {
		if _, err := FindPeer(peers, name); !errors.Is(err, want) {
			t.Errorf("%q: %v, want %v", name, err, want)
		}
	}
	c.Alive = true
	if _, err := FindPeer(peers, "bbbbbbbb"); !errors.Is(err, torus.ErrInvalid) {
		t.Errorf("two peers are called bbbbbbbb: %v", err)
	}
}

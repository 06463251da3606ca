package temp_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/metadata/metadatatest"
	"github.com/coreos/torus/metadata/temp"
	"github.com/coreos/torus/models"
)

var gmd = torus.GlobalMetadata{ClusterID: "test", BlockSize: torus.DefaultBlockSize}

// stopped is a clock that only Advance moves.
func stopped() time.Time { return time.Unix(1000, 0) }

func TestConformance(t *testing.T) {
	metadatatest.Run(t, func(*testing.T) *metadatatest.Service {
		s := temp.NewServer(stopped)
		return &metadatatest.Service{
			Connect: func(*testing.T) torus.MetadataService { return s.Client() },
			Init:    s.Init,
			Wipe:    func() error { s.Wipe(); return nil },
			TTL:     time.Second,
			Advance: s.Advance,
		}
	})
}

func attached(t *testing.T, m torus.MetadataService) (torus.VolumeID, torus.VolumeState) {
	t.Helper()
	v := &models.Volume{Name: "v"}
	if err := m.CreateVolume(t.Context(), v); err != nil {
		t.Fatal(err)
	}
	lease, err := m.GrantLease(t.Context(), 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	s, err := m.Attach(t.Context(), torus.VolumeID(v.Id), lease, nil, false)
	if err != nil {
		t.Fatal(err)
	}
	return torus.VolumeID(v.Id), s
}

// L1: with each fault a commit is made or not as the fault says, and a late duplicate never.
func TestFaults(t *testing.T) {
	for _, c := range []struct {
		fault      temp.Fault
		made, late bool
	}{
		{temp.FailBefore, false, false},
		{temp.FailAfter, true, true},
		{temp.FailLate, false, true},
	} {
		s := temp.NewServer(stopped)
		if err := s.Init(gmd, nil); err != nil {
			t.Fatal(err)
		}
		m, other := s.Client(), s.Client()
		id, from := attached(t, m)
		m.SetFaults(func(_ context.Context, method string) temp.Fault {
			if method == "Commit" {
				return c.fault
			}
			return temp.None
		})
		commit := func(m *temp.Client, number uint64) error {
			_, err := m.Commit(t.Context(), id, from, &models.VolumeState{Epoch: 1, Head: &models.Head{Number: number}})
			return err
		}
		number := func() uint64 {
			st, err := m.VolumeState(t.Context(), id)
			if err != nil {
				t.Fatal(err)
			}
			return st.GetHead().GetNumber()
		}
		if err := commit(m, 7); !errors.Is(err, torus.ErrMetadataUnavailable) {
			t.Fatalf("%v: %v", c.fault, err)
		}
		if made := number() == 7; made != c.made {
			t.Fatalf("fault %v: made %v", c.fault, made)
		}
		s.Deliver()
		if made := number() == 7; made != c.late {
			t.Fatalf("fault %v, delivered: made %v", c.fault, made)
		}
		if n := s.Deliver(); n != 0 {
			t.Fatalf("%d requests delivered twice", n)
		}
		// The same, overtaken by another commit: it must fail when it arrives.
		from, _ = m.VolumeState(t.Context(), id)
		if err := commit(m, 8); !errors.Is(err, torus.ErrMetadataUnavailable) {
			t.Fatal(err)
		}
		err := commit(other, 9)
		s.Deliver()
		want := uint64(9)
		if c.fault == temp.FailAfter {
			want = 8
			if !errors.Is(err, torus.ErrCompareFailed) {
				t.Fatal(err)
			}
		} else if err != nil {
			t.Fatal(err)
		}
		if got := number(); got != want {
			t.Fatalf("fault %v, overtaken: head %d, want %d", c.fault, got, want)
		}
	}
}

func TestOnChange(t *testing.T) {
	s := temp.NewServer(stopped)
	if err := s.Init(gmd, nil); err != nil {
		t.Fatal(err)
	}
	m, other := s.Client(), s.Client()
	changes := 0
	epoch := uint64(0)
	id := torus.VolumeID(1)
	stop := m.OnChange(func() {
		changes++
		if st, err := m.VolumeState(t.Context(), id); err == nil { // calling back is fine
			epoch = st.GetEpoch()
		}
	})
	id, _ = attached(t, other)
	if epoch != 1 {
		t.Fatalf("epoch %d seen", epoch)
	}
	before := changes
	if _, err := m.Peers(t.Context()); err != nil || changes != before {
		t.Fatalf("a read is a change (%v)", err)
	}
	// The lease ends by the clock alone.
	next, ok := s.NextExpiry()
	if want := stopped().Add(10 * time.Second); !ok || !next.Equal(want) {
		t.Fatalf("next expiry %v, want %v", next, want)
	}
	s.Advance(10*time.Second - 1)
	if changes != before {
		t.Fatal("too early")
	}
	s.Advance(1)
	if changes != before+1 {
		t.Fatalf("%d changes at the end of the lease", changes-before)
	}
	if h, err := m.Holder(t.Context(), id); h != nil || err != nil {
		t.Fatal(h, err)
	}
	if _, ok := s.NextExpiry(); ok {
		t.Fatal("another lease")
	}
	before = changes
	stop()
	if err := other.PutPeer(t.Context(), 0, &models.Peer{Uuid: torus.NewPeerID().String()}); err != nil || changes != before {
		t.Fatalf("told after stop (%v)", err)
	}
	m.OnChange(func() { changes++ })
	m.Close()
	if err := other.PutPeer(t.Context(), 0, &models.Peer{Uuid: torus.NewPeerID().String()}); err != nil || changes != before {
		t.Fatalf("told after Close (%v)", err)
	}
}

// A client cut off from the service hears nothing; once it is back its watch shows what it missed.
func TestWatchWhileCutOff(t *testing.T) {
	s := temp.NewServer(nil)
	if err := s.Init(gmd, nil); err != nil {
		t.Fatal(err)
	}
	m, other := s.Client(), s.Client()
	got := make(chan string, 16)
	go m.WatchRing(t.Context(), func(b []byte) { got <- string(b) })
	asked := make(chan struct{}, 16)
	m.SetFaults(func(context.Context, string) temp.Fault {
		asked <- struct{}{}
		return temp.FailBefore
	})
	<-asked
	for v, r := range []string{"one", "two"} {
		if err := other.SetRing(t.Context(), uint64(v+1), []byte(r)); err != nil {
			t.Fatal(err)
		}
		<-asked // it has looked, in vain
	}
	select {
	case r := <-got:
		t.Fatalf("got %q while cut off", r)
	default:
	}
	m.SetFaults(nil)
	if r := <-got; r != "two" {
		t.Fatalf("got %q", r)
	}
}

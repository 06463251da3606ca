package node

import (
	"context"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coreos/torus"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/peer/repair"
)

// leaseMDS is the part of an MDS that a heartbeat uses, with leases that run out and an off switch.
type leaseMDS struct {
	torus.MetadataService // nil: nothing else is called

	mu      sync.Mutex
	away    bool
	last    torus.LeaseID
	expires map[torus.LeaseID]time.Time
	peer    *models.Peer
	under   torus.LeaseID
}

func (m *leaseMDS) lock() (unlock func(), err error) {
	m.mu.Lock()
	if m.away {
		m.mu.Unlock()
		return nil, torus.ErrMetadataUnavailable
	}
	return m.mu.Unlock, nil
}

func (m *leaseMDS) GrantLease(_ context.Context, ttl time.Duration) (torus.LeaseID, error) {
	unlock, err := m.lock()
	if err != nil {
		return 0, err
	}
	defer unlock()
	m.last++
	m.expires[m.last] = time.Now().Add(ttl)
	return m.last, nil
}

func (m *leaseMDS) valid(id torus.LeaseID) error {
	if at, ok := m.expires[id]; !ok || time.Now().After(at) {
		return torus.ErrLeaseNotFound
	}
	return nil
}

func (m *leaseMDS) RenewLease(_ context.Context, id torus.LeaseID) error {
	unlock, err := m.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if err := m.valid(id); err != nil {
		return err
	}
	m.expires[id] = time.Now().Add(leaseTTL)
	return nil
}

func (m *leaseMDS) RevokeLease(_ context.Context, id torus.LeaseID) error {
	unlock, err := m.lock()
	if err != nil {
		return err
	}
	defer unlock()
	delete(m.expires, id)
	return nil
}

func (m *leaseMDS) PutPeer(_ context.Context, id torus.LeaseID, p *models.Peer) error {
	unlock, err := m.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if err := m.valid(id); err != nil {
		return err
	}
	m.under, m.peer = id, proto.CloneOf(p)
	return nil
}

func (m *leaseMDS) set(away bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.away = away
}

// registered returns the record, nil when its lease has run out.
func (m *leaseMDS) registered() *models.Peer {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.peer == nil || m.valid(m.under) != nil {
		return nil
	}
	return m.peer
}

// coreos/torus 252: a peer whose lease was lost registers again, after however long an absence of the MDS.
func TestHeartbeatRegistersAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &leaseMDS{expires: map[torus.LeaseID]time.Time{}}
		stats := torus.StoreStats{BlockSize: 1, Size: 100}
		h := &heartbeat{mds: m, stats: func() torus.StoreStats { return stats }, repairs: func() repair.Stats { return repair.Stats{Ring: 3, Short: 2} }, peer: &models.Peer{Uuid: "a"}, log: slog.New(slog.DiscardHandler)}
		if err := h.beat(t.Context()); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			h.run(ctx)
			close(done)
		}()
		if p := m.registered(); p.GetShortBlocks() != 2 || p.GetCheckedRing() != 3 {
			t.Fatalf("what the repair says is not in the record: %v", p)
		}
		for range 20 {
			time.Sleep(leaseTTL / 4)
			if m.registered() == nil {
				t.Fatal("not registered although nothing is wrong")
			}
		}
		m.set(true)
		time.Sleep(10 * time.Minute)
		if m.registered() != nil {
			t.Fatal("registered although nobody answers: the test is wrong")
		}
		m.set(false)
		time.Sleep(heartbeatEvery + time.Millisecond)
		if m.registered() == nil {
			t.Fatal("not registered again")
		}

		// Expired while nobody was away: the process was frozen.
		m.mu.Lock()
		delete(m.expires, m.last)
		m.mu.Unlock()
		time.Sleep(heartbeatEvery + time.Millisecond)
		if m.registered() == nil {
			t.Fatal("not registered after its lease was lost")
		}

		cancel()
		<-done
		h.end()
		if m.registered() != nil {
			t.Error("registered after the end")
		}
	})
}

// coreos/torus 401: a cluster that is filling up says so.
func TestHeartbeatSaysHowFull(t *testing.T) {
	m := &leaseMDS{expires: map[torus.LeaseID]time.Time{}}
	stats := torus.StoreStats{BlockSize: 10, Size: 1000}
	h := &heartbeat{mds: m, stats: func() torus.StoreStats { return stats }, repairs: func() repair.Stats { return repair.Stats{Ring: 3, Short: 2} }, peer: &models.Peer{}, log: slog.New(slog.DiscardHandler)}
	for _, c := range []struct {
		used   uint64
		failed bool
		want   string
	}{
		{0, false, StateOK}, {840, false, StateOK}, {850, false, StateNearFull}, {990, false, StateNearFull}, {1000, false, StateFull},
		{100, false, StateOK}, {100, true, StateFailed},
	} {
		stats.Used, stats.Failed = c.used, c.failed
		if err := h.beat(t.Context()); err != nil {
			t.Fatal(err)
		}
		if p := m.registered(); p.State != c.want || p.UsedBytes != c.used || p.SizeBytes != 1000 || p.UpdatedUnixMs == 0 {
			t.Errorf("used %d, failed %v: %v", c.used, c.failed, p)
		}
	}
}

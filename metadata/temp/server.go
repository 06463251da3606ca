// Package temp is the metadata service in memory: for tests, the simulator and clusters that need not outlive
// their process. A Server is the store, what etcd is to a cluster; each node gets a Client of its own, whose requests a
// test can make fail or stay unanswered (SetFaults). Leases end by an injected clock, looked at whenever somebody calls.
//
// No method but the blocking Watch… starts a timer or waits, and nothing here starts a goroutine; so a simulator gets the same
// history from the same calls. To hear of changes without a goroutine, see Client.OnChange.
package temp

import (
	"bytes"
	"fmt"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coreos/torus"
	"github.com/coreos/torus/metadata"
	"github.com/coreos/torus/models"
)

// Server is the store. Safe for concurrent use.
type Server struct {
	clock func() time.Time

	mu        sync.Mutex
	ahead     time.Duration // by which Advance has moved the clock
	revision  int64         // of the last change
	changed   chan struct{} // closed at the next change, or when a client's faults change
	listeners []*listener   // in order of registration
	late      []func()      // requests whose answers were lost before they arrived

	store
}

// store is what Wipe forgets.
type store struct {
	global     *torus.GlobalMetadata
	leases     map[torus.LeaseID]*lease
	lastLease  torus.LeaseID
	peers      map[torus.PeerID]*peer
	peersRev   int64
	rings      [][]byte // version 1 first
	ringRev    int64
	volumes    map[string]*volume
	byID       map[torus.VolumeID]*volume
	lastVolume uint64
}

type lease struct {
	ttl time.Duration
	end time.Time
}

type peer struct {
	*models.Peer
	lease torus.LeaseID // 0: not alive
}

type volume struct {
	*models.Volume
	state    *models.VolumeState
	revision int64          // of state
	holder   *models.Holder // nil: nobody
	lease    torus.LeaseID  // of holder
}

type listener struct{ fn func() }

// NewServer returns an empty store, as etcd is before init. clock says what time it is; nil means time.Now.
func NewServer(clock func() time.Time) *Server {
	if clock == nil {
		clock = time.Now
	}
	s := &Server{clock: clock, changed: make(chan struct{})}
	s.clear()
	return s
}

func (s *Server) clear() {
	last := s.lastLease
	s.store = store{
		leases:    make(map[torus.LeaseID]*lease),
		lastLease: last,
		peers:     make(map[torus.PeerID]*peer),
		volumes:   make(map[string]*volume),
		byID:      make(map[torus.VolumeID]*volume),
	}
}

// Init makes the cluster; ring may be nil, else its version is 1. ErrExists if there is a cluster.
func (s *Server) Init(gmd torus.GlobalMetadata, ring torus.Ring) error {
	if err := metadata.CheckGlobal(gmd); err != nil {
		return fmt.Errorf("init: %w", err)
	}
	var stored []byte
	if ring != nil {
		if ring.Version() != 1 {
			return fmt.Errorf("init with ring version %d: %w (the first is 1)", ring.Version(), torus.ErrNonSequentialRing)
		}
		var err error
		if stored, err = ring.Marshal(); err != nil {
			return fmt.Errorf("init: %w", err)
		}
	}
	return s.do(func() error {
		if s.global != nil {
			return fmt.Errorf("init: a cluster %w (%s)", torus.ErrExists, s.global.ClusterID)
		}
		s.global = &gmd
		if stored != nil {
			s.rings = [][]byte{stored}
			s.ringRev = s.change()
		}
		return nil
	})
}

// Wipe forgets the cluster.
func (s *Server) Wipe() {
	_ = s.do(func() error {
		s.clear()
		s.peersRev = s.change()
		return nil
	})
}

// Advance moves the clock forward and lets go of the leases that are over by then.
func (s *Server) Advance(d time.Duration) {
	s.mu.Lock()
	s.ahead += d
	s.mu.Unlock()
	s.Tick()
}

// Tick lets go of the leases that are over by now. Every request does so first; only who waits for
// an end without asking needs it, at NextExpiry.
func (s *Server) Tick() { _ = s.do(func() error { return nil }) }

// NextExpiry returns when the next lease will be over; false if there is none.
func (s *Server) NextExpiry() (time.Time, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.nextExpiry()
}

func (s *Server) nextExpiry() (next time.Time, ok bool) {
	for _, l := range s.leases {
		if !ok || l.end.Before(next) {
			next, ok = l.end, true
		}
	}
	return next, ok
}

// Deliver carries out the requests that FailLate held back, in their order, and returns how many there were.
// The answers go nowhere.
func (s *Server) Deliver() int {
	s.mu.Lock()
	late := s.late
	s.late = nil
	s.mu.Unlock()
	for _, f := range late {
		f()
	}
	return len(late)
}

// Peek returns the state of a volume as it is, without a request, for a checker beside the cluster; nil if there is no such
// volume. It must not be changed.
func (s *Server) Peek(id torus.VolumeID) *models.VolumeState {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v := s.byID[id]; v != nil {
		return v.state
	}
	return nil
}

// Client returns a new connection to the store.
func (s *Server) Client() *Client { return &Client{s: s, closed: make(chan struct{})} }

func (s *Server) now() time.Time { return s.clock().Add(s.ahead) }

// change is called, with the lock held, by all that changes something; it returns the revision of the change.
func (s *Server) change() int64 {
	s.revision++
	return s.revision
}

// do runs fn with the lock held, after what is over has been let go of, and then tells who listens if anything has changed.
func (s *Server) do(fn func() error) error {
	s.mu.Lock()
	before := s.revision
	s.expire()
	err := fn()
	var tell []*listener
	if s.revision != before {
		s.wake()
		tell = slices.Clone(s.listeners)
	}
	s.mu.Unlock()
	for _, l := range tell {
		l.fn()
	}
	return err
}

// wake makes the blocking watches look again.
func (s *Server) wake() {
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *Server) expire() {
	now := s.now()
	for id, l := range s.leases {
		if !now.Before(l.end) {
			s.endLease(id)
		}
	}
}

func (s *Server) endLease(id torus.LeaseID) {
	delete(s.leases, id)
	for _, p := range s.peers {
		if p.lease == id {
			p.lease = 0
			s.peersRev = s.change()
		}
	}
	for _, v := range s.byID {
		if v.holder != nil && v.lease == id {
			v.holder, v.lease = nil, 0
			s.change()
		}
	}
}

// What follows is called with the lock held.

func (s *Server) initialised() error {
	if s.global == nil {
		return torus.ErrNoGlobalMetadata
	}
	return nil
}

func (s *Server) checkLease(id torus.LeaseID) error {
	if s.leases[id] == nil {
		return fmt.Errorf("lease %x: %w", int64(id), torus.ErrLeaseNotFound)
	}
	return nil
}

func (s *Server) peerList() []*models.Peer {
	list := make([]*models.Peer, 0, len(s.peers))
	for _, p := range s.peers {
		m := proto.CloneOf(p.Peer)
		m.Alive = p.lease != 0
		list = append(list, m)
	}
	slices.SortFunc(list, func(a, b *models.Peer) int { return bytes.Compare([]byte(a.Uuid), []byte(b.Uuid)) })
	return list
}

func (s *Server) volumeByID(op string, id torus.VolumeID) (*volume, error) {
	v := s.byID[id]
	if v == nil {
		return nil, &torus.Error{Op: op, Obj: fmt.Sprintf("volume %x", uint64(id)), Err: torus.ErrNotExist}
	}
	return v, nil
}

func (v *volume) read() torus.VolumeState {
	return torus.VolumeState{VolumeState: proto.CloneOf(v.state), Revision: v.revision}
}

func (v *volume) write(s *Server, state *models.VolumeState) torus.VolumeState {
	v.state, v.revision = state, s.change()
	return v.read()
}

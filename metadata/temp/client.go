package temp

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coreos/torus"
	"github.com/coreos/torus/metadata"
	"github.com/coreos/torus/models"
)

// Fault is what befalls a request on its way.
type Fault int

// The faults. All but None fail with torus.ErrMetadataUnavailable.
const (
	None       Fault = iota
	FailBefore       // lost on the way there: nothing happens
	FailAfter        // the answer is lost: what was asked for happened, or failed, all the same
	FailLate         // the answer is lost, and the request arrives when Server.Deliver is called
)

// Client is one node's connection to a Server. Safe for concurrent use.
type Client struct {
	s *Server

	mu        sync.Mutex
	faults    func(ctx context.Context, method string) Fault
	stops     []func()
	closed    chan struct{}
	closeOnce sync.Once
}

var _ torus.MetadataService = (*Client)(nil)

// SetFaults makes f decide about this client's requests from now on; nil ends that. method is the name in
// torus.MetadataService. A delay is f's to wait for. While f answers a Watch… with a fault nothing new reaches it.
func (c *Client) SetFaults(f func(ctx context.Context, method string) Fault) {
	c.mu.Lock()
	c.faults = f
	c.mu.Unlock()
	c.s.mu.Lock()
	c.s.wake()
	c.s.mu.Unlock()
}

// OnChange has fn called after every change in the store, whoever makes it, on the goroutine that made it, with no lock held. fn may
// call the client; better, it posts that to its loop. It is called until stop is, or the client is closed.
func (c *Client) OnChange(fn func()) (stop func()) {
	l := &listener{fn}
	c.s.mu.Lock()
	c.s.listeners = append(c.s.listeners, l)
	c.s.mu.Unlock()
	stop = func() {
		c.s.mu.Lock()
		defer c.s.mu.Unlock()
		c.s.listeners = slices.DeleteFunc(slices.Clone(c.s.listeners), func(x *listener) bool { return x == l })
	}
	c.mu.Lock()
	c.stops = append(c.stops, stop)
	c.mu.Unlock()
	return stop
}

// Close ends the client's watches. The store lives on.
func (c *Client) Close() error {
	c.closeOnce.Do(func() {
		close(c.closed)
		c.mu.Lock()
		stops := c.stops
		c.stops = nil
		c.mu.Unlock()
		for _, stop := range stops {
			stop()
		}
	})
	return nil
}

// Kind is torus.MetadataTemp.
func (c *Client) Kind() torus.MetadataKind { return torus.MetadataTemp }

func (c *Client) fault(ctx context.Context, method string) (Fault, error) {
	select {
	case <-c.closed:
		return None, fmt.Errorf("%s: metadata service: %w", method, torus.ErrClosed)
	default:
	}
	c.mu.Lock()
	f := c.faults
	c.mu.Unlock()
	fault := None
	if f != nil {
		fault = f(ctx, method)
	}
	if err := ctx.Err(); err != nil {
		return None, unavailable(method, err)
	}
	return fault, nil
}

func unavailable(method string, err error) error {
	return &torus.Error{Op: method, Err: fmt.Errorf("%w: %w", torus.ErrMetadataUnavailable, err)}
}

// call carries out one request. After an error fn may run yet, later and on another goroutine: what it sets
// must not be looked at then, and what it reads must not be the caller's.
func (c *Client) call(ctx context.Context, method string, fn func() error) error {
	fault, err := c.fault(ctx, method)
	if err != nil {
		return err
	}
	switch fault {
	case None:
		return c.s.do(fn)
	case FailAfter:
		_ = c.s.do(fn) // nobody hears of it
	case FailLate:
		c.s.mu.Lock()
		c.s.late = append(c.s.late, func() { _ = c.s.do(fn) })
		c.s.mu.Unlock()
	}
	return unavailable(method, fmt.Errorf("injected fault %d", fault))
}

// GlobalMetadata implements torus.MetadataService, like all that follows.
func (c *Client) GlobalMetadata(ctx context.Context) (torus.GlobalMetadata, error) {
	var g torus.GlobalMetadata
	if err := c.call(ctx, "GlobalMetadata", func() error {
		if err := c.s.initialised(); err != nil {
			return err
		}
		g = *c.s.global
		return nil
	}); err != nil {
		return torus.GlobalMetadata{}, err
	}
	return g, nil
}

func (c *Client) GrantLease(ctx context.Context, ttl time.Duration) (torus.LeaseID, error) {
	if ttl <= 0 {
		return 0, fmt.Errorf("lease of %v: %w", ttl, torus.ErrInvalid)
	}
	var id torus.LeaseID
	if err := c.call(ctx, "GrantLease", func() error {
		c.s.lastLease++
		id = c.s.lastLease
		c.s.leases[id] = &lease{ttl, c.s.now().Add(ttl)}
		return nil
	}); err != nil {
		return 0, err
	}
	return id, nil
}

func (c *Client) RenewLease(ctx context.Context, id torus.LeaseID) error {
	return c.call(ctx, "RenewLease", func() error {
		if err := c.s.checkLease(id); err != nil {
			return err
		}
		l := c.s.leases[id]
		l.end = c.s.now().Add(l.ttl)
		return nil
	})
}

func (c *Client) RevokeLease(ctx context.Context, id torus.LeaseID) error {
	return c.call(ctx, "RevokeLease", func() error {
		c.s.endLease(id)
		return nil
	})
}

func (c *Client) PutPeer(ctx context.Context, lease torus.LeaseID, p *models.Peer) error {
	id, err := torus.ParsePeerID(p.GetUuid())
	if err != nil {
		return fmt.Errorf("PutPeer: %w", err)
	}
	m := proto.CloneOf(p)
	m.Uuid, m.Alive = id.String(), false
	return c.call(ctx, "PutPeer", func() error {
		s := c.s
		if err := s.initialised(); err != nil {
			return err
		}
		r := s.peers[id]
		if r == nil {
			r = &peer{}
		}
		if lease != 0 {
			if err := s.checkLease(lease); err != nil {
				return err
			}
			r.lease = lease
		}
		r.Peer = m
		s.peers[id] = r
		s.peersRev = s.change()
		return nil
	})
}

func (c *Client) DeletePeer(ctx context.Context, id torus.PeerID) error {
	return c.call(ctx, "DeletePeer", func() error {
		if c.s.peers[id] == nil {
			return fmt.Errorf("peer %s: %w", id, torus.ErrNotExist)
		}
		delete(c.s.peers, id)
		c.s.peersRev = c.s.change()
		return nil
	})
}

func (c *Client) Peers(ctx context.Context) ([]*models.Peer, error) {
	var list []*models.Peer
	if err := c.call(ctx, "Peers", func() error {
		list = c.s.peerList()
		return nil
	}); err != nil {
		return nil, err
	}
	return list, nil
}

func (c *Client) Ring(ctx context.Context) ([]byte, error) {
	var ring []byte
	if err := c.call(ctx, "Ring", func() error {
		n := len(c.s.rings)
		if n == 0 {
			return fmt.Errorf("ring: %w", torus.ErrNotExist)
		}
		ring = bytes.Clone(c.s.rings[n-1])
		return nil
	}); err != nil {
		return nil, err
	}
	return ring, nil
}

func (c *Client) RingAt(ctx context.Context, version uint64) ([]byte, error) {
	var ring []byte
	if err := c.call(ctx, "RingAt", func() error {
		if version < 1 || version > uint64(len(c.s.rings)) {
			return fmt.Errorf("ring version %d: %w", version, torus.ErrNotExist)
		}
		ring = bytes.Clone(c.s.rings[version-1])
		return nil
	}); err != nil {
		return nil, err
	}
	return ring, nil
}

func (c *Client) SetRing(ctx context.Context, version uint64, ring []byte) error {
	ring = bytes.Clone(ring)
	return c.call(ctx, "SetRing", func() error {
		if err := c.s.initialised(); err != nil {
			return err
		}
		if have := uint64(len(c.s.rings)); version != have+1 {
			return fmt.Errorf("ring version %d: %w (it is at %d)", version, torus.ErrNonSequentialRing, have)
		}
		c.s.rings = append(c.s.rings, ring)
		c.s.ringRev = c.s.change()
		return nil
	})
}

func (c *Client) CreateVolume(ctx context.Context, v *models.Volume) error {
	if err := metadata.CheckVolumeName(v.GetName()); err != nil {
		return err
	}
	m := proto.CloneOf(v)
	var id uint64
	if err := c.call(ctx, "CreateVolume", func() error {
		s := c.s
		if err := s.initialised(); err != nil {
			return err
		}
		if s.volumes[m.Name] != nil {
			return &torus.Error{Op: "CreateVolume", Obj: "volume " + m.Name, Err: torus.ErrExists}
		}
		if s.lastVolume >= uint64(torus.VolumeMax) {
			return fmt.Errorf("volume ids: %w", torus.ErrOutOfSpace)
		}
		s.lastVolume++
		id, m.Id = s.lastVolume, s.lastVolume
		r := &volume{Volume: m}
		r.write(s, &models.VolumeState{})
		s.volumes[m.Name], s.byID[torus.VolumeID(id)] = r, r
		return nil
	}); err != nil {
		return err
	}
	v.Id = id
	return nil
}

func (c *Client) Volume(ctx context.Context, name string) (*models.Volume, error) {
	var m *models.Volume
	if err := c.call(ctx, "Volume", func() error {
		v := c.s.volumes[name]
		if v == nil {
			return &torus.Error{Op: "Volume", Obj: "volume " + name, Err: torus.ErrNotExist}
		}
		m = proto.CloneOf(v.Volume)
		return nil
	}); err != nil {
		return nil, err
	}
	return m, nil
}

func (c *Client) Volumes(ctx context.Context) ([]*models.Volume, error) {
	var list []*models.Volume
	if err := c.call(ctx, "Volumes", func() error {
		for _, v := range c.s.volumes {
			list = append(list, proto.CloneOf(v.Volume))
		}
		return nil
	}); err != nil {
		return nil, err
	}
	slices.SortFunc(list, func(a, b *models.Volume) int { return strings.Compare(a.Name, b.Name) })
	return list, nil
}

func (c *Client) UpdateVolume(ctx context.Context, name string, change func(*models.Volume) error) error {
	return c.call(ctx, "UpdateVolume", func() error {
		v := c.s.volumes[name]
		if v == nil {
			return &torus.Error{Op: "UpdateVolume", Obj: "volume " + name, Err: torus.ErrNotExist}
		}
		to := proto.CloneOf(v.Volume)
		if err := change(to); err != nil {
			return err
		}
		if err := metadata.CheckUpdate(v.Volume, to); err != nil {
			return err
		}
		if to.Name != name && c.s.volumes[to.Name] != nil {
			return &torus.Error{Op: "UpdateVolume", Obj: "volume " + to.Name, Err: torus.ErrExists}
		}
		delete(c.s.volumes, name)
		v.Volume = to
		c.s.volumes[to.Name] = v
		c.s.change()
		return nil
	})
}

func (c *Client) DeleteVolume(ctx context.Context, name string) error {
	return c.call(ctx, "DeleteVolume", func() error {
		v := c.s.volumes[name]
		if v == nil {
			return &torus.Error{Op: "DeleteVolume", Obj: "volume " + name, Err: torus.ErrNotExist}
		}
		if v.holder != nil {
			return metadata.Locked("DeleteVolume", "volume "+name, v.holder)
		}
		delete(c.s.volumes, name)
		delete(c.s.byID, torus.VolumeID(v.Id))
		c.s.change()
		return nil
	})
}

func (c *Client) VolumeState(ctx context.Context, id torus.VolumeID) (torus.VolumeState, error) {
	var state torus.VolumeState
	if err := c.call(ctx, "VolumeState", func() error {
		v, err := c.s.volumeByID("VolumeState", id)
		if err != nil {
			return err
		}
		state = v.read()
		return nil
	}); err != nil {
		return torus.VolumeState{}, err
	}
	return state, nil
}

func (c *Client) VolumeStates(ctx context.Context, after torus.VolumeID, limit int) (torus.VolumeStates, error) {
	var page torus.VolumeStates
	if err := c.call(ctx, "VolumeStates", func() error {
		s := c.s
		if err := s.initialised(); err != nil {
			return err
		}
		page = torus.VolumeStates{ClusterID: s.global.ClusterID, LastID: torus.VolumeID(s.lastVolume)}
		var ids []torus.VolumeID
		for id := range s.byID {
			if id > after {
				ids = append(ids, id)
			}
		}
		slices.Sort(ids)
		page.More = len(ids) > limit
		for _, id := range ids[:min(len(ids), limit)] {
			page.List = append(page.List, torus.ListedState{ID: id, VolumeState: s.byID[id].read()})
		}
		return nil
	}); err != nil {
		return torus.VolumeStates{}, err
	}
	return page, nil
}

func (c *Client) Holder(ctx context.Context, id torus.VolumeID) (*models.Holder, error) {
	var h *models.Holder
	if err := c.call(ctx, "Holder", func() error {
		v, err := c.s.volumeByID("Holder", id)
		if err != nil {
			return err
		}
		if v.holder != nil {
			h = proto.CloneOf(v.holder)
		}
		return nil
	}); err != nil {
		return nil, err
	}
	return h, nil
}

func (c *Client) Attach(ctx context.Context, id torus.VolumeID, lease torus.LeaseID, h *models.Holder, force bool) (torus.VolumeState, error) {
	holder := metadata.HolderAt(h, 0)
	var state torus.VolumeState
	if err := c.call(ctx, "Attach", func() error {
		s := c.s
		v, err := s.volumeByID("Attach", id)
		if err != nil {
			return err
		}
		if err := s.checkLease(lease); err != nil {
			return err
		}
		if v.holder != nil && v.lease != lease && !force {
			return metadata.Locked("Attach", "volume "+v.Name, v.holder)
		}
		next := proto.CloneOf(v.state)
		next.Epoch++
		state = v.write(s, next)
		holder.Epoch = next.Epoch
		v.holder, v.lease = holder, lease
		return nil
	}); err != nil {
		return torus.VolumeState{}, err
	}
	return state, nil
}

func (c *Client) Commit(ctx context.Context, id torus.VolumeID, from torus.VolumeState, to *models.VolumeState) (torus.VolumeState, error) {
	next, err := metadata.NextState(from, to)
	if err != nil {
		return torus.VolumeState{}, err
	}
	return c.replace(ctx, "Commit", id, from, next)
}

func (c *Client) Amend(ctx context.Context, id torus.VolumeID, from torus.VolumeState, to *models.VolumeState) (torus.VolumeState, error) {
	next, err := metadata.AmendedState(from, to)
	if err != nil {
		return torus.VolumeState{}, err
	}
	return c.replace(ctx, "Amend", id, from, next)
}

// replace makes next the state if nothing has changed since from was read.
func (c *Client) replace(ctx context.Context, method string, id torus.VolumeID, from torus.VolumeState, next *models.VolumeState) (torus.VolumeState, error) {
	from.VolumeState = proto.CloneOf(from.VolumeState)
	var state torus.VolumeState
	if err := c.call(ctx, method, func() error {
		v, err := c.s.volumeByID(method, id)
		if err != nil {
			return err
		}
		if v.revision != from.Revision {
			return metadata.CompareFailed("volume "+v.Name, from, v.read())
		}
		state = v.write(c.s, next)
		return nil
	}); err != nil {
		return torus.VolumeState{}, err
	}
	return state, nil
}

func (c *Client) Relock(ctx context.Context, id torus.VolumeID, epoch uint64, lease torus.LeaseID, h *models.Holder) error {
	holder := metadata.HolderAt(h, epoch)
	return c.call(ctx, "Relock", func() error {
		v, err := c.s.volumeByID("Relock", id)
		if err != nil {
			return err
		}
		if err := c.s.checkLease(lease); err != nil {
			return err
		}
		if v.state.Epoch != epoch {
			return metadata.Fenced("Relock", "volume "+v.Name, epoch, v.state.Epoch)
		}
		if v.holder != nil && v.holder.Epoch != epoch {
			return metadata.Locked("Relock", "volume "+v.Name, v.holder)
		}
		v.holder, v.lease = holder, lease
		c.s.change()
		return nil
	})
}

func (c *Client) Unlock(ctx context.Context, id torus.VolumeID, epoch uint64) error {
	return c.call(ctx, "Unlock", func() error {
		if v := c.s.byID[id]; v != nil && v.holder != nil && v.holder.Epoch == epoch {
			v.holder, v.lease = nil, 0
			c.s.change()
		}
		return nil
	})
}

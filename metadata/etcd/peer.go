package etcd

import (
	"context"
	"fmt"
	"sort"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	"github.com/coreos/torus"
	"github.com/coreos/torus/models"
)

// PutPeer is a peer's heartbeat, so it writes one key only as long as the sign of life is under the same lease.
func (c *Client) PutPeer(ctx context.Context, lease torus.LeaseID, p *models.Peer) error {
	id, err := torus.ParsePeerID(p.GetUuid())
	if err != nil {
		return fmt.Errorf("PutPeer: %w", err)
	}
	m := proto.CloneOf(p)
	m.Uuid, m.Alive = id.String(), false
	stored, err := proto.Marshal(m)
	if err != nil {
		return fmt.Errorf("PutPeer %s: %v: %w", m.Uuid, err, torus.ErrInvalid)
	}
	puts := []clientv3.Op{clientv3.OpPut(c.keys.peer(m.Uuid), string(stored))}
	if lease != 0 {
		node := c.keys.node(m.Uuid)
		puts = append(puts, clientv3.OpTxn(
			[]clientv3.Cmp{clientv3.Compare(clientv3.LeaseValue(node), "=", int64(lease))},
			nil,
			[]clientv3.Op{clientv3.OpPut(node, m.Address, clientv3.WithLease(clientv3.LeaseID(lease)))}))
	}
	return c.write(ctx, "PutPeer", "peer "+m.Uuid, func(ctx context.Context, _ bool) error {
		resp, err := c.txn(ctx, []clientv3.Cmp{present(c.keys.global())}, puts, nil)
		if err != nil {
			return err
		}
		if !resp.Succeeded {
			return torus.ErrNoGlobalMetadata
		}
		return nil
	})
}

func (c *Client) DeletePeer(ctx context.Context, id torus.PeerID) error {
	peer := c.keys.peer(id.String())
	return c.write(ctx, "DeletePeer", "peer "+id.String(), func(ctx context.Context, again bool) error {
		resp, err := c.txn(ctx,
			[]clientv3.Cmp{present(peer)},
			[]clientv3.Op{clientv3.OpDelete(peer), clientv3.OpDelete(c.keys.node(id.String()))}, nil)
		if err != nil {
			return err
		}
		if !resp.Succeeded && !again {
			return torus.ErrNotExist
		}
		return nil
	})
}

func (c *Client) Peers(ctx context.Context) ([]*models.Peer, error) {
	var list []*models.Peer
	err := c.read(ctx, "Peers", "", func(ctx context.Context) error {
		from, end := c.keys.nodesAndPeers()
		resp, err := c.get(ctx, from, clientv3.WithRange(end))
		if err != nil {
			return err
		}
		set := newPeerSet(c.keys)
		if err := set.reset(resp.Kvs); err != nil {
			return err
		}
		list = set.list()
		return nil
	})
	return list, err
}

// WatchPeers keeps the list up to date from the events; etcd is asked for all of it only at the start.
func (c *Client) WatchPeers(ctx context.Context, fn func([]*models.Peer)) error {
	set := newPeerSet(c.keys)
	from, end := c.keys.nodesAndPeers()
	return c.watch(ctx, "WatchPeers", "", from, end, watcher{
		reset: set.reset,
		event: set.event,
		tell:  func() error { fn(set.list()); return nil },
	})
}

// peerSet is the keys of nodesAndPeers, put together.
type peerSet struct {
	keys  keys
	peers map[string]*models.Peer
	nodes map[string]bool
}

func newPeerSet(k keys) *peerSet { return &peerSet{keys: k} }

func (s *peerSet) reset(kvs []*mvccpb.KeyValue) error {
	s.peers, s.nodes = make(map[string]*models.Peer), make(map[string]bool)
	for _, kv := range kvs {
		if err := s.put(kv); err != nil {
			return err
		}
	}
	return nil
}

func (s *peerSet) put(kv *mvccpb.KeyValue) error {
	uuid, node := s.keys.peerKey(string(kv.Key))
	if node {
		s.nodes[uuid] = true
		return nil
	}
	p := &models.Peer{}
	if err := decode(kv, p); err != nil {
		return err
	}
	s.peers[uuid] = p
	return nil
}

func (s *peerSet) event(e *clientv3.Event) error {
	if e.Type == clientv3.EventTypePut {
		return s.put(e.Kv)
	}
	uuid, node := s.keys.peerKey(string(e.Kv.Key))
	if node {
		delete(s.nodes, uuid)
	} else {
		delete(s.peers, uuid)
	}
	return nil
}

// list returns copies, sorted by UUID.
func (s *peerSet) list() []*models.Peer {
	list := make([]*models.Peer, 0, len(s.peers))
	for uuid, p := range s.peers {
		p = proto.CloneOf(p)
		p.Alive = s.nodes[uuid]
		list = append(list, p)
	}
	sort.Slice(list, func(i, j int) bool { return list[i].Uuid < list[j].Uuid })
	return list
}

package etcd

import (
	"bytes"
	"context"
	"fmt"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/coreos/torus"
)

func (c *Client) Ring(ctx context.Context) ([]byte, error) {
	return c.ringUnder(ctx, "Ring", "ring", c.keys.ring())
}

func (c *Client) RingAt(ctx context.Context, version uint64) ([]byte, error) {
	return c.ringUnder(ctx, "RingAt", fmt.Sprintf("ring version %d", version), c.keys.ringAt(version))
}

func (c *Client) ringUnder(ctx context.Context, method, what, key string) (ring []byte, err error) {
	err = c.read(ctx, method, what, func(ctx context.Context) error {
		resp, err := c.get(ctx, key)
		if err != nil {
			return err
		}
		if len(resp.Kvs) == 0 {
			return torus.ErrNotExist
		}
		ring = resp.Kvs[0].Value
		return nil
	})
	return ring, err
}

// SetRing needs to read nothing: versions are never skipped or removed, so the current one is the one
// before if that is there and this is not.
func (c *Client) SetRing(ctx context.Context, version uint64, ring []byte) error {
	what := fmt.Sprintf("ring version %d", version)
	cmps := []clientv3.Cmp{present(c.keys.global()), absent(c.keys.ringAt(version))}
	switch version {
	case 0:
		return c.fail("SetRing", what, torus.ErrNonSequentialRing, "")
	case 1:
		cmps = append(cmps, absent(c.keys.ring()))
	default:
		cmps = append(cmps, present(c.keys.ringAt(version-1)))
	}
	return c.write(ctx, "SetRing", what, func(ctx context.Context, again bool) error {
		resp, err := c.txn(ctx, cmps,
			[]clientv3.Op{clientv3.OpPut(c.keys.ring(), string(ring)), clientv3.OpPut(c.keys.ringAt(version), string(ring))},
			[]clientv3.Op{clientv3.OpGet(c.keys.ringAt(version)), clientv3.OpGet(c.keys.global())})
		switch {
		case err != nil || resp.Succeeded:
			return err
		case again && found(resp, 0) != nil && bytes.Equal(value(resp, 0), ring):
			return nil
		case found(resp, 1) == nil:
			return torus.ErrNoGlobalMetadata
		}
		return torus.ErrNonSequentialRing
	})
}

// WatchRing says nothing while there is no ring.
func (c *Client) WatchRing(ctx context.Context, fn func(ring []byte)) error {
	var ring []byte
	return c.watch(ctx, "WatchRing", "ring", c.keys.ring(), "", watcher{
		reset: func(kvs []*mvccpb.KeyValue) error {
			ring = nil
			if len(kvs) > 0 {
				ring = kvs[0].Value
			}
			return nil
		},
		event: func(e *clientv3.Event) error {
			ring = nil
			if e.Type == clientv3.EventTypePut {
				ring = e.Kv.Value
			}
			return nil
		},
		tell: func() error {
			if ring != nil {
				fn(ring)
			}
			return nil
		},
	})
}

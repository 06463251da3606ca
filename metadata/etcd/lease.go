package etcd

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/coreos/torus"
)

// GrantLease rounds ttl up to seconds; etcd grants no less than one and a half times its election timeout (1.5 s by default).
func (c *Client) GrantLease(ctx context.Context, ttl time.Duration) (torus.LeaseID, error) {
	if ttl <= 0 {
		return 0, fmt.Errorf("lease of %v: %w", ttl, torus.ErrInvalid)
	}
	var id torus.LeaseID
	// One granted without our knowing ends by itself.
	err := c.write(ctx, "GrantLease", "", func(ctx context.Context, _ bool) error {
		resp, err := c.etcd.Grant(ctx, int64((ttl+time.Second-1)/time.Second))
		if err != nil {
			return &rpcError{err}
		}
		id = torus.LeaseID(resp.ID)
		return nil
	})
	return id, err
}

// RenewLease does not go through clientv3's KeepAliveOnce, which tries again without a pause while etcd is away.
func (c *Client) RenewLease(ctx context.Context, id torus.LeaseID) error {
	return c.read(ctx, "RenewLease", fmt.Sprintf("lease %x", int64(id)), func(ctx context.Context) error {
		ctx, cancel := context.WithCancel(ctx) // ends the stream
		defer cancel()
		stream, err := c.leases.LeaseKeepAlive(ctx)
		if err != nil {
			return &rpcError{err}
		}
		if err := stream.Send(&etcdserverpb.LeaseKeepAliveRequest{ID: int64(id)}); err != nil {
			// The reason comes with Recv.
			if _, rerr := stream.Recv(); rerr != nil {
				err = rerr
			}
			return &rpcError{err}
		}
		resp, err := stream.Recv()
		if err != nil {
			return &rpcError{err}
		}
		if resp.TTL <= 0 {
			return torus.ErrLeaseNotFound
		}
		return nil
	})
}

func (c *Client) RevokeLease(ctx context.Context, id torus.LeaseID) error {
	err := c.write(ctx, "RevokeLease", fmt.Sprintf("lease %x", int64(id)), func(ctx context.Context, _ bool) error {
		if _, err := c.etcd.Revoke(ctx, clientv3.LeaseID(id)); err != nil {
			return &rpcError{err}
		}
		return nil
	})
	if errors.Is(err, torus.ErrLeaseNotFound) {
		return nil
	}
	return err
}

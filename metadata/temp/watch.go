package temp

import (
	"bytes"
	"context"
	"fmt"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/models"
)

func (c *Client) WatchPeers(ctx context.Context, fn func([]*models.Peer)) error {
	return c.watch(ctx, "WatchPeers", func() (int64, func(), error) {
		list := c.s.peerList()
		return c.s.peersRev, func() { fn(list) }, nil
	})
}

// WatchRing says nothing while there is no ring.
func (c *Client) WatchRing(ctx context.Context, fn func(ring []byte)) error {
	return c.watch(ctx, "WatchRing", func() (int64, func(), error) {
		n := len(c.s.rings)
		if n == 0 {
			return 0, nil, nil
		}
		ring := bytes.Clone(c.s.rings[n-1])
		return c.s.ringRev, func() { fn(ring) }, nil
	})
}

// WatchVolume returns ErrNotExist once there is no such volume.
func (c *Client) WatchVolume(ctx context.Context, id torus.VolumeID, fn func(torus.VolumeState)) error {
	return c.watch(ctx, "WatchVolume", func() (int64, func(), error) {
		v, err := c.s.volumeByID("WatchVolume", id)
		if err != nil {
			return 0, nil, err
		}
		state := v.read()
		return state.Revision, func() { fn(state) }, nil
	})
}

// watch calls read, with the lock held, after every change, and what that returns whenever its revision is another.
func (c *Client) watch(ctx context.Context, method string, read func() (revision int64, tell func(), err error)) error {
	seen := int64(-1)
	for {
		fault, err := c.fault(ctx, method)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			return err
		}
		// The channel is fetched before reading, so that no change falls between the two.
		c.s.mu.Lock()
		changed := c.s.changed
		c.s.mu.Unlock()
		var tell func()
		if fault == None {
			var revision int64
			err := c.s.do(func() (err error) {
				revision, tell, err = read()
				return err
			})
			if err != nil {
				return err
			}
			if tell != nil && revision != seen {
				seen = revision
				tell()
			}
		}
		c.s.mu.Lock()
		next, leases := c.s.nextExpiry()
		wait := next.Sub(c.s.now())
		c.s.mu.Unlock()
		var end <-chan time.Time
		var timer *time.Timer
		if leases {
			timer = time.NewTimer(max(wait, time.Millisecond))
			end = timer.C
		}
		select {
		case <-changed:
		case <-end:
		case <-ctx.Done():
			err = ctx.Err()
		case <-c.closed:
			err = fmt.Errorf("%s: metadata service: %w", method, torus.ErrClosed)
		}
		if timer != nil {
			timer.Stop()
		}
		if err != nil {
			return err
		}
	}
}

package etcd

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/coreos/torus"
)

// watcher is what a watch keeps up to date. An error ends the watch.
type watcher struct {
	reset func(kvs []*mvccpb.KeyValue) error // this is all there is
	event func(e *clientv3.Event) error      // this has changed
	tell  func() error                       // time to tell the caller
}

// watch lists [from, end) (the key from alone if end is empty) and follows it until ctx ends. It lists again whenever it may have
// missed something: after etcd has compacted what it had not seen yet, or the member asked has lost its leader. Reconnections in
// between are the library's; it goes on from the revision it has.
func (c *Client) watch(ctx context.Context, method, what, from, end string, w watcher) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(c.closed, cancel)
	defer stop()
	opts := []clientv3.OpOption{}
	if end != "" {
		opts = append(opts, clientv3.WithRange(end))
	}
	ended := func() error {
		if c.closed.Err() != nil {
			return c.fail(method, what, fmt.Errorf("metadata service: %w", torus.ErrClosed), "")
		}
		return ctx.Err()
	}
	wait := firstWait
	for ctx.Err() == nil {
		var listed *clientv3.GetResponse
		err := c.read(ctx, method, what, func(ctx context.Context) (err error) {
			listed, err = c.get(ctx, from, opts...)
			return err
		})
		if ctx.Err() != nil {
			break
		}
		if errors.Is(err, torus.ErrMetadataUnavailable) {
			c.log.Warn("watch: etcd is away, trying on", "method", method, "error", err)
			c.pause(ctx, longestWait)
			continue
		}
		if err != nil {
			return err
		}
		if err := w.reset(listed.Kvs); err != nil {
			return c.fail(method, what, err, "")
		}
		if err := w.tell(); err != nil {
			return c.fail(method, what, err, "")
		}
		progress, err := c.follow(ctx, method, from, append(opts, clientv3.WithRev(listed.Header.Revision+1)), w)
		if err != nil {
			return c.fail(method, what, err, "")
		}
		if progress {
			wait = firstWait
		}
		c.pause(ctx, wait)
		wait = min(2*wait, longestWait)
	}
	return ended()
}

// follow hands on events until etcd ends the stream, which is no error, or w fails.
func (c *Client) follow(ctx context.Context, method, from string, opts []clientv3.OpOption, w watcher) (progress bool, err error) {
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	stream := c.etcd.Watch(ctx, from, opts...)
	for resp := range stream {
		changed := false
		for more := true; more; {
			if err := resp.Err(); err != nil {
				if ctx.Err() == nil {
					c.log.Info("watch: listing anew", "method", method, "error", err)
				}
				return progress, nil
			}
			for _, e := range resp.Events {
				if err := w.event(e); err != nil {
					return progress, err
				}
				changed = true
			}
			// What else has come meanwhile is told in the same call.
			select {
			case resp, more = <-stream:
			default:
				more = false
			}
		}
		if changed {
			progress = true
			if err := w.tell(); err != nil {
				return progress, err
			}
		}
	}
	return progress, nil
}

func (c *Client) pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

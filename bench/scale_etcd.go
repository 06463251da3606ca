package main

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coreos/torus"
	"github.com/coreos/torus/models"
)

// metadata is what the embedded etcd does on this machine when it is asked as much as it can take: the measure for what it is asked
// elsewhere in the report.
func (s *scale) metadata(ctx context.Context) error {
	const askers, volumes = 64, 1000
	t := &table{
		title: "What the embedded etcd can do",
		note: "64 askers at once, over one connection, each with a volume of its own, of 1,000; their CPU time, in this process, competes for the same processors. CPU seconds for 10,000, of the peer that has etcd inside; bytes of gRPC " +
			"out of etcd, and into it, for one. A commit is fsynced.",
		head: []string{"call", "calls / s", "CPU", "bytes out", "bytes in"},
	}
	c, remove, err := s.cluster(ctx, clusterOptions{peers: 1, peerSize: 64 << 20})
	if err != nil {
		return err
	}
	defer remove()
	mds, err := c.mds(ctx)
	if err != nil {
		return err
	}
	defer mds.Close()
	names := volumeNames(volumes)
	if err := c.create(ctx, 1<<30, names...); err != nil {
		return err
	}
	states := make([]torus.VolumeState, volumes)
	ids := make([]torus.VolumeID, volumes)
	for i, name := range names {
		v, err := mds.Volume(ctx, name)
		if err != nil {
			return err
		}
		ids[i] = torus.VolumeID(v.Id)
		if states[i], err = mds.VolumeState(ctx, ids[i]); err != nil {
			return err
		}
		// Of the size that a state in use has.
		states[i].Open = &models.Window{Spans: []*models.Span{{Lo: 1 << 20, Hi: 1<<20 + 32, RingVersion: 7, Replication: 2}}}
		states[i].Head = &models.Head{Number: 1 << 20, Seq: 1 << 30, SizeBytes: 1 << 40, CommittedUnixMs: 1 << 40, LiveBytes: 1 << 39, StoredBytes: 1 << 39, Inode: &models.Extent{Index: 1 << 20, Offset: 1 << 20, Length: 1 << 10, Crc32C: 1 << 31}}
		if states[i], err = mds.Commit(ctx, ids[i], states[i], states[i].VolumeState); err != nil {
			return err
		}
	}
	for _, x := range []struct {
		title string
		call  func(ctx context.Context, i int) error
	}{
		{"VolumeState", func(ctx context.Context, i int) error {
			_, err := mds.VolumeState(ctx, ids[i])
			return err
		}},
		{"VolumeStates, of 1,000 volumes", func(ctx context.Context, i int) error {
			_, err := mds.VolumeStates(ctx, 0, volumes)
			return err
		}},
		{"Commit", func(ctx context.Context, i int) error {
			to := proto.CloneOf(states[i].VolumeState)
			to.Txn++
			st, err := mds.Commit(ctx, ids[i], states[i], to)
			if err == nil {
				states[i] = st
			}
			return err
		}},
	} {
		if err := c.rest(ctx); err != nil {
			return err
		}
		span, err := c.begin(ctx)
		if err != nil {
			return err
		}
		var calls atomic.Int64
		errs := make([]error, askers)
		var all sync.WaitGroup
		for i := range askers {
			all.Go(func() {
				for errs[i] == nil && time.Since(span.began) < time.Duration(s.seconds)*time.Second {
					errs[i] = x.call(ctx, i)
					calls.Add(1)
				}
			})
		}
		all.Wait()
		if err := errors.Join(append(errs, span.end(ctx))...); err != nil {
			return err
		}
		n := float64(calls.Load())
		cpu, _ := span.cpu(kindEtcd)
		s.say("%s: %.0f/s", x.title, n/span.seconds)
		t.add(x.title, thousands(n/span.seconds), significant(cpu/n*10_000), thousands(span.etcd("etcd_network_client_grpc_sent_bytes_total")/n), thousands(span.etcd("etcd_network_client_grpc_received_bytes_total")/n))
	}
	return s.print(t)
}

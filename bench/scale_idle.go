package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// resting is a cluster that has nothing to do.
type resting struct {
	title            string
	peers            int
	created, written int  // volumes
	attached         bool // the written ones
	c                *cluster
	hold             held
	span             span
}

// idleness watches clusters that do nothing, all of them at the same time: what they use is theirs, whoever else runs.
func (s *scale) idleness(ctx context.Context) error {
	all := []*resting{
		{title: "no volume", peers: 3},
		{title: "1,000 volumes created", peers: 3, created: 1000},
		{title: "64 volumes written and detached", peers: 3, created: 64, written: 64},
		{title: "64 volumes attached", peers: 3, created: 64, written: 64, attached: true},
		{title: "no volume", peers: 6},
		{title: "no volume", peers: 12},
	}
	for _, r := range all {
		s.say("preparing: %s, %d peers", r.title, r.peers)
		remove, err := r.prepare(ctx, s)
		if remove != nil {
			defer remove()
		}
		if err != nil {
			return fmt.Errorf("%s: %w", r.title, err)
		}
	}
	s.say("watching for %v", s.idle)
	// Until what was written is checkpointed, and the peers have written their files through.
	if err := pause(ctx, min(s.idle, 40*time.Second)); err != nil {
		return err
	}
	for _, r := range all {
		var err error
		if r.span, err = r.c.begin(ctx); err != nil {
			return err
		}
	}
	profiled := make(chan error, 1)
	go func() { profiled <- s.profileIdle(ctx, all) }()
	if err := pause(ctx, s.idle); err != nil {
		return err
	}
	for _, r := range all {
		if err := r.span.end(ctx); err != nil {
			return err
		}
	}
	if err := <-profiled; err != nil {
		return err
	}
	cpu := &table{
		title: "Idle: CPU and memory",
		note:  "CPU seconds a minute, MiB of memory that is no file of a disk: of torusblk, of the peer with etcd inside, of each other peer; and of torusblk's heap, collected. TDP is what peers receive and answer, all together; a ping counts as one.",
		head:  []string{"state", "peers", "torusblk CPU", "peer + etcd CPU", "other peer CPU", "torusblk MiB", "peer + etcd MiB", "other peer MiB", "torusblk heap MiB", "TDP requests / min", "TDP KiB / min", "connections"},
	}
	mds := &table{
		title: "Idle: etcd",
		note:  "A minute: reads, puts, lease renewals, watch events sent; KiB of gRPC that etcd takes in and gives out; what a peer asks (volume lists, volume states; mean over peers). At the end: keys, watchers, KiB of data in use.",
		head:  []string{"state", "peers", "reads", "puts", "renewals", "events", "KiB in", "KiB out", "a peer: VolumeStates", "a peer: VolumeState", "keys", "watchers", "KiB in use"},
	}
	for _, r := range all {
		x := &r.span
		perMinute := 60 / x.seconds
		one := []string{r.title, strconv.Itoa(r.peers)}
		var ram []string
		for _, k := range []kind{kindClient, kindEtcd, kindPeer} {
			sum, n := x.cpu(k)
			one = append(one, significant(sum*perMinute/float64(n)))
			m, err := r.c.memory(k)
			if err != nil {
				return err
			}
			ram = append(ram, mib(m.Own))
		}
		live, err := heap(ctx, r.c.client.http)
		if err != nil {
			return err
		}
		ram = append(ram, mib(live))
		conns := 0.0
		for _, p := range r.c.peers {
			conns += x.is.torus[p.name].sum("torus_server_tdp_connections")
		}
		cpu.add(append(append(one, ram...), thousands(x.peers("torus_server_tdp_requests_total")*perMinute),
			thousands((x.peers("torus_server_tdp_received_bytes_total")+x.peers("torus_server_tdp_sent_bytes_total"))*perMinute/1024), thousands(conns))...)
		asked := x.calls(kindPeer)
		others := float64(r.peers - 1)
		now := x.is.etcd
		mds.add(r.title, strconv.Itoa(r.peers),
			thousands(x.etcd("etcd_mvcc_range_total")*perMinute), thousands(x.etcd("etcd_mvcc_put_total")*perMinute),
			thousands(x.etcd("etcd_debugging_lease_renewed_total")*perMinute), thousands(x.etcd("etcd_debugging_mvcc_events_total")*perMinute),
			thousands(x.etcd("etcd_network_client_grpc_received_bytes_total")*perMinute/1024), thousands(x.etcd("etcd_network_client_grpc_sent_bytes_total")*perMinute/1024),
			significant(asked["VolumeStates"]*perMinute/others), thousands(asked["VolumeState"]*perMinute/others),
			thousands(now.sum("etcd_debugging_mvcc_keys_total")), thousands(now.sum("etcd_debugging_mvcc_watcher_total")), thousands(now.sum("etcd_mvcc_db_total_size_in_use_in_bytes")/1024))
	}
	return s.print(cpu, mds)
}

func (r *resting) prepare(ctx context.Context, s *scale) (remove func(), err error) {
	// No larger than it must be: a peer writes its files through in the background, and that is to be over.
	c, remove, err := s.cluster(ctx, clusterOptions{peers: r.peers, peerSize: 64<<20 + byteSize(r.written)*16<<20})
	if err != nil {
		return nil, err
	}
	r.c = c
	if err := errors.Join(c.create(ctx, 1<<30, volumeNames(r.created)...), c.serve()); err != nil {
		return remove, err
	}
	if r.written == 0 {
		return remove, nil
	}
	names := volumeNames(r.written)
	if r.hold, err = c.attach(ctx, names...); err != nil {
		return remove, err
	}
	if err := c.fill(ctx, c.uris(names...), 1<<20); err != nil {
		return remove, err
	}
	if r.attached {
		end := remove // the result has the other's name
		return func() {
			r.hold.release()
			end()
		}, nil
	}
	r.hold.release()
	mds, err := c.mds(ctx)
	if err != nil {
		return remove, err
	}
	defer mds.Close()
	for _, name := range names {
		if err := c.released(ctx, mds, name); err != nil {
			return remove, err
		}
	}
	return remove, nil
}

// profileIdle records what the processes of the idle clusters do, one cluster after the other. What that costs is in the figures.
func (s *scale) profileIdle(ctx context.Context, all []*resting) error {
	if s.profile == "" {
		return nil
	}
	if err := os.MkdirAll(s.profile, 0o755); err != nil {
		return err
	}
	done := make(chan error)
	n := 0
	for i, r := range all {
		for _, p := range r.c.processes() {
			if r.c.kind(p.name) == kindPeer && p != r.c.peers[1] {
				continue
			}
			path := filepath.Join(s.profile, fmt.Sprintf("idle-%d-%s.pprof", i+1, p.name))
			n++
			go func() { done <- fetchProfile(ctx, p.http, max(1, int(s.idle.Seconds())-2), path) }()
		}
	}
	var err error
	for range n {
		err = errors.Join(err, <-done)
	}
	return err
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

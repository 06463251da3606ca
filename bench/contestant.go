package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/coreos/torus/e2e/nbdclient"
)

const (
	startLimit = time.Minute
	// trimStep is how much is trimmed by one request, bytes.
	trimStep = 256 << 20
	exported = "bench"
)

// contestant is something that holds a volume, with the servers that takes.
type contestant struct {
	name    string
	target  []string // fio's name for the volume
	servers []*process
	hold    *nbdclient.Conn // keeps the volume attached between the runs of fio
	torus   bool
}

func (b *bench) start(ctx context.Context, name string) (c *contestant, err error) {
	c = &contestant{name: name}
	defer func() {
		if err != nil {
			c.stop()
			err = fmt.Errorf("%s: %w", name, err)
		}
	}()
	dir := filepath.Join(b.dir, name) // where its servers run
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	switch name {
	case "raw":
		err = c.startRaw(ctx, dir)
	case "qemu":
		err = c.startQemu(ctx, dir, b.size)
	case "torus":
		err = c.startTorus(ctx, dir, b.bin, b.options)
	case "old":
		err = c.startTorus(ctx, dir, b.old, b.options)
	}
	return c, err
}

// startRaw uses io_uring where the kernel lets it, as the others do.
func (c *contestant) startRaw(ctx context.Context, dir string) error {
	for _, engine := range []string{"io_uring", "libaio"} {
		c.target = []string{"--filename=" + fioPath(filepath.Join(dir, "volume")), "--direct=1", "--ioengine=" + engine}
		_, err := runFio(ctx, dir, fioGrace, append([]string{"--name=try", "--rw=write", "--bs=64k", "--size=64k"}, c.target...))
		if err == nil {
			return nil
		}
		if engine == "libaio" {
			return err
		}
	}
	return nil
}

func (c *contestant) startQemu(ctx context.Context, dir string, size byteSize) error {
	volume := filepath.Join(dir, "volume")
	f, err := os.Create(volume)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(int64(size)), f.Close()); err != nil {
		return err
	}
	socket := filepath.Join(dir, "nbd.sock")
	p, err := start("qemu-storage-daemon", dir, "qemu-storage-daemon",
		"--blockdev", "driver=file,node-name=file,cache.direct=on,aio=io_uring,filename="+qemuPath(volume),
		"--blockdev", "driver=raw,node-name=volume,file=file,cache.direct=on",
		"--nbd-server", "addr.type=unix,addr.path="+qemuPath(socket),
		"--export", "type=nbd,id=export,node-name=volume,writable=on,name="+exported)
	if err != nil {
		return err
	}
	c.servers = append(c.servers, p)
	return c.connect(ctx, socket)
}

// startTorus starts three peers, the first with etcd inside, and what serves the volume.
func (c *contestant) startTorus(ctx context.Context, dir, bin string, o *options) error {
	c.torus = true
	t, err := startCluster(ctx, dir, bin, clusterOptions{peers: 3, peerSize: o.peerBytes(), http: o.profile != nil})
	if err != nil {
		return err
	}
	c.servers = t.peers
	if _, err := t.ctl(ctx, "volume", "create-block", exported, strconv.FormatUint(uint64(o.size), 10)); err != nil {
		return err
	}
	if err := t.serve(); err != nil {
		return err
	}
	c.servers = t.processes()
	return c.connect(ctx, t.socket)
}

// connect waits until the volume is served, and holds it: else each run of fio would attach it again.
func (c *contestant) connect(ctx context.Context, socket string) error {
	export := nbdclient.Unix(socket, exported)
	c.target = []string{"--ioengine=nbd", "--uri=" + export.URI()}
	return eventually(ctx, startLimit, "the volume is served", c.servers, func(ctx context.Context) error {
		var err error
		c.hold, err = export.Dial(ctx)
		return err
	})
}

// fill brings the volume to the state "written once". A log-structured volume forgets first what it was before: its blocks
// are freed, and nothing of an earlier round is in the way of the next.
func (c *contestant) fill(ctx context.Context, dir string, size byteSize) error {
	if c.torus {
		if err := c.trim(ctx, uint64(size)); err != nil {
			return c.explain(err)
		}
	}
	if _, err := runFio(ctx, dir, fillLimit, fillArgs(c.target, size)); err != nil {
		return c.explain(err)
	}
	return nil
}

func (c *contestant) trim(ctx context.Context, size uint64) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	defer context.AfterFunc(ctx, c.hold.Close)() // what is under way fails then
	for off := uint64(0); off < size; off += trimStep {
		if err := c.hold.Trim(off, uint32(min(trimStep, size-off)), 0); err != nil {
			return err
		}
	}
	return c.hold.Flush()
}

// explain adds what the servers say.
func (c *contestant) explain(err error) error {
	err = fmt.Errorf("%s: %w", c.name, err)
	if c.torus && strings.Contains(err.Error(), "No space left") {
		err = fmt.Errorf("%w\nthe peers are full: give them a larger --peer-size, or shorten the log with --seconds", err)
	}
	return explain(err, c.servers)
}

func (c *contestant) usage() (usage, error) { return usageOf(c.servers) }

func (c *contestant) stop() {
	if c.hold != nil {
		c.hold.Close()
	}
	for i := len(c.servers) - 1; i >= 0; i-- {
		c.servers[i].stop()
	}
}

// fioPath and qemuPath write a path as these programs' options want it, in which colons and commas separate.
func fioPath(path string) string { return escape(path, ':', '\\') }

func qemuPath(path string) string { return escape(path, ',', ',') }

func escape(s string, special, with byte) string {
	var out []byte
	for i := range len(s) {
		if s[i] == special {
			out = append(out, with)
		}
		out = append(out, s[i])
	}
	return string(out)
}

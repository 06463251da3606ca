package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coreos/torus/e2e/nbdclient"
)

const (
	peerSize = "6GiB"
	soakSize = "24GiB" // in a long run, which writes more
	// startLimit is how long a process may take to serve.
	startLimit = 20 * time.Second
	// leaseTime is how long a volume stays locked after its holder's death (DESIGN §4).
	leaseTime = 10 * time.Second
)

// cluster is an etcd, three torusd and any number of torusblk.
type cluster struct {
	dir      string
	net      *network // nil: all on this machine's loopback
	peerSize string
	etcdURL  string // HOST:PORT
	torusctl string // its path
	etcd     *process
	peers    []*peer
	blks     []*blk
	ended    []*blk // of this test
	volumes  int
}

// peer is a torusd.
type peer struct {
	*process
	http string // HOST:PORT
}

// blk is a torusblk nbdserve.
type blk struct {
	*process
	socket string
}

func (b *blk) export(volume string) nbdclient.Address { return nbdclient.Unix(b.socket, volume) }

// sharedCluster returns the cluster that tests share, made at the first call. Every process of it must run at the end of a test.
func sharedCluster(t *testing.T) *cluster {
	t.Helper()
	if shared.cluster == nil {
		dir := filepath.Join(shared.dir, "shared")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		c := &cluster{dir: dir}
		c.start(t)
		shared.cluster = c
	}
	c := shared.cluster
	c.ended = nil
	logOnFailure(t, c.processes)
	c.waitHealthy(t, startLimit)
	t.Cleanup(func() {
		c.stopBlks(t)
		for _, p := range c.servers() {
			p.thaw()
			if !p.alive() {
				if err := p.tryStart(); err != nil {
					t.Error(err)
				}
			}
		}
	})
	return c
}

// ownCluster is a cluster for one test.
func ownCluster(t *testing.T) *cluster {
	t.Helper()
	return (&cluster{dir: tempDir(t)}).started(t)
}

// networkCluster is a cluster for one test with an address for every process, so that any two can be cut off from each other.
// NBD is on unix sockets, which no cut reaches.
func networkCluster(t *testing.T) *cluster {
	t.Helper()
	dir := tempDir(t)
	nodes := []string{clientNode, etcdNode, adminNode}
	for i := range 3 {
		nodes = append(nodes, peerName(i))
	}
	return (&cluster{dir: dir, net: newNetwork(t, dir, nodes...)}).started(t)
}

func peerName(i int) string { return fmt.Sprintf("peer%d", i+1) }

// started starts the cluster for one test.
func (c *cluster) started(t *testing.T) *cluster {
	t.Helper()
	c.start(t)
	t.Cleanup(c.kill)
	logOnFailure(t, c.processes)
	return c
}

// start starts an etcd and three peers, and waits until torusctl says that all is well.
func (c *cluster) start(t *testing.T) {
	t.Helper()
	c.torusctl = program(t, "torusctl")
	if c.peerSize == "" {
		c.peerSize = peerSize
		if soaking() {
			c.peerSize = soakSize
		}
	}
	ok := false
	defer func() {
		if !ok {
			for _, p := range c.processes() {
				t.Logf("the end of %s's log:\n%s", p.name, p.tail(40))
			}
			c.kill()
		}
	}()
	c.startEtcd(t)
	c.ctl(t, "init", "--block-spec", "crc,rep=2")
	for i := range 3 {
		c.peers = append(c.peers, c.newPeer(t, peerName(i)))
	}
	for _, p := range c.peers {
		p.start(t)
	}
	eventually(t, startLimit, "three peers register", func() error {
		peers, err := c.peerList(t.Context())
		if err == nil && len(peers) != 3 {
			err = fmt.Errorf("%d peers", len(peers))
		}
		return err
	})
	c.ctl(t, "peer", "add", "--all-peers")
	c.waitHealthy(t, startLimit)
	ok = true
}

// node is the network of a node, nil without a network of our own.
func (c *cluster) node(name string) *namespace {
	if c.net == nil {
		return nil
	}
	return c.net.nodes[name]
}

// address is one that nobody listens on yet, of a node.
func (c *cluster) address(t testing.TB, node string) string {
	if ns := c.node(node); ns != nil {
		ns.ports++
		return fmt.Sprintf("%s:%d", ns.ip, 7000+ns.ports)
	}
	return freePort(t)
}

func (c *cluster) startEtcd(t *testing.T) {
	t.Helper()
	c.etcdURL = c.address(t, etcdNode)
	peer := "http://" + c.address(t, etcdNode)
	client := "http://" + c.etcdURL
	c.etcd = newProcess(c.dir, "etcd", program(t, "etcd"), "--name", "e", "--data-dir", filepath.Join(c.dir, "etcd"),
		"--listen-client-urls", client, "--advertise-client-urls", client, "--listen-peer-urls", peer,
		"--initial-advertise-peer-urls", peer, "--initial-cluster", "e="+peer, "--log-level", "warn")
	c.etcd.net = c.node(etcdNode)
	c.etcd.start(t)
	c.waitEtcd(t)
}

func (c *cluster) waitEtcd(t *testing.T) {
	t.Helper()
	eventually(t, startLimit, "etcd is healthy", func() error {
		return c.getOK(t.Context(), "http://"+c.etcdURL+"/health")
	})
}

// getOK asks a page that must be there.
func (c *cluster) getOK(ctx context.Context, url string) error {
	_, err := c.get(ctx, url)
	return err
}

// get returns a page.
func (c *cluster) get(ctx context.Context, url string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	resp, err := c.node(adminNode).client().Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", url, resp.Status)
	}
	return string(b), err
}

func (c *cluster) peerDir(name string) string { return filepath.Join(c.dir, name) }

func (c *cluster) newPeer(t *testing.T, name string) *peer {
	t.Helper()
	p := &peer{http: c.address(t, name)}
	p.process = newProcess(c.dir, name, program(t, "torusd"), "--etcd", c.etcdURL, "--data-dir", c.peerDir(name), "--size", c.peerSize,
		"--peer-address", "tdp://"+c.address(t, name), "--label", "host="+name, "--http", p.http)
	p.net = c.node(name)
	return p
}

// servers are etcd and the peers.
func (c *cluster) servers() (l []*process) {
	if c.etcd != nil {
		l = append(l, c.etcd)
	}
	for _, p := range c.peers {
		l = append(l, p.process)
	}
	return l
}

func (c *cluster) processes() []*process {
	l := c.servers()
	for _, b := range append(c.ended, c.blks...) {
		l = append(l, b.process)
	}
	return l
}

// stopBlks ends every torusblk, in order if that works: it then releases its volumes.
func (c *cluster) stopBlks(t *testing.T) {
	for _, b := range c.blks {
		b.thaw()
		b.signal(syscall.SIGTERM)
	}
	for _, b := range c.blks {
		if _, exited := b.state(); exited != nil {
			select {
			case <-exited:
			case <-time.After(15 * time.Second):
				t.Errorf("%s still runs 15 s after SIGTERM\n%s", b.name, b.tail(20))
				b.kill()
			}
		}
	}
	c.ended, c.blks = append(c.ended, c.blks...), nil
}

func (c *cluster) kill() {
	for _, p := range c.processes() {
		p.kill()
	}
}

// ctl runs torusctl, which must succeed.
func (c *cluster) ctl(t testing.TB, args ...string) string {
	t.Helper()
	out, err := c.tryCtl(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (c *cluster) tryCtl(ctx context.Context, args ...string) (string, error) {
	return try(ctx, c.node(adminNode).enter(append([]string{c.torusctl, "-C", c.etcdURL}, args...))...)
}

type peerJSON struct {
	UUID, Address, Status string
	Member                bool
	UsedBytes             uint64 `json:"used_bytes"`
}

func (c *cluster) peerList(ctx context.Context) (peers []peerJSON, err error) {
	return peers, c.json(ctx, &peers, "peer", "list")
}

type volumeJSON struct {
	Epoch      uint64
	Status     string
	AttachedTo string `json:"attached_to"`
	Checkpoint *time.Time
}

func (c *cluster) volume(t testing.TB, name string) (v volumeJSON) {
	t.Helper()
	if err := c.json(t.Context(), &v, "volume", "info", name); err != nil {
		t.Fatal(err)
	}
	return v
}

func (c *cluster) json(ctx context.Context, v any, args ...string) error {
	out, err := c.tryCtl(ctx, append([]string{"-o", "json"}, args...)...)
	if err != nil {
		return err
	}
	return json.Unmarshal([]byte(out), v)
}

// waitHealthy waits until every peer serves and torusctl status says "ok".
func (c *cluster) waitHealthy(t testing.TB, limit time.Duration) time.Duration {
	t.Helper()
	return eventually(t, limit, "the cluster is healthy", func() error {
		var s struct {
			Status   string
			Problems []string
			Members  int
		}
		for _, p := range c.peers {
			if err := c.getOK(t.Context(), "http://"+p.http+"/readyz"); err != nil {
				return err
			}
		}
		if err := c.json(t.Context(), &s, "status"); err != nil {
			return err
		}
		if s.Status != "ok" || s.Members != len(c.peers) {
			return fmt.Errorf("%s, %d members: %s", s.Status, s.Members, strings.Join(s.Problems, "; "))
		}
		return nil
	})
}

// waitReady waits until a peer serves.
func (c *cluster) waitReady(t testing.TB, p *peer) {
	t.Helper()
	eventually(t, startLimit, p.name+" serves", func() error { return c.getOK(t.Context(), "http://"+p.http+"/readyz") })
}

// newVolume creates a volume and deletes it at the end of the test.
func (c *cluster) newVolume(t *testing.T, size string) string {
	t.Helper()
	c.volumes++
	name := fmt.Sprintf("vol%d", c.volumes)
	c.ctl(t, "volume", "create-block", name, size)
	t.Cleanup(func() {
		c.stopBlks(t)
		if _, err := c.tryCtl(context.Background(), "volume", "delete", name); err != nil {
			t.Logf("the volume stays: %v", err) // its holder was killed, and the lease lives on
		}
	})
	return name
}

// newBlk starts a torusblk; flags are global ones, such as --force. It waits until it listens.
func (c *cluster) newBlk(t *testing.T, flags ...string) *blk {
	t.Helper()
	return c.newBlkAt(t, c.etcdURL, flags...)
}

// newBlkAt is newBlk with another way to etcd.
func (c *cluster) newBlkAt(t *testing.T, etcd string, flags ...string) *blk {
	t.Helper()
	name := fmt.Sprintf("blk%d", len(c.blks)+1)
	b := &blk{socket: filepath.Join(c.dir, name+".sock")}
	args := append([]string{program(t, "torusblk"), "-C", etcd}, flags...)
	b.process = newProcess(c.dir, name, append(args, "nbdserve", "-l", "unix:"+b.socket)...)
	b.net = c.node(clientNode)
	c.blks = append(c.blks, b)
	b.serve(t)
	return b
}

// serve starts it (again) and waits until it listens.
func (b *blk) serve(t *testing.T) {
	t.Helper()
	os.Remove(b.socket) //nolint:errcheck // else what is waited for is there already
	b.start(t)
	eventually(t, startLimit, b.name+" listens", func() error {
		if !b.alive() {
			t.Fatalf("%s ended: %v\n%s", b.name, b.wait(), b.tail(20))
		}
		conn, err := net.Dial("unix", b.socket) // that it is there does not say that somebody listens
		if err == nil {
			conn.Close()
		}
		return err
	})
}

// dial connects to an export; limit is how long the attach may take.
func dial(t testing.TB, a nbdclient.Address, limit time.Duration) *nbdclient.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	c, err := a.DialUntil(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

package e2e

import (
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/e2e/nbdclient"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/storage"
	"github.com/coreos/torus/vfs"
)

// resumes is how long after a cut is healed I/O may be away.
const resumes = 10 * time.Second

// Any pairs of nodes are cut off from each other, in one direction or both, under load, and healed: no I/O error, nothing
// acknowledged is lost or changed (D1, W1, D2), I/O is back within 10 s of the healing, and in the end every page can be
// read with any one peer away, and no two copies of a block differ where both have bytes.
func TestPartitions(t *testing.T) {
	c := networkCluster(t)
	volume := c.newVolume(t, "1GiB")
	b := c.newBlk(t)
	conn, probe := dial(t, b.export(volume), startLimit), dial(t, b.export(volume), startLimit)
	defer probe.Close()
	w := newStamper(71, 0, 8192, 16)
	w.pace = time.Millisecond
	w.overwriteAll(t, conn)
	stop := w.start(conn)

	var worst time.Duration
	schedule := partitions(t)
	for _, p := range schedule {
		_, before, _ := w.counts()
		c.net.cut(t, p.cuts...)
		time.Sleep(p.hold)
		_, during, _ := w.counts()
		c.net.heal(t)
		healed := time.Now()
		// A write that is flushed, and a read that no cache answers.
		took := eventually(t, 3*resumes, fmt.Sprintf("I/O is back after %v", p.cuts), func() error { return answered(probe) })
		took = max(took, time.Since(healed))
		if worst = max(worst, took); took > resumes {
			t.Errorf("%v: I/O back %v after it was healed", p.cuts, took)
		}
		t.Logf("RESUME %v for %v: %d writes meanwhile, I/O back after %v", p.cuts, p.hold, during-before, took.Round(time.Millisecond))
		w.mustBeRight(t)
		if w.hasFailed() || t.Failed() {
			break
		}
	}
	if err := stop(); err != nil {
		t.Fatalf("I/O error: %v", err)
	}
	w.flush(t, conn)
	w.mustEqual(t, conn)
	c.waitHealthy(t, 30*time.Second)
	last, _, _ := w.counts()
	t.Logf("RESUME %d partitions, %d writes: I/O back after %v at most", len(schedule), last, worst.Round(time.Millisecond))

	// Each page has another copy than the one on this peer, and it is the same.
	for _, p := range c.peers {
		p.kill()
		w.mustEqual(t, conn)
		p.start(t)
		c.waitHealthy(t, startLimit)
	}
	img, err := w.image(conn)
	if err != nil {
		t.Fatal(err)
	}
	final := filepath.Join(c.dir, "final")
	if err := os.WriteFile(final, img, 0o644); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	c.stopBlks(t)
	for _, p := range c.peers {
		p.interrupt(t, syscall.SIGTERM, startLimit)
	}
	both, err := compareReplicas(c)
	if err != nil || both == 0 {
		t.Errorf("%d bytes compared: %v", both, err)
	}
	t.Logf("%d MiB compared on two peers each", both>>20)
	// The control: bytes of one copy flipped.
	flipped := 0
	for _, f := range slotFiles(t, c.peerDir(peerName(0))) {
		flipped += flipBytes(t, f, final, func(uint64) bool { return true })
	}
	if _, err := compareReplicas(c); err == nil || flipped == 0 {
		t.Errorf("%d flipped bytes were not noticed", flipped)
	}
}

// answered does a flushed write and a read, outside of what the stamper uses.
func answered(c *nbdclient.Conn) error {
	page := make([]byte, pageSize)
	if err := c.WriteAt(page, 900<<20, nbdclient.FUA); err != nil {
		return err
	}
	return c.ReadAt(page, 900<<20)
}

// partition is what is cut, and for how long.
type partition struct {
	cuts []cut
	hold time.Duration
}

// partitions are the cuts of a run. A long run has all 2⁶ sets of directions between three peers, every link of a client, a peer
// and etcd in each direction and both, and random sets of all directions there are; a short run has some of each.
func partitions(t *testing.T) (all []partition) {
	const hold = 2 * time.Second
	var peers []cut
	for i := range 3 {
		for j := range 3 {
			if i != j {
				peers = append(peers, cut{peerName(i), peerName(j)})
			}
		}
	}
	for set := range 1 << len(peers) {
		var cuts []cut
		for i, c := range peers {
			if set>>i&1 == 1 {
				cuts = append(cuts, c)
			}
		}
		all = append(all, partition{cuts, hold})
	}
	nodes := []string{peerName(0), peerName(1), peerName(2), etcdNode, clientNode}
	links := slices.Clone(peers)
	for i, a := range nodes {
		for _, b := range nodes[max(i+1, 3):] {
			both := bothWays(a, b)
			links = append(links, both...)
			all = append(all, partition{both[:1], hold}, partition{both[1:], hold}, partition{both, hold})
		}
	}
	// The client without two peers, without any, without anything; and etcd without anybody past every lease.
	toAll := func(node string, others ...string) (cuts []cut) {
		for _, o := range others {
			cuts = append(cuts, bothWays(node, o)...)
		}
		return cuts
	}
	special := []partition{
		{toAll(clientNode, nodes[:2]...), hold},
		{toAll(clientNode, nodes[:3]...), hold},
		{toAll(clientNode, nodes[:4]...), hold},
		{toAll(etcdNode, nodes[:3]...), leaseTime + 5*time.Second},
		{toAll(clientNode, etcdNode), leaseTime + 5*time.Second},
		{toAll(clientNode, nodes[:4]...), leaseTime + 5*time.Second},
	}
	rng := rand.New(rand.NewPCG(1, 1))
	for range rounds(t, 1, 100) {
		var cuts []cut
		for _, c := range links {
			if rng.IntN(4) == 0 {
				cuts = append(cuts, c)
			}
		}
		special = append(special, partition{cuts, time.Duration(1+rng.IntN(4)) * time.Second})
	}
	if soaking() {
		return append(all, special...)
	}
	pick := func(a, b string) partition { return partition{[]cut{{a, b}}, hold} }
	return []partition{
		all[1<<len(peers)-1], pick(clientNode, peerName(0)), pick(peerName(1), clientNode), pick(etcdNode, clientNode), special[1],
	}
}

func (s *stamper) hasFailed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err != nil
}

// blocksOf reads the blocks in a data dir whose torusd has ended.
func blocksOf(dir string, each func(tail torus.Tail, data []byte)) (err error) {
	l, err := loop.NewEpoll(nil)
	if err != nil {
		return err
	}
	defer l.Close() //nolint:errcheck // the test is over
	fsys := vfs.NewOS(dir)
	id, err := storage.ReadIdentity(fsys)
	if err != nil {
		return err
	}
	s, err := storage.Open(storage.Config{Loop: l, FS: fsys, Identity: id, SizeBytes: 1 << 30})
	if err != nil {
		return err
	}
	failed := func(e error) {
		if err == nil {
			err = e
		}
	}
	loop.Go(l, func(task *loop.Task) {
		defer l.Stop()
		ask := func(r *torus.Request) *torus.Request {
			task.Wait(func(wake func()) {
				r.Done = func(*torus.Request) { wake() }
				s.Submit(r)
			})
			return r
		}
		var last torus.BlockRef
		for {
			list := ask(&torus.Request{Op: torus.OpList, Ref: last, Off: torus.ListEveryVolume, Len: 1000})
			if list.Err != nil || len(list.Tails) == 0 {
				failed(list.Err)
				break
			}
			for _, tail := range list.Tails {
				last = tail.Ref
				read := ask(&torus.Request{Op: torus.OpRead, Ref: tail.Ref, Data: make([]byte, tail.Length)})
				if read.Err != nil {
					failed(fmt.Errorf("read %v: %w", tail.Ref, read.Err))
					continue
				}
				each(tail, read.Data)
			}
		}
		failed(s.Close())
	})
	if e := l.Run(); e != nil {
		failed(e)
	}
	return err
}

// compareReplicas compares what stopped peers hold, page by page (D2), and returns how many bytes two of them have.
func compareReplicas(c *cluster) (both int, err error) {
	type copyOf struct {
		peer  string
		pages []uint64 // hashes
	}
	seed, seen := maphash.MakeSeed(), map[torus.BlockRef]copyOf{}
	for _, p := range c.peers {
		if e := blocksOf(c.peerDir(p.name), func(tail torus.Tail, data []byte) {
			pages := make([]uint64, len(data)/pageSize)
			for i := range pages {
				pages[i] = maphash.Bytes(seed, data[i*pageSize:(i+1)*pageSize])
			}
			first, ok := seen[tail.Ref]
			if !ok {
				seen[tail.Ref] = copyOf{p.name, pages}
				return
			}
			n := min(len(first.pages), len(pages))
			both += n * pageSize
			if !slices.Equal(first.pages[:n], pages[:n]) && err == nil {
				err = fmt.Errorf("D2: %v differs between %s and %s", tail.Ref, first.peer, p.name)
			}
		}); e != nil {
			return both, fmt.Errorf("%s: %w", p.name, e)
		}
	}
	return both, err
}

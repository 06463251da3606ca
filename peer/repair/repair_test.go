package repair_test

import (
	"bytes"
	"context"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/vfs"
)

// written returns a rig with a volume that was written, and detached: no window.
func written(t *testing.T, seed uint64, peers, repl int) *rig {
	t.Helper()
	r := newRig(t, seed, peers, repl)
	c := r.attach()
	c.fill(1, 0, rigVolume)
	r.v.RunFor(6 * time.Second) // a checkpoint in between
	c.fill(2, 0, rigVolume/4)
	c.detach()
	return r
}

func (r *rig) verify() {
	r.t.Helper()
	c := r.attach()
	c.check(2, 0, rigVolume/4)
	c.check(1, rigVolume/4, rigVolume/4*3)
	c.detach()
}

// listedAt returns the blocks that a peer is to hold.
func (r *rig) listedAt(n *node) (mine []file.Listed) {
	r.t.Helper()
	all, d := r.listed()
	for _, b := range all {
		if d.Home(b.Ref, b.Set).Has(n.id) {
			mine = append(mine, b)
		}
	}
	return mine
}

// D1: where nothing is missing, nothing is done, and that is soon known.
func TestNothingToDo(t *testing.T) {
	r := written(t, 1, 3, 2)
	r.settled(20 * time.Second)
	if n := r.repaired(); n != 0 {
		t.Fatalf("%d blocks repaired", n)
	}
	r.verify()
}

// D1: a peer that is removed for good is replaced copy by copy by the others.
func TestPeerRemoved(t *testing.T) {
	for seed := range uint64(3) {
		r := written(t, seed, 4, 2)
		dead := r.nodes[seed%4]
		lost := len(r.listedAt(dead))
		if lost == 0 {
			t.Fatal("the peer holds nothing")
		}
		dead.kill()
		r.v.RunFor(5 * time.Second)
		r.remove(dead)
		r.settled(2 * time.Minute)
		if n := r.repaired(); n != uint64(lost) {
			t.Fatalf("%d blocks repaired, %d were lost", n, lost)
		}
		// Now any other may go as well.
		next := r.nodes[(seed+1)%4]
		next.kill()
		r.v.RunFor(time.Second)
		r.verify()
	}
}

// D1: a disk that was lost comes back empty, under a new identity, while the old one leaves.
func TestPeerReplaced(t *testing.T) {
	r := written(t, 3, 3, 3)
	r.nodes[0].kill()
	fresh := r.addNode()
	r.join(fresh)
	r.remove(r.nodes[0])
	r.settled(2 * time.Minute)
	if len(r.listedAt(fresh)) == 0 || fresh.rep.Stats().Repaired == 0 {
		t.Fatal("the new peer holds nothing")
	}
	r.nodes[1].kill()
	r.nodes[2].kill() // only the new one is left, and it has everything
	for _, b := range r.listedAt(fresh) {
		if _, err := fresh.blockOf(b.Ref, b.Length); err != nil {
			t.Fatal(err)
		}
	}
}

// A ring with a member more moves nothing: what has its copies keeps them.
func TestPeerAdded(t *testing.T) {
	r := written(t, 4, 3, 2)
	fresh := r.addNode()
	r.join(fresh)
	r.settled(20 * time.Second)
	if n := r.repaired(); n != 0 {
		t.Fatalf("%d blocks copied", n)
	}
}

// D1: copies are found wherever rings in between have put them.
func TestManyRings(t *testing.T) {
	r := written(t, 5, 4, 2)
	for i := range 6 {
		fresh := r.addNode()
		r.join(fresh)
		r.v.RunFor(2 * time.Second)
		old := r.nodes[i]
		old.kill()
		r.remove(old)
		r.settled(2 * time.Minute)
	}
	r.verify()
}

// D1: what a peer lost, wholly or in part, is fetched again.
func TestLostTail(t *testing.T) {
	r := written(t, 6, 3, 2)
	n := r.nodes[0]
	mine := r.listedAt(n)
	if len(mine) < 4 {
		t.Fatalf("only %d blocks", len(mine))
	}
	// The store as it would be had it never been told of the ends of some blocks.
	type cut struct {
		ref  torus.BlockRef
		keep int
	}
	var cuts []cut
	for i, b := range mine {
		if i%3 == 2 {
			continue
		}
		data, err := n.blockOf(b.Ref, b.Length)
		r.must(err)
		keep := 0
		if i%3 == 0 {
			keep = firstRecord(b.Ref, data)
			if keep == len(data) {
				keep = 0
			}
		}
		cuts = append(cuts, cut{b.Ref, keep})
		n.replaceBy(b.Ref, data[:keep])
	}
	n.kill()
	r.v.RunFor(time.Second)
	n.start()
	r.settled(time.Minute)
	if got := n.rep.Stats().Repaired; got != uint64(len(cuts)) {
		t.Fatalf("%d blocks repaired, %d were cut", got, len(cuts))
	}
	r.verify()
}

// D1, D3: rot is found by the scrub and by nothing but a read, and mended from the other copy; the bad copy is there until then.
func TestRot(t *testing.T) {
	r := written(t, 7, 3, 2)
	r.settled(20 * time.Second)
	rotten := 0
	for _, b := range r.listedAt(r.nodes[1]) {
		data, err := r.nodes[1].blockOf(b.Ref, b.Length)
		r.must(err)
		r.nodes[1].rot(b.Ref, lastRecord(b.Ref, data)+20)
		rotten++
	}
	if err := r.whole(); err == nil {
		t.Fatal("nothing has rotted")
	}
	r.v.RunFor(6 * time.Minute) // the next scrub
	r.settled(time.Minute)
	if n := r.repaired(); n != uint64(rotten) {
		t.Fatalf("%d blocks repaired, %d were rotten", n, rotten)
	}
	r.verify()
}

// D3: where all copies are bad, that is said, and nothing is touched; where each has another good part, the parts make one.
func TestAllCopiesBad(t *testing.T) {
	r := written(t, 8, 2, 2)
	r.settled(20 * time.Second)
	var lost, split, mixed *file.Listed
	all, _ := r.listed()
	for i := range all {
		b := &all[i]
		data, err := r.nodes[0].blockOf(b.Ref, b.Length)
		r.must(err)
		if b.Ref.Type == torus.TypeBlock && firstRecord(b.Ref, data) < len(data) {
			if lost == nil {
				lost = b
			} else if split == nil {
				split = b
			} else {
				mixed = b
			}
		}
	}
	if mixed == nil {
		t.Fatal("no blocks of several records")
	}
	for i, n := range r.nodes {
		n.rot(lost.Ref, lost.Length-100)
		n.rot(split.Ref, []uint32{5000, split.Length - 100}[i])
		n.rot(mixed.Ref, []uint32{5000, 3*torus.PageSize + 100}[i]) // other pages of one record
	}
	before := [2][]byte{}
	for i, n := range r.nodes {
		before[i], _ = n.blockOf(lost.Ref, lost.Length)
	}
	r.v.RunFor(8 * time.Minute)
	for i, n := range r.nodes {
		s := n.rep.Stats()
		if s.Corrupt != 1 || s.Short != 1 || n.rep.Whole() {
			t.Errorf("%s: %+v, whole %v", n.name, s, n.rep.Whole())
		}
		after, err := n.blockOf(lost.Ref, lost.Length)
		if err != nil || string(after) != string(before[i]) {
			t.Errorf("%s: the bad copy has changed: %v", n.name, err)
		}
		for _, b := range []*file.Listed{split, mixed} {
			if got, err := n.blockOf(b.Ref, b.Length); err != nil || !sound(b.Ref, got) {
				t.Errorf("%s: parts that were good did not make a whole of %v: %v", n.name, b.Ref, err)
			}
		}
	}
}

// A copy that cannot be read from the disk is replaced from the other, and who reads it meanwhile gets the other.
func TestReadErrors(t *testing.T) {
	r := newRig(t, 9, 3, 2)
	r.tune = nil
	c := r.attach()
	c.fill(1, 0, rigVolume)
	c.detach()
	r.settled(20 * time.Second)
	n := r.nodes[2]
	var bad file.Listed
	for _, b := range r.listedAt(n) {
		if b.Ref.Type == torus.TypeBlock {
			bad = b
		}
	}
	n.kill()
	r.v.RunFor(time.Second)
	n.failReads(bad.Ref)
	n.start()
	if _, err := n.blockOf(bad.Ref, bad.Length); err == nil {
		t.Fatal("it can be read")
	}
	if n.rep.Whole() {
		t.Fatal("the read error was not noticed")
	}
	r.settled(2 * time.Minute)
	if n.rep.Stats().Repaired != 1 {
		t.Fatalf("%+v", n.rep.Stats())
	}
}

// L1: what an open window covers is the writer's: nothing there is touched, though it is counted; once below the window it is made
// whole. And an attached writer goes on beside the repair.
func TestOpenWindow(t *testing.T) {
	r := newRig(t, 10, 3, 2)
	c := r.attach()
	c.fill(1, 0, 128<<10)
	r.v.RunFor(6 * time.Second) // a checkpoint lists the open block
	st := r.state()
	all, _ := r.listed()
	var open file.Listed
	for _, b := range all {
		if file.InWindow(st.VolumeState, b.Ref) {
			open = b
		}
	}
	if open.Length == 0 {
		t.Fatal("no open block is listed")
	}
	n := r.node(open.Set[0])
	data, err := n.blockOf(open.Ref, open.Length)
	r.must(err)
	n.replaceBy(open.Ref, data[:firstRecord(open.Ref, data)])
	n.rep.Kick()
	r.v.RunFor(10 * time.Second)
	if got, err := n.blockOf(open.Ref, open.Length); err == nil {
		t.Fatalf("%d bytes are back in the writer's block", len(got))
	}
	if s := n.rep.Stats(); s.Short != 1 || n.rep.Whole() {
		t.Fatalf("%+v", s)
	}
	// The writer notices when it writes, and leaves the block.
	c.fill(2, 128<<10, rigVolume/2)
	r.v.RunFor(10 * time.Second)
	c.check(1, 0, 128<<10)
	c.detach()
	r.settled(time.Minute)
}

// L1: below the fence of a newer attach nothing is changed; afterwards it goes on.
func TestFence(t *testing.T) {
	r := written(t, 11, 3, 2)
	r.settled(20 * time.Second)
	n := r.nodes[0]
	b := r.listedAt(n)[0]
	n.remove(b.Ref)
	// An attach that got as far as its fence, of an epoch the MDS does not say yet.
	st := r.state()
	n.fence(b.Ref.Volume, st.Epoch+1)
	n.rep.Kick()
	r.v.RunFor(20 * time.Second)
	if _, err := n.blockOf(b.Ref, b.Length); err == nil {
		t.Fatal("a fenced epoch has stored a block")
	}
	if s := n.rep.Stats(); s.Short != 1 {
		t.Fatalf("%+v", s)
	}
	c := r.attach() // which has that epoch
	r.v.RunFor(10 * time.Second)
	c.detach()
	r.settled(time.Minute)
}

// A volume that is deleted while its blocks are copied leaves nothing to be done.
func TestVolumeDeleted(t *testing.T) {
	r := newRig(t, 12, 4, 2)
	r.tune = func(c *repairConfig) { c.CopyRate = 16 << 10 } // many seconds a block
	for _, n := range r.nodes {
		n.kill()
		n.start()
	}
	c := r.attach()
	c.fill(1, 0, rigVolume)
	c.detach()
	r.nodes[0].kill()
	r.remove(r.nodes[0])
	r.v.RunFor(10 * time.Second)
	short := uint64(0)
	for _, n := range r.nodes[1:] {
		short += n.rep.Stats().Short
	}
	if short == 0 {
		t.Fatal("nothing is missing")
	}
	r.must(r.admin.DeleteVolume(context.Background(), "v"))
	r.v.RunFor(2 * time.Minute)
	for _, n := range r.nodes[1:] {
		if !n.rep.Whole() {
			t.Errorf("%s: %+v", n.name, n.rep.Stats())
		}
	}
}

// Unknown means keep (D3), and is not taken for whole: without the MDS, or the peers that hold the INode.
func TestUnknown(t *testing.T) {
	r := written(t, 13, 3, 2)
	r.settled(20 * time.Second)
	n := r.nodes[0]
	n.kill()
	r.nodes[1].kill()
	r.nodes[2].kill()
	r.v.RunFor(time.Second)
	n.start()
	r.v.RunFor(2 * time.Minute)
	if s := n.rep.Stats(); s.Unknown != 1 || s.Ring != 0 || n.rep.Whole() {
		// unless it holds the INode and the whole table itself
		if all := r.listedAt(n); s.Unknown != 0 || len(all) == 0 {
			t.Fatalf("%+v", s)
		}
	}
	r.nodes[1].start()
	r.nodes[2].start()
	r.settled(time.Minute)
}

// Close ends everything, wherever it is.
func TestClose(t *testing.T) {
	for seed := range uint64(8) {
		r := written(t, seed, 3, 2)
		r.nodes[0].kill()
		r.remove(r.nodes[0])
		n := r.nodes[1]
		r.v.RunFor(time.Duration(seed) * 400 * time.Millisecond)
		closed := 0
		n.l.Post(func() { n.rep.Close(func() { closed++ }) })
		if !r.v.Run(func() bool { return closed > 0 }, 20*time.Second) {
			t.Fatalf("seed %d: not closed", seed)
		}
		r.v.RunFor(5 * time.Minute)
		if closed != 1 {
			t.Fatalf("closed %d times", closed)
		}
	}
}

// D1, D3: power is lost at every single point at which the repair changes anything on the medium. Whatever was whole stays so, no
// good part of a bad copy is lost (the other peers are gone: what is left must do), and the next start finishes the work.
func TestPowerLossEverywhere(t *testing.T) {
	points := 0
	for k := 0; ; k++ {
		r := newRig(t, 14, 2, 2)
		c := r.attach()
		c.fill(1, 0, 1200<<10)
		c.detach()
		r.settled(20 * time.Second)
		n := r.nodes[0]
		all, _ := r.listed()
		var want [][]byte
		damage := 0
		for _, b := range all { // the first record stays intact in every copy that stays
			data, err := n.blockOf(b.Ref, b.Length)
			r.must(err)
			want = append(want, data)
			first := firstRecord(b.Ref, data)
			switch damage++; {
			case damage == 1 && first < len(data):
				n.replaceBy(b.Ref, data[:first])
			case damage == 2:
				n.remove(b.Ref)
			case first < len(data):
				n.rot(b.Ref, lastRecord(b.Ref, data)+20)
			}
		}
		if damage < 3 {
			t.Fatalf("only %d blocks", damage)
		}
		n.kill()
		r.v.RunFor(time.Second)
		armed, ops, cut := false, 0, (*vfs.Mem)(nil)
		n.fs = vfs.NewErrors(n.disk, func(op vfs.Op) error {
			if armed && op.Changes() && cut == nil {
				if ops++; ops > k {
					cut = n.disk.CrashClone(r.v.Rand())
				}
			}
			return nil
		})
		n.start()
		armed = true
		done := func() bool { return n.rep.Stats().Scrubs > 0 && n.rep.Whole() }
		r.v.Run(func() bool { return cut != nil || done() }, 2*time.Minute)
		if cut == nil {
			if !done() {
				t.Fatalf("not whole: %+v", n.rep.Stats())
			}
			break
		}
		points++
		n.kill()
		n.disk, n.fs = cut, nil
		n.start()
		for i, b := range all { // what was not damaged is as good as before, at every moment
			if i == 1 {
				continue // it was not there
			}
			first := firstRecord(b.Ref, want[i])
			got, err := n.blockOf(b.Ref, uint32(first))
			if err != nil || !bytes.Equal(got, want[i][:first]) {
				t.Fatalf("point %d: the good part of %v is gone: %v", k, b.Ref, err)
			}
		}
		r.v.RunFor(time.Second)
		if !r.v.Run(done, 2*time.Minute) {
			t.Fatalf("point %d: not whole: %+v", k, n.rep.Stats())
		}
		r.settled(time.Minute)
		for i, b := range all {
			if got, err := n.blockOf(b.Ref, b.Length); err != nil || !bytes.Equal(got, want[i]) {
				t.Fatalf("point %d: %v: %v", k, b.Ref, err)
			}
		}
		r.v.Close()
	}
	if points < 20 {
		t.Fatalf("only %d points", points)
	}
	t.Logf("%d points", points)
}

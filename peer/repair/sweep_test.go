package repair_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coreos/torus"
	"github.com/coreos/torus/block"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/metadata/temp"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/record"
)

// Each test holds one rule of D3, nothing is deleted on missing or failed information, against a control: garbage beside it that goes.

// plant gives a peer a block of one record.
func (n *node) plant(ref torus.BlockRef) torus.BlockRef {
	n.r.t.Helper()
	h := record.Header{Ref: ref, Extents: []record.Extent{{Page: 1, Count: 1, Kind: record.Data}}}
	if ref.Type == torus.TypeBlock {
		h.Seq = 1
	}
	b := make([]byte, record.HeaderSize+torus.PageSize)
	h.CRCs = []uint32{record.Checksum(b[record.HeaderSize:])}
	h.Encode(b[:record.HeaderSize])
	n.replaceBy(ref, b)
	return ref
}

// unlisted names a block that nobody has ever written.
func (r *rig) unlisted(typ torus.BlockType, epoch uint64, index torus.IndexID) torus.BlockRef {
	return torus.BlockRef{Type: typ, Volume: torus.VolumeID(r.vol.Id), INode: torus.INodeID(epoch), Index: index}
}

// here lists what a peer has.
func (n *node) here() map[torus.BlockRef]torus.Tail {
	n.r.t.Helper()
	q := &torus.Request{Op: torus.OpList, Off: torus.ListEveryVolume, Len: 1 << 16}
	n.ask(q)
	all := map[torus.BlockRef]torus.Tail{}
	for _, x := range q.Tails {
		all[x.Ref] = x
	}
	return all
}

// passes lets every peer look through everything, and sweep.
func (r *rig) passes() {
	r.t.Helper()
	for range 2 {
		for _, n := range r.nodes {
			if n.up {
				n.l.Post(n.rep.Kick)
			}
		}
		r.v.RunFor(5 * time.Second)
	}
}

func (n *node) mustHave(what string, refs ...torus.BlockRef) {
	n.r.t.Helper()
	all := n.here()
	for _, ref := range refs {
		if _, ok := all[ref]; !ok {
			n.r.t.Errorf("D3: %s has deleted %v: %s", n.name, ref, what)
		}
	}
}

func (n *node) mustLack(refs ...torus.BlockRef) {
	n.r.t.Helper()
	all := n.here()
	for _, ref := range refs {
		if _, ok := all[ref]; ok {
			n.r.t.Errorf("%s has %v still: %+v", n.name, ref, n.rep.Stats())
		}
	}
}

// twice returns a rig with a volume whose head is of epoch 2.
func twice(t *testing.T, seed uint64) *rig {
	t.Helper()
	r := newRig(t, seed, 3, 2)
	c := r.attach()
	c.fill(1, 0, rigVolume)
	c.detach()
	c = r.attach()
	c.fill(2, 0, rigVolume/4)
	c.detach()
	if h := r.state().Head; h.Epoch != 2 {
		t.Fatalf("the head is of epoch %d", h.Epoch)
	}
	r.passes()
	return r
}

// edit changes the volume's state as an administrator may, or as nobody may.
func (r *rig) edit(change func(*models.VolumeState)) {
	r.t.Helper()
	st := r.state()
	to := proto.CloneOf(st.VolumeState)
	change(to)
	_, err := r.admin.Commit(context.Background(), torus.VolumeID(r.vol.Id), st, to)
	r.must(err)
}

var types = []torus.BlockType{torus.TypeBlock, torus.TypeINode, torus.TypeMoved}

// What a checkpoint, a compaction or a recovery left that was never committed goes once there is a head of a later epoch; what that or a
// later one may yet list stays. The epoch is the head's: an attach that finds nothing to recover commits none.
func TestSweepEpochs(t *testing.T) {
	r := twice(t, 21)
	n := r.nodes[0]
	before := n.here()
	var old, same, next, later []torus.BlockRef
	for _, typ := range types {
		old = append(old, n.plant(r.unlisted(typ, 1, 5000)))
		same = append(same, n.plant(r.unlisted(typ, 2, 5000)))
		next = append(next, n.plant(r.unlisted(typ, 3, 5000)))
		later = append(later, n.plant(r.unlisted(typ, 4, 5000)), n.plant(r.unlisted(typ, 9, 5000)))
	}
	r.passes()
	n.mustLack(old...)
	n.mustHave("it may belong to what the head's writer has not committed yet", same...)
	n.mustHave("it may belong to a recovery under way", append(next, later...)...)
	for ref := range before {
		n.mustHave("the head lists it", ref)
	}
	if s := n.rep.Stats(); s.Swept != uint64(len(old)) || s.Garbage != 0 {
		t.Fatalf("%+v", s)
	}
	r.attach().detach()
	c := r.attach()
	if st := r.state(); st.Epoch != 4 || st.Head.Epoch != 2 {
		t.Fatalf("epoch %d, head of %d", st.Epoch, st.Head.Epoch)
	}
	r.passes()
	n.mustHave("the head is of its epoch still", same...)
	n.mustHave("there is no head of that epoch", next...)
	c.fill(3, 0, 64<<10)
	r.v.RunFor(7 * time.Second) // a checkpoint
	r.passes()
	n.mustLack(append(same, next...)...)
	n.mustHave("it may belong to the attached writer", later...)
	c.check(3, 0, 64<<10)
	c.check(2, 64<<10, rigVolume/4-64<<10)
	c.detach()
	r.settled(time.Minute)
}

// A writer that stays attached for long deletes its own blocks by name; a peer that did not hear of it gives them up as well: those that
// the writer had done with when it laid out the head.
func TestSweepWhileAttached(t *testing.T) {
	r := newRig(t, 32, 3, 2)
	c := r.attach()
	n := r.nodes[0]
	c.fill(1, 0, rigVolume)
	r.v.RunFor(7 * time.Second) // a checkpoint
	had := n.here()
	n.kill()
	for i := range 3 { // what the peer has is dead, and more
		c.fill(byte(2+i), 0, rigVolume)
		r.v.RunFor(7 * time.Second)
	}
	st := r.state()
	if st.Head.Epoch != 1 || st.Open.Spans[0].Lo < 40 {
		t.Fatalf("%+v", st.Open)
	}
	n.start()
	r.v.RunFor(2 * time.Second)
	c.fill(5, 0, 256<<10) // not listed yet
	open := n.plant(r.unlisted(torus.TypeBlock, 1, torus.IndexID(st.Open.Spans[0].Hi-1)))
	beyond := n.plant(r.unlisted(torus.TypeBlock, 1, 1<<20))
	moved := n.plant(r.unlisted(torus.TypeMoved, 1, 1<<20))
	meta := n.plant(r.unlisted(torus.TypeINode, 1, 1<<20))
	r.passes()
	n.mustHave("the writer may be about to list it", open, beyond, moved, meta)
	all, _ := r.listed()
	needed := map[torus.BlockRef]bool{}
	for _, b := range all {
		needed[b.Ref] = true
	}
	gone := 0
	for ref := range had {
		if !needed[ref] {
			n.mustLack(ref)
			gone++
		}
	}
	if gone < 8 {
		t.Fatalf("%d blocks had died", gone)
	}
	c.check(5, 0, 256<<10)
	c.check(4, 256<<10, rigVolume-256<<10)
	c.detach()
	r.settled(time.Minute)
}

// What lies in the open window is the writer's, or the next attach's, whatever its epoch.
func TestSweepWindow(t *testing.T) {
	r := twice(t, 22)
	n := r.nodes[0]
	r.edit(func(s *models.VolumeState) {
		s.Open = &models.Window{Epoch: 1, Spans: []*models.Span{{Lo: 5000, Hi: 5010, RingVersion: 1, Replication: 2}}}
	})
	in := []torus.BlockRef{n.plant(r.unlisted(torus.TypeBlock, 1, 5000)), n.plant(r.unlisted(torus.TypeBlock, 1, 5009))}
	out := []torus.BlockRef{n.plant(r.unlisted(torus.TypeBlock, 1, 4999)), n.plant(r.unlisted(torus.TypeBlock, 1, 5010)), n.plant(r.unlisted(torus.TypeMoved, 1, 5005))}
	r.passes()
	n.mustHave("it lies in the open window", in...)
	n.mustLack(out...)
	r.edit(func(s *models.VolumeState) { s.Open = nil })
	r.passes()
	n.mustLack(in...)
}

// A writer is killed: what it has flushed and not listed stays until the next attach has found it (D1).
func TestSweepKilledWriter(t *testing.T) {
	r := twice(t, 23)
	for i := range 3 {
		c := r.attach()
		c.fill(byte(3+i), 0, rigVolume/2)
		if i == 1 {
			r.v.RunFor(7 * time.Second) // a checkpoint
			c.fill(byte(3+i), 0, rigVolume/4)
		}
		c.kill()
		r.passes()
		c = r.attach()
		c.check(byte(3+i), 0, rigVolume/2)
		c.fill(byte(3+i), 0, 64<<10)
		r.v.RunFor(7 * time.Second)
		r.passes()
		c.check(byte(3+i), 0, rigVolume/2)
		c.check(1, rigVolume/2, rigVolume/2)
		c.detach()
		r.settled(time.Minute)
	}
	// No peer has anything that is not listed, after one more head.
	c := r.attach()
	c.fill(9, 0, 64<<10)
	c.detach()
	r.passes()
	r.onlyListed()
}

// onlyListed: no peer holds anything that the volume does not need.
func (r *rig) onlyListed() {
	r.t.Helper()
	all, _ := r.listed()
	listed := map[torus.BlockRef]bool{}
	for _, b := range all {
		listed[b.Ref] = true
	}
	for _, n := range r.nodes {
		for ref := range n.here() {
			if ref.Volume == torus.VolumeID(r.vol.Id) && !listed[ref] {
				r.t.Errorf("%s has %v, which nothing needs", n.name, ref)
			}
		}
	}
}

// S1: what a snapshot needs is kept whole, though it is dead to the head, for as long as there is the snapshot, and no longer.
func TestSweepPins(t *testing.T) {
	r := twice(t, 24)
	_, err := block.CreateSnapshot(context.Background(), r.admin, "v", "s")
	r.must(err)
	c := r.attach()
	c.fill(3, 0, rigVolume)
	r.v.RunFor(7 * time.Second)
	c.detach()
	r.settled(time.Minute)
	n := r.nodes[0]
	old := n.plant(r.unlisted(torus.TypeBlock, 1, 5000))
	var dead []file.Listed
	for _, b := range r.listedAt(n) {
		if b.Ref.INode < 3 {
			dead = append(dead, b)
		}
	}
	if len(dead) < 8 {
		t.Fatalf("%d blocks are kept for the snapshot", len(dead))
	}
	n.remove(dead[0].Ref) // the repair makes it whole, as it does all that is needed
	r.passes()
	r.settled(time.Minute)
	n.mustLack(old)
	for _, b := range dead {
		n.mustHave("a snapshot needs it", b.Ref)
	}
	r.must(block.DeleteSnapshot(context.Background(), r.admin, "v", "s"))
	needed := r.listedAt(n)
	for _, b := range needed {
		dead = slices.DeleteFunc(dead, func(x file.Listed) bool { return x.Ref == b.Ref })
	}
	if len(dead) < 8 {
		t.Fatalf("%d blocks were kept for the snapshot alone", len(dead))
	}
	n.remove(dead[1].Ref)
	r.passes()
	for _, b := range dead {
		n.mustLack(b.Ref) // nor is what was removed fetched again
	}
	r.settled(time.Minute)
	r.onlyListed()
	c = r.attach()
	c.check(3, 0, rigVolume)
	c.detach()
}

// A volume is taken back to a snapshot that is deleted, and swept, before that is committed: it is not taken back, and loses nothing.
func TestSweepDuringRestore(t *testing.T) {
	r := twice(t, 33)
	_, err := block.CreateSnapshot(context.Background(), r.admin, "v", "s")
	r.must(err)
	c := r.attach()
	c.fill(3, 0, rigVolume)
	c.detach()
	for _, deleted := range []bool{true, false} {
		if !deleted {
			_, err := block.CreateSnapshot(context.Background(), r.admin, "v", "s") // of what it is now
			r.must(err)
			c := r.attach()
			c.fill(4, 0, rigVolume)
			c.detach()
		}
		r.to = r.state().Pins[0].At
		r.passes()
		c := r.client()
		commits := 0
		used := r.used()
		c.mds.SetFaults(func(_ context.Context, method string) temp.Fault {
			if method == "Commit" && deleted {
				if commits++; commits == 1 {
					r.must(block.DeleteSnapshot(context.Background(), r.admin, "v", "s"))
				}
				if commits < 3 {
					return temp.FailBefore // until the peers have swept
				}
			}
			return temp.None
		})
		if !r.v.Run(func() bool { return c.done || commits == 2 }, time.Minute) {
			t.Fatal("attach is still not done")
		}
		if deleted {
			r.passes()
			if r.used() >= used {
				t.Fatalf("nothing was swept: %d blocks, then %d", used, r.used())
			}
		}
		if !r.v.Run(func() bool { return c.done }, time.Minute) {
			t.Fatal("attach is still not done")
		}
		if deleted != (c.err != nil) || deleted && !errors.Is(c.err, torus.ErrNotExist) {
			t.Fatalf("deleted %v: %v", deleted, c.err)
		}
		r.to = nil
		if deleted {
			c.kill()
		} else {
			c.detach()
		}
		r.passes()
		c = r.attach()
		c.check(3, 0, rigVolume) // what it was, or what it was taken back to
		c.detach()
		r.settled(time.Minute)
	}
}

// What a volume can be rewound to is kept, from the INode on that the state names.
func TestSweepKeptFrom(t *testing.T) {
	r := newRig(t, 25, 3, 2)
	r.must(block.SetRetention(context.Background(), r.admin, "v", time.Hour))
	for i := range 5 {
		c := r.attach()
		c.fill(byte(i), 0, rigVolume/4)
		c.detach()
	}
	st := r.state()
	if st.KeptFrom == 0 || st.KeptFrom >= st.Head.Number {
		t.Fatalf("kept from %d, head %d", st.KeptFrom, st.Head.Number)
	}
	r.passes()
	all, _ := r.listed()
	before := r.nodes[0].here()
	r.passes()
	for ref := range before {
		r.nodes[0].mustHave("the volume can be rewound to it", ref)
	}
	r.edit(func(s *models.VolumeState) { s.KeptFrom++ })
	r.passes()
	some, _ := r.listed()
	r.edit(func(s *models.VolumeState) { s.KeptFrom, s.RetainMs = 0, 0 })
	r.passes()
	few, _ := r.listed()
	if len(all) <= len(some) || len(some) <= len(few) {
		t.Fatalf("%d blocks needed, then %d, then %d", len(all), len(some), len(few))
	}
	r.settled(time.Minute)
	r.onlyListed()
}

// A deleted volume keeps what its clones need, in it and in what it was itself cloned from; the clones read right, whether or not they
// were ever attached, and when they are gone nothing is left.
func TestSweepClones(t *testing.T) {
	r := twice(t, 26)
	ctx := context.Background()
	parent := r.vol
	_, err := block.CreateSnapshot(ctx, r.admin, "v", "s")
	r.must(err)
	p, err := r.admin.VolumeState(ctx, torus.VolumeID(parent.Id))
	r.must(err)
	first, err := block.Clone(ctx, r.admin, parent, p.Pins[0].At, "first", 0)
	r.must(err)
	second, err := block.Clone(ctx, r.admin, parent, p.Pins[0].At, "second", 0)
	r.must(err)
	c := r.attach()
	c.fill(3, 0, rigVolume) // dead to the parent, all of it
	c.detach()
	look := func(v *models.Volume) {
		t.Helper()
		r.vol = v
		c := r.attach()
		c.check(2, 0, rigVolume/4)
		c.check(1, rigVolume/4, rigVolume/4*3)
		c.detach()
	}
	look(first)
	r.vol = parent
	var swept uint64
	for _, n := range r.nodes {
		swept += n.rep.Stats().Swept
	}
	r.must(block.Delete(ctx, r.admin, "v", true))
	if !r.state().Deleted {
		t.Fatal("the parent is not kept for its clones")
	}
	used := r.used()
	r.passes()
	var now uint64
	for _, n := range r.nodes {
		now += n.rep.Stats().Swept
	}
	if now == swept || r.used() >= used {
		t.Fatalf("nothing of the deleted volume was given back: %d slots were used, now %d", used, r.used())
	}
	r.settled(time.Minute)
	// What is left of it is repaired as ever.
	for _, n := range r.nodes {
		for i, b := range r.listedAt(n) {
			if i%3 == 0 {
				n.remove(b.Ref)
			}
		}
		r.passes()
		r.settled(time.Minute)
	}
	look(first)
	look(second) // never attached before
	// A clone of a clone.
	st, err := r.admin.VolumeState(ctx, torus.VolumeID(second.Id))
	r.must(err)
	_, err = block.CreateSnapshot(ctx, r.admin, "second", "s")
	r.must(err)
	third, err := block.Clone(ctx, r.admin, second, &models.Moment{Base: st.Head, Seq: st.Head.Seq, SizeBytes: rigVolume}, "third", 0)
	r.must(err)
	r.must(block.Delete(ctx, r.admin, "first", true))
	r.must(block.Delete(ctx, r.admin, "second", true))
	r.passes()
	look(third)
	r.passes()
	look(third)
	r.must(block.Delete(ctx, r.admin, "third", true))
	if l, err := r.admin.Volumes(ctx); err != nil || len(l) != 0 {
		t.Fatalf("%d volumes are left (%v)", len(l), err)
	}
	r.passes()
	if n := r.used(); n != 0 {
		t.Fatalf("%d slots are taken, and there is no volume", n)
	}
}

// used is how many blocks all peers have.
func (r *rig) used() (n int) {
	for _, x := range r.nodes {
		n += len(x.here())
	}
	return n
}

// Of a volume that was deleted nothing stays. What is of none that this MDS has ever known does: nobody knows whose it is.
func TestSweepDeletedVolume(t *testing.T) {
	r := twice(t, 27)
	r.must(r.admin.CreateVolume(context.Background(), &models.Volume{Name: "other", Type: "block", SizeBytes: rigVolume, BlockSpec: "crc"}))
	n := r.nodes[0]
	other, err := r.admin.Volume(context.Background(), "other")
	r.must(err)
	theirs := n.plant(torus.BlockRef{Type: torus.TypeBlock, Volume: torus.VolumeID(other.Id), INode: 1})
	stray := n.plant(torus.BlockRef{Type: torus.TypeBlock, Volume: torus.VolumeID(other.Id) + 1, INode: 1})
	n.plant(r.unlisted(torus.TypeINode, 77, 0)) // of no epoch below that of an attach under way
	n.fence(torus.VolumeID(r.vol.Id), 70)
	r.must(r.admin.DeleteVolume(context.Background(), "v"))
	r.passes()
	n.mustHave("its volume exists, and nothing is committed yet", theirs)
	n.mustHave("no MDS has handed out its volume's id", stray)
	if r.used() != 2 {
		t.Fatalf("%d blocks are left", r.used())
	}
	r.must(r.admin.DeleteVolume(context.Background(), "other"))
	r.passes()
	n.mustLack(theirs)
	n.mustHave("no MDS has handed out its volume's id", stray)
}

// Unknown means keep: without the MDS, with another cluster's, or without the peers that hold the INode, nothing is deleted.
func TestSweepUnknown(t *testing.T) {
	r := twice(t, 28)
	n := r.nodes[0]
	r.must(r.admin.CreateVolume(context.Background(), &models.Volume{Name: "gone", Type: "block", SizeBytes: rigVolume, BlockSpec: "crc"}))
	gone, err := r.admin.Volume(context.Background(), "gone")
	r.must(err)
	r.must(r.admin.DeleteVolume(context.Background(), "gone"))
	down := true
	n.mds.SetFaults(func(_ context.Context, method string) temp.Fault {
		if down && method == "VolumeStates" {
			return temp.FailAfter
		}
		return temp.None
	})
	garbage := []torus.BlockRef{n.plant(r.unlisted(torus.TypeBlock, 1, 5000)), n.plant(torus.BlockRef{Type: torus.TypeBlock, Volume: torus.VolumeID(gone.Id), INode: 1})}
	r.passes()
	n.mustHave("the MDS does not answer", garbage...)
	down = false
	// The MDS answers, and no copy of the INode can be read: what of the volume is garbage is not known.
	r.nodes[1].kill()
	r.nodes[2].kill()
	head := r.state().Head.Inode
	inode := torus.BlockRef{Type: torus.TypeINode, Volume: torus.VolumeID(r.vol.Id), INode: torus.INodeID(head.Epoch), Index: torus.IndexID(head.Index)}
	n.remove(inode) // if it has that
	r.v.RunFor(time.Minute)
	n.mustHave("the INode cannot be read", garbage[0])
	n.mustLack(garbage[1]) // of another volume, about which there is no doubt
	r.nodes[1].start()
	r.nodes[2].start()
	r.settled(time.Minute)
	r.passes()
	n.mustLack(garbage...)

	// Another cluster, in the place of the old one.
	before := r.used()
	n.plant(r.unlisted(torus.TypeBlock, 1, 5001))
	r.mds.Wipe()
	r.passes()
	r.must(r.mds.Init(torus.GlobalMetadata{ClusterID: "another", BlockSize: rigBlock, DefaultBlockSpec: "crc"}, nil))
	for i := range 3 {
		r.must(r.admin.CreateVolume(context.Background(), &models.Volume{Name: string(rune('a' + i)), Type: "block", SizeBytes: rigVolume, BlockSpec: "crc"}))
		r.must(r.admin.DeleteVolume(context.Background(), string(rune('a'+i))))
	}
	r.passes()
	if r.used() != before+1 {
		t.Fatalf("%d of %d blocks are left", r.used(), before+1)
	}
}

// L1: deletions carry the pass's epoch, and are refused below the fence.
func TestSweepFence(t *testing.T) {
	r := twice(t, 29)
	n, other := r.nodes[0], r.nodes[1]
	st := r.state()
	n.fence(torus.VolumeID(r.vol.Id), st.Epoch+1)
	ref := n.plant(r.unlisted(torus.TypeBlock, 1, 5000))
	other.plant(ref)
	r.passes()
	n.mustHave("an attach is under way", ref)
	other.mustLack(ref)
	if s := n.rep.Stats(); s.Garbage != 1 {
		t.Fatalf("%+v", s)
	}
	c := r.attach() // which has that epoch
	r.passes()
	n.mustLack(ref)
	c.detach()
	r.settled(time.Minute)
}

// A peer was away while its volumes went on, or went: it gives up what they have no use for, and fetches what it missed.
func TestSweepAfterAbsence(t *testing.T) {
	r := twice(t, 30)
	ctx := context.Background()
	r.must(r.admin.CreateVolume(ctx, &models.Volume{Name: "w", Type: "block", SizeBytes: rigVolume, BlockSpec: "crc"}))
	v := r.vol
	w, err := r.admin.Volume(ctx, "w")
	r.must(err)
	r.vol = w
	c := r.attach()
	c.fill(1, 0, rigVolume/2)
	c.detach()
	r.vol = v
	n := r.nodes[0]
	n.kill()
	r.v.RunFor(time.Second)
	c = r.attach()
	c.fill(5, 0, rigVolume) // all that n has of it is dead
	r.v.RunFor(7 * time.Second)
	c.detach()
	c = r.attach()
	c.fill(6, 0, rigVolume)
	c.detach()
	r.must(block.Delete(ctx, r.admin, "w", false))
	n.start()
	if len(n.here()) < 8 {
		t.Fatal("it has nothing")
	}
	r.v.RunFor(10 * time.Second)
	r.passes()
	r.settled(time.Minute)
	r.onlyListed()
	for ref := range n.here() {
		if ref.Volume == torus.VolumeID(w.Id) {
			t.Fatalf("%v of a volume that was deleted", ref)
		}
	}
	c = r.attach()
	c.check(6, 0, rigVolume)
	c.detach()
}

// A sweep takes its time, goes on in the next pass, and says how much is left.
func TestSweepPace(t *testing.T) {
	r := newRig(t, 31, 3, 2)
	r.tune = func(c *repairConfig) { c.SweepRate = 1 }
	for _, n := range r.nodes {
		n.kill()
		n.start()
	}
	c := r.attach()
	c.fill(1, 0, rigVolume)
	c.detach()
	r.settled(time.Minute)
	n := r.nodes[0]
	have := len(n.here())
	if have < 8 {
		t.Fatalf("%d blocks", have)
	}
	r.must(r.admin.DeleteVolume(context.Background(), "v"))
	n.l.Post(n.rep.Kick)
	r.v.RunFor(6 * time.Second)
	s := n.rep.Stats()
	if s.Swept == 0 || s.Swept > 6 || s.Garbage == 0 {
		t.Fatalf("%+v", s)
	}
	r.v.RunFor(5 * time.Minute)
	if s := n.rep.Stats(); len(n.here()) != 0 || s.Swept != uint64(have) || s.Garbage != 0 {
		t.Fatalf("%d blocks left, %+v", len(n.here()), s)
	}
}

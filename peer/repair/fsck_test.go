package repair_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/distributor"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/peer/repair"
	"github.com/coreos/torus/record"
	"github.com/coreos/torus/transport/tdp"
)

// checker is a process that checks the volume.
type checker struct {
	r    *rig
	l    *loop.VirtualLoop
	dist *distributor.Distributor
	cfg  file.FsckConfig
}

func (r *rig) checker() *checker {
	r.n++
	name := fmt.Sprintf("fsck%d", r.n)
	c := &checker{r: r, l: r.v.NewLoop(name)}
	mds := r.mds.Client()
	c.dist = r.dist(c.l, mds, name, tdp.Hello{Cluster: rigCluster, ID: torus.PeerID{0xfd, byte(r.n)}, Incarnation: 1, BlockSize: rigBlock, Name: name})
	c.cfg = file.FsckConfig{Config: file.Config{Loop: c.l, Dist: c.dist, MDS: mds, Volume: r.vol, BlockSize: rigBlock, Log: r.log}}
	return c
}

func (r *rig) fsck(mend bool) *file.FsckReport {
	r.t.Helper()
	c := r.checker()
	c.cfg.Repair = mend
	var report *file.FsckReport
	var err error
	c.l.After(time.Second, func() {
		file.Fsck(c.cfg, func(x *file.FsckReport, e error) { report, err = x, e })
	})
	if !r.v.Run(func() bool { return report != nil }, time.Hour) || err != nil {
		r.t.Fatalf("fsck: %v, %v", report, err)
	}
	c.l.Kill()
	return report
}

func show(r *file.FsckReport) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d blocks, %d copies, unchecked %v", r.Blocks, r.Copies, r.Unchecked)
	for _, x := range r.Findings {
		fmt.Fprintf(&b, "\n%s %v at %s: %s; good %d, lost %v, mended %v", x.Kind, x.Ref, x.Peer.Short(), x.What, len(x.Good), x.Lost, x.Mended)
	}
	return b.String()
}

func (r *rig) clean() {
	r.t.Helper()
	if report := r.fsck(false); len(report.Findings) > 0 || len(report.Unchecked) > 0 || report.Blocks == 0 {
		r.t.Fatal(show(report))
	}
}

// quiet is a rig with a volume that was written and detached, whose peers do not scrub, and look only so often: what is mended soon is mended since somebody said so.
func quiet(t *testing.T, seed uint64, every time.Duration) *rig {
	t.Helper()
	r := newRig(t, seed, 3, 2)
	r.tune = func(cfg *repair.Config) { cfg.NoScrub, cfg.Every = true, every }
	for _, n := range r.nodes { // begun by newRig
		n.kill()
		n.start()
	}
	c := r.attach()
	c.fill(1, 0, rigVolume)
	r.v.RunFor(6 * time.Second)
	c.fill(2, 0, rigVolume/4)
	c.detach()
	r.settled(time.Minute)
	return r
}

// D1: fsck names each kind of damage, block and peer; with Repair the peers mend it, and a second check finds nothing. What a check alone finds it leaves as it is.
func TestFsckRepair(t *testing.T) {
	for seed := range uint64(3) {
		r := quiet(t, seed, 24*time.Hour)
		r.clean()
		all, d := r.listed()
		meta := all[slices.IndexFunc(all, func(b file.Listed) bool { return b.Ref.Type == torus.TypeINode })]
		home := d.Home(meta.Ref, meta.Set)
		n, other := r.node(home[0]), r.node(home[1])
		small := func(b file.Listed) bool { return b.Length < 4*torus.PageSize || b.Ref.Type == torus.TypeINode }
		mine := slices.DeleteFunc(r.listedAt(n), small)
		flipped, torn, gone := mine[0], mine[1], mine[2]
		n.rot(flipped.Ref, 2*torus.PageSize+100)
		data, err := n.blockOf(torn.Ref, torn.Length)
		r.must(err)
		cut := int(lastRecord(torn.Ref, data))
		n.replaceBy(torn.Ref, data[:cut])
		n.remove(gone.Ref)
		n.rot(meta.Ref, lastRecordOf(t, n, meta)+torus.PageSize)
		also := slices.DeleteFunc(r.listedAt(other), func(b file.Listed) bool {
			return small(b) || b.Ref == flipped.Ref || b.Ref == torn.Ref || b.Ref == gone.Ref
		})
		other.rot(also[0].Ref, 100) // the header
		type at struct {
			ref  torus.BlockRef
			peer torus.PeerID
		}
		want := map[at]file.FindingKind{
			{flipped.Ref, n.id}: file.FindDamaged, {torn.Ref, n.id}: file.FindShort, {gone.Ref, n.id}: file.FindMissing, {also[0].Ref, other.id}: file.FindDamaged,
			{meta.Ref, n.id}: file.FindDamaged,
		}
		if cut == 0 {
			want[at{torn.Ref, n.id}] = file.FindMissing
		}
		before := r.repaired()
		for _, mend := range []bool{false, true} {
			report := r.fsck(mend)
			got := map[at]file.FindingKind{}
			for _, x := range report.Findings {
				got[at{x.Ref, x.Peer}] = x.Kind
				if x.Mended != mend || !x.Mendable() {
					t.Errorf("repair %v: %s", mend, show(report))
				}
			}
			if fmt.Sprint(got) != fmt.Sprint(want) {
				t.Fatalf("seed %d: the check says: %s\nbut what is wrong is %v", seed, show(report), want)
			}
			if !mend && r.repaired() != before {
				t.Fatal("a check has changed something")
			}
			if mend && report.Left() != 0 {
				t.Fatal(show(report))
			}
		}
		r.clean()
		r.must(r.whole())
		r.verify()
	}
}

func lastRecordOf(t *testing.T, n *node, b file.Listed) uint32 {
	t.Helper()
	data, err := n.blockOf(b.Ref, b.Length)
	if err != nil {
		t.Fatal(err)
	}
	return lastRecord(b.Ref, data)
}

// D3: what has no good copy is named, with the pages that are lost, and nobody touches it; what is damaged in different places is mended from both.
func TestFsckRepairLeavesTheLost(t *testing.T) {
	r := quiet(t, 5, 24*time.Hour)
	all, d := r.listed()
	all = slices.DeleteFunc(all, func(b file.Listed) bool { return b.Ref.Type != torus.TypeBlock || b.Length < 8*torus.PageSize })
	all = slices.DeleteFunc(all, func(b file.Listed) bool { // what is still in use of it is what was not written again
		var h record.Header
		data, err := r.node(d.Home(b.Ref, b.Set)[0]).blockOf(b.Ref, b.Length)
		return err != nil || h.Decode(data) != nil || h.Extents[0].Page < rigVolume/4/torus.PageSize
	})
	lost, both := all[0], all[1]
	home := d.Home(lost.Ref, lost.Set)
	for _, p := range home {
		r.node(p).rot(lost.Ref, 2*torus.PageSize+100)
	}
	for i, p := range d.Home(both.Ref, both.Set) {
		r.node(p).rot(both.Ref, uint32(2+i)*torus.PageSize+100)
	}
	report := r.fsck(true)
	mended := 0
	for _, x := range report.Findings {
		switch {
		case x.Kind == file.FindDamaged && x.Ref == both.Ref && x.Mended:
			mended++
		case x.Kind == file.FindLost && x.Ref == lost.Ref && !x.Mended && !x.Mendable():
			pages := uint64(0)
			for _, l := range x.Lost {
				pages += l.Count
			}
			if pages != 1 {
				t.Errorf("one page is lost: %s", show(report))
			}
		default:
			t.Fatal(show(report))
		}
	}
	if mended != 2 || report.Left() != 1 {
		t.Fatal(show(report))
	}
	for _, p := range home {
		b, err := r.node(p).blockOf(lost.Ref, lost.Length)
		if err != nil || sound(lost.Ref, b) {
			t.Errorf("the only copies of something have been touched: %v", err)
		}
	}
}

// A peer that is away when others mend: its copies are neither found nor waited for.
func TestFsckRepairBesideAnAbsentPeer(t *testing.T) {
	r := quiet(t, 6, 24*time.Hour)
	n, away := r.nodes[0], r.nodes[1]
	_, d := r.listed()
	mine := slices.DeleteFunc(r.listedAt(n), func(b file.Listed) bool {
		return b.Length < 4*torus.PageSize || d.Home(b.Ref, b.Set).Has(away.id)
	})
	alone := slices.DeleteFunc(r.listedAt(n), func(b file.Listed) bool {
		return b.Length < 4*torus.PageSize || !d.Home(b.Ref, b.Set).Has(away.id) || b.Ref.Type != torus.TypeBlock
	})
	n.rot(mine[0].Ref, 2*torus.PageSize+100)
	n.rot(alone[0].Ref, 2*torus.PageSize+100)
	away.kill()
	began := r.v.Now()
	report := r.fsck(true)
	if r.v.Now()-began > 90*time.Second {
		t.Errorf("it took %v", r.v.Now()-began)
	}
	if len(report.Findings) != 2 || report.Unchecked[away.id] == 0 || len(report.Unchecked) != 1 {
		t.Fatal(show(report))
	}
	for _, x := range report.Findings {
		switch {
		case x.Ref == mine[0].Ref && x.Kind == file.FindDamaged && x.Mended:
		case x.Ref == alone[0].Ref && x.Kind == file.FindUnknown && !x.Mended && x.Away.Has(away.id):
		default:
			t.Fatal(show(report))
		}
	}
	away.start()
	if report := r.fsck(true); report.Left() != 0 || len(report.Unchecked) > 0 {
		t.Fatal(show(report))
	}
	r.clean()
	r.verify()
}

// A block in the open window is the writer's: it is named, and not mended before the writer has left it.
func TestFsckOpenWindow(t *testing.T) {
	r := quiet(t, 7, repair.DefaultEvery)
	c := r.attach()
	c.fill(3, 0, 64<<10)
	r.v.RunFor(10 * time.Second) // listed
	st := r.state()
	var open file.Listed
	all, d := r.listed()
	for _, b := range all {
		if file.InWindow(st.VolumeState, b.Ref) {
			open = b
		}
	}
	if open.Length == 0 {
		t.Fatal("no listed block is in the window")
	}
	n := r.node(d.Home(open.Ref, open.Set)[1])
	n.rot(open.Ref, 100+2*torus.PageSize)
	report := r.fsck(true)
	if len(report.Findings) != 1 || report.Findings[0].Ref != open.Ref || report.Findings[0].Peer != n.id || report.Findings[0].Mended || !strings.Contains(report.Findings[0].What, "window") {
		t.Fatal(show(report))
	}
	c.check(3, 0, 64<<10)
	c.detach()
	if report := r.fsck(true); report.Left() != 0 {
		t.Fatal(show(report))
	}
	r.clean()
}

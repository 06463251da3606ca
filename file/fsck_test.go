package file_test

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/record"
)

// fsck checks the volume through the connections of a client.
func (r *rig) fsck(c *client, tune func(*file.FsckConfig)) *file.FsckReport {
	r.t.Helper()
	cfg := file.FsckConfig{Config: file.Config{Loop: c.l, Dist: c.d, MDS: c.mds, Volume: r.vol, BlockSize: rigBlock, Log: r.log}}
	if tune != nil {
		tune(&cfg)
	}
	var report *file.FsckReport
	var err error
	c.l.Post(func() {
		file.Fsck(cfg, func(x *file.FsckReport, e error) { report, err = x, e })
	})
	if !r.v.Run(func() bool { return report != nil }, time.Hour) || err != nil {
		r.t.Fatalf("fsck: %v, %v", report, err)
	}
	return report
}

func show(r *file.FsckReport) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d INodes, %d nodes, %d entries, %d blocks, %d copies, %d bytes, unchecked %v", r.INodes, r.Nodes, r.Entries, r.Blocks, r.Copies, r.Bytes, r.Unchecked)
	for _, x := range r.Findings {
		fmt.Fprintf(&b, "\n%s %v at %s: %s; good %d, away %d, lost %v, mended %v", x.Kind, x.Ref, x.Peer.Short(), x.What, len(x.Good), len(x.Away), x.Lost, x.Mended)
	}
	return b.String()
}

// quiet: nothing was found.
func quiet(t *testing.T, r *file.FsckReport) {
	t.Helper()
	if len(r.Findings) > 0 || len(r.Unchecked) > 0 || r.Left() > 0 {
		t.Fatalf("the volume is whole, and the check says: %s", show(r))
	}
}

// clean: that, and something of everything was looked at.
func clean(t *testing.T, r *file.FsckReport) {
	t.Helper()
	quiet(t, r)
	if r.Blocks == 0 || r.Copies < r.Blocks || r.INodes == 0 || r.Nodes == 0 || r.Entries == 0 || r.Bytes == 0 {
		t.Fatalf("what has been checked? %s", show(r))
	}
}

// place is where a page of the volume is: which copy of which block, and where in it.
type place struct {
	p   *fakePeer
	ref torus.BlockRef
	off int
}

// copiesOf finds all copies of pages with these contents in blocks of some types.
func (r *rig) copiesOf(want []byte) (l []place) {
	for _, p := range r.peers {
		for ref, b := range p.blocks {
			for off := 4096; off+4096 <= len(b.data); off += 4096 {
				if bytes.Equal(b.data[off:off+4096], want) {
					l = append(l, place{p, ref, off})
				}
			}
		}
	}
	return l
}

// nodes finds all copies of the pages of a class of metadata in the newest of the blocks that hold any.
func (r *rig) nodes(class uint64) (l []place) {
	for _, p := range r.peers {
		for ref, b := range p.blocks {
			if ref.Type != torus.TypeINode {
				continue
			}
			var h record.Header
			for off := 0; off < len(b.data); off += h.Size() {
				if err := h.Decode(b.data[off:]); err != nil {
					r.t.Fatal(err)
				}
				at := off + record.HeaderSize
				for _, x := range h.Extents {
					for range x.Count {
						if x.Page == class {
							l = append(l, place{p, ref, at})
						}
						at += 4096
					}
				}
			}
		}
	}
	return l
}

func (x place) flip() { x.p.blocks[x.ref].data[x.off+77] ^= 4 }

func is(t *testing.T, r *file.FsckReport, kind file.FindingKind, at place, good int) *file.Finding {
	t.Helper()
	if len(r.Findings) != 1 {
		t.Fatalf("one thing is wrong: %v of %v at %s. The check says: %s", kind, at.ref, at.p.id.Short(), show(r))
	}
	x := r.Findings[0]
	if x.Kind != kind || x.Ref != at.ref || x.Peer != at.p.id || len(x.Good) != good || x.Good.Has(at.p.id) || len(x.Lost) > 0 || !x.Mendable() {
		t.Fatalf("what is wrong is: %v of %v at %s, which %d others have. The check says: %s", kind, at.ref, at.p.id.Short(), good, show(r))
	}
	return x
}

// damagedRig is a volume of 8 MiB that was released: its first 610 pages are numbered, and a snapshot "s" has pages 100 to 199 as they were before. The last ten
// are, for the snapshot, in the log behind its INode.
func damagedRig(t *testing.T) (*rig, *client) {
	r := newRig(t, 7, 4, 2, 8<<20)
	t.Cleanup(r.v.Close)
	c := r.attach(r.tune())
	for i := range 600 {
		c.must(&device.Request{Op: device.Write, Off: uint64(i) * 4096, Data: numbered(i, 0)})
	}
	c.must(&device.Request{Op: device.Flush})
	r.v.RunFor(10 * time.Second) // an INode
	for i := range 10 {
		c.must(&device.Request{Op: device.Write, Off: uint64(600+i) * 4096, Data: numbered(600+i, 0)}) // the log behind it
	}
	r.snapshot(c, "s")
	r.v.RunFor(20 * time.Second)
	for i := range 100 {
		c.must(&device.Request{Op: device.Write, Off: uint64(100+i) * 4096, Data: numbered(100+i, 9)})
	}
	c.detach()
	return r, c
}

func numbered(i, mark int) []byte {
	return bytes.Repeat([]byte{byte(i), byte(i >> 8), byte(mark), 1}, 1024)
}

// D1, D2, S1: fsck finds nothing in what is whole, and each kind of damage where it is.
func TestFsckNamesWhatIsWrong(t *testing.T) {
	for name, test := range map[string]func(*testing.T, *rig, *client){
		"nothing": func(t *testing.T, r *rig, c *client) {
			report := r.fsck(c, nil)
			clean(t, report)
			if !report.Counted || report.Entries < 700 || report.Copies != 2*report.Blocks {
				t.Fatal(show(report))
			}
		},
		"a bit of data": func(t *testing.T, r *rig, c *client) {
			at := r.copiesOf(numbered(5, 0))[1]
			at.flip()
			is(t, r.fsck(c, nil), file.FindDamaged, at, 1)
		},
		"a header": func(t *testing.T, r *rig, c *client) {
			at := r.copiesOf(numbered(5, 0))[0]
			at.off = 0
			at.flip()
			is(t, r.fsck(c, nil), file.FindDamaged, at, 1)
		},
		"what follows a header": func(t *testing.T, r *rig, c *client) {
			at := r.copiesOf(numbered(5, 0))[0]
			at.off = 4096 - 78
			at.flip()
			is(t, r.fsck(c, nil), file.FindDamaged, at, 1)
		},
		"a leaf": func(t *testing.T, r *rig, c *client) {
			at := r.nodes(1)[0]
			at.flip()
			is(t, r.fsck(c, nil), file.FindDamaged, at, 1)
		},
		"an INode": func(t *testing.T, r *rig, c *client) {
			at := r.nodes(4)[0]
			at.flip()
			is(t, r.fsck(c, nil), file.FindDamaged, at, 1)
		},
		"a missing copy": func(t *testing.T, r *rig, c *client) {
			at := r.copiesOf(numbered(5, 0))[0]
			delete(at.p.blocks, at.ref)
			is(t, r.fsck(c, nil), file.FindMissing, at, 1)
		},
		"a short copy": func(t *testing.T, r *rig, c *client) {
			at := r.nodes(4)[0]
			b := at.p.blocks[at.ref]
			b.data = b.data[:firstRecord(t, at.ref, b.data)]
			is(t, r.fsck(c, nil), file.FindShort, at, 1)
		},
		"a page that cannot be read": func(t *testing.T, r *rig, c *client) {
			at := r.copiesOf(numbered(5, 0))[0]
			at.p.drop = func(q *torus.Request) error {
				if q.Op == torus.OpRead && q.Ref == at.ref && int(q.Off) <= at.off && at.off < int(q.Off)+len(q.Data) {
					return torus.ErrIO
				}
				return nil
			}
			x := is(t, r.fsck(c, nil), file.FindDamaged, at, 1)
			if !strings.Contains(x.What, "1 of") {
				t.Error(x.What)
			}
		},
		"each copy elsewhere": func(t *testing.T, r *rig, c *client) {
			at, other := r.copiesOf(numbered(5, 0)), r.copiesOf(numbered(6, 0))
			at[0].flip()
			i := slices.IndexFunc(other, func(x place) bool { return x.p != at[0].p })
			if other[i].ref != at[0].ref {
				t.Fatal("they are in different blocks")
			}
			other[i].flip()
			report := r.fsck(c, nil)
			if len(report.Findings) != 2 || !report.Findings[0].Mendable() || !report.Findings[1].Mendable() || len(report.Findings[0].Good) != 2 {
				t.Fatal(show(report))
			}
		},
		"both copies of a page": func(t *testing.T, r *rig, c *client) {
			for _, i := range []int{5, 6, 8} {
				for _, x := range r.copiesOf(numbered(i, 0)) {
					x.flip()
				}
			}
			report := r.fsck(c, nil)
			if len(report.Findings) != 1 {
				t.Fatal(show(report))
			}
			x := report.Findings[0]
			want := []file.LostPages{{First: 5, Count: 2}, {First: 8, Count: 1}, {Of: "@s", First: 5, Count: 2}, {Of: "@s", First: 8, Count: 1}}
			if x.Kind != file.FindLost || x.Mendable() || !slices.Equal(x.Lost, want) {
				t.Fatal(show(report))
			}
		},
		"what only a snapshot has": func(t *testing.T, r *rig, c *client) {
			for _, x := range r.copiesOf(numbered(150, 0)) {
				x.flip()
			}
			report := r.fsck(c, nil)
			if len(report.Findings) != 1 || !slices.Equal(report.Findings[0].Lost, []file.LostPages{{Of: "@s", First: 150, Count: 1}}) {
				t.Fatal(show(report))
			}
			at := r.state().Pins[0].At
			report = r.fsck(c, func(cfg *file.FsckConfig) { cfg.At, cfg.Of = at, "@s" })
			if len(report.Findings) != 1 || !slices.Equal(report.Findings[0].Lost, []file.LostPages{{Of: "@s", First: 150, Count: 1}}) {
				t.Fatal(show(report))
			}
			for _, x := range r.copiesOf(numbered(150, 9)) {
				x.flip()
			}
			report = r.fsck(c, func(cfg *file.FsckConfig) { cfg.At, cfg.Of = at, "@s" })
			if len(report.Findings) != 1 {
				t.Fatalf("the snapshot has nothing of what was written since: %s", show(report))
			}
		},
		"the header of a record everywhere": func(t *testing.T, r *rig, c *client) {
			for _, x := range r.copiesOf(numbered(5, 0)) {
				x.off = 0
				x.flip()
			}
			report := r.fsck(c, nil)
			if len(report.Findings) != 1 || report.Findings[0].Kind != file.FindLost || report.Findings[0].Mendable() {
				t.Fatal(show(report))
			}
			if len(report.Findings[0].Lost) > 0 {
				t.Fatalf("readers do not need it: %s", show(report))
			}
		},
		"a leaf everywhere": func(t *testing.T, r *rig, c *client) {
			newest := map[torus.BlockRef]bool{}
			for _, x := range r.nodes(1) {
				x.flip()
				newest[x.ref] = true
			}
			report := r.fsck(c, nil)
			pages := map[string]uint64{}
			for _, x := range report.Findings {
				if x.Kind == file.FindMoment && x.Lost[0].Of == "@s" {
					continue
				}
				if x.Kind != file.FindLost || !newest[x.Ref] || x.Mendable() {
					t.Fatal(show(report))
				}
				for _, l := range x.Lost {
					pages[l.Of] += l.Count
				}
			}
			if pages[""] != 1024 { // two leaves
				t.Fatal(show(report))
			}
		},
		"the INode everywhere": func(t *testing.T, r *rig, c *client) {
			for _, x := range r.nodes(4) {
				x.flip()
			}
			report := r.fsck(c, nil)
			if len(report.Findings) != 1 || report.Findings[0].Kind != file.FindINode || report.Findings[0].Ref.Type != torus.TypeINode {
				t.Fatal(show(report))
			}
		},
		"another page where the map points": func(t *testing.T, r *rig, c *client) {
			// A record with the same contents that says that they are another page: all checksums are right.
			places := r.copiesOf(numbered(5, 0))
			for _, x := range places {
				b := x.p.blocks[x.ref].data
				var h record.Header
				off := 0
				for ; off < x.off; off += h.Size() {
					if err := h.Decode(b[off:]); err != nil {
						t.Fatal(err)
					}
				}
				off -= h.Size()
				if len(h.Extents) != 1 || h.Extents[0] != (record.Extent{Page: 0, Count: 63, Kind: record.Moved}) {
					t.Fatalf("%+v", h.Extents)
				}
				h.Extents[0].Page = 1500
				h.Encode(b[off : off+record.HeaderSize])
			}
			report := r.fsck(c, nil)
			if len(report.Findings) != 1 {
				t.Fatal(show(report))
			}
			x := report.Findings[0]
			if x.Kind != file.FindEntry || x.Ref != places[0].ref || x.Mendable() || !slices.Equal(x.Lost, []file.LostPages{{Count: 63}, {Of: "@s", Count: 63}}) {
				t.Fatal(show(report))
			}
		},
		"copies that differ": func(t *testing.T, r *rig, c *client) {
			x := r.copiesOf(numbered(5, 0))[0]
			b := x.p.blocks[x.ref].data
			var h record.Header
			if err := h.Decode(b); err != nil {
				t.Fatal(err)
			}
			h.Time++
			h.Encode(b[:record.HeaderSize])
			report := r.fsck(c, nil)
			if len(report.Findings) != 1 || report.Findings[0].Kind != file.FindDiffer || report.Findings[0].Mendable() || report.Findings[0].Ref != x.ref {
				t.Fatal(show(report))
			}
		},
		"a peer that is down": func(t *testing.T, r *rig, c *client) {
			r.peers[0].crash(false)
			report := r.fsck(c, nil)
			if len(report.Findings) > 0 || report.Unchecked[r.peers[0].id] != uint64(len(r.peers[0].blocks)) || len(report.Unchecked) != 1 {
				t.Fatalf("%d blocks are there that cannot be checked; %s", len(r.peers[0].blocks), show(report))
			}
			if want := uint64(len(r.peers[1].blocks) + len(r.peers[2].blocks) + len(r.peers[3].blocks)); report.Copies != want {
				t.Fatalf("%d copies are elsewhere: %s", want, show(report))
			}
		},
		"fewer copies than there are to be": func(t *testing.T, r *rig, c *client) {
			report := r.fsck(c, func(cfg *file.FsckConfig) { cfg.Replication = 3 })
			if uint64(len(report.Findings)) != report.Blocks || report.Blocks == 0 {
				t.Fatal(show(report))
			}
			for _, x := range report.Findings {
				if x.Kind != file.FindFewer || len(x.Good) != 2 || x.Mendable() {
					t.Fatal(show(report))
				}
			}
		},
		"damage beside a peer that is down": func(t *testing.T, r *rig, c *client) {
			at := r.copiesOf(numbered(5, 0))
			at[0].flip()
			at[1].p.crash(false)
			report := r.fsck(c, nil)
			if len(report.Findings) != 1 {
				t.Fatal(show(report))
			}
			if x := report.Findings[0]; x.Kind != file.FindUnknown || x.Ref != at[0].ref || !x.Away.Has(at[1].p.id) || x.Mendable() {
				t.Fatal(show(report))
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			r, c := damagedRig(t)
			before := r.state()
			test(t, r, c)
			if after := r.state(); after.Revision != before.Revision {
				t.Error("a check has changed the state of the volume")
			}
			for _, p := range r.peers {
				if p.fence[torus.VolumeID(r.vol.Id)] > before.Epoch {
					t.Error("a check has fenced somebody")
				}
			}
		})
	}
}

func firstRecord(t *testing.T, ref torus.BlockRef, b []byte) int {
	t.Helper()
	var h record.Header
	n, err := record.Check(ref, 0, b, &h)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// A table that counts other live pages than there are is found, whichever way.
func TestFsckCountsLivePages(t *testing.T) {
	for _, by := range []int{-1, 1} {
		r := newRig(t, 1, 3, 2, 8<<20)
		c := r.attach(nil)
		c.must(&device.Request{Op: device.Write, Data: pg(1, 20)})
		c.must(&device.Request{Op: device.Flush})
		c.l.Post(func() { c.f.Miscount(by) })
		c.detach()
		report := r.fsck(c, nil)
		if len(report.Findings) != 1 || report.Findings[0].Kind != file.FindLive || report.Findings[0].Ref.Type != torus.TypeBlock {
			t.Fatal(show(report))
		}
		if dangerous := strings.Contains(report.Findings[0].What, "in use"); dangerous != (by < 0) {
			t.Error(report.Findings[0].What)
		}
	}
}

// What a volume had been taken back from, and can be rewound to, is checked as well; and each moment by itself.
func TestFsckThePast(t *testing.T) {
	for seed := range uint64(4) {
		r := newRig(t, seed, 4, 2, 4<<20)
		c := r.attach(r.tune())
		r.edit(c, func(s *models.VolumeState) { s.RetainMs = 60_000 })
		m := &model{r: r, b: make([]byte, r.size)}
		m.churn(c, 150)
		first := r.snapshot(c, "first")
		m.churn(c, 150)
		r.v.RunFor(10 * time.Second)
		second := r.snapshot(c, "second")
		m.churn(c, 50)
		c.detach()
		for _, to := range []*models.Moment{first, second, first} {
			c = r.attach(func(cfg *file.Config) {
				r.tune()(cfg)
				cfg.To = to
			})
			m.churn(c, 100)
			c.detach()
			report := r.fsck(c, nil)
			clean(t, report)
			if s := r.state(); s.KeptFrom == 0 || report.INodes < s.Head.Number-s.KeptFrom+1 || report.INodes < 4 {
				t.Fatalf("INodes %d to %d can be read: %s", s.KeptFrom, s.Head.Number, show(report))
			}
			for _, at := range []*models.Moment{first, second} {
				quiet(t, r.fsck(c, func(cfg *file.FsckConfig) { cfg.At, cfg.Of = at, "@x" }))
			}
		}
	}
}

// Beside a writer that overwrites, checkpoints and compacts, and snapshots that come and go, a check finds nothing; nor what the writer has killed halfway left.
func TestFsckBesideAWriter(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			size, spread, rate, want := uint64(16<<20), uint64(1), uint64(32<<20), 4
			if seed%6 >= 4 { // a map of many leaves, and a check that takes its time for each
				size, spread, rate, want = 512<<20, 64, 4<<20, 2
			}
			r := newRig(t, seed, 4, 2, size)
			defer r.v.Close()
			c := r.attach(func(cfg *file.Config) {
				r.tune()(cfg)
				cfg.CheckpointBytes, cfg.CheckpointEvery, cfg.CompactSlack = 256<<10, time.Second, 2
			})
			r.edit(c, func(s *models.VolumeState) { s.RetainMs = seed % 2 * 2000 })
			look := r.client(func(cfg *file.Config) { cfg.Volume = &models.Volume{Name: "none", Id: 99} }) // only its connections are used
			draw := func() uint64 { return uint64(r.rng.IntN(2000)) * spread }
			c.overwrite(100, time.Millisecond, draw, func() {})
			if !r.v.Run(func() bool { return r.state().Head != nil }, time.Minute) {
				t.Fatal("no checkpoint")
			}
			var reports []*file.FsckReport
			checks := 0
			var begin func()
			begin = func() {
				cfg := file.FsckConfig{Config: file.Config{Loop: look.l, Dist: look.d, MDS: look.mds, Volume: r.vol, BlockSize: rigBlock, Log: r.log}, Rate: rate}
				file.Fsck(cfg, func(x *file.FsckReport, err error) {
					if err != nil {
						t.Errorf("check %d: %v", checks, err)
					}
					checks++
					reports = append(reports, x)
					if checks < want {
						begin()
					}
				})
			}
			look.l.Post(begin)
			number := r.state().Head.GetNumber()
			for i := 0; checks < want; i++ {
				c.overwrite(20, 10*time.Millisecond, draw, func() {})
				if i > 400 {
					t.Fatal("the checks do not end")
				}
				switch i % 4 {
				case 1:
					r.snapshot(c, fmt.Sprint(i))
				case 3:
					r.edit(c, func(s *models.VolumeState) { s.Pins = nil })
				}
			}
			gone := uint64(0)
			for _, x := range reports {
				clean(t, x)
				gone += x.Copies
			}
			t.Log(gone, "copies")
			if now := r.state().Head.GetNumber(); now < number+5 {
				t.Fatalf("only %d INodes were committed meanwhile", now-number)
			}
			c.kill()
			clean(t, r.fsck(look, nil))
			clean(t, r.fsck(r.attach(nil), nil))
		})
	}
}

// A clone is checked with what it has of its origin, before and after it is written to.
func TestFsckClone(t *testing.T) {
	r, _ := damagedRig(t)
	at := r.state().Pins[0].At
	origin := r.clone("w", at)
	clone := r.vol
	c := r.attach(r.tune())
	for i := range uint64(20) {
		c.must(&device.Request{Op: device.Write, Off: i * 4096, Data: pg(byte(i), 1)})
	}
	c.detach()
	clean(t, r.fsck(c, nil))
	for _, x := range r.copiesOf(numbered(30, 0)) {
		x.flip()
	}
	report := r.fsck(c, nil)
	if len(report.Findings) != 1 || report.Findings[0].Ref.Volume != torus.VolumeID(origin.Id) || !slices.Equal(report.Findings[0].Lost, []file.LostPages{{First: 30, Count: 1}}) {
		t.Fatal(show(report))
	}
	r.vol = origin
	report = r.fsck(c, nil)
	want := []file.LostPages{{First: 30, Count: 1}, {Of: "@s", First: 30, Count: 1}, {Of: fmt.Sprintf("clone %d", clone.Id), First: 30, Count: 1}}
	if len(report.Findings) != 1 || !slices.Equal(report.Findings[0].Lost, want) {
		t.Fatal(show(report))
	}
}

// Nothing was ever written: there is nothing to check. And a check ends when it is told to.
func TestFsckEnds(t *testing.T) {
	r := newRig(t, 1, 3, 2, 8<<20)
	c := r.attach(nil)
	if report := r.fsck(c, nil); report.Blocks > 0 && len(report.Findings) > 0 {
		t.Fatal(show(report))
	}
	c.must(&device.Request{Op: device.Write, Data: pg(1, 20)})
	c.detach()
	stop := errors.New("enough")
	var got error
	finished := false
	c.l.Post(func() {
		cfg := file.FsckConfig{Config: file.Config{Loop: c.l, Dist: c.d, MDS: c.mds, Volume: r.vol, BlockSize: rigBlock, Log: r.log}, Stop: func() error { return stop }}
		file.Fsck(cfg, func(_ *file.FsckReport, err error) { got, finished = err, true })
	})
	if !r.v.Run(func() bool { return finished }, time.Minute) || !errors.Is(got, stop) {
		t.Fatal(finished, got)
	}
}

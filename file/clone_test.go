package file_test

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/models"
)

func (r *rig) tune() func(*file.Config) {
	return func(c *file.Config) {
		c.CheckpointBytes, c.CheckpointEvery = 1<<20, 5*time.Second
		c.WallClock = func() time.Time { return time.Unix(1000, 0).Add(c.Loop.Now()) }
	}
}

// A volume goes back to a pinned moment, and forward again to what it was before that: everything since is still there while it is pinned.
func TestRestore(t *testing.T) {
	for seed := range uint64(6) {
		r := newRig(t, seed, 4, 2, 4<<20)
		c := r.attach(r.tune())
		m := &model{r: r, b: make([]byte, r.size)}
		m.churn(c, 150)
		first := r.snapshot(c, "first")
		then := bytes.Clone(m.b)
		m.churn(c, 150)
		second := r.snapshot(c, "second")
		now := bytes.Clone(m.b)
		if seed%2 == 0 {
			r.v.RunFor(time.Minute) // compacted
		}
		c.detach()
		for i, to := range []struct {
			at   *models.Moment
			want []byte
		}{{first, then}, {second, now}, {first, then}} {
			c = r.attach(func(cfg *file.Config) {
				r.tune()(cfg)
				cfg.To = to.at
			})
			same(t, "restored", r.image(c.f, c), to.want)
			copy(m.b, to.want)
			m.churn(c, 100)
			c.must(&device.Request{Op: device.Flush})
			if i == 1 {
				c.kill()
				c = r.attach(r.tune())
			}
			same(t, "what was written since", r.image(c.f, c), m.b)
			same(t, "first", r.image(r.view(c, first), c), then)
			same(t, "second", r.image(r.view(c, second), c), now)
			c.detach()
		}
		c = r.attach(r.tune())
		same(t, "attached again", r.image(c.f, c), m.b)
		c.detach()
	}
}

// clone makes a clone of a moment of the rig's volume and makes it the rig's volume.
func (r *rig) clone(name string, at *models.Moment) (parent *models.Volume) {
	r.t.Helper()
	ctx := context.Background()
	parent = r.vol
	mds := r.mds.Client()
	v := &models.Volume{Name: name, Type: "block", SizeBytes: at.SizeBytes, BlockSpec: "crc", Origin: &models.Origin{Volume: parent.Id, At: at}}
	if err := mds.CreateVolume(ctx, v); err != nil {
		r.t.Fatal(err)
	}
	r.edit(nil, func(s *models.VolumeState) { s.Pins = append(s.Pins, &models.Pin{Clone: v.Id, At: at}) })
	var err error
	if r.vol, err = mds.Volume(ctx, name); err != nil {
		r.t.Fatal(err)
	}
	return parent
}

// Clones of clones: each goes its own way; the parent is written, compacted and collected meanwhile; a flattened one needs nobody.
func TestClones(t *testing.T) {
	for seed := range uint64(6) {
		r := newRig(t, seed, 4, 2, 4<<20)
		c := r.attach(r.tune())
		m := &model{r: r, b: make([]byte, r.size)}
		m.churn(c, 200)
		at := r.snapshot(c, "s")
		then := bytes.Clone(m.b)
		m.churn(c, 200)
		r.v.RunFor(time.Minute)
		// The first clone.
		root := r.clone("w", at)
		r.edit2(root, func(s *models.VolumeState) { // the snapshot goes, the clone's pin stays
			for i, p := range s.Pins {
				if p.Name == "s" {
					s.Pins = append(s.Pins[:i], s.Pins[i+1:]...)
					break
				}
			}
		})
		w := r.attach(r.tune())
		same(t, "clone", r.image(w.f, w), then)
		mw := &model{r: r, b: bytes.Clone(then), n: 1 << 20}
		mw.churn(w, 100)
		same(t, "clone", r.image(w.f, w), mw.b)
		m.churn(c, 300) // the parent lives on
		atW := r.snapshot(w, "t")
		thenW := bytes.Clone(mw.b)
		mw.churn(w, 100)
		w.must(&device.Request{Op: device.Flush})
		if seed%2 == 0 {
			w.kill()
			w = r.attach(r.tune())
		}
		same(t, "clone attached again", r.image(w.f, w), mw.b)
		// The clone of the clone.
		first := r.clone("x", atW)
		x := r.attach(r.tune())
		same(t, "clone of a clone", r.image(x.f, x), thenW)
		mx := &model{r: r, b: bytes.Clone(thenW), n: 2 << 20}
		mx.churn(x, 50)
		// It is flattened: nothing of the other two is needed any more.
		r.edit(x, func(s *models.VolumeState) { s.Asks = append(s.Asks, &models.Ask{Flatten: true}) })
		if !r.v.Run(func() bool { return r.state().Own }, 5*time.Minute) {
			t.Fatal("the clone is not flattened")
		}
		same(t, "flattened", r.image(x.f, x), mx.b)
		for _, p := range r.peers {
			for ref := range p.blocks {
				if ref.Volume != torus.VolumeID(r.vol.Id) {
					delete(p.blocks, ref)
				}
			}
		}
		same(t, "flattened, and alone", r.image(x.f, x), mx.b)
		x.detach()
		x = r.attach(r.tune())
		same(t, "flattened, attached again", r.image(x.f, x), mx.b)
		_ = first
	}
}

// edit2 is edit for another volume than the rig's present one.
func (r *rig) edit2(v *models.Volume, change func(*models.VolumeState)) {
	now := r.vol
	r.vol = v
	r.edit(nil, change)
	r.vol = now
}

// A volume grows while it is in use.
func TestGrow(t *testing.T) {
	r := newRig(t, 1, 3, 2, 4<<20)
	c := r.attach(r.tune())
	m := &model{r: r, b: make([]byte, r.size)}
	m.churn(c, 100)
	const size = 3 << 30
	if err := r.mds.Client().UpdateVolume(context.Background(), "v", func(v *models.Volume) error { v.SizeBytes = size; return nil }); err != nil {
		t.Fatal(err)
	}
	r.edit(c, func(s *models.VolumeState) { s.Asks = append(s.Asks, &models.Ask{SizeBytes: size}) })
	if !r.v.Run(func() bool { return c.f.Size() == size }, time.Minute) {
		t.Fatal("it has not grown")
	}
	page := bytes.Repeat([]byte{7}, 4096)
	c.must(&device.Request{Op: device.Write, Off: size - 4096, Data: page, Flags: device.FUA})
	c.kill()
	r.vol.SizeBytes = size
	c = r.attach(r.tune())
	got := make([]byte, 4096)
	c.must(&device.Request{Op: device.Read, Off: size - 4096, Data: got})
	if !bytes.Equal(got, page) {
		t.Fatal("what was written behind the old end is not there")
	}
	got = make([]byte, 4<<20)
	c.must(&device.Request{Op: device.Read, Data: got})
	same(t, "what was there before", got, m.b)
	c.detach()
}

// A volume that retains can be taken back to any of its flushes, and forward again.
func TestRewind(t *testing.T) {
	for seed := range uint64(6) {
		r := newRig(t, seed, 4, 2, 4<<20)
		r.edit(nil, func(s *models.VolumeState) { s.RetainMs = uint64(10 * time.Minute / time.Millisecond) })
		c := r.attach(r.tune())
		m := &model{r: r, b: make([]byte, r.size)}
		m.churn(c, 50)
		c.must(&device.Request{Op: device.Flush})
		r.v.RunFor(20 * time.Second) // from here on
		type point struct {
			at   time.Time
			want []byte
		}
		var points []point
		for i := range 20 {
			m.churn(c, 1+r.rng.IntN(100))
			c.must(&device.Request{Op: device.Flush})
			points = append(points, point{time.Unix(1000, 0).Add(c.l.Now()), bytes.Clone(m.b)})
			r.v.RunFor(time.Duration(1+r.rng.IntN(3000)) * time.Millisecond)
			switch i {
			case 7:
				c.kill()
				c = r.attach(r.tune())
			case 13:
				r.v.RunFor(time.Minute) // checkpoints, and compaction
			}
		}
		for _, p := range points[:5] { // online, to look at
			same(t, "a view of the past", r.image(r.view(c, r.locate(c, p.at)), c), p.want)
		}
		c.detach()
		for range 8 {
			p := points[r.rng.IntN(len(points))]
			at := r.locate(c, p.at)
			c = r.attach(func(cfg *file.Config) {
				r.tune()(cfg)
				cfg.To = at
			})
			same(t, "rewound", r.image(c.f, c), p.want)
			copy(m.b, p.want)
			m.churn(c, 30)
			same(t, "gone on from there", r.image(c.f, c), m.b)
			c.detach()
		}
		// What is older than the retention goes.
		c = r.attach(r.tune())
		for range 15 {
			m.churn(c, 100)
			c.must(&device.Request{Op: device.Flush})
			r.v.RunFor(time.Minute)
		}
		if s := c.f.Stats(); s.StoredBytes > 60<<20 {
			t.Errorf("%d bytes are stored 15 minutes later", s.StoredBytes)
		}
		var err error
		finished := false
		c.l.Post(func() {
			file.Locate(file.Config{Loop: c.l, Dist: c.d, MDS: c.mds, Volume: r.vol, BlockSize: rigBlock}, points[0].at, func(_ *models.Moment, e error) { err, finished = e, true })
		})
		r.v.Run(func() bool { return finished }, time.Minute)
		if !errors.Is(err, torus.ErrNotExist) {
			t.Errorf("locating what is not kept any more: %v", err)
		}
		c.detach()
	}
}

func (r *rig) locate(c *client, at time.Time) (m *models.Moment) {
	r.t.Helper()
	var err error
	finished := false
	c.l.Post(func() {
		file.Locate(file.Config{Loop: c.l, Dist: c.d, MDS: c.mds, Volume: r.vol, BlockSize: rigBlock}, at, func(x *models.Moment, e error) { m, err, finished = x, e, true })
	})
	if !r.v.Run(func() bool { return finished }, time.Minute) || err != nil {
		r.t.Fatalf("locate: done %v, %v", finished, err)
	}
	return m
}

package file_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/models"
	"google.golang.org/protobuf/proto"
)

// state reads the volume's state.
func (r *rig) state() torus.VolumeState {
	r.t.Helper()
	st, err := r.mds.Client().VolumeState(context.Background(), torus.VolumeID(r.vol.Id))
	if err != nil {
		r.t.Fatal(err)
	}
	return st
}

// edit changes the volume's state as an administrator does, and tells the writer.
func (r *rig) edit(c *client, change func(*models.VolumeState)) {
	r.t.Helper()
	for {
		st := r.state()
		to := proto.CloneOf(st.VolumeState)
		change(to)
		now, err := r.mds.Client().Amend(context.Background(), torus.VolumeID(r.vol.Id), st, to)
		if errors.Is(err, torus.ErrCompareFailed) {
			continue
		}
		if err != nil {
			r.t.Fatal(err)
		}
		if c != nil {
			c.l.Post(func() { c.f.Observe(now) })
		}
		return
	}
}

// snapshot asks for a snapshot and waits for it.
func (r *rig) snapshot(c *client, name string) *models.Moment {
	r.t.Helper()
	r.edit(c, func(s *models.VolumeState) { s.Asks = append(s.Asks, &models.Ask{Snapshot: name}) })
	var at *models.Moment
	if !r.v.Run(func() bool {
		for _, p := range r.state().Pins {
			if p.Name == name {
				at = p.At
			}
		}
		return at != nil
	}, time.Minute) {
		r.t.Fatalf("snapshot %s is not taken", name)
	}
	return at
}

// image is all of a device.
func (r *rig) image(dev device.Device, on *client) []byte {
	r.t.Helper()
	b := make([]byte, dev.Size())
	for off := 0; off < len(b); off += 1 << 20 {
		finished := false
		q := &device.Request{Op: device.Read, Off: uint64(off), Data: b[off:min(len(b), off+1<<20)], Done: func(*device.Request) { finished = true }}
		q.Len = uint64(len(q.Data))
		on.l.Post(func() { dev.Submit(q) })
		if !r.v.Run(func() bool { return finished }, time.Minute) || q.Err != nil {
			r.t.Fatalf("read at %d: done %v, %v", off, finished, q.Err)
		}
	}
	return b
}

// view opens a moment, by a client of its own.
func (r *rig) view(c *client, at *models.Moment) *file.View {
	r.t.Helper()
	var v *file.View
	var err error
	finished := false
	c.l.Post(func() {
		file.OpenView(file.Config{Loop: c.l, Dist: c.d, MDS: c.mds, Volume: r.vol, BlockSize: rigBlock}, at, func(x *file.View, e error) { v, err, finished = x, e, true })
	})
	if !r.v.Run(func() bool { return finished }, time.Minute) || err != nil {
		r.t.Fatalf("view: done %v, %v", finished, err)
	}
	return v
}

func same(t *testing.T, what string, got, want []byte) {
	t.Helper()
	for i := 0; i < len(want); i += 4096 {
		if !bytes.Equal(got[i:i+4096], want[i:i+4096]) {
			t.Fatalf("%s: page %d is not what it was: %x, want %x", what, i/4096, got[i:i+8], want[i:i+8])
		}
	}
}

// model is what a volume should hold.
type model struct {
	r *rig
	b []byte
	n uint64
}

// churn writes, zeroes and trims at random.
func (m *model) churn(c *client, n int) {
	m.r.t.Helper()
	pages := len(m.b) / 4096
	for range n {
		first := m.r.rng.IntN(pages)
		count := 1 + m.r.rng.IntN(min(12, pages-first))
		dst := m.b[first*4096:][:count*4096]
		q := &device.Request{Op: device.Write, Off: uint64(first) * 4096, Len: uint64(count) * 4096}
		switch k := m.r.rng.IntN(20); k {
		case 0:
			q.Op = device.Trim
			clear(dst)
		case 1:
			q.Op = device.WriteZeroes
			clear(dst)
		default:
			for i := range count {
				m.n++
				copy(dst[i*4096:][:4096], bytes.Repeat([]byte(fmt.Sprintf("%08x", m.n)), 512))
			}
			q.Data = bytes.Clone(dst)
		}
		c.must(q)
	}
}

// S1: a snapshot reads the same for as long as it exists, whatever is written, compacted, deleted and attached elsewhere; and what only deleted ones needed goes.
func TestSnapshots(t *testing.T) {
	for seed := range uint64(8) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := newRig(t, seed, 4, 2, 4<<20)
			tune := r.tune()
			c := r.attach(tune)
			m := &model{r: r, b: make([]byte, r.size)}
			type snap struct {
				at   *models.Moment
				want []byte
			}
			snaps := map[string]snap{}
			check := func() {
				t.Helper()
				for name, s := range snaps {
					same(t, name, r.image(r.view(c, s.at), c), s.want)
				}
				same(t, "the volume", r.image(c.f, c), m.b)
			}
			for i := range 12 {
				m.churn(c, r.rng.IntN(200))
				name := fmt.Sprint("s", i)
				want := bytes.Clone(m.b)
				snaps[name] = snap{r.snapshot(c, name), want}
				switch r.rng.IntN(4) {
				case 0:
					m.churn(c, r.rng.IntN(20))
					c.must(&device.Request{Op: device.Flush})
					c.kill()
					c = r.attach(tune)
				case 1:
					c.detach()
					c = r.attach(tune)
				}
				for name := range snaps {
					if r.rng.IntN(4) == 0 {
						delete(snaps, name)
						r.edit(c, func(s *models.VolumeState) {
							for k, p := range s.Pins {
								if p.Name == name {
									s.Pins = append(s.Pins[:k], s.Pins[k+1:]...)
									break
								}
							}
						})
					}
				}
				if i%4 == 3 {
					check()
				}
			}
			check()
			r.edit(c, func(s *models.VolumeState) { s.Pins = nil })
			m.churn(c, 300)
			c.must(&device.Request{Op: device.Flush})
			r.v.RunFor(time.Minute)
			c.detach()
			c = r.attach(tune)
			same(t, "the volume", r.image(c.f, c), m.b)
			s := c.f.Stats()
			if s.StoredBytes > s.LiveBytes*2+8<<20 {
				t.Errorf("%d bytes stored for %d alive, though no snapshot is left", s.StoredBytes, s.LiveBytes)
			}
		})
	}
}

package file_test

import (
	"slices"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/models"
)

// stored is how many bytes of blocks of some types the peers hold, one copy.
func (r *rig) stored(types ...torus.BlockType) (n uint64) {
	for _, p := range r.peers {
		for ref, b := range p.blocks {
			if slices.Contains(types, ref.Type) {
				n += uint64(len(b.data))
			}
		}
	}
	return n / 2
}

// Leaves of the map that never change do not keep the metadata blocks in which they were once written among others.
func TestTidy(t *testing.T) {
	const leaves, hot = 400, 10
	r := newRig(t, 1, 3, 2, leaves*2<<20)
	c := r.attach(func(cfg *file.Config) { cfg.CheckpointEvery = time.Second })
	change := func(page uint64) { // of the map alone: what compaction moves is written anew anyway
		c.must(&device.Request{Op: device.WriteZeroes, Flags: device.NoHole, Off: page * 4096, Len: 4096})
	}
	for i := range uint64(leaves) {
		change(i * 512) // once and never again
		for k := range uint64(hot) {
			change(k*512 + 1)
		}
		r.v.RunFor(1100 * time.Millisecond)
	}
	if n, s := c.f.Stats().Checkpoints, r.stored(torus.TypeINode); n < leaves*9/10 || s > 3*(leaves+20)*4096+8*rigBlock {
		t.Errorf("%d checkpoints; metadata takes %d bytes, of which %d leaves are %d", n, s, leaves, leaves*4096)
	}
	c.detach()
	c = r.attach(nil)
	for i := range uint64(leaves) {
		q := &device.Request{Op: device.Status, Off: i * 2 << 20, Len: 4096}
		if c.must(q); len(q.Extents) != 1 || q.Extents[0].Hole || !q.Extents[0].Zero {
			t.Fatalf("leaf %d says %+v", i, q.Extents)
		}
	}
	c.detach()
}

// Who asks for it is given back all but a twentieth of what is not alive, data and metadata, even if compaction is switched off, and in a volume that is being
// written to as well.
func TestTight(t *testing.T) {
	const (
		size  = 48 << 20
		pages = size / 4096
	)
	for name, utilisation := range map[string]float64{"default": 0, "off": -1} {
		for _, busy := range []bool{false, true} {
			if busy {
				name += ", busy"
			}
			t.Run(name, func(t *testing.T) {
				r := newRig(t, 1, 4, 2, size)
				c := r.attach(func(cfg *file.Config) { cfg.CheckpointBytes, cfg.Utilisation = 4<<20, utilisation })
				next := uint64(0)
				c.overwrite(pages/32, time.Millisecond, func() uint64 { next++; return next - 1 }, func() {})
				for i := range 4 {
					c.overwrite(pages/32/8, 5*time.Millisecond, func() uint64 { return r.rng.Uint64N(pages) }, func() {})
					r.snapshot(c, string(rune('a'+i)))
				}
				r.v.RunFor(5 * time.Second)
				before := r.stored(torus.TypeBlock, torus.TypeMoved)
				if before < size*13/10 {
					t.Fatalf("%d bytes are stored for %d: too little to tell", before, size)
				}
				r.edit(c, func(s *models.VolumeState) {
					s.Pins = nil
					s.Asks = append(s.Asks, &models.Ask{Compact: 1})
				})
				if busy {
					c.overwrite(100, 5*time.Millisecond, func() uint64 { return r.rng.Uint64N(pages) }, func() {})
				}
				if !r.v.Run(func() bool { return len(r.state().Asks) == 0 }, 5*time.Minute) {
					t.Fatal("it is never done")
				}
				r.v.RunFor(time.Second) // deletions arrive
				most := uint64(size*105/100 + 2*rigBlock)
				if busy {
					most = before
				}
				if s := r.stored(torus.TypeBlock, torus.TypeMoved, torus.TypeINode); s > most {
					t.Errorf("%d bytes are stored for %d, more than %d; %d before", s, size, most, before)
				}
				s := c.f.Stats()
				r.v.RunFor(10 * time.Second)
				if moved := c.f.Stats().MovedBytes; !busy && moved != s.MovedBytes {
					t.Errorf("%d bytes were moved after that", moved-s.MovedBytes)
				}
				c.detach()
			})
		}
	}
}

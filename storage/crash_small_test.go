package storage_test

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/coreos/torus"
	"github.com/coreos/torus/storage/storetest"
	"github.com/coreos/torus/vfs"
)

// crashOps is what workloads are made of. Block a has two records from the beginning, which are durable; b is not there.
var crashOps = []struct {
	name string
	do   func(w *world)
}{
	{"append a", func(w *world) { w.appendTo(1) }},
	{"append b", func(w *world) { w.appendTo(2) }},
	{"sync a", func(w *world) { w.syncOf(1) }},
	{"sync b", func(w *world) { w.syncOf(2) }},
	{"seal a", func(w *world) { w.sealOf(1, false) }},
	{"seal a short", func(w *world) { w.sealOf(1, true) }},
	{"put a", func(w *world) { w.putOf(1) }},
	{"put b", func(w *world) { w.putOf(2) }},
	{"delete a", func(w *world) { w.deleteOf(1) }},
}

func (w *world) block(i uint64) (torus.BlockRef, *truth) {
	ref := torus.BlockRef{Volume: 1, INode: 1, Index: torus.IndexID(i)}
	b := w.blocks[ref]
	if b == nil {
		b = &truth{seal: -1, put: -1}
		w.blocks[ref] = b
		w.refs = append(w.refs, ref)
	}
	return ref, b
}

func (w *world) appendTo(i uint64) {
	ref, b := w.block(i)
	if b.seal >= 0 || b.put >= 0 || b.deleting {
		return
	}
	off := len(b.data)
	data := storetest.Record(ref, uint32(off), uint64(off/torus.PageSize)+1, 0, 1)
	if off+len(data) > crashBlock {
		return
	}
	b.data = append(b.data, data...)
	w.submit(&torus.Request{Op: torus.OpAppend, Ref: ref, Off: uint32(off), Data: data}, func() { b.held = max(b.held, off+len(data)) })
}

func (w *world) syncOf(i uint64) {
	ref, b := w.block(i)
	n := b.held
	if b.seal >= 0 {
		n = min(n, b.seal)
	}
	if n > 0 && !b.deleting {
		w.submit(&torus.Request{Op: torus.OpSync, Ref: ref, Len: uint32(n)}, func() { b.synced = max(b.synced, n) })
	}
}

func (w *world) sealOf(i uint64, short bool) {
	ref, b := w.block(i)
	if b.seal >= 0 || b.put >= 0 || b.deleting || b.held < len(b.data) {
		return
	}
	b.seal = b.held
	if short {
		b.seal = 2 * torus.PageSize // of at least two records the first
	}
	w.submit(&torus.Request{Op: torus.OpSeal, Ref: ref, Len: uint32(b.seal)}, func() { b.sealed = true })
}

func (w *world) putOf(i uint64) {
	if ref, b := w.block(i); b.put < 0 && !b.deleting {
		w.putBlock(ref, b)
	}
}

func (w *world) deleteOf(i uint64) {
	ref, b := w.block(i)
	if b.deleting || b.held < len(b.data) || b.put >= 0 {
		return
	}
	b.deleting = true
	w.submit(&torus.Request{Op: torus.OpDelete, Ref: ref}, func() { b.deleted = true })
}

// Every workload of up to three operations, one after the other or all at once, cut at every point at which anything on the medium changes,
// with every combination of what may be left of what was not synced (D1, D2, D3). Short runs, and all but `make crash`, take a part of the
// workloads of three.
func TestCrashSmallWorkloads(t *testing.T) {
	most, part := 16, 48
	if os.Getenv("TORUS_CRASH") == "all" {
		most, part = 256, 1
	} else if testing.Short() {
		part = 200
	}
	var workloads [][]int
	n := len(crashOps)
	for a := range n {
		workloads = append(workloads, []int{a})
		for b := range n {
			workloads = append(workloads, []int{a, b})
			for c := range n {
				if (a*n*n+b*n+c)%part == 0 {
					workloads = append(workloads, []int{a, b, c})
				}
			}
		}
	}
	points, states := 0, 0
	for i, ops := range workloads {
		for _, atOnce := range []bool{false, true} {
			p, s, err := crashWorkload(uint64(i), ops, atOnce, most)
			points, states = points+p, states+s
			if err != nil {
				var names []string
				for _, o := range ops {
					names = append(names, crashOps[o].name)
				}
				t.Fatalf("%s; at once %v: %v", strings.Join(names, ", "), atOnce, err)
			}
		}
	}
	t.Logf("%d workloads, %d points, %d states after a power cut", 2*len(workloads), points, states)
}

func crashWorkload(seed uint64, ops []int, atOnce bool, most int) (points, states int, failed error) {
	mem := vfs.NewMem(seed)
	armed := false
	var w *world
	w = newWorld(seed, mem, vfs.NewErrors(mem, func(op vfs.Op) error {
		if !armed || !op.Changes() || failed != nil {
			return nil //nolint:nilerr // that was another operation
		}
		points++
		states += mem.CrashEach(most, w.rng, func(c *vfs.Mem) bool {
			if _, err := w.check(c, false); err != nil {
				failed = fmt.Errorf("power cut before %v of %s at %d: %w", op.Kind, op.Name, op.Off, err)
			}
			return failed == nil
		})
		return nil
	}))
	if err := w.open(); err != nil {
		return 0, 0, err
	}
	step := func(do ...func(*world)) {
		w.loop.Post(func() {
			for _, f := range do {
				f(w)
			}
		})
		w.sim.RunFor(0)
		if err := w.settle(); err != nil && failed == nil {
			failed = err
		}
	}
	step(func(w *world) { w.appendTo(1) })
	step(func(w *world) { w.appendTo(1) })
	step(func(w *world) { w.syncOf(1) })
	armed = true
	var all []func(*world)
	for _, o := range ops {
		all = append(all, crashOps[o].do)
		if !atOnce {
			step(crashOps[o].do)
		}
	}
	if atOnce {
		step(all...)
	}
	armed = false
	states += mem.CrashEach(most, w.rng, func(c *vfs.Mem) bool {
		if _, err := w.check(c, false); err != nil && failed == nil {
			failed = fmt.Errorf("power cut at the end: %w", err)
		}
		return failed == nil
	})
	w.store.Close()
	return points, states, failed
}

// A disk fails while a seal that drops a tail is under way: the block must not grow again, not even the part that was durable, as it has
// been said to end there (D2).
func TestSealThatFailsStaysShort(t *testing.T) {
	mem := vfs.NewMem(1)
	fail := false
	w := newWorld(1, mem, vfs.NewErrors(mem, func(op vfs.Op) error {
		if fail && op.Kind == vfs.OpDatasync && strings.HasPrefix(op.Name, "slots-") {
			return fmt.Errorf("injected")
		}
		return nil
	}))
	w.faults = true
	if err := w.open(); err != nil {
		t.Fatal(err)
	}
	step := func(f func()) {
		w.loop.Post(f)
		w.sim.RunFor(0)
	}
	for _, f := range []func(){func() { w.appendTo(1) }, func() { w.appendTo(1) }, func() { w.syncOf(1) }} {
		step(f)
		if err := w.settle(); err != nil {
			t.Fatal(err)
		}
	}
	fail = true
	tail := func() (t torus.Tail) {
		r := &torus.Request{Op: torus.OpList, Len: 10}
		r.Done = func(*torus.Request) {
			if len(r.Tails) == 1 {
				t = r.Tails[0]
			}
		}
		step(func() { w.store.Submit(r) })
		return t
	}
	step(func() { w.sealOf(1, true) })
	said := tail()
	if err := w.settle(); err != nil {
		t.Fatal(err)
	}
	if !w.store.Stats().Failed || w.blocks[said.Ref].sealed {
		t.Fatal("not the schedule this is about")
	}
	if now := tail(); said.Length != 2*torus.PageSize || now.Length > said.Length {
		t.Fatalf("a block that was said to have %d bytes has %d", said.Length, now.Length)
	}
	b := make([]byte, 4*torus.PageSize)
	r := &torus.Request{Op: torus.OpRead, Ref: said.Ref, Data: b, Done: func(*torus.Request) {}}
	step(func() { w.store.Submit(r) })
	if r.Err == nil && bytes.Equal(b, w.blocks[said.Ref].data) {
		t.Fatal("the tail that was dropped is read again")
	}
}

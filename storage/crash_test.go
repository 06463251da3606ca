package storage_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/record"
	"github.com/coreos/torus/storage"
	"github.com/coreos/torus/storage/storetest"
	"github.com/coreos/torus/vfs"
)

const (
	crashBlock = 8 * torus.PageSize
	crashSlots = 8 // one of them kept
)

var crashIdentity = storage.Identity{Peer: torus.PeerID{9}, ClusterID: "c", BlockSize: crashBlock}

// truth is what is known of a block from the outside.
type truth struct {
	data     []byte // all that was ever appended
	held     int    // bytes whose append was acknowledged
	synced   int    // bytes whose sync was acknowledged
	seal     int    // -1, or the length of a seal that was asked for
	sealed   bool   // … and acknowledged
	put      int    // -1, or the length of a Put under way
	deleting bool   // a delete was asked for
	deleted  bool   // … and acknowledged
	suspect  bool   // the last crash left records behind the end: nothing can be appended
	there    bool   // the last crash left it, perhaps without a whole record: such a block is kept, since its bytes may be readable
}

// world is a store under a random workload, and the truth about it.
type world struct {
	rng    *rand.Rand
	mem    *vfs.Mem
	fs     vfs.FS
	sim    *loop.Virtual
	loop   *loop.VirtualLoop
	store  *storage.Disk
	blocks map[torus.BlockRef]*truth
	refs   []torus.BlockRef // those not deleted
	next   uint64
	flying int
	faults bool // errors are expected
	acked  int

	helping bool // the event that runs is the Work of a job
}

// lateFS lets requests arrive between the end of an fdatasync on a helper and its being noticed on the loop.
type lateFS struct {
	vfs.FS
	w *world
}

type lateFile struct {
	vfs.File
	w *world
}

func (l lateFS) Create(name string) (vfs.File, error) {
	f, err := l.FS.Create(name)
	if err != nil {
		return nil, err
	}
	return lateFile{f, l.w}, nil
}

func (l lateFS) Open(name string) (vfs.File, error) {
	f, err := l.FS.Open(name)
	if err != nil {
		return nil, err
	}
	return lateFile{f, l.w}, nil
}

func (f lateFile) Datasync() error {
	err := f.File.Datasync()
	if f.w.helping && f.w.store != nil {
		f.w.helping = false
		for range f.w.rng.IntN(5) {
			f.w.step()
		}
	}
	return err
}

func newWorld(seed uint64, mem *vfs.Mem, fsys vfs.FS) *world {
	w := &world{rng: rand.New(rand.NewPCG(seed, 77)), mem: mem, fs: fsys, blocks: map[torus.BlockRef]*truth{}}
	if w.rng.IntN(2) == 0 {
		mem.SetSlowSyncs(0, 0) // a disk that is always quick is waited for on the loop
	}
	return w
}

func crashConfig(l loop.Loop, fsys vfs.FS) storage.Config {
	return storage.Config{Loop: l, FS: fsys, Identity: crashIdentity, SizeBytes: crashSlots * crashBlock, SlotsPerFile: 3, ReserveBytes: 4096}
}

func (w *world) open() error {
	w.sim = loop.NewVirtual(w.rng.Uint64())
	w.loop = w.sim.NewLoop("store")
	w.sim.SetTrace(func(e loop.Event) { w.helping = e.Kind == loop.KindWork })
	w.flying = 0
	if _, err := storage.ReadIdentity(w.fs); err != nil {
		if err := storage.Create(w.fs, crashIdentity); err != nil {
			return err
		}
	}
	var err error
	cfg := crashConfig(w.loop, w.fs)
	cfg.BulkBytes = []int{crashBlock + torus.PageSize, torus.PageSize, 2 * torus.PageSize, 3 * torus.PageSize}[w.rng.IntN(4)] // none, all, or some appends fly
	w.store, err = storage.Open(cfg)
	return err
}

// submit starts a request; ok runs when it has succeeded.
func (w *world) submit(r *torus.Request, ok func()) {
	w.flying++
	r.Done = func(r *torus.Request) {
		w.flying--
		if r.Err == nil {
			w.acked++
			ok()
		} else if b := w.blocks[r.Ref]; r.Op == torus.OpPut && (errors.Is(r.Err, torus.ErrOutOfSpace) || b.deleting) {
			b.put = -1
			b.data = b.data[:max(b.held, b.seal)] // nothing, if it was not there before
		} else if r.Op == torus.OpSeal && w.blocks[r.Ref].deleting && errors.Is(r.Err, torus.ErrBlockNotExist) {
			// overtaken by a delete
		} else if b := w.blocks[r.Ref]; r.Op == torus.OpAppend && (errors.Is(r.Err, torus.ErrOutOfSpace) || errors.Is(r.Err, torus.ErrGap)) && int(r.Off) >= b.held {
			b.data = b.data[:min(len(b.data), int(r.Off))] // it was not to be, and neither is what was sent after it
		} else if (r.Op == torus.OpRead || r.Op == torus.OpSync) && errors.Is(r.Err, torus.ErrGap) && w.blocks[r.Ref].held < max(len(r.Data), int(r.Len)) {
			// of what had not been acknowledged
		} else if !w.faults && !errors.Is(r.Err, torus.ErrClosed) {
			panic(fmt.Sprintf("%v of %v at %d, %d: %v", r.Op, r.Ref, r.Off, r.Len, r.Err))
		}
	}
	w.store.Submit(r)
}

// step submits one random request, of a kind that a correct client might.
func (w *world) step() {
	if len(w.refs) == 0 || len(w.refs) < crashSlots && w.rng.IntN(5) == 0 {
		w.next++
		ref := torus.BlockRef{Volume: 1, INode: 1, Index: torus.IndexID(w.next)}
		w.blocks[ref] = &truth{seal: -1, put: -1}
		w.refs = append(w.refs, ref)
	}
	i := w.rng.IntN(len(w.refs))
	ref := w.refs[i]
	b := w.blocks[ref]
	if b.put >= 0 {
		return
	}
	switch k := w.rng.IntN(22); {
	case k < 9: // append
		if b.seal >= 0 || b.suspect || b.held < len(b.data) && w.faults {
			return
		}
		off := len(b.data)
		data := storetest.Record(ref, uint32(off), w.rng.Uint64()>>1, 0, w.rng.IntN(3))
		if off+len(data) > crashBlock {
			return
		}
		b.data = append(b.data, data...)
		end := off + len(data)
		durable := w.rng.IntN(3) == 0
		w.submit(&torus.Request{Op: torus.OpAppend, Ref: ref, Off: uint32(off), Data: data, Reserve: w.rng.IntN(2) == 0, Durable: durable}, func() { b.held = max(b.held, end) })
		if durable {
			w.submit(&torus.Request{Op: torus.OpSync, Ref: ref, Len: uint32(end)}, func() { b.synced = max(b.synced, end) })
		}
	case k < 15:
		n := b.known(w.rng)
		if n > 0 {
			w.submit(&torus.Request{Op: torus.OpSync, Ref: ref, Len: uint32(n)}, func() { b.synced = max(b.synced, n) })
		}
	case k < 17:
		if b.seal < 0 && b.held > 0 && b.held == len(b.data) {
			b.seal = b.held
			if w.rng.IntN(3) == 0 { // a tail is dropped
				b.seal = w.someBoundary(ref, b.data)
			}
			w.submit(&torus.Request{Op: torus.OpSeal, Ref: ref, Len: uint32(b.seal)}, func() { b.sealed = true })
		}
	case k < 18 || len(w.refs) == crashSlots:
		if b.held < len(b.data) {
			return
		}
		w.refs = slices.Delete(w.refs, i, i+1)
		b.deleting = true
		w.submit(&torus.Request{Op: torus.OpDelete, Ref: ref}, func() { b.deleted = true })
	case k < 20:
		w.putBlock(ref, b)
	case len(b.data) > 0:
		n := b.known(w.rng)
		r := &torus.Request{Op: torus.OpRead, Ref: ref, Data: make([]byte, n)}
		want := slices.Clone(b.data[:n])
		w.submit(r, func() {
			if !bytes.Equal(r.Data, want) {
				panic("a read returned other bytes than were appended")
			}
		})
	}
}

// known is how much of a block to ask for: what was acknowledged, or, as long as it is not sealed, all that was sent.
func (b *truth) known(rng *rand.Rand) int {
	switch {
	case b.seal >= 0:
		return min(b.held, b.seal)
	case rng.IntN(2) == 0:
		return len(b.data)
	}
	return b.held
}

// putBlock puts another copy of a block in its place, or a new block.
func (w *world) putBlock(ref torus.BlockRef, b *truth) {
	if b.held < len(b.data) || b.seal >= 0 && !b.sealed {
		return
	}
	data := b.data
	if b.seal >= 0 {
		data = data[:b.seal]
	}
	if b.seal < 0 && len(data) == 0 || w.rng.IntN(3) == 0 && b.seal < 0 { // or a longer one
		data = append(slices.Clone(data), storetest.Record(ref, uint32(len(data)), w.rng.Uint64()>>1, 0, w.rng.IntN(2))...)
	}
	if len(data) == 0 || len(data) > crashBlock {
		return
	}
	most := uint32(len(b.data))
	if b.sealed {
		most = uint32(b.seal)
	}
	b.data, b.put = data, len(data)
	w.submit(&torus.Request{Op: torus.OpPut, Ref: ref, Data: data, Len: most, Reserve: w.rng.IntN(2) == 0}, func() {
		b.held, b.synced, b.seal, b.sealed, b.put = len(data), len(data), len(data), true, -1
	})
}

func (w *world) someBoundary(ref torus.BlockRef, data []byte) int {
	var h record.Header
	ends := []int{0}
	for at := 0; at < len(data); {
		n, err := record.Check(ref, uint32(at), data[at:], &h)
		if err != nil {
			panic(err)
		}
		at += n
		ends = append(ends, at)
	}
	return ends[w.rng.IntN(len(ends))]
}

// run does steps in turns of random size.
func (w *world) run(steps int) {
	for range steps {
		w.loop.Post(func() {
			for range w.rng.IntN(4) + 1 {
				w.step()
			}
		})
		w.sim.RunFor(time.Duration(w.rng.IntN(300)) * time.Microsecond)
	}
}

// settle waits until every request is answered.
func (w *world) settle() error {
	if !w.sim.Run(func() bool { return w.flying == 0 }, time.Minute) {
		return fmt.Errorf("%d requests were never done", w.flying)
	}
	return nil
}

// check opens what a crash has left and compares it with the truth (D1, D2, D3). `killed`: only the process died, so
// what was acknowledged at all is there. It returns the store's tails.
func (w *world) check(mem *vfs.Mem, killed bool) (tails map[torus.BlockRef]torus.Tail, err error) {
	sim := loop.NewVirtual(w.rng.Uint64())
	l := sim.NewLoop("recovered")
	if _, err := storage.ReadIdentity(mem); err != nil {
		if w.acked > 0 {
			return nil, fmt.Errorf("identity lost: %w", err)
		}
		if err := storage.Create(mem, crashIdentity); err != nil {
			return nil, fmt.Errorf("create after a crash: %w", err)
		}
	}
	d, err := storage.Open(crashConfig(l, mem))
	if err != nil {
		return nil, fmt.Errorf("open after a crash: %w", err)
	}
	do := func(r *torus.Request) *torus.Request {
		done := false
		r.Done = func(*torus.Request) { done = true }
		l.Post(func() { d.Submit(r) })
		if !sim.Run(func() bool { return done }, time.Minute) {
			r.Err = errors.New("never done")
		}
		return r
	}
	list := func() ([]torus.Tail, error) {
		r := do(&torus.Request{Op: torus.OpList, Len: 1000})
		return r.Tails, r.Err
	}
	found, err := list()
	if err != nil {
		return nil, err
	}
	tails = map[torus.BlockRef]torus.Tail{}
	for _, x := range found {
		if _, twice := tails[x.Ref]; twice {
			return nil, fmt.Errorf("%v is listed twice", x.Ref)
		}
		tails[x.Ref] = x
		b := w.blocks[x.Ref]
		n := int(x.Length)
		switch {
		case b == nil || len(b.data) == 0 && b.seal < 0 && !b.there:
			return nil, fmt.Errorf("%v was invented", x.Ref)
		case b.deleted:
			return nil, fmt.Errorf("%v was deleted and is back", x.Ref)
		case x.Sealed && n == b.put:
		case n > len(b.data):
			return nil, fmt.Errorf("%v has %d bytes, %d were appended", x.Ref, n, len(b.data))
		case x.Sealed && n != b.seal:
			return nil, fmt.Errorf("%v is sealed at %d, asked for: %d", x.Ref, n, b.seal)
		case b.sealed && !x.Sealed && !b.deleting:
			return nil, fmt.Errorf("%v is not sealed any more", x.Ref)
		}
		r := do(&torus.Request{Op: torus.OpRead, Ref: x.Ref, Data: make([]byte, n)})
		if r.Err != nil {
			return nil, fmt.Errorf("read %v: %w", x.Ref, r.Err)
		}
		if !bytes.Equal(r.Data, b.data[:n]) {
			at := 0
			for r.Data[at] == b.data[at] {
				at++
			}
			return nil, fmt.Errorf("%v holds other bytes than were appended: %+v, %d bytes appended, %d held, %d synced, seal %d, first at %d", x.Ref, x, len(b.data), b.held, b.synced, b.seal, at)
		}
		var h record.Header
		for at := 0; at < n; {
			size, err := record.Check(x.Ref, uint32(at), r.Data[at:], &h)
			if err != nil {
				return nil, fmt.Errorf("%v ends within a record: %w", x.Ref, err)
			}
			at += size
		}
	}
	for ref, b := range w.blocks {
		need := b.synced
		if killed {
			need = b.held
		}
		if b.seal >= 0 {
			need = min(need, b.seal)
		}
		x, there := tails[ref]
		if b.deleting || need == 0 && !b.sealed {
			continue
		}
		if !there || int(x.Length) < need {
			return nil, fmt.Errorf("%v: %d bytes were acknowledged as durable, %d are there", ref, need, x.Length)
		}
	}
	// No slot is lost, none is counted twice: as many new blocks fit as must, and none of them harms an old one.
	if used := d.Stats().Used; used != uint64(len(tails))*crashBlock {
		return nil, fmt.Errorf("%d bytes used by %d blocks", used, len(tails))
	}
	fresh := []torus.BlockRef{}
	for i := range uint64(crashSlots + 1) {
		ref := torus.BlockRef{Volume: 7, INode: 1, Index: torus.IndexID(i)}
		data := storetest.Record(ref, 0, i, 0, crashBlock/torus.PageSize-1)
		err := do(&torus.Request{Op: torus.OpAppend, Ref: ref, Data: data, Reserve: true}).Err
		if err != nil {
			if !errors.Is(err, torus.ErrOutOfSpace) {
				return nil, fmt.Errorf("append after a crash: %w", err)
			}
			break
		}
		fresh = append(fresh, ref)
	}
	if len(fresh) != crashSlots-len(tails) {
		return nil, fmt.Errorf("%d new blocks fit beside %d", len(fresh), len(tails))
	}
	for _, x := range found {
		r := do(&torus.Request{Op: torus.OpRead, Ref: x.Ref, Data: make([]byte, x.Length)})
		if r.Err != nil || !bytes.Equal(r.Data, w.blocks[x.Ref].data[:x.Length]) {
			return nil, fmt.Errorf("%v was harmed by new blocks: %v", x.Ref, r.Err)
		}
	}
	for _, ref := range fresh {
		if err := do(&torus.Request{Op: torus.OpDelete, Ref: ref}).Err; err != nil {
			return nil, err
		}
	}
	// What Open found is durable: another power cut changes nothing.
	again := mem.CrashClone(w.rng)
	if err := d.Close(); err != nil {
		return nil, err
	}
	d, err = storage.Open(crashConfig(l, again))
	if err != nil {
		return nil, fmt.Errorf("open after a second crash: %w", err)
	}
	found2, err := list()
	if err != nil {
		return nil, err
	}
	if !slices.Equal(found, found2) {
		return nil, fmt.Errorf("a second crash changed the blocks from %v to %v", found, found2)
	}
	return tails, d.Close()
}

// Small workloads, cut at every single point at which anything on the medium changes, several times each (D1, D2).
func TestCrashEverywhere(t *testing.T) {
	seeds := uint64(14)
	if testing.Short() {
		seeds = 5
	}
	points := 0
	for seed := range seeds {
		mem := vfs.NewMem(seed)
		mem.SetByteTears(seed%2 == 1)
		var w *world
		var failed error
		w = newWorld(seed, mem, vfs.NewErrors(mem, func(op vfs.Op) error {
			if !op.Changes() || failed != nil {
				return nil //nolint:nilerr // that was another operation
			}
			points++
			for range 2 {
				if _, err := w.check(mem.CrashClone(w.rng), false); err != nil {
					failed = fmt.Errorf("power cut before %v of %s at %d: %w", op.Kind, op.Name, op.Off, err)
				}
			}
			return nil
		}))
		w.fs = lateFS{w.fs, w}
		if err := w.open(); err != nil {
			t.Fatal(err)
		}
		w.run(40)
		if err := w.settle(); err != nil {
			t.Fatal(err)
		}
		w.store.Close()
		if failed != nil {
			t.Fatalf("seed %d: %v", seed, failed)
		}
	}
	t.Logf("%d seeds, %d points, 2 power cuts each", seeds, points)
}

// Long histories through many power cuts and process kills: each time the store goes on from what was left.
func TestCrashAgainAndAgain(t *testing.T) {
	seeds := uint64(30)
	if os.Getenv("TORUS_CRASH") == "all" {
		seeds = 1000
	} else if testing.Short() {
		seeds = 8
	}
	cuts, kills := 0, 0
	for seed := range seeds {
		mem := vfs.NewMem(seed)
		mem.SetByteTears(seed%2 == 1)
		w := newWorld(seed, mem, mem)
		for life := range 12 {
			w.fs = lateFS{w.mem, w}
			if err := w.open(); err != nil {
				t.Fatalf("seed %d, life %d: %v", seed, life, err)
			}
			w.run(w.rng.IntN(120))
			w.loop.Kill()
			killed := w.rng.IntN(3) == 0
			w.mem.Kill()
			if killed {
				kills++
			} else {
				cuts++
				byteTears := seed%2 == 1
				w.mem = w.mem.CrashClone(w.rng)
				w.mem.SetByteTears(byteTears)
			}
			tails, err := w.check(w.mem, killed)
			if err != nil {
				t.Fatalf("seed %d, life %d, killed %v: %v", seed, life, killed, err)
			}
			w.mem.Kill() // releases what check held, were it not closed
			// What is there now is the truth.
			w.refs = nil
			for ref, b := range w.blocks {
				x, there := tails[ref]
				if !there {
					delete(w.blocks, ref)
					continue
				}
				n := int(x.Length)
				*b = truth{data: b.data[:n], held: n, synced: n, seal: -1, put: -1, suspect: x.Suspect && !x.Sealed, there: true}
				if x.Sealed {
					b.seal, b.sealed = n, true
				}
				w.refs = append(w.refs, ref)
			}
			slices.SortFunc(w.refs, func(a, b torus.BlockRef) int { return int(a.Index) - int(b.Index) })
		}
	}
	t.Logf("%d seeds: %d power cuts, %d process kills", seeds, cuts, kills)
}

// The checker is worth something: a disk that acknowledges fdatasync and does nothing is found out.
func TestCrashCheckFindsLyingDisk(t *testing.T) {
	found := 0
	for seed := range uint64(20) {
		mem := vfs.NewMem(seed)
		w := newWorld(seed, mem, lyingFS{mem})
		if err := w.open(); err != nil {
			t.Fatal(err)
		}
		w.run(60)
		if _, err := w.check(mem.CrashClone(w.rng), false); err != nil {
			found++
		}
	}
	if found < 10 {
		t.Fatalf("only %d of 20 lies were found out", found)
	}
}

type lyingFS struct{ vfs.FS }
type lyingFile struct{ vfs.File }

func (l lyingFS) Create(name string) (vfs.File, error) {
	f, err := l.FS.Create(name)
	if err != nil {
		return nil, err
	}
	return lyingFile{f}, nil
}

func (l lyingFS) Open(name string) (vfs.File, error) {
	f, err := l.FS.Open(name)
	if err != nil {
		return nil, err
	}
	return lyingFile{f}, nil
}

func (f lyingFile) Datasync() error { return nil }

// A failed fdatasync is final (TESTING, trap 2): what it may have lost is never acknowledged afterwards, and what was
// acknowledged before is there, after a power cut just as after a restart of the process, when memory still shows lost bytes.
func TestCrashAfterFailedSync(t *testing.T) {
	failures := 0
	for seed := range uint64(60) {
		mem := vfs.NewMem(seed)
		var armed, fired atomic.Bool
		w := newWorld(seed, mem, vfs.NewErrors(mem, func(op vfs.Op) error {
			kind := vfs.OpDatasync
			if seed%3 == 0 {
				kind = vfs.OpWrite
			}
			if armed.Load() && op.Kind == kind && op.Name != "identity.new" {
				armed.Store(false)
				fired.Store(true)
				return errors.New("injected")
			}
			return nil
		}))
		w.faults = true
		if err := w.open(); err != nil {
			t.Fatal(err)
		}
		w.run(40)
		armed.Store(true)
		w.run(60) // goes on regardless
		if err := w.settle(); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if !fired.Load() {
			continue
		}
		failures++
		clone := mem.CrashClone(w.rng)
		if _, err := w.check(clone, false); err != nil {
			t.Fatalf("seed %d: power cut after a failure: %v", seed, err)
		}
		w.loop.Kill()
		mem.Kill()
		if _, err := w.check(mem, false); err != nil {
			t.Fatalf("seed %d: restart after a failure: %v", seed, err)
		}
	}
	if failures < 40 {
		t.Fatalf("only %d failures", failures)
	}
}

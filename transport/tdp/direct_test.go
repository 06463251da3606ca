package tdp

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coreos/torus"
	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/place"
	"github.com/coreos/torus/storage"
	"github.com/coreos/torus/storage/storetest"
	"github.com/coreos/torus/vfs"
)

// disk is a real store in memory, which counts what it is asked for.
type disk struct {
	place.Store
	prometheus.Counter // nil but for Inc
	direct             int
	store              *storage.Disk
	fs                 *vfs.Mem
	reads, wheres      int
	opened             int // files
	open               int // of them, not closed yet
	fault              func(vfs.Op) error
}

func (d *disk) Inc() { d.direct++ }

func (d *disk) Submit(r *torus.Request) {
	switch r.Op {
	case torus.OpRead:
		d.reads++
	case torus.OpAppend:
		// Answered when it is in its block, where it can be read past the peer.
		end, done := r.Off+uint32(len(r.Data)), r.Done
		r.Done = func(r *torus.Request) {
			r.Done = done
			if r.Err != nil {
				done(r)
				return
			}
			d.Store.Submit(&torus.Request{Op: torus.OpSync, Ref: r.Ref, Len: end, Done: func(*torus.Request) { done(r) }})
		}
	}
	d.Store.Submit(r)
}

func (d *disk) Locate(ref torus.BlockRef) (place.Place, error) {
	d.wheres++
	return d.Store.Locate(ref)
}

func (d *disk) OpenFile(number uint32) (vfs.Reader, error) {
	f, err := d.Store.OpenFile(number)
	if err == nil {
		d.opened++
		d.open++
		f = &countedFile{f, d, false}
	}
	return f, err
}

type countedFile struct {
	vfs.Reader
	d      *disk
	closed bool
}

func (f *countedFile) ReadAt(b []byte, off int64) (int, error) {
	if f.closed {
		panic("read from a file that has been closed")
	}
	return f.Reader.ReadAt(b, off)
}

func (f *countedFile) Close() error {
	if f.closed {
		panic("closed twice")
	}
	f.closed = true
	f.d.open--
	return f.Reader.Close()
}

// near is a cluster of a client and a disk on one machine.
func near(t *testing.T, seed uint64, lending float64) (*cluster, *disk) {
	t.Helper()
	x := newCluster(t, seed)
	x.n.Lending = lending
	d := &disk{fs: vfs.NewMem(seed)}
	fsys := vfs.NewErrors(d.fs, func(op vfs.Op) error {
		if d.fault != nil {
			return d.fault(op)
		}
		return nil
	})
	id := storage.Identity{Peer: testHello().ID, ClusterID: "c", BlockSize: storetest.BlockSize}
	if err := storage.Create(fsys, id); err != nil {
		t.Fatal(err)
	}
	store, err := storage.Open(storage.Config{
		Loop: x.ls, FS: fsys, Identity: id, SizeBytes: (storetest.Slots + storetest.Kept) * storetest.BlockSize, SlotsPerFile: 5, ReserveBytes: 1 << 20,
	})
	if err != nil {
		t.Fatal(err)
	}
	d.Store, d.store = store, store
	x.scfg.Store = d
	x.ccfg.Direct = d
	return x.start(), d
}

// write makes a block of one record.
func (x *cluster) write(ref torus.BlockRef, off uint32, seq uint64, n int) []byte {
	x.t.Helper()
	b := storetest.Record(ref, off, seq, 0, n)
	if err := x.do(&torus.Request{Op: torus.OpAppend, Ref: ref, Off: off, Epoch: 1, Data: b}); err != nil {
		x.t.Fatal(err)
	}
	return b
}

// check reads a run of bytes and compares it: to memory that may be exchanged, and to memory that may not.
func (x *cluster) check(ref torus.BlockRef, off uint32, want []byte) {
	x.t.Helper()
	b := buf.Get(len(want))
	r := &torus.Request{Op: torus.OpRead, Ref: ref, Off: off, Data: b.Bytes()[:len(want)]}
	if x.checks++; x.checks%2 == 0 {
		r.Buf = b
	}
	if err := x.do(r); err != nil || !bytes.Equal(r.Data, want) {
		x.t.Fatalf("read of %v at %d: %v, or other bytes", ref, off, err)
	}
	if r.Buf != nil && &r.Data[0] != &r.Buf.Bytes()[0] || r.Buf == nil && &r.Data[0] != &b.Bytes()[0] {
		x.t.Fatalf("the data of a read of %v at %d is not where it belongs", ref, off)
	}
	if r.Buf != nil && r.Buf != b {
		b = r.Buf
		x.exchanged++
	}
	b.Release()
}

// What is read once goes through the peer, and what is read again past it, if both are on one machine.
func TestDirect(t *testing.T) {
	for _, lending := range []float64{0, 1} {
		x, d := near(t, 1, lending)
		d.fs.SetColdReads(0.5)
		ref := storetest.Ref(1)
		b := x.write(ref, 0, 1, 4)
		x.check(ref, 0, b)
		x.v.RunFor(time.Second)
		before := d.reads
		for i := range 40 {
			x.check(ref, uint32(i%5)*torus.PageSize, b[i%5*torus.PageSize:])
		}
		want := 40
		if lending == 1 {
			want = 0
		}
		if n := d.reads - before; n != want || x.c.Near() != (lending == 1) {
			t.Errorf("lending %v: the peer was asked %d times, near: %v", lending, n, x.c.Near())
		}
		if x.exchanged > 0 != (lending == 1) {
			t.Errorf("lending %v: %d of %d reads were given other memory", lending, x.exchanged, x.checks)
		}
		if lending == 0 {
			if d.wheres > 0 || d.opened > 0 {
				t.Errorf("asked %d times where, %d files", d.wheres, d.opened)
			}
			continue
		}

		// What is appended later is found through the peer, and then is known.
		more := x.write(ref, uint32(len(b)), 2, 3)
		before = d.reads
		x.check(ref, uint32(len(b)), more)
		if d.reads == before {
			t.Error("read what was not known to be there")
		}
		x.v.RunFor(time.Second)
		before = d.reads
		x.check(ref, 0, append(b, more...))
		if d.reads != before {
			t.Error("what is known by now was asked for")
		}

		// Another block of the same file needs no other descriptor. Reads with an epoch are the peer's to refuse.
		other := storetest.Ref(2)
		c := x.write(other, 0, 3, 1)
		x.check(other, 0, c)
		x.v.RunFor(time.Second)
		before = d.reads
		x.check(other, 0, c)
		if d.reads != before || d.opened != 1 {
			t.Errorf("%d files opened", d.opened)
		}
		if err := x.do(&torus.Request{Op: torus.OpRead, Ref: other, Epoch: 1, Data: make([]byte, len(c))}); err != nil || d.reads != before+1 {
			t.Errorf("a read with an epoch: %v, %d reads", err, d.reads-before)
		}

		// What is not there is not found, and not asked for all the time.
		wheres := d.wheres
		for range 50 {
			if err := x.do(&torus.Request{Op: torus.OpRead, Ref: storetest.Ref(7), Data: make([]byte, 4096)}); !errors.Is(err, torus.ErrBlockNotExist) {
				t.Fatal(err)
			}
		}
		if n := d.wheres - wheres; n > 2 {
			t.Errorf("asked %d times within some milliseconds", n)
		}

		// The file is closed with the connection.
		x.lc.Post(x.c.Close)
		x.v.RunFor(time.Second)
		if d.open != 0 {
			t.Errorf("%d files still open", d.open)
		}
	}
}

// Whatever happens to blocks meanwhile, a read returns bytes of the block that it asks for, or an error.
func TestDirectNeverStale(t *testing.T) {
	direct, stale := 0, 0
	for seed := range uint64(60) {
		x, d := near(t, seed, 1)
		d.fs.SetColdReads(0.5)
		x.lc.SetOffloadDelay(func(rng *rand.Rand) time.Duration { return time.Duration(rng.IntN(2000)) * time.Microsecond })
		rng := rand.New(rand.NewPCG(seed, 1))
		type blk struct {
			ref  torus.BlockRef
			data []byte
		}
		var blocks []*blk // alive or not
		alive := []*blk{}
		under := 0
		submit := func(r *torus.Request, done func(error)) {
			under++
			r.Done = func(r *torus.Request) { under--; done(r.Err) }
			x.lc.Post(func() { x.c.Submit(r) })
		}
		for step := range 600 {
			switch {
			case rng.IntN(4) == 0 && len(alive) < storetest.Slots-2:
				b := &blk{ref: storetest.Ref(uint64(step))}
				b.data = storetest.Record(b.ref, 0, uint64(step)+1, 0, 1+rng.IntN(20))
				submit(&torus.Request{Op: torus.OpAppend, Ref: b.ref, Epoch: 1, Data: b.data}, func(err error) {
					if err != nil && !errors.Is(err, torus.ErrOutOfSpace) && !errors.Is(err, torus.ErrSealed) { // overtaken by a copy
						t.Errorf("append: %v", err)
					}
				})
				blocks, alive = append(blocks, b), append(alive, b)
			case rng.IntN(8) == 0 && len(alive) > 0:
				i := rng.IntN(len(alive))
				b := alive[i]
				switch rng.IntN(3) {
				case 0: // its bytes are copied to another slot
					b := alive[i]
					x.ls.Post(func() {
						d.Submit(&torus.Request{Op: torus.OpPut, Ref: b.ref, Len: uint32(len(b.data)), Data: b.data, Done: func(*torus.Request) {}})
					})
				default:
					alive = append(alive[:i], alive[i+1:]...)
					submit(&torus.Request{Op: torus.OpDelete, Ref: b.ref, Epoch: 1}, func(error) {})
				}
			case len(blocks) > 0:
				b := blocks[max(0, len(blocks)-1-rng.IntN(15))]
				n := len(b.data) / torus.PageSize
				first := rng.IntN(n)
				count := 1 + rng.IntN(n-first)
				want := b.data[first*torus.PageSize:][:count*torus.PageSize]
				r := &torus.Request{Op: torus.OpRead, Ref: b.ref, Off: uint32(first) * torus.PageSize, Data: make([]byte, len(want))}
				submit(r, func(err error) {
					if err == nil && !bytes.Equal(r.Data, want) {
						t.Errorf("seed %d, step %d: bytes of another block", seed, step)
					}
				})
			}
			if rng.IntN(3) == 0 {
				x.v.RunFor(time.Duration(rng.IntN(1500)) * time.Microsecond)
			}
		}
		x.wait(func() bool { return under == 0 })
		direct += d.direct
		if x.c.link != nil {
			for _, s := range x.c.link.places.of {
				if s.file != nil && !s.good() {
					stale++
				}
			}
		}
	}
	if direct < 1000 || stale < 60 {
		t.Errorf("%d reads past the peer, %d places that changed: this tests little", direct, stale)
	}
}

// A file that cannot be read is the peer's affair, which has another try, and notices.
func TestDirectFails(t *testing.T) {
	x, d := near(t, 1, 1)
	ref := storetest.Ref(1)
	b := x.write(ref, 0, 1, 4)
	for _, cold := range []float64{0, 1} {
		d.fs.SetColdReads(cold)
		x.check(ref, 0, b)
		x.v.RunFor(time.Second)
		before, failed := d.reads, 0
		d.fault = func(op vfs.Op) error {
			if op.Kind == vfs.OpRead && failed == 0 && (cold == 0 || d.reads > before || op.Len == int64(len(b))) {
				failed++
				return errors.New("injected")
			}
			return nil
		}
		x.check(ref, 0, b)
		d.fault = nil
		if failed != 1 || d.reads != before+1 {
			t.Errorf("cold %v: %d failures, the peer was asked %d times", cold, failed, d.reads-before)
		}
		x.v.RunFor(time.Second)
	}
}

// slowDisk is near with a block of which the client knows where it lies, on a disk that takes its time.
func slowDisk(t *testing.T, takes time.Duration) (x *cluster, d *disk, ref torus.BlockRef, b []byte) {
	x, d = near(t, 1, 1)
	ref = storetest.Ref(1)
	b = x.write(ref, 0, 1, 4)
	x.check(ref, 0, b)
	x.v.RunFor(time.Second)
	d.fs.SetColdReads(1)
	x.lc.SetOffloadDelay(func(*rand.Rand) time.Duration { return takes })
	return x, d, ref, b
}

// However a connection ends, and whoever else answers: the memory of a read is the caller's again at once, whatever the disk still does.
func TestDirectAndGone(t *testing.T) {
	for i, how := range []string{"close", "reset", "power", "replace", "close", "reset", "power", "replace"} {
		x, d, ref, b := slowDisk(t, 2*time.Second)
		r := &torus.Request{Op: torus.OpRead, Ref: ref, Data: make([]byte, len(b))}
		if i >= 4 {
			r.Buf = buf.Get(len(b))
			r.Data = r.Buf.Bytes()[:len(b)]
			clear(r.Data)
		}
		own := r.Buf
		done := x.submit(r)
		x.v.RunFor(10 * time.Millisecond)
		if *done || d.reads != 1 {
			t.Fatalf("done %v, %d reads", *done, d.reads)
		}
		other := &torus.Request{Op: torus.OpRead, Ref: ref, Data: make([]byte, len(b))}
		answered := false
		other.Done = func(*torus.Request) { answered = true }
		switch how {
		case "close":
			x.lc.Post(x.c.Close)
		case "reset":
			x.n.Reset("c", "s")
		case "power":
			x.n.Host("s").PowerOff()
		case "replace":
			replaced := false
			x.lc.Post(func() { replaced = x.c.Replace(r, other) })
			x.v.RunFor(0)
			if !replaced {
				t.Fatal("not replaced")
			}
		}
		x.v.RunFor(time.Second)
		if how != "replace" && (!*done || !errors.Is(r.Err, torus.ErrBlockUnavailable)) {
			t.Errorf("%s: done %v, %v", how, *done, r.Err)
		}
		x.v.RunFor(5 * time.Second)
		if !bytes.Equal(r.Data, make([]byte, len(b))) || r.Buf != own {
			t.Errorf("%s: memory of the caller's was written to", how)
		}
		if how == "replace" {
			if !answered || !bytes.Equal(other.Data, b) || *done {
				t.Errorf("the one in its place: answered %v", answered)
			}
			x.lc.Post(x.c.Close)
			x.v.RunFor(time.Second)
		}
		if how == "power" {
			x.lc.Post(x.c.Close)
			x.v.RunFor(time.Second)
		}
		if d.open != 0 {
			t.Errorf("%s: %d files still open", how, d.open)
		}
	}
}

// A peer without files is asked once.
func TestDirectNotSupported(t *testing.T) {
	x, d := near(t, 1, 1)
	d.Store = noFiles{d.Store}
	ref := storetest.Ref(1)
	b := x.write(ref, 0, 1, 4)
	for range 20 {
		x.check(ref, 0, b)
		x.v.RunFor(time.Second)
	}
	if d.wheres != 1 || x.c.Near() {
		t.Errorf("asked %d times, near: %v", d.wheres, x.c.Near())
	}
}

type noFiles struct{ place.Store }

func (noFiles) Locate(torus.BlockRef) (place.Place, error) {
	return place.Place{}, fmt.Errorf("a store in memory: %w", torus.ErrNotSupported)
}

// What is known of blocks is bounded, and the oldest is forgotten first.
func TestPlacesBounded(t *testing.T) {
	var p places
	for i := range uint64(maxPlaces + 10) {
		p.add(storetest.Ref(i))
	}
	if len(p.of) != maxPlaces || p.of[storetest.Ref(9)] != nil || p.of[storetest.Ref(10)] == nil || p.of[storetest.Ref(maxPlaces+9)] == nil {
		t.Errorf("%d blocks known", len(p.of))
	}
}

// Who asked and who read exchange their memory: either has one buffer afterwards, and nobody two or none.
func TestDirectExchanges(t *testing.T) {
	x, d := near(t, 1, 1)
	ref := storetest.Ref(1)
	b := x.write(ref, 0, 1, 20) // more than 64 KiB: of those buffers the last that was given back is the next
	x.check(ref, 0, b)
	x.v.RunFor(time.Second)
	d.fs.SetColdReads(1)
	buf.Trim()
	buf.Trim()
	own := buf.Get(len(b))
	r := &torus.Request{Op: torus.OpRead, Ref: ref, Data: own.Bytes()[:len(b)], Buf: own}
	if err := x.do(r); err != nil || !bytes.Equal(r.Data, b) {
		t.Fatalf("%v, or other bytes", err)
	}
	if r.Buf == own {
		t.Fatal("not exchanged")
	}
	back := false
	for range 4 {
		switch buf.Get(len(b)) {
		case r.Buf:
			t.Error("what the read was given is somebody else's, too")
		case own:
			back = true
		}
	}
	if !back {
		t.Error("what the read had has not been given back")
	}
}

// A peer that answers what it has not been asked, while the client reads it for itself, is given up before a byte of that is taken.
func TestDirectAnsweredUnasked(t *testing.T) {
	for _, exchange := range []bool{false, true} {
		x, d, ref, b := slowDisk(t, 100*time.Millisecond)
		own := buf.Get(len(b))
		r := &torus.Request{Op: torus.OpRead, Ref: ref, Data: own.Bytes()[:len(b)]}
		if exchange {
			r.Buf = own
		}
		done := x.submit(r)
		x.v.RunFor(10 * time.Millisecond)
		if *done || d.reads != 1 {
			t.Fatalf("done %v, %d reads", *done, d.reads)
		}
		_, id, _ := x.c.slots.oldest()
		conn := x.srv.conns[0]
		f := frame{op: uint8(torus.OpRead) | opReply, id: id, payload: uint32(len(b))}
		other := bytes.Repeat([]byte{0xee}, len(b))
		x.ls.Post(func() { conn.s.Write(append(encodeFrame(f), other[:4096]...)) })
		x.v.RunFor(200 * time.Millisecond) // the disk has answered meanwhile
		if !*done || !errors.Is(r.Err, torus.ErrBlockUnavailable) {
			t.Errorf("exchange %v: done %v, %v", exchange, *done, r.Err)
		}
		mine := bytes.Repeat([]byte{0x55}, len(b))
		copy(r.Data, mine)
		x.ls.Post(func() { conn.s.Write(other[4096:]) })
		x.v.RunFor(200 * time.Millisecond)
		if !bytes.Equal(r.Data, mine) {
			t.Errorf("exchange %v: memory that is the caller's again was written to", exchange)
		}
		if n := x.c.Outstanding(); n != 0 {
			t.Errorf("%d requests under way", n)
		}
	}
}

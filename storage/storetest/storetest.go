// Package storetest is what every torus.Store must do, as tests, and the records and calls to write such tests with.
package storetest

import (
	"bytes"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/record"
)

// BlockSize is what the suite wants stores to be made with, in bytes: many small blocks.
const BlockSize = 128 << 10

// Slots is how many blocks a store of the suite must hold of ordinary writes, no more and no fewer; Kept is how many more
// with torus.Request.Reserve.
const (
	Slots = 12
	Kept  = 1
)

// Bench is a store on a virtual loop, with calls that wait.
type Bench struct {
	TB    testing.TB
	Sim   *loop.Virtual
	Loop  *loop.VirtualLoop
	Store torus.Store
}

// NewBench makes the clock and the loop; Store is still to be set.
func NewBench(tb testing.TB, seed uint64) *Bench {
	v := loop.NewVirtual(seed)
	return &Bench{TB: tb, Sim: v, Loop: v.NewLoop("store")}
}

// Do submits r on the loop and waits for it. It returns r.
func (b *Bench) Do(r *torus.Request) *torus.Request {
	b.TB.Helper()
	b.DoAll(r)
	return r
}

// DoAll submits all requests in one turn of the loop and waits for all of them.
func (b *Bench) DoAll(rs ...*torus.Request) {
	b.TB.Helper()
	left := len(rs)
	b.Loop.Post(func() {
		for _, r := range rs {
			calls := 0
			r.Done = func(*torus.Request) {
				if calls++; calls > 1 {
					b.TB.Errorf("%v of %v: done twice", r.Op, r.Ref)
				}
				left--
			}
			b.Store.Submit(r)
		}
	})
	if !b.Sim.Run(func() bool { return left == 0 }, time.Minute) {
		b.TB.Fatalf("%d of %d requests were never done", left, len(rs))
	}
}

// Append appends and returns the error.
func (b *Bench) Append(ref torus.BlockRef, off uint32, data []byte) error {
	b.TB.Helper()
	return b.Do(&torus.Request{Op: torus.OpAppend, Ref: ref, Off: off, Data: data}).Err
}

// Sync syncs and returns the error.
func (b *Bench) Sync(ref torus.BlockRef, n uint32) error {
	b.TB.Helper()
	return b.Do(&torus.Request{Op: torus.OpSync, Ref: ref, Len: n}).Err
}

// Seal seals and returns the error.
func (b *Bench) Seal(ref torus.BlockRef, n uint32) error {
	b.TB.Helper()
	return b.Do(&torus.Request{Op: torus.OpSeal, Ref: ref, Len: n}).Err
}

// Delete deletes and returns the error.
func (b *Bench) Delete(ref torus.BlockRef) error {
	b.TB.Helper()
	return b.Do(&torus.Request{Op: torus.OpDelete, Ref: ref}).Err
}

// Read reads n bytes.
func (b *Bench) Read(ref torus.BlockRef, off, n uint32) ([]byte, error) {
	b.TB.Helper()
	r := b.Do(&torus.Request{Op: torus.OpRead, Ref: ref, Off: off, Data: make([]byte, n)})
	return r.Data, r.Err
}

// List lists a volume page by page, or every volume.
func (b *Bench) List(volume torus.VolumeID, page uint32) []torus.Tail {
	b.TB.Helper()
	r := &torus.Request{Op: torus.OpList, Ref: torus.BlockRef{Volume: volume}, Len: page}
	if volume == 0 {
		r.Off = torus.ListEveryVolume
	}
	var all []torus.Tail
	for {
		if b.Do(r).Err != nil {
			b.TB.Fatal(r.Err)
		}
		all = append(all, r.Tails...)
		if len(r.Tails) < int(page) {
			return all
		}
		r.Ref = all[len(all)-1].Ref
	}
}

// Ref is a block of volume 1, epoch 1.
func Ref(index uint64) torus.BlockRef {
	return torus.BlockRef{Volume: 1, INode: 1, Index: torus.IndexID(index)}
}

// Record builds the record of ref at off with so many data pages; its bytes follow from ref, off, seq and flushed.
func Record(ref torus.BlockRef, off uint32, seq, flushed uint64, pages int) []byte {
	b := make([]byte, record.HeaderSize+pages*torus.PageSize)
	h := record.Header{Ref: ref, Seq: seq, Flushed: flushed, Offset: off}
	if pages > 0 {
		h.Extents = []record.Extent{{Page: seq, Count: uint32(pages), Kind: record.Data}}
	} else {
		h.Extents = []record.Extent{{Page: seq, Count: 1, Kind: record.Trim}}
	}
	x := seq*0x9e3779b97f4a7c15 ^ uint64(ref.Index)<<32 ^ uint64(off)
	for i := range pages {
		p := b[record.HeaderSize+i*torus.PageSize:][:torus.PageSize]
		for j := 0; j < len(p); j += 8 {
			x ^= x << 13
			x ^= x >> 7
			x ^= x << 17
			for k := range 8 {
				p[j+k] = byte(x >> (8 * k))
			}
		}
		h.CRCs = append(h.CRCs, record.Checksum(p))
	}
	h.Encode(b[:record.HeaderSize])
	return b
}

// Run runs the suite. open returns an empty store on the loop, of Slots blocks of BlockSize.
func Run(t *testing.T, open func(t *testing.T, l loop.Loop) torus.Store) {
	for _, c := range []struct {
		name string
		test func(*testing.T, *Bench)
	}{
		{"AppendRead", appendRead},
		{"AppendRefusals", appendRefusals},
		{"Resend", resend},
		{"ReadRefusals", readRefusals},
		{"Sync", syncs},
		{"SyncGroup", syncGroup},
		{"Seal", seals},
		{"SealOrder", sealOrder},
		{"Delete", deletes},
		{"DeleteUnderWay", deleteUnderWay},
		{"Put", puts},
		{"PutUnderWay", putUnderWay},
		{"OutOfSpace", outOfSpace},
		{"Scan", scans},
		{"Fence", fences},
		{"List", lists},
		{"Random", random},
		{"Closed", closed},
	} {
		t.Run(c.name, func(t *testing.T) {
			for seed := range uint64(3) {
				b := NewBench(t, seed)
				b.Store = open(t, b.Loop)
				c.test(t, b)
				b.Store.Close()
			}
		})
	}
}

func want(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error %v, want %v", err, want)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// fill appends n records to ref and returns the block's bytes.
func fill(t *testing.T, b *Bench, ref torus.BlockRef, n int) []byte {
	t.Helper()
	var all []byte
	for i := range n {
		r := Record(ref, uint32(len(all)), uint64(i+1), uint64(i), i%3)
		must(t, b.Append(ref, uint32(len(all)), r))
		all = append(all, r...)
	}
	return all
}

func wantBlock(t *testing.T, b *Bench, ref torus.BlockRef, bytesWanted []byte) {
	t.Helper()
	got, err := b.Read(ref, 0, uint32(len(bytesWanted)))
	must(t, err)
	if !bytes.Equal(got, bytesWanted) {
		t.Fatalf("%v: other bytes than were appended", ref)
	}
	_, err = b.Read(ref, uint32(len(bytesWanted)), 1)
	want(t, err, torus.ErrGap)
}

func appendRead(t *testing.T, b *Bench) {
	ref := Ref(1)
	all := fill(t, b, ref, 10)
	wantBlock(t, b, ref, all)
	got, err := b.Read(ref, 5000, 777)
	must(t, err)
	if !bytes.Equal(got, all[5000:5777]) {
		t.Fatal("a range within differs")
	}
	// Several records in one append; Length is what the block holds.
	r1 := Record(ref, uint32(len(all)), 11, 0, 2)
	r2 := Record(ref, uint32(len(all)+len(r1)), 12, 0, 1)
	r := b.Do(&torus.Request{Op: torus.OpAppend, Ref: ref, Off: uint32(len(all)), Data: append(slices.Clone(r1), r2...)})
	must(t, r.Err)
	all = append(append(all, r1...), r2...)
	if r.Length != uint32(len(all)) {
		t.Fatalf("length %d, want %d", r.Length, len(all))
	}
	wantBlock(t, b, ref, all)
	// Up to the block's last byte.
	for len(all) < BlockSize {
		pages := min((BlockSize-len(all))/torus.PageSize-1, 5)
		r := Record(ref, uint32(len(all)), 20, 0, pages)
		must(t, b.Append(ref, uint32(len(all)), r))
		all = append(all, r...)
	}
	wantBlock(t, b, ref, all)
	want(t, b.Append(ref, BlockSize, Record(ref, BlockSize, 30, 0, 0)), torus.ErrInvalid)
	wantBlock(t, b, ref, all)
	st := b.Store.Stats()
	if st.Used != BlockSize || st.BlockSize != BlockSize || st.Size != Slots*BlockSize || st.Failed {
		t.Fatalf("stats %+v", st)
	}
}

// What is not a run of whole, sound records of this place is refused, and changes nothing.
func appendRefusals(t *testing.T, b *Bench) {
	ref := Ref(1)
	good := Record(ref, 0, 1, 0, 1)
	want(t, b.Append(ref, 4096, Record(ref, 4096, 1, 0, 1)), torus.ErrGap) // no such block
	want(t, b.Append(ref, 0, nil), torus.ErrInvalid)
	want(t, b.Append(ref, 0, good[:5000]), torus.ErrInvalid)
	want(t, b.Append(ref, 0, good[:4096]), torus.ErrCorrupt)
	want(t, b.Append(ref, 0, make([]byte, 4096)), torus.ErrCorrupt)
	want(t, b.Append(Ref(2), 0, good), torus.ErrCorrupt)
	for _, at := range []int{20, 100, 4095, 4096, 8191} {
		bad := slices.Clone(good)
		bad[at] ^= 1
		want(t, b.Append(ref, 0, bad), torus.ErrCorrupt)
	}
	second := Record(ref, 8192, 2, 0, 1)
	second[5000] ^= 1
	want(t, b.Append(ref, 0, append(slices.Clone(good), second...)), torus.ErrCorrupt)
	if _, err := b.Read(ref, 0, 1); !errors.Is(err, torus.ErrBlockNotExist) {
		t.Fatalf("a refused append made a block: %v", err)
	}
	must(t, b.Append(ref, 0, good))
	want(t, b.Append(ref, 4096, Record(ref, 4096, 1, 0, 1)), torus.ErrInvalid) // within a record: other bytes are there
	want(t, b.Append(ref, 12288, Record(ref, 12288, 1, 0, 1)), torus.ErrGap)
	big := Record(ref, 8192, 2, 0, (BlockSize-8192)/torus.PageSize)
	want(t, b.Append(ref, 8192, big), torus.ErrInvalid) // one page too many
	want(t, b.Append(torus.BlockRef{Type: 1 << 24, Volume: 1}, 0, good), torus.ErrInvalid)
	want(t, b.Append(torus.BlockRef{Volume: torus.VolumeMax + 1}, 0, good), torus.ErrInvalid)
	wantBlock(t, b, ref, good)
}

// D2: the same bytes again are a success, others never.
func resend(t *testing.T, b *Bench) {
	ref := Ref(1)
	all := fill(t, b, ref, 6)
	first := Record(ref, 0, 1, 0, 0)
	for range 20 { // some of them find nothing in memory
		r := b.Do(&torus.Request{Op: torus.OpAppend, Ref: ref, Data: slices.Clone(all)})
		must(t, r.Err)
		if r.Length != uint32(len(all)) {
			t.Fatalf("length %d, want %d", r.Length, len(all))
		}
		must(t, b.Append(ref, 0, first))
		want(t, b.Append(ref, 0, Record(ref, 0, 99, 0, 0)), torus.ErrInvalid)
		wantBlock(t, b, ref, all)
	}
	// What is there, and more.
	for i := range 3 {
		more := Record(ref, uint32(len(all)), 50+uint64(i), 0, 1)
		must(t, b.Append(ref, 0, append(slices.Clone(all), more...)))
		all = append(all, more...)
		wantBlock(t, b, ref, all)
	}
	other := append(Record(ref, 0, 99, 0, 0), all[4096:]...)
	want(t, b.Append(ref, 0, append(other, Record(ref, uint32(len(all)), 60, 0, 0)...)), torus.ErrInvalid)
	wantBlock(t, b, ref, all)
}

func readRefusals(t *testing.T, b *Bench) {
	ref := Ref(1)
	_, err := b.Read(ref, 0, 10)
	want(t, err, torus.ErrBlockNotExist)
	fill(t, b, ref, 1)
	_, err = b.Read(ref, 0, 4097)
	want(t, err, torus.ErrGap)
	_, err = b.Read(ref, 4096, 1)
	want(t, err, torus.ErrGap)
	_, err = b.Read(ref, 1<<32-1, 100)
	want(t, err, torus.ErrGap)
	_, err = b.Read(ref, 4096, 0)
	must(t, err)
}

func syncs(t *testing.T, b *Bench) {
	ref := Ref(1)
	want(t, b.Sync(ref, 1), torus.ErrGap)
	all := fill(t, b, ref, 3)
	want(t, b.Sync(ref, uint32(len(all)+1)), torus.ErrGap)
	r := b.Do(&torus.Request{Op: torus.OpSync, Ref: ref, Len: 4096})
	must(t, r.Err)
	if r.Length != 4096 {
		t.Fatalf("length %d", r.Length)
	}
	must(t, b.Sync(ref, uint32(len(all))))
	must(t, b.Sync(ref, uint32(len(all)))) // nothing to do
	must(t, b.Sync(ref, 0))
}

// Many blocks, appended to and synced at once, over and over.
func syncGroup(t *testing.T, b *Bench) {
	lengths := make([]uint32, Slots)
	for round := range uint64(8) {
		var rs []*torus.Request
		for i := range lengths {
			ref := Ref(uint64(i))
			data := Record(ref, lengths[i], round+1, round, int(round)%3)
			rs = append(rs, &torus.Request{Op: torus.OpAppend, Ref: ref, Off: lengths[i], Data: data})
			lengths[i] += uint32(len(data))
			for range 3 {
				rs = append(rs, &torus.Request{Op: torus.OpSync, Ref: ref, Len: lengths[i]})
			}
		}
		b.DoAll(rs...)
		for _, r := range rs {
			must(t, r.Err)
			if r.Length != lengths[r.Ref.Index] {
				t.Fatalf("%v of %v: length %d, want %d", r.Op, r.Ref, r.Length, lengths[r.Ref.Index])
			}
		}
	}
}

func wantTail(t *testing.T, b *Bench, ref torus.BlockRef, length uint32, sealed bool) {
	t.Helper()
	for _, x := range b.List(ref.Volume, 100) {
		if x.Ref == ref {
			if x.Length != length || x.Sealed != sealed {
				t.Fatalf("%v: length %d, sealed %v; want %d, %v", ref, x.Length, x.Sealed, length, sealed)
			}
			return
		}
	}
	t.Fatalf("%v is not listed", ref)
}

func seals(t *testing.T, b *Bench) {
	ref := Ref(1)
	want(t, b.Seal(ref, 0), torus.ErrBlockNotExist)
	all := fill(t, b, ref, 5)
	want(t, b.Seal(ref, uint32(len(all)+4096)), torus.ErrGap)
	want(t, b.Seal(ref, 4097), torus.ErrInvalid)      // within a page
	want(t, b.Seal(ref, 4096+4096), torus.ErrInvalid) // within the second record
	must(t, b.Append(ref, uint32(len(all)), Record(ref, uint32(len(all)), 6, 0, 0)))
	wantTail(t, b, ref, uint32(len(all)+4096), false)
	must(t, b.Seal(ref, uint32(len(all)))) // the last one is dropped
	wantTail(t, b, ref, uint32(len(all)), true)
	wantBlock(t, b, ref, all)
	want(t, b.Append(ref, uint32(len(all)), Record(ref, uint32(len(all)), 6, 0, 0)), torus.ErrSealed)
	want(t, b.Append(ref, 0, all[:4096]), torus.ErrSealed)
	must(t, b.Seal(ref, uint32(len(all))))
	want(t, b.Seal(ref, 4096), torus.ErrSealed)
	want(t, b.Seal(ref, uint32(len(all)+4096)), torus.ErrGap)
	must(t, b.Sync(ref, uint32(len(all))))
	want(t, b.Sync(ref, uint32(len(all)+1)), torus.ErrGap)

	must(t, b.Append(Ref(2), 0, Record(Ref(2), 0, 1, 0, 1)))
	must(t, b.Seal(Ref(2), 0))
	wantTail(t, b, Ref(2), 0, true)
}

// Requests to one block take effect in order, whether or not those before are done.
func sealOrder(t *testing.T, b *Bench) {
	ref := Ref(1)
	data, more := Record(ref, 0, 1, 0, 1), Record(ref, 8192, 2, 0, 1)
	rs := []*torus.Request{
		{Op: torus.OpAppend, Ref: ref, Data: data},
		{Op: torus.OpSeal, Ref: ref, Len: 8192},
		{Op: torus.OpAppend, Ref: ref, Off: 8192, Data: more},
		{Op: torus.OpSync, Ref: ref, Len: 8192},
		{Op: torus.OpSeal, Ref: ref, Len: 8192},
		{Op: torus.OpDelete, Ref: ref},
		{Op: torus.OpRead, Ref: ref, Data: make([]byte, 10)},
		{Op: torus.OpAppend, Ref: ref, Data: data},
	}
	b.DoAll(rs...)
	// A seal that a delete overtook may say so.
	wants := []error{nil, nil, torus.ErrSealed, nil, nil, nil, torus.ErrBlockNotExist, nil}
	for i, r := range rs {
		if r.Op == torus.OpSeal && errors.Is(r.Err, torus.ErrBlockNotExist) {
			continue
		}
		if !errors.Is(r.Err, wants[i]) {
			t.Errorf("request %d, %v: %v, want %v", i, r.Op, r.Err, wants[i])
		}
	}
	wantBlock(t, b, ref, data)
}

func deletes(t *testing.T, b *Bench) {
	must(t, b.Delete(Ref(1)))
	for round := range uint64(5) {
		blocks := map[torus.BlockRef][]byte{}
		for i := range uint64(Slots) {
			ref := Ref(100*round + i)
			blocks[ref] = fill(t, b, ref, 4)
			switch i % 3 {
			case 1:
				must(t, b.Sync(ref, uint32(len(blocks[ref]))))
			case 2:
				must(t, b.Seal(ref, uint32(len(blocks[ref]))))
			}
		}
		if used := b.Store.Stats().Used; used != Slots*BlockSize {
			t.Fatalf("used %d", used)
		}
		for ref, data := range blocks {
			wantBlock(t, b, ref, data)
		}
		for i := range uint64(Slots) {
			ref := Ref(100*round + i)
			must(t, b.Delete(ref))
			_, err := b.Read(ref, 0, 1)
			want(t, err, torus.ErrBlockNotExist)
			must(t, b.Delete(ref))
		}
		if used := b.Store.Stats().Used; used != 0 {
			t.Fatalf("round %d: used %d after everything was deleted", round, used)
		}
		if l := b.List(1, 10); len(l) != 0 {
			t.Fatalf("listed after everything was deleted: %v", l)
		}
	}
}

// A slot is not used again while somebody reads it.
func deleteUnderWay(t *testing.T, b *Bench) {
	for round := range uint64(30) {
		ref, next := Ref(2*round), Ref(2*round+1)
		data := Record(ref, 0, round+1, 0, 4)
		must(t, b.Append(ref, 0, data))
		read := &torus.Request{Op: torus.OpRead, Ref: ref, Data: make([]byte, len(data))}
		rs := []*torus.Request{read, {Op: torus.OpDelete, Ref: ref}}
		for i := range uint64(Slots) {
			r := next
			r.Index += torus.IndexID(1000 * i)
			rs = append(rs, &torus.Request{Op: torus.OpAppend, Ref: r, Data: Record(r, 0, 1, 0, 4)})
		}
		b.DoAll(rs...)
		must(t, read.Err)
		if !bytes.Equal(read.Data, data) {
			t.Fatal("a read returned bytes of another block")
		}
		for _, x := range b.List(1, 100) {
			must(t, b.Delete(x.Ref))
		}
	}
}

// records is a run of n records from the start of ref.
func records(ref torus.BlockRef, n int) (all []byte) {
	for i := range n {
		all = append(all, Record(ref, uint32(len(all)), uint64(i+1), uint64(i), i%3)...)
	}
	return all
}

func put(ref torus.BlockRef, data []byte, most uint32) *torus.Request {
	return &torus.Request{Op: torus.OpPut, Ref: ref, Data: data, Len: most}
}

// A put block is whole, sealed and alone, whatever was there before.
func puts(t *testing.T, b *Bench) {
	ref := Ref(1)
	all := records(ref, 7)
	half := uint32(len(records(ref, 4)))
	check := func(ref torus.BlockRef, data []byte) {
		t.Helper()
		wantBlock(t, b, ref, data)
		tails := b.List(1, 100)
		if len(tails) != 1 || tails[0] != (torus.Tail{Ref: ref, Length: uint32(len(data)), Sealed: true}) {
			t.Fatalf("tails %+v", tails)
		}
		b.Sim.RunFor(time.Second)
		if used := b.Store.Stats().Used; used != BlockSize {
			t.Fatalf("%d bytes used by one block of %d", used, BlockSize)
		}
		f := b.Do(&torus.Request{Op: torus.OpFence, Ref: Ref(0), Len: 10, Epoch: 9})
		must(t, f.Err)
		if f.Committed == 0 {
			t.Fatal("a put block has forgotten what was flushed")
		}
	}
	// Where nothing was.
	must(t, b.Do(put(ref, all[:half], 0)).Err)
	check(ref, all[:half])
	want(t, b.Append(ref, half, all[half:]), torus.ErrSealed)
	// In place of a sealed one; a copy that is longer than the caller knows stays.
	want(t, b.Do(put(ref, all, half-1)).Err, torus.ErrAgain)
	check(ref, all[:half])
	must(t, b.Do(put(ref, all, half)).Err)
	check(ref, all)
	must(t, b.Do(put(ref, all[:half], BlockSize)).Err)
	check(ref, all[:half])
	must(t, b.Sync(ref, half))
	must(t, b.Seal(ref, half))
	must(t, b.Delete(ref))
	// In place of an open one.
	must(t, b.Append(ref, 0, all[:half]))
	must(t, b.Do(put(ref, all, half)).Err)
	check(ref, all)
	must(t, b.Delete(ref))
	must(t, b.Append(ref, 0, all))
	must(t, b.Do(put(ref, all[:half], 1<<32-1)).Err)
	check(ref, all[:half])
	// What is not whole records is refused, and changes nothing.
	bad := slices.Clone(all)
	bad[len(bad)-1] ^= 1
	for _, data := range [][]byte{nil, bad, all[:len(all)-100], all[:half-torus.PageSize/2], Record(Ref(2), 0, 1, 0, 1), make([]byte, BlockSize+torus.PageSize)} {
		if err := b.Do(put(ref, data, 1<<32-1)).Err; !errors.Is(err, torus.ErrInvalid) && !errors.Is(err, torus.ErrCorrupt) {
			t.Fatalf("put of %d bad bytes: %v", len(data), err)
		}
	}
	check(ref, all[:half])
	// As many as there are slots, and not one more.
	for i := range uint64(Slots - 1) {
		must(t, b.Do(put(Ref(10+i), records(Ref(10+i), 2), 0)).Err)
	}
	want(t, b.Do(put(Ref(9), records(Ref(9), 2), 0)).Err, torus.ErrOutOfSpace)
	wantBlock(t, b, ref, all[:half])
}

// Requests for a block that is being put take effect before or after that, in their order.
func putUnderWay(t *testing.T, b *Bench) {
	ref := Ref(1)
	all := records(ref, 7)
	half := uint32(len(records(ref, 4)))
	del := func() *torus.Request { return &torus.Request{Op: torus.OpDelete, Ref: ref} }
	gone := func() {
		t.Helper()
		b.Sim.RunFor(time.Second)
		if _, err := b.Read(ref, 0, 1); !errors.Is(err, torus.ErrBlockNotExist) {
			t.Fatalf("a deleted block: %v", err)
		}
		if used := b.Store.Stats().Used; used != 0 {
			t.Fatalf("%d bytes used by none", used)
		}
	}
	for delay := range 40 { // a delete at every moment of a put
		must(t, b.Append(ref, 0, all[:half]))
		must(t, b.Sync(ref, half))
		p, d := put(ref, all, half), del()
		left := 2
		p.Done = func(*torus.Request) { left-- }
		d.Done = p.Done
		b.Loop.Post(func() { b.Store.Submit(p) })
		b.Sim.RunFor(time.Duration(delay*10) * time.Microsecond)
		b.Loop.Post(func() { b.Store.Submit(d) })
		if !b.Sim.Run(func() bool { return left == 0 }, time.Minute) {
			t.Fatal("never done")
		}
		must(t, d.Err)
		if p.Err != nil {
			want(t, p.Err, torus.ErrAgain)
		}
		gone()
	}
	// It grows under way: then what has grown stays.
	must(t, b.Append(ref, 0, all[:half]))
	p := put(ref, all[:half], half)
	more := &torus.Request{Op: torus.OpAppend, Ref: ref, Off: half, Data: all[half:]}
	b.DoAll(p, more)
	if p.Err == nil { // the append came too late
		want(t, more.Err, torus.ErrSealed)
		wantBlock(t, b, ref, all[:half])
	} else {
		want(t, p.Err, torus.ErrAgain)
		must(t, more.Err)
		wantBlock(t, b, ref, all)
	}
	must(t, b.Delete(ref))
	gone()
	// Everything at once.
	must(t, b.Append(ref, 0, all[:half]))
	seal := &torus.Request{Op: torus.OpSeal, Ref: ref, Len: half}
	p, q := put(ref, all[:half], half), put(ref, all[:half], half)
	b.DoAll(seal, p, &torus.Request{Op: torus.OpSync, Ref: ref, Len: half}, q)
	must(t, seal.Err)
	must(t, p.Err)
	must(t, q.Err)
	wantBlock(t, b, ref, all[:half])
	d := del()
	b.DoAll(put(ref, all[:half], half), put(ref, all[:half], half), d)
	must(t, d.Err)
	gone()
}

func outOfSpace(t *testing.T, b *Bench) {
	blocks := make([][]byte, Slots)
	for i := range blocks {
		blocks[i] = fill(t, b, Ref(uint64(i)), 2)
	}
	more := Ref(100)
	for range 3 {
		want(t, b.Append(more, 0, Record(more, 0, 1, 0, 1)), torus.ErrOutOfSpace)
	}
	// What is there can grow, be synced and sealed.
	for i := range blocks {
		ref := Ref(uint64(i))
		r := Record(ref, uint32(len(blocks[i])), 3, 0, 3)
		must(t, b.Append(ref, uint32(len(blocks[i])), r))
		blocks[i] = append(blocks[i], r...)
		must(t, b.Sync(ref, uint32(len(blocks[i]))))
		must(t, b.Seal(ref, uint32(len(blocks[i]))))
		wantBlock(t, b, ref, blocks[i])
	}
	want(t, b.Append(more, 0, Record(more, 0, 1, 0, 1)), torus.ErrOutOfSpace)
	if st := b.Store.Stats(); !st.Full || st.Used != st.Size {
		t.Fatalf("stats %+v", st)
	}
	// What a full cluster needs finds room still: but no more than that.
	kept := func(ref torus.BlockRef) *torus.Request {
		return &torus.Request{Op: torus.OpAppend, Ref: ref, Data: Record(ref, 0, 1, 0, 1), Reserve: true}
	}
	for i := range uint64(Kept) {
		must(t, b.Do(kept(Ref(200+i))).Err)
	}
	want(t, b.Do(kept(Ref(299))).Err, torus.ErrOutOfSpace)
	for i := range uint64(Kept) {
		must(t, b.Delete(Ref(200+i)))
		want(t, b.Append(more, 0, Record(more, 0, 1, 0, 1)), torus.ErrOutOfSpace)
	}
	p := put(Ref(5), blocks[5], BlockSize)
	p.Reserve = true
	must(t, b.Do(p).Err)
	must(t, b.Delete(Ref(5)))
	must(t, b.Append(more, 0, Record(more, 0, 1, 0, 1)))
	want(t, b.Append(Ref(101), 0, Record(Ref(101), 0, 1, 0, 1)), torus.ErrOutOfSpace)
	for i := range blocks {
		if i != 5 {
			wantBlock(t, b, Ref(uint64(i)), blocks[i])
		}
	}
}

func scans(t *testing.T, b *Bench) {
	ref := Ref(1)
	r := b.Do(&torus.Request{Op: torus.OpScan, Ref: ref, Len: 4096})
	want(t, r.Err, torus.ErrBlockNotExist)
	var offs []uint32
	off := uint32(0)
	for i := range 12 {
		data := Record(ref, off, uint64(i+1), uint64(i), i%3)
		must(t, b.Append(ref, off, data))
		offs = append(offs, off)
		off += uint32(len(data))
	}
	for _, n := range []uint32{200, 500, 1 << 20} {
		var got []uint32
		from := uint32(0)
		for range 100 {
			r := b.Do(&torus.Request{Op: torus.OpScan, Ref: ref, Off: from, Len: n})
			must(t, r.Err)
			if len(r.Data) > int(n) {
				t.Fatalf("%d bytes, %d asked for", len(r.Data), n)
			}
			if len(r.Data) == 0 {
				break
			}
			for rest := r.Data; len(rest) > 0; {
				var h record.Header
				var err error
				rest, err = record.NextScanEntry(rest, &h)
				must(t, err)
				if h.Ref != ref || h.Seq != uint64(len(got)+1) {
					t.Fatalf("entry %d is %+v", len(got), h)
				}
				got = append(got, h.Offset)
				from = h.Offset + uint32(h.Size())
			}
		}
		if !slices.Equal(got, offs) || from != off {
			t.Fatalf("records at %v, want %v", got, offs)
		}
	}
	want(t, b.Do(&torus.Request{Op: torus.OpScan, Ref: ref, Len: 10}).Err, torus.ErrInvalid)
	want(t, b.Do(&torus.Request{Op: torus.OpScan, Ref: ref, Off: offs[1] + 4096, Len: 4096}).Err, torus.ErrCorrupt)
	want(t, b.Do(&torus.Request{Op: torus.OpScan, Ref: ref, Off: off + 4096, Len: 4096}).Err, torus.ErrGap)
}

func fences(t *testing.T, b *Bench) {
	for i, ref := range []torus.BlockRef{
		{Volume: 1, INode: 5, Index: 3}, {Volume: 1, INode: 5, Index: 5}, {Volume: 1, INode: 5, Index: 9},
		{Volume: 1, INode: 6, Index: 4}, {Volume: 2, INode: 5, Index: 4}, {Type: torus.TypeINode, Volume: 1, INode: 5, Index: 4},
	} {
		must(t, b.Append(ref, 0, Record(ref, 0, uint64(100+i), uint64(50+i), 1)))
		must(t, b.Append(ref, 8192, Record(ref, 8192, uint64(200+i), uint64(150+i), 1)))
	}
	fence := func(index uint64, n uint32) *torus.Request {
		r := b.Do(&torus.Request{Op: torus.OpFence, Ref: torus.BlockRef{Volume: 1, INode: 5, Index: torus.IndexID(index)}, Len: n, Epoch: 7})
		must(t, r.Err)
		return r
	}
	check := func(r *torus.Request, committed uint64, indexes ...uint64) {
		t.Helper()
		var got []uint64
		for _, x := range r.Tails {
			got = append(got, uint64(x.Ref.Index))
			if x.Length != 16384 || x.Ref.INode != 5 || x.Ref.Volume != 1 || x.Ref.Type != 0 {
				t.Errorf("tail %+v", x)
			}
		}
		if !slices.Equal(got, indexes) || r.Committed != committed {
			t.Errorf("tails of %v, committed %d; want %v, %d", got, r.Committed, indexes, committed)
		}
	}
	for range 2 {
		check(fence(3, 3), 151, 3, 5)
		check(fence(0, 1<<32-1), 152, 3, 5, 9)
		check(fence(4, 1), 0)
		check(fence(4, 0), 0)
		check(fence(9, 1), 152, 9)
		check(fence(1<<64-1, 100), 0)
		// What the records said to be flushed is still known of a sealed block.
		must(t, b.Seal(torus.BlockRef{Volume: 1, INode: 5, Index: 5}, 16384))
	}
	if r := fence(5, 1); !r.Tails[0].Sealed {
		t.Error("a sealed block's tail does not say so")
	}
}

func lists(t *testing.T, b *Bench) {
	if got := b.List(0, 10); len(got) != 0 {
		t.Fatalf("an empty store lists %v", got)
	}
	refs := []torus.BlockRef{ // in order
		{Volume: 1, INode: 1, Index: 1},
		{Volume: 1, INode: 1, Index: 300},
		{Volume: 1, INode: 2, Index: 0},
		{Volume: 2, INode: 0, Index: 1},
		{Volume: torus.VolumeMax, INode: 1, Index: 7},
		{Type: torus.TypeINode, Volume: 1, INode: 1, Index: 1},
		{Type: torus.TypeINode, Volume: 1, INode: 1 << 63, Index: 1<<64 - 1},
		{Type: torus.TypeINode, Volume: 3, INode: 1, Index: 1},
		{Type: 1<<24 - 1, Volume: 1, INode: 1, Index: 1},
	}
	for _, i := range []int{4, 0, 8, 2, 6, 1, 7, 3, 5} {
		must(t, b.Append(refs[i], 0, Record(refs[i], 0, 1, 0, i%2)))
	}
	for _, volume := range []torus.VolumeID{0, 1, 2, 3, 4, torus.VolumeMax} {
		var wanted []torus.Tail
		for i, ref := range refs {
			if volume == 0 || ref.Volume == volume {
				wanted = append(wanted, torus.Tail{Ref: ref, Length: uint32(1+i%2) * 4096})
			}
		}
		for _, page := range []uint32{1, 2, 100} {
			if got := b.List(volume, page); !slices.Equal(got, wanted) {
				t.Errorf("volume %d by %d: %v, want %v", volume, page, got, wanted)
			}
		}
	}
	r := b.Do(&torus.Request{Op: torus.OpList, Len: 100}) // volume 0 is every one, too
	must(t, r.Err)
	if len(r.Tails) != len(refs) {
		t.Errorf("%d blocks listed", len(r.Tails))
	}
	r = b.Do(&torus.Request{Op: torus.OpList})
	must(t, r.Err)
	if len(r.Tails) != 0 {
		t.Errorf("%d blocks listed, none asked for", len(r.Tails))
	}
}

// random compares with a model, many requests at a time.
func random(t *testing.T, b *Bench) {
	type block struct {
		data   []byte
		sealed bool
	}
	rng := b.Sim.Rand()
	model := map[torus.BlockRef]*block{}
	next := uint64(0)
	var refs []torus.BlockRef
	for range 60 {
		var rs []*torus.Request
		var checks []func()
		for range rng.IntN(12) + 1 {
			if len(refs) == 0 || rng.IntN(6) == 0 && len(refs) < Slots {
				next++
				refs = append(refs, Ref(next))
				model[Ref(next)] = &block{}
			}
			ref := refs[rng.IntN(len(refs))]
			m := model[ref]
			r := &torus.Request{Ref: ref}
			var wanted error
			switch k := rng.IntN(10); {
			case k < 5 || len(m.data) == 0: // append
				r.Op, r.Off = torus.OpAppend, uint32(len(m.data))
				r.Data = Record(ref, r.Off, rng.Uint64(), 0, rng.IntN(4))
				switch {
				case m.sealed:
					wanted = torus.ErrSealed
				case len(m.data)+len(r.Data) > BlockSize:
					wanted = torus.ErrInvalid
				default:
					m.data = append(m.data, r.Data...)
				}
			case k < 6:
				r.Op, r.Len = torus.OpSync, uint32(rng.IntN(len(m.data)+1))
			case k < 8:
				off := rng.IntN(len(m.data))
				n := rng.IntN(len(m.data) - off)
				r.Op, r.Off, r.Data = torus.OpRead, uint32(off), make([]byte, n)
				expect := slices.Clone(m.data[off : off+n])
				checks = append(checks, func() {
					if r.Err == nil && !bytes.Equal(r.Data, expect) {
						t.Errorf("read of %v at %d: other bytes than were appended", ref, off)
					}
				})
			case k < 9 && rng.IntN(4) == 0:
				r.Op, r.Len = torus.OpSeal, uint32(len(m.data))
				m.sealed = true
			default:
				if rng.IntN(4) > 0 {
					r.Op, r.Len = torus.OpScan, 1<<20
					break
				}
				continue
			}
			rs = append(rs, r)
			checks = append(checks, func() {
				if !errors.Is(r.Err, wanted) {
					t.Errorf("%v of %v: %v, want %v", r.Op, r.Ref, r.Err, wanted)
				}
			})
		}
		if len(rs) > 0 {
			b.DoAll(rs...)
		}
		for _, check := range checks {
			check()
		}
		if len(refs) > 0 && rng.IntN(8) == 0 {
			i := rng.IntN(len(refs))
			must(t, b.Delete(refs[i]))
			delete(model, refs[i])
			refs = slices.Delete(refs, i, i+1)
		}
		if t.Failed() {
			return
		}
	}
	for ref, m := range model {
		if len(m.data) > 0 {
			wantBlock(t, b, ref, m.data)
			wantTail(t, b, ref, uint32(len(m.data)), m.sealed)
		}
	}
}

func closed(t *testing.T, b *Bench) {
	fill(t, b, Ref(1), 2)
	must(t, b.Store.Close())
	want(t, b.Sync(Ref(1), 4096), torus.ErrClosed)
	want(t, b.Store.Close(), torus.ErrClosed)
	b.Sim.RunFor(time.Second)
}

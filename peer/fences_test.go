package peer

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/coreos/torus"
	"github.com/coreos/torus/vfs"
)

var update = flag.Bool("update", false, "write the golden file instead of comparing with it")

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func contents(t testing.TB, fsys vfs.FS) []byte {
	t.Helper()
	f, err := fsys.Open(fencesFile)
	must(t, err)
	defer f.Close()
	size, err := f.Size()
	must(t, err)
	b := make([]byte, size)
	if size > 0 {
		_, err = f.ReadAt(b, 0)
		must(t, err)
	}
	return b
}

// overwrite replaces the journal, durably.
func overwrite(t testing.TB, fsys vfs.FS, b []byte) {
	t.Helper()
	f, err := fsys.Open(fencesFile)
	must(t, err)
	defer f.Close()
	must(t, f.Truncate(0))
	_, err = f.WriteAt(b, 0)
	must(t, err)
	must(t, f.Datasync())
}

func TestGoldenFences(t *testing.T) {
	fsys := vfs.NewMem(1)
	j, _, err := openFences(fsys, true)
	must(t, err)
	must(t, j.rewrite(map[torus.VolumeID]uint64{1: 2, torus.VolumeMax: 3}))
	must(t, j.add([]promise{{1, 4}, {7, 1}}))
	must(t, j.add([]promise{{0x123456789a, 0x0102030405060708}}))
	got := hex.Dump(contents(t, fsys))
	path := filepath.Join("testdata", "fences.v1.hex")
	if *update {
		must(t, os.MkdirAll("testdata", 0o777))
		must(t, os.WriteFile(path, []byte(got), 0o666))
	}
	want, err := os.ReadFile(path)
	must(t, err)
	if got != string(want) {
		t.Errorf("the format has changed:\n%s\nwas\n%s", got, want)
	}
	state, _, err := parseFences(contents(t, fsys))
	must(t, err)
	if !maps.Equal(state, map[torus.VolumeID]uint64{1: 4, 7: 1, torus.VolumeMax: 3, 0x123456789a: 0x0102030405060708}) {
		t.Error(state)
	}
}

// TestFencesCrash cuts the power at every call that changes the file system, several ways each: whatever was promised
// is found again, and nothing that was never asked for (L1).
func TestFencesCrash(t *testing.T) {
	for seed := range uint64(300) {
		rng := rand.New(rand.NewPCG(seed, 1))
		disk := vfs.NewMem(seed)
		disk.SetByteTears(seed%2 == 0)
		promised, asked := map[torus.VolumeID]uint64{}, map[torus.VolumeID]uint64{}
		made := false // the file exists for certain
		check := func() {
			clone := disk.CrashClone(rng)
			_, state, err := openFences(clone, !made)
			if err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			for v, e := range promised {
				if state[v] < e {
					t.Fatalf("seed %d: volume %d: epoch %d was promised, %d found", seed, v, e, state[v])
				}
			}
			for v, e := range state {
				if e > asked[v] {
					t.Fatalf("seed %d: volume %d: epoch %d found, %d asked for", seed, v, e, asked[v])
				}
			}
			// And again, from what that start has made durable.
			_, again, err := openFences(clone.CrashClone(rng), false)
			if err != nil || !maps.Equal(state, again) {
				t.Fatalf("seed %d: %v, then %v, %v", seed, state, again, err)
			}
		}
		fails := 0
		fsys := vfs.NewErrors(disk, func(op vfs.Op) error {
			if !op.Changes() {
				return nil
			}
			if rng.IntN(4) == 0 {
				check()
			}
			if made && rng.IntN(25) == 0 {
				fails++
				return errors.New("injected")
			}
			return nil
		})
		j, _, err := openFences(fsys, true)
		must(t, err)
		made = true
		for step := range 60 {
			switch {
			case rng.IntN(12) == 0: // the process ends and starts again
				disk.Kill()
				k, state, err := openFences(fsys, false)
				if err != nil {
					continue // an injected error: the peer does not start; try again
				}
				j = k
				for v, e := range promised {
					if state[v] < e {
						t.Fatalf("seed %d: lost", seed)
					}
				}
			case j.f == nil: // broken from the start
			case j.broken || rng.IntN(15) == 0:
				all := maps.Clone(asked)
				if j.rewrite(all) == nil {
					promised = all
				}
			default:
				var ps []promise
				for range 1 + rng.IntN(20) {
					p := promise{torus.VolumeID(rng.IntN(9)), uint64(step + 1)}
					ps = append(ps, p)
					asked[p.volume] = p.epoch
				}
				if j.add(ps) == nil {
					for _, p := range ps {
						promised[p.volume] = p.epoch
					}
				}
			}
			check()
		}
		if seed == 0 && (fails == 0 || len(promised) == 0) {
			t.Error("nothing tested")
		}
	}
}

// TestFencesDamage changes and cuts off every byte of a journal: nothing durable is lost without a word, except what
// the last write alone has brought.
func TestFencesDamage(t *testing.T) {
	fsys := vfs.NewMem(1)
	j, _, err := openFences(fsys, true)
	must(t, err)
	must(t, j.rewrite(map[torus.VolumeID]uint64{1: 2, 2: 2, 3: 2}))
	must(t, j.add([]promise{{1, 3}, {4, 1}}))
	must(t, j.add([]promise{{2, 4}}))
	good := contents(t, fsys)
	before, _, err := parseFences(good[:len(good)-entrySize])
	must(t, err)
	check := func(what string, b []byte, before map[torus.VolumeID]uint64) {
		t.Helper()
		state, _, err := parseFences(b)
		if err != nil {
			if !errors.Is(err, torus.ErrCorrupt) && !errors.Is(err, torus.ErrNotSupported) {
				t.Errorf("%s: %v", what, err)
			}
			return
		}
		for v, e := range before {
			if state[v] < e {
				t.Errorf("%s: volume %d has %d, not %d, and no error", what, v, state[v], e)
			}
		}
	}
	for i := range good {
		b := bytes.Clone(good)
		b[i] ^= 0x40
		check(fmt.Sprintf("byte %d flipped", i), b, before)
		for s := i / 512 * 512; s < min(i/512*512+512, len(b)); s++ {
			b[s] = 0
		}
		check(fmt.Sprintf("sector of byte %d zeroed", i), b, before)
	}
	rewritten := map[torus.VolumeID]uint64{1: 2, 2: 2, 3: 2}
	for i := range good {
		want := rewritten
		if i >= len(good)-entrySize {
			want = before
		}
		check(fmt.Sprintf("cut off at %d", i), good[:i], want)
	}
}

// Somebody else has filled the file system: a peer starts nevertheless, with all it has promised, and what it promises from then on is
// durable as long as that finds room in the file's last block (L1).
func TestFencesWhenDiskIsFull(t *testing.T) {
	for seed := range uint64(100) {
		rng := rand.New(rand.NewPCG(seed, 2))
		disk := vfs.NewMem(seed)
		j, _, err := openFences(disk, true)
		must(t, err)
		must(t, j.rewrite(map[torus.VolumeID]uint64{1: 2, 2: 7}))
		must(t, j.add([]promise{{1, 3}, {4, 1}}))
		must(t, j.add([]promise{{2, 9}}))
		want := map[torus.VolumeID]uint64{1: 3, 2: 9, 4: 1}
		left, size, err := disk.Free()
		must(t, err)
		disk.Kill()
		disk.SetCapacity(size - left)
		started := false // until then the power is cut at every step
		fsys := vfs.NewErrors(disk, func(op vfs.Op) error {
			if op.Changes() && !started {
				_, state, err := openFences(disk.CrashClone(rng), false)
				if err != nil || !maps.Equal(state, want) {
					t.Fatalf("seed %d: after a power cut: %v, %v", seed, state, err)
				}
			}
			return nil
		})
		j, state, err := openFences(fsys, false)
		if err != nil || !maps.Equal(state, want) {
			t.Fatalf("a peer on a full disk does not start: %v, %v", state, err)
		}
		started = true
		if _, state, err = openFences(disk.CrashClone(rng), false); err != nil || !maps.Equal(state, want) {
			t.Fatalf("seed %d: then %v, %v", seed, state, err)
		}
		disk.SetCapacity(vfs.DefaultMemCapacity)
		must(t, j.add([]promise{{4, 5}}))
		want[4] = 5
		if _, state, err = openFences(disk.CrashClone(rng), false); err != nil || !maps.Equal(state, want) {
			t.Fatalf("seed %d: and then %v, %v", seed, state, err)
		}
	}
}

func TestFencesMissing(t *testing.T) {
	_, _, err := openFences(vfs.NewMem(1), false)
	if !errors.Is(err, torus.ErrCorrupt) {
		t.Error(err)
	}
}

func FuzzFences(f *testing.F) {
	fsys := vfs.NewMem(1)
	j, _, err := openFences(fsys, true)
	must(f, err)
	f.Add(contents(f, fsys))
	must(f, j.add([]promise{{1, 3}, {4, 1}}))
	must(f, j.add([]promise{{1, 4}}))
	f.Add(contents(f, fsys))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		fsys := vfs.NewMem(1)
		_, _, err := openFences(fsys, true)
		must(t, err)
		overwrite(t, fsys, b)
		_, state, err := openFences(fsys, true)
		if err != nil {
			if !bytes.Equal(contents(t, fsys), b) {
				t.Error("a file that cannot be read was changed")
			}
			return
		}
		_, again, err := openFences(fsys, true)
		if err != nil || !maps.Equal(state, again) {
			t.Errorf("%v, then %v, %v", state, again, err)
		}
	})
}

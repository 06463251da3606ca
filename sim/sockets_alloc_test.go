//go:build !race

package sim

import (
	"cmp"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/coreos/torus/device"
	"golang.org/x/sys/unix"
)

// A read or a write costs less than one allocation in the client and in a peer each, on sockets and files as in production. What
// there is comes now and then: a new block, a leaf of the map, a checkpoint. (The race detector has sync.Pool lose things on purpose.)
func TestSocketsAllocations(t *testing.T) {
	const (
		ops   = 8192
		limit = 0.5
		// The client keeps what it has written until a background flush is done, 32 MiB at most. How much that is depends on the disk,
		// so its pool of records may still be growing when it writes: to 4,096 of two pages, by four allocations each.
		growing = 4 * 4096 / (limit * ops)
	)
	l, f := startSockets(t)
	// Pools, map and blocks are then as they stay.
	newBenchLoad(f, device.Write, 32).runOn(t, l, 3*benchVolume/PageSize)
	newBenchLoad(f, device.Flush, 1).runOn(t, l, 1)
	defer func(rate int) { runtime.MemProfileRate = rate }(runtime.MemProfileRate)
	runtime.MemProfileRate = 1
	cells := append(slices.Clone(stackCells), stackCell{"cold read", device.Read, 1}, stackCell{"cold read", device.Read, 32})
	for _, c := range cells {
		w := newBenchLoad(f, c.op, c.depth)
		w.runOn(t, l, ops)
		rounds := 1
		if c.op == device.Write {
			rounds += growing
		}
		for round := 1; ; round++ {
			if c.name == "cold read" {
				dropCached(t, filepath.Dir(t.TempDir()))
			}
			sides, places := allocationsOf(ops, func() { w.runOn(t, l, ops) })
			t.Logf("%v: allocations per operation: %.3f in the client, %.3f in the three peers, %.3f elsewhere", c, sides["client"], sides["peer"], sides[""])
			if sides["client"] < limit && sides["peer"] < limit {
				break
			}
			for _, p := range places[:min(8, len(places))] {
				t.Logf("%7.3f %s", p.n, p.where)
			}
			if round == rounds {
				t.Errorf("%v: more than %v allocations per operation on a side", c, limit)
				break
			}
		}
	}
}

// dropCached has the kernel forget what it has of the files below dir in its page cache.
func dropCached(t *testing.T, dir string) {
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		file, err := os.Open(path)
		if err != nil {
			return err
		}
		return errors.Join(file.Sync(), unix.Fadvise(int(file.Fd()), 0, 0, unix.FADV_DONTNEED), file.Close())
	})
	if err != nil {
		t.Fatal(err)
	}
}

// allocator is one in the program that allocates n times per operation.
type allocator struct {
	where string
	n     float64
}

// allocationsOf counts the allocations for each of ops operations that run does, by side of the wire and by place, most first.
func allocationsOf(ops int, run func()) (sides map[string]float64, places []allocator) {
	before := allocations()
	run()
	sides = map[string]float64{}
	for at, n := range allocations() {
		if n -= before[at]; n > 0 {
			side, where := sideOf(at)
			if strings.Contains(where, "sim.allocations") {
				continue // the counting itself
			}
			per := float64(n) / float64(ops)
			sides[side] += per
			places = append(places, allocator{where, per})
		}
	}
	slices.SortFunc(places, func(a, b allocator) int { return cmp.Compare(b.n, a.n) })
	return sides, places
}

type stack [32]uintptr

// allocations are all so far, by the place in the program.
func allocations() map[stack]int64 {
	runtime.GC() // the profile is of what has been swept
	runtime.GC()
	var records []runtime.MemProfileRecord
	for n, ok := runtime.MemProfile(nil, true); !ok; {
		records = make([]runtime.MemProfileRecord, n+100)
		if n, ok = runtime.MemProfile(records, true); ok {
			records = records[:n]
		}
	}
	all := map[stack]int64{}
	for _, r := range records {
		all[r.Stack0] += r.AllocObjects
	}
	return all
}

// sideOf says which side of the wire a stack is on, and describes it.
func sideOf(s stack) (side, where string) {
	n := slices.Index(s[:], 0)
	if n < 0 {
		n = len(s)
	}
	var names []string
	frames := runtime.CallersFrames(s[:n])
	for {
		f, more := frames.Next()
		name := f.Function[strings.LastIndexByte(f.Function, '/')+1:]
		names = append(names, name)
		for _, p := range []struct{ part, side string }{
			{"tdp.(*conn)", "peer"}, {"tdp.(*Server)", "peer"}, {"tdp.(*call)", "peer"}, {"peer.", "peer"}, {"storage.", "peer"},
			{"tdp.(*Client)", "client"}, {"tdp.(*link)", "client"}, {"file.", "client"}, {"distributor.", "client"}, {"sim.", "client"},
		} {
			if side == "" && strings.HasPrefix(name, p.part) {
				side = p.side
			}
		}
		if !more {
			return side, strings.Join(names, " < ")
		}
	}
}

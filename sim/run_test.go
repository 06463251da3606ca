package sim

import (
	"flag"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

func number(t *testing.T, name string, otherwise uint64) uint64 {
	s := os.Getenv(name)
	if s == "" {
		return otherwise
	}
	x, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// TestSeeds plays schedules: TORUS_SEEDS of them, from TORUS_FROM on, or TORUS_SEED alone, which is told in full with -v:
//
//	TORUS_SEED=17 go test ./sim -run TestSeeds -v
//
// It holds D1, D2, D3, F1, L1, W1, C1, P1 and S1, and that a cluster in which everything is well comes to serve (LIVE).
func TestSeeds(t *testing.T) {
	from, n := number(t, "TORUS_FROM", 0), number(t, "TORUS_SEEDS", seeds)
	var log *slog.Logger
	if os.Getenv("TORUS_SEED") != "" {
		from, n = number(t, "TORUS_SEED", 0), 1
		if testing.Verbose() {
			log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
		}
	} else if testing.Short() {
		n = min(n, 100)
	}
	most := 20
	if f := flag.Lookup("test.failfast"); f != nil && f.Value.String() == "true" {
		most = 1
	}
	defer debug.SetGCPercent(debug.SetGCPercent(400)) // memory is not what matters here
	var mu sync.Mutex
	next, failed := from, 0
	faults := map[string]int{}
	attaches, acks, leaked, left, direct := 0, 0, 0, 0, 0
	var past [5]int
	began := time.Now()
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for {
				mu.Lock()
				seed := next
				next++
				stop := seed >= from+n || failed >= most
				mu.Unlock()
				if stop {
					return
				}
				r, err := Play(seed, log)
				mu.Lock()
				if err != nil {
					failed++
					t.Errorf("seed %d: %v\nagain: TORUS_SEED=%d go test ./sim -run TestSeeds -v", seed, err, seed)
				}
				if r != nil {
					attaches, acks, leaked, left = attaches+r.Attaches, acks+r.Acks, leaked+r.Leaked, left+r.Left
					direct += r.Direct.n
					for i, n := range []int{r.Snapshots, r.Views, r.Clones, r.Flattened, r.Returns} {
						past[i] += n
					}
					for k, c := range r.Faults {
						faults[k] += c
					}
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	var said []string
	for k, c := range faults {
		said = append(said, fmt.Sprintf("%s %d", k, c))
	}
	slices.Sort(said)
	played := min(next, from+n) - from
	t.Logf("%d schedules, %v each: %d attaches compared with the history, %d writes acknowledged, %d blocks left that nobody lists, %d of deleted volumes; %d snapshots, %d views of moments compared, %d clones, %d flattened, %d volumes taken back; %d reads past a peer; faults: %s",
		played, (time.Since(began) / time.Duration(max(played, 1))).Round(time.Microsecond), attaches, acks, leaked, left, past[0], past[1], past[2], past[3], past[4], direct, strings.Join(said, ", "))
	if played >= 50 && failed == 0 && direct < int(played) {
		t.Errorf("%d reads past a peer: these schedules say little of them", direct)
	}
}

// Schedules that have found something which others seldom come to.
func TestSeedsThatFoundSomething(t *testing.T) {
	for seed, what := range map[uint64]string{
		660:  "an attach that had been overtaken waited for an INode that only a peer that was gone might have had",
		4207: "the witness took for a stranger what a slow disk had written and not answered for",
		81:   "a time is located behind which the volume had grown",
		325:  "a clone counted as free of its origin while a snapshot of it needed a block that compaction held",
		861:  "an origin was deleted before its log, which a clone needed, had been recovered",
		1036: "an attach that had waited served the volume in the size it had before it grew",
		1300: "a checkpoint ended before the moment that was pinned with the INode before it",
		1711: "a torn tail in a block of a deleted volume that a clone needed was nobody's to mend",
		3055: "a snapshot was taken while writes were under way that failed for want of space",
		8505: "an attach tried for ever to go back to a moment that had passed out of what was kept",
		3548: "an attach whose commit had lost its answer laid its window out anew, and never knew it again",
	} {
		if _, err := Play(seed, nil); err != nil {
			t.Errorf("seed %d, once %s: %v", seed, what, err)
		}
	}
}

// The same seed gives the same trace, another one another.
func TestTrace(t *testing.T) {
	for seed := range uint64(8) {
		a, err := Play(seed, nil)
		if err != nil {
			t.Fatal(err)
		}
		b, err := Play(seed, nil)
		if err != nil {
			t.Fatal(err)
		}
		if a.Trace != b.Trace || a.V.Now() != b.V.Now() {
			t.Errorf("seed %d: traces %x at %v, and %x at %v", seed, a.Trace, a.V.Now(), b.Trace, b.V.Now())
		}
		c, err := Play(seed+1000, nil)
		if err != nil {
			t.Fatal(err)
		}
		if a.Trace == c.Trace {
			t.Errorf("seeds %d and %d have the same trace", seed, seed+1000)
		}
	}
}

package sim

import (
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"testing"
)

// TestSeeds plays schedules. TORUS_SEEDS=n plays n of them, TORUS_SEED=s that one:
//
//	TORUS_SEED=17 go test ./sim -run TestSeeds -v
func TestSeeds(t *testing.T) {
	from, n := uint64(0), uint64(40)
	number := func(name string, to *uint64) bool {
		s := os.Getenv(name)
		if s == "" {
			return false
		}
		x, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		*to = x
		return true
	}
	number("TORUS_SEEDS", &n)
	if number("TORUS_SEED", &from) {
		n = 1
	}
	for seed := from; seed < from+n; seed++ {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			var log *slog.Logger
			if testing.Verbose() {
				log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
			}
			if _, err := Play(seed, 5, log); err != nil {
				t.Fatalf("%v\nTORUS_SEED=%d go test ./sim -run TestSeeds -v", err, seed)
			}
		})
	}
}

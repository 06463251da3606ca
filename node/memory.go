package node

import (
	"os"
	"runtime/debug"
	"time"

	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/transport/sock"
)

const (
	// gcPercent is how much garbage there may be, in per cent of what is alive. Nearly all of that is buffers, which are used
	// again rather than collected, and have no pointers to follow: with the 100 that is usual, a process with 60 MiB of buffers would
	// gather as much of garbage before anybody looks, and to look costs less than a millisecond.
	gcPercent = 40
	trimEvery = 5 * time.Second
	// trimAtLeast is for how many bytes of buffers given up it is worth while to collect garbage out of turn.
	trimAtLeast = 4 << 20
)

// keepMemory has buffers lie where other processes of this machine can read them (transport.Lender), and sees to it that the process gives back memory that it does not need any more, until stop is called. GOGC and
// GOMEMLIMIT in the environment have their usual meaning.
func keepMemory() (stop func() error) {
	_ = buf.Share() // else what could be lent is sent
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		ticker := time.NewTicker(trimEvery)
		defer ticker.Stop()
		dropped := 0
		for {
			select {
			case <-end:
				return
			case <-ticker.C:
			}
			sock.LetGo()
			if dropped += buf.Trim(); dropped >= trimAtLeast {
				dropped = 0
				debug.FreeOSMemory()
			}
		}
	}()
	return func() error {
		close(end)
		<-ended
		return nil
	}
}

package distributor

import (
	"context"
	"log/slog"
	"time"

	"github.com/coreos/torus"
)

// complainEvery is how often one peer may be complained of.
const complainEvery = 10 * time.Second

// complaint is what has been said of a peer in the log: with every read that fails there it would be too much.
type complaint struct {
	until      time.Duration // nothing more before this loop time
	suppressed int
}

// complain logs what is wrong with a peer's answers, now and then.
func (d *Distributor) complain(p torus.PeerID, level slog.Level, msg string, args ...any) {
	x := d.peers[p]
	if x == nil {
		return
	}
	now := d.loop.Now()
	if now < x.said.until {
		x.said.suppressed++
		return
	}
	args = append(args, "peer", p)
	if x.said.suppressed > 0 {
		args = append(args, "suppressed", x.said.suppressed)
	}
	x.said = complaint{until: now + complainEvery}
	d.log.Log(context.Background(), level, msg, args...)
}

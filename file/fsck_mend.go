package file

import (
	"fmt"
	"slices"
	"time"

	"github.com/coreos/torus"
)

const (
	// mendPatience is how long it waits for the next copy to be mended.
	mendPatience = 2 * time.Minute
	// mendLook is how often it looks, and mendTell how often it says again what is to be mended.
	mendLook = time.Second
	mendTell = 20 * time.Second
	// mendAtOnce is how many copies it looks at each time.
	mendAtOnce = 8
)

// Mendable reports whether the peer that a finding is about can make its copy whole.
func (x *Finding) Mendable() bool {
	return (x.Kind == FindMissing || x.Kind == FindShort || x.Kind == FindDamaged) && len(x.Good) > 0
}

// mend has each peer verify the copies of its own that are not what they should be. They make them whole by themselves, in their own time and in their own way, or leave them
// alone; here it is only seen to that they look, and waited until the copies are good.
func (c *fsck) mend() error {
	var left []*Finding
	for _, x := range c.report.Findings {
		if x.Mendable() {
			left = append(left, x)
		}
	}
	d, l := c.cfg.Dist, c.cfg.Loop
	told := -mendTell
	for until := l.Now() + mendPatience; len(left) > 0 && l.Now() < until; {
		if err := c.stopped(); err != nil {
			return err
		}
		if l.Now() >= told+mendTell {
			told = l.Now()
			for _, x := range left {
				d.Submit(x.Peer, &torus.Request{Op: torus.OpVerify, Ref: x.Ref, Peer: x.Peer, Done: func(r *torus.Request) {
					if r.Err != nil {
						c.cfg.Log.Debug("ask a peer to verify its copy", "block", r.Ref.String(), "peer", r.Peer, "err", r.Err)
					}
				}})
			}
		}
		c.t.Sleep(mendLook)
		for i := 0; i < min(len(left), mendAtOnce); { // in their order, since that is how they are mended, about; and it costs reads
			good, err := c.mended(left[i])
			if err != nil {
				return err
			}
			if !good {
				i++
				continue
			}
			left[i].Mended = true
			left = slices.Delete(left, i, i+1)
			until = l.Now() + mendPatience
		}
	}
	for _, x := range left {
		x.What += fmt.Sprintf(" (not mended within %v", mendPatience)
		if InWindow(c.st.VolumeState, x.Ref) {
			x.What += ": it is in the open window of the writer, and is mended when that has left it"
		}
		x.What += ")"
	}
	return nil
}

// mended reports whether a peer's copy is good by now, or is not needed any more.
func (c *fsck) mended(x *Finding) (bool, error) {
	slot, ok := c.f.table.byRef[x.Ref]
	if !ok {
		return true, nil
	}
	w := c.want(slot)
	y := &blockCopy{peer: x.Peer, home: true}
	w.copies = []*blockCopy{y}
	c.readCopy(c.t, w, y)
	w.v = examine(w.ref, w.length, w.copies, w.claims)
	good := w.v.whole() && w.v.claimed
	if good || y.away != nil {
		return good, c.stopped()
	}
	_, ok, err := c.still(x.Ref)
	return !ok, err
}

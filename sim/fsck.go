package sim

import (
	"fmt"
	"strings"
	"time"

	"github.com/coreos/torus/file"
)

// fsck checks every volume as an administrator does: when all is well and the peers have mended what they could, nothing is amiss.
func (r *Run) fsck() error {
	for _, v := range r.vols {
		r.n++
		cl := r.NewClient(fmt.Sprintf("fsck%d", r.n))
		var report *file.FsckReport
		var err error
		cl.Loop.After(100*time.Millisecond, func() {
			file.Fsck(file.FsckConfig{Config: file.Config{
				Loop: cl.Loop, Dist: cl.Dist, MDS: cl.MDS, Volume: v.info, BlockSize: uint32(r.opt.BlockSize), Log: r.log,
			}}, func(x *file.FsckReport, e error) { report, err = x, e })
		})
		if !r.runUntil(func() bool { return report != nil || err != nil || r.err != nil }, 10*time.Minute) {
			return violated("LIVE", "fsck of volume %s never ends", v.info.Name)
		}
		cl.Kill()
		if r.err != nil {
			return r.err
		}
		if err != nil {
			return violated("LIVE", "fsck of volume %s: %w", v.info.Name, err)
		}
		var said strings.Builder
		for _, x := range report.Findings {
			fmt.Fprintf(&said, "\n%s %v at %v: %s", x.Kind, x.Ref, x.Peer.Short(), x.What)
		}
		if said.Len() > 0 || len(report.Unchecked) > 0 {
			return violated("C1", "volume %s is well, and fsck says: %s; unchecked: %v", v.info.Name, said.String(), report.Unchecked)
		}
	}
	return nil
}

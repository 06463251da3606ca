package file

import "time"

// leaveAfter is how long a peer of the open block may be away before an idle writer leaves the block. A restart is quicker.
const leaveAfter = 10 * time.Second

// leaveLost lets go of the open block when a peer of its set stays away. A writer with something to write notices and rolls; an
// idle one would keep flushed records in its window on fewer peers than they are meant for, where nobody else may touch them. After
// the next checkpoint the block is below the window, and the peers see to its copies.
func (f *File) leaveLost() {
	b := f.blk
	if b == nil || f.connected(b.set) || f.applied < f.last {
		f.lostSince = 0
		return
	}
	now := f.loop.Now()
	if f.lostSince == 0 {
		f.lostSince = now
	}
	if now-f.lostSince < leaveAfter {
		return
	}
	f.log.Info("a peer of the open block stays away: leaving it to the peers that are there", "block", b.ref.String())
	b.closed = true
	f.blk, f.lostSince = nil, 0
	for i, x := range f.blocks {
		if x == b {
			f.blocks = append(f.blocks[:i], f.blocks[i+1:]...)
			break
		}
	}
	f.sinceCkpt++ // something to commit: where the window begins
}

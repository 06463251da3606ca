package file

import (
	"github.com/coreos/torus"
	"github.com/coreos/torus/models"
)

// FillTable lists n more blocks of an older epoch, each with one live page.
func (f *File) FillTable(n int) {
	ps := &models.PlacementSet{RingVersion: 1, Replication: uint32(f.repl)}
	for i := range n {
		ref := torus.BlockRef{Type: torus.TypeBlock, Volume: f.vol, INode: 0, Index: torus.IndexID(i)}
		slot := f.table.add(ref, ps, f.dist.Set(ref, ps))
		f.table.setLength(slot, 2)
		f.table.addLive(slot, 1)
		f.table.e[slot].sealed = true
	}
}

// Miscount has the table count so many live pages more of the first data block in use.
func (f *File) Miscount(by int) {
	for i := range f.table.e {
		if e := &f.table.e[i]; e.used && isData(e.ref.Type) && e.live > 0 {
			f.table.addLive(uint32(i), by)
			f.sinceCkpt++
			return
		}
	}
}

// Pace is how many bytes may be written for each that compaction moves; 0: any number.
func (f *File) Pace() float64 { return f.pace }

// SetEmptying has the volume write as it does while compaction empties blocks.
func (f *File) SetEmptying(on bool) { f.emptying = on }

// Compacting reports whether compaction is at work.
func (f *File) Compacting() bool { return f.compacting }

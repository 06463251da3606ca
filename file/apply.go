package file

import (
	"errors"

	"github.com/coreos/torus"
	"github.com/coreos/torus/record"
)

// loadTries is how often a node of the map that every replica has damaged is asked for again, before what is acknowledged goes on without.
const loadTries = 20

// apply moves flushed records from memory into the map, in order. It stops where a leaf has to be loaded first,
// and goes on when that is there. What is applied is at its final place: a later roll does not touch it.
func (f *File) apply() {
	for f.applied < f.flushed && f.err == nil && !f.applying {
		if f.m.dirtyLeaves > f.m.maxLeaves && f.checkpointing {
			return // memory is bounded: the checkpoint under way must finish first; it calls again
		}
		r := f.rec(f.applied + 1)
		if page, missing := f.missing(r); missing {
			f.applying = true
			f.m.load(page, func(err error) {
				f.applying = false
				switch {
				case err == nil:
					f.loadTries = 0
				case f.err == nil && (errors.Is(err, errLost) || errors.Is(err, torus.ErrCorrupt) && f.loadTries >= loadTries):
					f.loadTries = 0
					first, n := f.m.lose(page)
					f.log.Error("a node of the map is damaged on every replica: what it pointed to is lost, and reads as an error until it is written anew",
						"offset", first*pageSize, "bytes", n*pageSize, "err", err)
				default:
					if f.loadTries++; f.loadTries == 1 {
						f.log.Error("cannot load the map, trying again", "page", page, "err", err)
					}
					f.loop.After(retryEvery, f.apply)
					return
				}
				f.apply()
			})
			return
		}
		f.applyRec(r)
		f.applied, f.appliedStamp = r.seq, r.hdr.Time
		f.over.drop(r)
		f.sinceCkpt += uint64(r.size())
		f.forget(r)
	}
	f.resumeWaiting()
	f.maybeCheckpoint()
}

// prefetch begins to load the leaves that a record will change, so that they are there when it is applied.
func (f *File) prefetch(h *record.Header) {
	for _, x := range h.Extents {
		last := x.Page + uint64(x.Count) - 1
		if x.Count > listPages {
			continue
		}
		for p := x.Page; p <= last; p = (p/leafPages + 1) * leafPages {
			if _, ok := f.m.get(p); !ok {
				f.m.load(p, func(error) {})
			}
		}
	}
}

// missing returns a page of r whose leaf exists and is not in memory.
func (f *File) missing(r *rec) (uint64, bool) {
	for _, x := range r.hdr.Extents {
		last := x.Page + uint64(x.Count) - 1
		for p := x.Page; p <= last; {
			if n := f.m.hole(p); n > 0 {
				p += n
				continue
			}
			if _, ok := f.m.get(p); !ok {
				return p, true
			}
			p = (p/leafPages + 1) * leafPages
		}
	}
	return 0, false
}

func (f *File) applyRec(r *rec) {
	slot := r.blk.slot
	f.table.setLength(slot, r.end()/pageSize)
	first := r.off/pageSize + record.HeaderSize/pageSize
	f.applyExtents(slot, first, &r.hdr)
}

// applyExtents puts the extents of a record into the map, whose leaves must be there. first is the page of
// its block where its data begins.
func (f *File) applyExtents(slot, first uint32, h *record.Header) {
	i := uint32(0)
	live := 0
	for _, x := range h.Extents {
		last := x.Page + uint64(x.Count) - 1
		for p := x.Page; p <= last; {
			if x.Kind == record.Trim {
				if n := f.m.hole(p); n > 0 {
					p += n
					continue
				}
			}
			l := f.m.writable(p)
			f.m.touch(l)
			end := min(last, l.page+leafPages-1)
			for ; p <= end; p++ {
				old := l.e[p%fanout]
				switch x.Kind {
				case record.Data:
					l.e[p%fanout] = dataEntry(slot, first+i, h.CRCs[i])
					live++
					i++
				case record.Zero:
					l.e[p%fanout] = zeroEntry
				default:
					l.e[p%fanout] = 0
				}
				if old.kind() == entryData {
					f.table.addLive(old.slot(), -1)
				}
			}
		}
	}
	if live > 0 {
		f.table.addLive(slot, live)
	}
}

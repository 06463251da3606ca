package file

import (
	"cmp"
	"slices"

	"github.com/coreos/torus"
	"github.com/coreos/torus/models"
)

// A block is listed by the head for as long as anything may need it. Its birth is the number of the first INode that listed it, its
// death that of the first to which it was of no more use: every INode from birth to before death refers to it. What a moment
// needs follows from these two numbers and the moment's own, so that no list has to be kept for a snapshot; and
// since nothing that is dead comes to life, what no pin needs now no pin will need later (D3).

// pins says what must be kept beside what the head refers to.
type pins struct {
	base []uint64 // numbers of the INodes that moments begin with, ascending
	log  []uint64 // log[i]: the last INode whose log blocks base[0] to base[i] need: records behind a base are in blocks that the next INode lists
	from uint64   // everything that died after this INode is kept, for rewinding; 0: nothing
}

func newPins(s *models.VolumeState, from uint64) pins {
	p := pins{from: from}
	l := slices.Clone(s.Pins)
	slices.SortFunc(l, func(x, y *models.Pin) int { return cmp.Compare(x.At.GetBase().GetNumber(), y.At.GetBase().GetNumber()) })
	for _, x := range l {
		n := x.At.GetBase().GetNumber()
		p.base = append(p.base, n)
		if x.At.GetSeq() > x.At.GetBase().GetSeq() {
			n++
		}
		if k := len(p.log); k > 0 {
			n = max(n, p.log[k-1])
		}
		p.log = append(p.log, n)
	}
	return p
}

// need reports whether a dead block must be kept.
func (p *pins) need(e *tableEntry) bool {
	if p.from > 0 && e.death > p.from {
		return true
	}
	i, _ := slices.BinarySearch(p.base, e.death) // to those before i it was of use
	if i == 0 {
		return false
	}
	if e.ref.Type == torus.TypeBlock {
		return p.log[i-1] >= e.birth
	}
	return p.base[i-1] >= e.birth
}

// cover reports whether all that a state wants kept is among the pins.
func (p *pins) cover(s *models.VolumeState) bool {
	q := newPins(s, s.KeptFrom)
	for i, n := range q.base {
		k, ok := slices.BinarySearch(p.base, n)
		if !ok {
			return false
		}
		for k+1 < len(p.base) && p.base[k+1] == n {
			k++
		}
		if p.log[k] < q.log[i] {
			return false
		}
	}
	return true
}

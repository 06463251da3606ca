package file

import (
	"time"

	"github.com/coreos/torus/models"
)

// marksPerRetention is how finely a volume knows how old its INodes are: what is kept for rewinding is kept longer by that part
// of the time at most, and a checkpoint.
const marksPerRetention = 64

// remember lists, for the INode about to be written, the earlier ones through which all are found, as in a skip list; and when some of
// them were the newest.
func (f *File) remember(z *frozen) {
	z.marks = f.marks
	h := f.state.Head
	if h == nil {
		return
	}
	known := append([]*models.Head{h}, f.history...)
	for level := 0; f.number>>level > 0; level++ {
		for _, x := range known {
			if x.Number>>level < f.number>>level {
				if n := len(z.history); n == 0 || z.history[n-1].Number != x.Number {
					z.history = append(z.history, x)
				}
				break
			}
		}
	}
	retain := f.retain()
	if retain == 0 {
		z.marks = nil
		return
	}
	if n := len(f.marks); n == 0 || h.TimeUs >= f.marks[n-1].TimeUs+retain/marksPerRetention && h.Number > f.marks[n-1].Number {
		z.marks = append(append([]*models.Mark(nil), f.marks...), &models.Mark{Number: h.Number, TimeUs: h.TimeUs})
	}
	from := f.keepFrom(z.marks)
	for len(z.marks) > 1 && z.marks[0].Number < from {
		z.marks = z.marks[1:]
	}
}

// retain is for how long the volume can be rewound, in microseconds.
func (f *File) retain() uint64 {
	return f.state.GetRetainMs() * uint64(time.Millisecond/time.Microsecond)
}

// keepFrom is the oldest INode that the volume can be rewound to: the newest that is old enough. 0: nothing is kept.
func (f *File) keepFrom(marks []*models.Mark) uint64 {
	retain := f.retain()
	if retain == 0 || len(marks) == 0 {
		return 0
	}
	from := max(marks[0].Number, f.state.GetKeptFrom())
	for now := f.stamp(); len(marks) > 0 && marks[0].TimeUs+retain <= now; marks = marks[1:] {
		from = max(from, marks[0].Number)
	}
	return from
}

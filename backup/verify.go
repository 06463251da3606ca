package backup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/coreos/torus"
)

// Verified is what Verify has looked at.
type Verified struct {
	Backups, Sections int
	Pages             uint64 // read and found to be what was written
	Damaged           []Damage
}

// Verify reads what backups need (nil: all there are) and checks it: every object once, however many backups share it. Damage is no error; it is
// in the result, by object. progress is told how many bytes of pages have been looked at, of how many there are to look at, at most.
func (r *Repository) Verify(ctx context.Context, which []*Backup, progress func(done, total uint64)) (*Verified, error) {
	v := &verification{r: r, seen: map[string]map[string]uint64{}, frames: map[frame]uint32{}, damaged: map[string]*Damage{}}
	if which == nil {
		l, bad, err := r.List(ctx, "")
		if err != nil {
			return nil, err
		}
		for _, d := range bad {
			v.damaged[d.Object] = &d
		}
		which = l
	}
	sizes := map[string]uint64{}
	for _, b := range which {
		for _, name := range b.Sections {
			if name != "" {
				sizes[name] = sectionBytes
			}
		}
	}
	total := uint64(len(sizes)) * sectionBytes
	for _, b := range which {
		v.res.Backups++
		rd := r.NewReader(b)
		for n, name := range b.Sections {
			if name == "" {
				continue
			}
			if err := v.section(ctx, rd, uint64(n), name); err != nil {
				rd.Close()
				return nil, err
			}
			if progress != nil {
				progress(uint64(len(v.seen))*sectionBytes, total)
			}
		}
		rd.Close()
	}
	for _, k := range slices.Sorted(maps.Keys(v.damaged)) {
		d := *v.damaged[k]
		slices.Sort(d.Of)
		v.res.Damaged = append(v.res.Damaged, d)
	}
	return &v.res, nil
}

type verification struct {
	r       *Repository
	res     Verified
	seen    map[string]map[string]uint64 // sections, and what is damaged of them: pages by object
	frames  map[frame]uint32             // which pages of a frame were found to be good
	damaged map[string]*Damage
}

// note adds damage.
func (v *verification) note(object string, err error, pages uint64, b *Backup) {
	d := v.damaged[object]
	if d == nil {
		d = &Damage{Object: object, Err: err}
		v.damaged[object] = d
	}
	d.Pages += pages
	if !slices.Contains(d.Of, b.Name()) {
		d.Of = append(d.Of, b.Name())
	}
}

func (v *verification) section(ctx context.Context, rd *Reader, n uint64, name string) error {
	if bad, ok := v.seen[name]; ok {
		for object, pages := range bad {
			v.note(object, nil, pages, rd.b)
		}
		return nil
	}
	bad := map[string]uint64{}
	v.seen[name] = bad
	v.res.Sections++
	s, err := rd.section(ctx, n)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		if !damage(err) {
			return err
		}
		bad[mapKey(name)] = min(sectionPages, (rd.b.Size-n*sectionBytes+pageSize-1)/pageSize)
		v.note(mapKey(name), err, bad[mapKey(name)], rd.b)
		return nil
	}
	var which []int
	for i := range s.pages {
		p := &s.pages[i]
		if p.frame > 0 && v.frames[s.frames[p.frame-1]]&(1<<p.index) == 0 {
			which = append(which, i)
		}
	}
	var mu sync.Mutex
	return rd.pages(ctx, s, which, func(i int, _ []byte, err error) error {
		mu.Lock()
		defer mu.Unlock()
		p := &s.pages[i]
		f := s.frames[p.frame-1]
		switch {
		case err == nil:
			v.res.Pages++
			v.frames[f] |= 1 << p.index
		case damage(err):
			bad[f.pack.key()]++
			v.note(f.pack.key(), err, 1, rd.b)
		default:
			return err
		}
		return nil
	})
}

// damage tells damage from a store that cannot be reached.
func damage(err error) bool {
	return errors.Is(err, torus.ErrCorrupt) || errors.Is(err, torus.ErrNotExist)
}

// Error says what is damaged; nil: nothing.
func (v *Verified) Error() error {
	if len(v.Damaged) == 0 {
		return nil
	}
	worst := slices.MaxFunc(v.Damaged, func(x, y Damage) int { return cmp.Compare(x.Pages, y.Pages) })
	return fmt.Errorf("%d objects are damaged, %s among them: %w", len(v.Damaged), worst.Object, torus.ErrCorrupt)
}

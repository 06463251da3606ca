package backup

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/coreos/torus"
)

// packMagic begins a pack; frames follow, one behind the other.
var packMagic = []byte("TORUSPK\x01")

func newPackID() (id packID) {
	rand.Read(id[:]) //nolint:errcheck // never fails
	return id
}

func parsePack(s string) (id packID, err error) {
	if n, err := hex.Decode(id[:], []byte(s[:min(len(s), 2*len(id))])); err != nil || n != len(id) || len(s) != 2*n {
		return id, fmt.Errorf("%q names no pack: %w", s, torus.ErrCorrupt)
	}
	return id, nil
}

func sortPacks(l []packUse) {
	slices.SortFunc(l, func(x, y packUse) int { return cmp.Compare(x.ID, y.ID) })
}

const (
	spanSize = 4 << 20 // of adjacent frames, what is fetched at once
	fetches  = 8       // spans on their way
)

// span is some frames of a pack that are near each other.
type span struct {
	pack     packID
	off, end uint32
	frames   []uint32 // indexes into the section's frames, by offset
}

// spans orders frames for fetching.
func (s *section) spans(frames []uint32) (l []span) {
	slices.SortFunc(frames, func(x, y uint32) int {
		a, b := &s.frames[x], &s.frames[y]
		return cmp.Or(slices.Compare(a.pack[:], b.pack[:]), cmp.Compare(a.off, b.off))
	})
	for _, n := range frames {
		f := &s.frames[n]
		if k := len(l) - 1; k >= 0 && l[k].pack == f.pack && f.off >= l[k].off && f.off-l[k].off < spanSize && f.off-min(f.off, l[k].end) <= spanSize/8 {
			l[k].end = max(l[k].end, f.off+f.size)
			l[k].frames = append(l[k].frames, n)
			continue
		}
		l = append(l, span{pack: f.pack, off: f.off, end: f.off + f.size, frames: []uint32{n}})
	}
	return l
}

// pages fetches the frames that some pages of a section are in, and calls fn for each of these pages: with its bytes, as its hash says, or with
// why there are none. fn is called from several goroutines, and owns nothing. The first error of fn ends it all.
func (rd *Reader) pages(ctx context.Context, s *section, which []int, fn func(i int, data []byte, err error) error) error {
	in := map[uint32][]int{} // by frame
	var frames []uint32
	for _, i := range which {
		n := s.pages[i].frame - 1
		if in[n] == nil {
			frames = append(frames, n)
		}
		in[n] = append(in[n], i)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(fetches)
	for _, x := range s.spans(frames) {
		g.Go(func() error {
			all := func(frames []uint32, err error) error {
				for _, n := range frames {
					for _, i := range in[n] {
						if err := fn(i, nil, err); err != nil {
							return err
						}
					}
				}
				return nil
			}
			b, err := rd.r.getRange(ctx, x.pack.key(), int(x.off), int(x.end-x.off))
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err != nil && len(x.frames) > 1 { // which of them?
				for _, n := range x.frames {
					f := &s.frames[n]
					b, err := rd.r.getRange(ctx, x.pack.key(), int(f.off), int(f.size))
					if err == nil {
						err = rd.unpack(s, n, b, in[n], fn)
					} else {
						err = all([]uint32{n}, err)
					}
					if err != nil {
						return err
					}
				}
				return nil
			}
			if err != nil {
				return all(x.frames, err)
			}
			for _, n := range x.frames {
				f := &s.frames[n]
				if err := rd.unpack(s, n, b[f.off-x.off:][:f.size], in[n], fn); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

var rawFrames = sync.Pool{New: func() any { b := make([]byte, 0, framePages*pageSize); return &b }}

// unpack calls fn for pages of one frame.
func (rd *Reader) unpack(s *section, n uint32, b []byte, which []int, fn func(i int, data []byte, err error) error) error {
	f := &s.frames[n]
	p := rawFrames.Get().(*[]byte)
	defer rawFrames.Put(p)
	raw, err := rd.z.DecodeAll(b, (*p)[:0])
	if err == nil && len(raw) != int(f.pages)*pageSize {
		err = fmt.Errorf("%d bytes, not %d pages", len(raw), f.pages)
	}
	for _, i := range which {
		x := &s.pages[i]
		if err != nil {
			if err := fn(i, nil, rd.damaged(f, err)); err != nil {
				return err
			}
			continue
		}
		data := raw[int(x.index)*pageSize:][:pageSize]
		if hashOf(data) != x.hash {
			if err := fn(i, nil, rd.damaged(f, fmt.Errorf("page %d of the frame is not what was written", x.index))); err != nil {
				return err
			}
			continue
		}
		if err := fn(i, data, nil); err != nil {
			return err
		}
	}
	return nil
}

func (rd *Reader) damaged(f *frame, err error) error {
	return fmt.Errorf("repository %s: object %s: frame at %d: %w: %w", rd.r, f.pack.key(), f.off, torus.ErrCorrupt, err)
}

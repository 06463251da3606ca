package backup

import (
	"context"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// Reader reads a backup. Its methods may be called at the same time.
type Reader struct {
	r *Repository
	b *Backup
	z *zstd.Decoder

	mu       sync.Mutex
	sections []*loaded // the most recently used ones, the newest last
}

type loaded struct {
	n    uint64
	s    *section
	err  error
	done chan struct{}
}

const (
	keptSections = 8       // in memory, some 2 MiB each
	windowPages  = 4 << 10 // what Restore assembles at once: 16 MiB
	windowBytes  = windowPages * pageSize
)

// NewReader reads a backup of the repository, which it does not close.
func (r *Repository) NewReader(b *Backup) *Reader { return &Reader{r: r, b: b, z: newDecoder()} }

// Close frees what the reader has in memory.
func (rd *Reader) Close() { rd.z.Close() }

// Backup is what is read.
func (rd *Reader) Backup() *Backup { return rd.b }

// section returns section n; nil: there is nothing but zeroes.
func (rd *Reader) section(ctx context.Context, n uint64) (*section, error) {
	name := rd.b.Sections[n]
	if name == "" {
		return nil, nil
	}
	rd.mu.Lock()
	for i, l := range rd.sections {
		if l.n == n {
			rd.sections = append(append(rd.sections[:i:i], rd.sections[i+1:]...), l)
			rd.mu.Unlock()
			select {
			case <-l.done:
				return l.s, l.err
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		}
	}
	l := &loaded{n: n, done: make(chan struct{})}
	if len(rd.sections) == keptSections {
		rd.sections = rd.sections[1:]
	}
	rd.sections = append(rd.sections[:len(rd.sections):len(rd.sections)], l)
	rd.mu.Unlock()
	l.s, l.err = rd.r.section(ctx, name, rd.z)
	close(l.done)
	if l.err != nil { // the next one tries again
		rd.mu.Lock()
		for i := range rd.sections {
			if rd.sections[i] == l {
				rd.sections = append(rd.sections[:i:i], rd.sections[i+1:]...)
				break
			}
		}
		rd.mu.Unlock()
	}
	return l.s, l.err
}

// ReadAt reads len(p) bytes at off, which must be within the backup.
func (rd *Reader) ReadAt(ctx context.Context, p []byte, off uint64) error {
	for len(p) > 0 {
		n := off / sectionBytes
		in := off % sectionBytes
		part := p[:min(uint64(len(p)), sectionBytes-in)]
		s, err := rd.section(ctx, n)
		if err != nil {
			return err
		}
		clear(part)
		if s != nil {
			var which []int
			for i := in / pageSize; i*pageSize < in+uint64(len(part)); i++ {
				if s.pages[i].frame > 0 {
					which = append(which, int(i))
				}
			}
			err := rd.pages(ctx, s, which, func(i int, data []byte, err error) error {
				if err != nil {
					return err
				}
				if at := uint64(i) * pageSize; at >= in {
					copy(part[at-in:], data)
				} else {
					copy(part, data[in-at:])
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
		p, off = p[len(part):], off+uint64(len(part))
	}
	return nil
}

// extent returns how many bytes from off on, up to n, are of one kind, and whether they are zeroes that nobody has to read.
func (rd *Reader) extent(ctx context.Context, off, n uint64) (uint64, bool, error) {
	s, err := rd.section(ctx, off/sectionBytes)
	if err != nil {
		return 0, false, err
	}
	in := off % sectionBytes
	n = min(n, sectionBytes-in)
	if s == nil {
		return n, true, nil
	}
	first := in / pageSize
	hole := s.pages[first].frame == 0
	i := first
	for i*pageSize < in+n && (s.pages[i].frame == 0) == hole {
		i++
	}
	return min(i*pageSize-in, n), hole, nil
}

// Restore reads the backup from the beginning to the end. put is called for one piece after the other: data is nil for n bytes of zeroes, which may be
// many; otherwise it has n bytes, of which some may be zeroes, until put returns.
func (rd *Reader) Restore(ctx context.Context, put func(off, n uint64, data []byte) error) error {
	type window struct {
		off, n uint64
		data   []byte
		err    error
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ready := make(chan window)
	free := make(chan []byte, 2)
	free <- make([]byte, windowBytes)
	free <- make([]byte, windowBytes)
	go func() {
		defer close(ready)
		send := func(w window) bool {
			select {
			case ready <- w:
				return w.err == nil
			case <-ctx.Done():
				return false
			}
		}
		for off := uint64(0); off < rd.b.Size; {
			w := window{off: off}
			var zero bool
			w.n, zero, w.err = rd.extent(ctx, off, rd.b.Size-off)
			if w.err == nil && !zero {
				select {
				case b := <-free:
					w.n = min(windowBytes-off%windowBytes, rd.b.Size-off)
					w.data = b[:w.n]
					w.err = rd.ReadAt(ctx, w.data, off)
				case <-ctx.Done():
					return
				}
			}
			if !send(w) {
				return
			}
			off += w.n
		}
	}()
	for w := range ready {
		if w.err != nil {
			return w.err
		}
		if err := put(w.off, w.n, w.data); err != nil {
			return err
		}
		if w.data != nil {
			free <- w.data[:cap(w.data)]
		}
	}
	return context.Cause(ctx)
}

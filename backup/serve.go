package backup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/loop"
)

// Directory serves the backups of a repository, to read: VOL@ID, and VOL for the newest of a volume.
type Directory struct {
	r    *Repository
	l    loop.Loop
	log  *slog.Logger
	ctx  context.Context
	stop context.CancelFunc
}

// NewDirectory serves a repository on a loop. Close it before the repository.
func NewDirectory(r *Repository, l loop.Loop, log *slog.Logger) *Directory {
	ctx, stop := context.WithCancel(context.Background())
	return &Directory{r: r, l: l, log: log, ctx: ctx, stop: stop}
}

// Stop ends the reads that are under way; those to come fail.
func (d *Directory) Stop() { d.stop() }

// List lists all backups, the newest of each volume also by the volume's name.
func (d *Directory) List(done func([]device.Info, error)) {
	go func() {
		l, bad, err := d.r.List(d.ctx, "")
		var infos []device.Info
		for i, b := range l {
			infos = append(infos, d.info(b, b.Name()))
			if i+1 == len(l) || l[i+1].Volume != b.Volume {
				infos = append(infos, d.info(b, b.Volume))
			}
		}
		for _, x := range bad {
			d.log.Error("a backup is damaged", "object", x.Object, "err", x.Err)
		}
		slices.SortFunc(infos, func(x, y device.Info) int { return cmp.Compare(x.Name, y.Name) })
		d.l.Post(func() { done(infos, err) })
	}()
}

func (d *Directory) info(b *Backup, name string) device.Info {
	return device.Info{Name: name, Description: fmt.Sprintf("%s as of %s", b.Volume, b.Moment.Format("2006-01-02 15:04:05 UTC")), Size: b.Size, ReadOnly: true}
}

func (d *Directory) find(name string, done func(*Backup, error)) {
	go func() {
		b, err := d.r.Find(d.ctx, name)
		if errors.Is(err, torus.ErrNotExist) || errors.Is(err, torus.ErrInvalid) {
			err = fmt.Errorf("%w: %w", device.ErrNotExist, err)
		}
		d.l.Post(func() { done(b, err) })
	}()
}

// Stat describes a backup.
func (d *Directory) Stat(name string, done func(device.Info, error)) {
	d.find(name, func(b *Backup, err error) {
		if err != nil {
			done(device.Info{}, err)
			return
		}
		done(d.info(b, name), nil)
	})
}

// Open opens a backup; each client has it for itself.
func (d *Directory) Open(name string, done func(device.Device, error)) {
	d.find(name, func(b *Backup, err error) {
		if err == nil {
			err = d.ctx.Err()
		}
		if err != nil {
			done(nil, err)
			return
		}
		done(&served{d: d, rd: d.r.NewReader(b), slots: make(chan struct{}, servedReads)}, nil)
	})
}

// Close ends the use of a backup. Nothing of it is under way.
func (d *Directory) Close(_ string, dev device.Device) {
	dev.(*served).rd.Close()
}

// servedReads bounds the reads of the repository under way for one client.
const servedReads = 16

// served is a backup as a device.
type served struct {
	d     *Directory
	rd    *Reader
	slots chan struct{} // as many as reads may be under way
}

func (s *served) Size() uint64   { return s.rd.b.Size }
func (s *served) ReadOnly() bool { return true }

func (s *served) Submit(r *device.Request) {
	switch r.Op {
	case device.Read, device.Status:
		if r.Off > s.Size() || r.Len > s.Size()-r.Off {
			r.Finish(device.ErrRange)
			return
		}
	case device.Flush, device.Prefetch:
		r.Finish(nil)
		return
	default:
		r.Finish(device.ErrReadOnly)
		return
	}
	go func() {
		s.slots <- struct{}{}
		var err error
		if r.Op == device.Read {
			err = s.rd.ReadAt(s.d.ctx, r.Data, r.Off)
		} else {
			var n uint64
			var zero bool
			if n, zero, err = s.rd.extent(s.d.ctx, r.Off, r.Len); err == nil {
				r.Extents = append(r.Extents[:0], device.Extent{Len: n, Hole: zero, Zero: zero})
			}
		}
		<-s.slots
		if err != nil {
			s.d.log.Error("a read of a backup failed", "backup", s.rd.b.Name(), "off", r.Off, "len", r.Len, "err", err)
		}
		s.d.l.Post(func() { r.Finish(err) })
	}()
}

package backup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"

	"github.com/coreos/torus"
	"github.com/coreos/torus/file"
)

const (
	packSize = 16 << 20 // a pack is closed when it has so many bytes, and kept in memory until it is stored
	uploads  = 2        // packs and sections on their way
	readers  = 16       // reads of the volume under way
	runPages = 64       // of one read, at most

	// retireBelow: so little of a pack is in use that what is in use is moved to a new one, though it has not changed: once the earlier backups are pruned,
	// the repository takes no more than a few times what the newest one needs.
	retireBelow = 0.25
)

// Source is what is backed up: a volume at a moment. Its methods may be called at the same time.
type Source interface {
	Size() uint64 // bytes
	ReadAt(b []byte, off int64) (int, error)
	// Places finds out where the pages from first on lie; see file.View.
	Places(first uint64, dst []file.Place) error
}

// CreateConfig says what is backed up.
type CreateConfig struct {
	Volume   string
	VolumeID torus.VolumeID
	Cluster  string
	Snapshot string    // empty: one taken for the backup
	Moment   time.Time // what the source shows
	Full     bool      // compare with nothing: all is moved
	Log      *slog.Logger
	// Progress is told, now and then, which byte of the source the work is at and how many bytes were new.
	Progress func(at, moved uint64)
}

// Create adds a backup to the repository. It is there when Create returns, durably, and not before. What is moved is what is not in the newest backup of
// the same volume.
func (r *Repository) Create(ctx context.Context, src Source, cfg CreateConfig) (_ *Backup, err error) {
	ctx, unlock, err := r.lock(ctx, "torusctl backup create "+cfg.Volume, false)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	now := time.Now().UTC()
	c := &creation{r: r, src: src, cfg: cfg, z: newEncoder(), unz: newDecoder(), retired: map[packID]bool{}, total: map[packID]uint32{}, used: map[packID]uint32{}}
	defer c.z.Close()
	defer c.unz.Close()
	c.b = &Backup{
		ID: newID(now), Format: format, Volume: cfg.Volume, VolumeID: uint64(cfg.VolumeID), Cluster: cfg.Cluster, Snapshot: cfg.Snapshot, Moment: cfg.Moment.UTC(),
		Created: now.Round(time.Second), Size: src.Size(),
	}
	if err := c.choose(ctx); err != nil {
		return nil, err
	}
	c.up, ctx = errgroup.WithContext(ctx)
	c.up.SetLimit(uploads)
	err = c.sections(ctx)
	if err == nil {
		err = c.closePack(ctx)
	}
	if uerr := c.up.Wait(); uerr != nil && (err == nil || errors.Is(err, context.Canceled)) {
		err = uerr // the cause
	}
	if err != nil {
		if cause := context.Cause(ctx); cause != nil && errors.Is(err, context.Canceled) {
			err = cause
		}
		return nil, err
	}
	return c.b, c.finish(context.WithoutCancel(ctx))
}

// creation is a backup that is being made.
type creation struct {
	r    *Repository
	src  Source
	cfg  CreateConfig
	b    *Backup
	base *Backup // nil: none
	z    *zstd.Encoder
	unz  *zstd.Decoder
	up   *errgroup.Group

	retired     map[packID]bool   // what is in these is stored anew
	total, used map[packID]uint32 // pages

	pack   []byte // being filled
	packID packID
	raw    []byte // pages of the frame being filled
	want   []wanted
}

// wanted is a page that will be in the frame being filled.
type wanted struct {
	s    *section
	i    int
	hash hash
	at   place
}

// choose finds the newest backup of the volume, for comparison.
func (c *creation) choose(ctx context.Context) error {
	if c.cfg.Full {
		return nil
	}
	keys, err := c.r.keys(ctx, c.cfg.Volume+"/")
	if err != nil {
		return err
	}
	for n := len(keys) - 1; n >= 0 && c.base == nil; n-- {
		b, err := c.r.load(ctx, keys[n])
		switch {
		case err == nil:
			c.base = b
		case damage(err):
			c.cfg.Log.Warn("a backup is damaged, and passed over; see `torusctl backup verify`", "object", keys[n], "err", err)
		default:
			return err
		}
	}
	if c.base == nil {
		return nil
	}
	c.b.Base = c.base.ID
	if c.b.ID <= c.base.ID {
		return fmt.Errorf("the newest backup of %s, %s, is of a time to come: %w\ncheck the clocks", c.cfg.Volume, c.base.ID, torus.ErrInvalid)
	}
	for _, u := range c.base.Packs {
		id, err := parsePack(u.ID)
		if err != nil {
			return fmt.Errorf("repository %s: object %s: %w", c.r, c.base.key(), err)
		}
		c.total[id] = u.Pages
		c.retired[id] = float64(u.Used) < retireBelow*float64(u.Pages)
	}
	return nil
}

func (c *creation) sections(ctx context.Context) error {
	places := make([]file.Place, sectionPages)
	for n := range sectionsOf(c.b.Size) {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if err := c.src.Places(n*sectionPages, places); err != nil {
			return err
		}
		name, err := c.section(ctx, n, places)
		if err != nil {
			return err
		}
		c.b.Sections = append(c.b.Sections, name)
		if c.cfg.Progress != nil {
			c.cfg.Progress(min((n+1)*sectionBytes, c.b.Size), c.b.NewBytes)
		}
	}
	return nil
}

// section makes section n, and returns its name: empty if there is nothing in it.
func (c *creation) section(ctx context.Context, n uint64, places []file.Place) (string, error) {
	var old *section
	oldName := ""
	if c.base != nil && n < uint64(len(c.base.Sections)) && c.base.Sections[n] != "" {
		var err error
		old, err = c.r.section(ctx, c.base.Sections[n], c.unz)
		switch {
		case err == nil:
			oldName = c.base.Sections[n]
		case damage(err):
			c.cfg.Log.Warn("what the backup is compared with is damaged, so all of this part is moved", "base", c.base.Name(), "err", err)
		default:
			return "", err
		}
	}
	s := newSection()
	keep := func(i int, at place) bool {
		p := &old.pages[i]
		f := old.frames[p.frame-1]
		if c.retired[f.pack] {
			return false
		}
		s.set(i, f, p.index, p.hash, at)
		c.used[f.pack]++
		return true
	}
	sameCluster := c.base != nil && c.base.Cluster == c.b.Cluster
	var runs []*run
	for i := range places {
		at := place{places[i].Block, places[i].Page}
		if places[i] == (file.Place{}) {
			continue
		}
		if sameCluster && old != nil && at != (place{}) && old.pages[i].frame > 0 && old.place(i) == at && keep(i, at) {
			continue
		}
		if k := len(runs) - 1; k >= 0 && runs[k].first+runs[k].n == i && runs[k].n < runPages {
			runs[k].n++
		} else {
			runs = append(runs, &run{first: i, n: 1, done: make(chan error, 1)})
		}
	}
	err := c.read(ctx, n, runs, func(i int, h hash, data []byte) error {
		if h == zeroHash {
			return nil
		}
		at := place{places[i].Block, places[i].Page}
		if old != nil && old.pages[i].frame > 0 && old.pages[i].hash == h && keep(i, at) {
			return nil
		}
		c.b.NewBytes += pageSize
		return c.add(ctx, wanted{s, i, h, at}, data)
	})
	if err != nil {
		return "", err
	}
	if err := c.closeFrame(ctx); err != nil {
		return "", err
	}
	if len(s.frames) == 0 {
		return "", nil
	}
	for i := range s.pages {
		if s.pages[i].frame > 0 {
			c.b.DataBytes += pageSize
		}
	}
	o, name := s.encode(c.z)
	if name == oldName {
		return name, nil
	}
	c.b.StoredBytes += uint64(len(o))
	c.up.Go(func() error { return c.r.put(ctx, mapKey(name), o) })
	return name, nil
}

// run is some adjacent pages that are read at once.
type run struct {
	first, n int // in the section
	data     []byte
	hashes   []hash
	done     chan error
}

// read reads runs, several at a time, and calls fn for each page in their order.
func (c *creation) read(ctx context.Context, n uint64, runs []*run, fn func(i int, h hash, data []byte) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	started := 0
	for k, x := range runs {
		for ; started < min(k+readers, len(runs)); started++ {
			x := runs[started]
			go func() { x.done <- x.read(c.src, n*sectionBytes) }()
		}
		select {
		case err := <-x.done:
			if err != nil {
				return err
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		c.b.ReadBytes += uint64(len(x.data))
		for j, h := range x.hashes {
			if err := fn(x.first+j, h, x.data[j*pageSize:][:pageSize]); err != nil {
				return err
			}
		}
		x.data, x.hashes = nil, nil
	}
	return nil
}

func (x *run) read(src Source, base uint64) error {
	x.data = make([]byte, x.n*pageSize)
	off := base + uint64(x.first)*pageSize
	if _, err := src.ReadAt(x.data[:min(uint64(len(x.data)), src.Size()-off)], int64(off)); err != nil {
		return fmt.Errorf("read %d bytes from %d on: %w", len(x.data), off, err)
	}
	for p := x.data; len(p) > 0; p = p[pageSize:] {
		x.hashes = append(x.hashes, hashOf(p[:pageSize]))
	}
	return nil
}

// add puts a page into the frame being filled.
func (c *creation) add(ctx context.Context, w wanted, data []byte) error {
	c.raw = append(c.raw, data...)
	c.want = append(c.want, w)
	if len(c.want) == framePages {
		return c.closeFrame(ctx)
	}
	return nil
}

// closeFrame compresses what is in the frame, puts it into the pack, and tells the section.
func (c *creation) closeFrame(ctx context.Context) error {
	if len(c.want) == 0 {
		return nil
	}
	if c.pack == nil {
		c.pack = append(make([]byte, 0, packSize+2*framePages*pageSize), packMagic...)
		c.packID = newPackID()
	}
	off := len(c.pack)
	c.pack = c.z.EncodeAll(c.raw, c.pack)
	f := frame{pack: c.packID, off: uint32(off), size: uint32(len(c.pack) - off), pages: uint8(len(c.want))}
	for k, w := range c.want {
		w.s.set(w.i, f, uint8(k), w.hash, w.at)
	}
	c.total[f.pack] += uint32(len(c.want))
	c.used[f.pack] += uint32(len(c.want))
	c.raw, c.want = c.raw[:0], c.want[:0]
	if len(c.pack) >= packSize {
		return c.closePack(ctx)
	}
	return nil
}

func (c *creation) closePack(ctx context.Context) error {
	if c.pack == nil {
		return nil
	}
	b, key := c.pack, c.packID.key()
	c.pack = nil
	c.b.StoredBytes += uint64(len(b))
	c.up.Go(func() error { return c.r.put(ctx, key, b) })
	return context.Cause(ctx)
}

// finish makes the backup be there: durably, once what it needs is.
func (c *creation) finish(ctx context.Context) error {
	for id, n := range c.used {
		c.b.Packs = append(c.b.Packs, packUse{ID: id.String(), Pages: c.total[id], Used: n})
	}
	sortPacks(c.b.Packs)
	if err := c.r.settle(); err != nil {
		return err
	}
	o, err := c.b.encode()
	if err != nil {
		return err
	}
	if err := c.r.put(ctx, c.b.key(), o); err != nil {
		return err
	}
	return c.r.settle()
}

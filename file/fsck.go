package file

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/models"
)

// Fsck verifies all that a volume needs, as one state of it says: the INodes, the maps, and every copy of every block, each for itself. It needs no
// epoch and fences nobody, whoever may have the volume attached meanwhile. What it finds wrong it looks at again by the newest state before
// it says so: what nothing needs any more may go at any time, and what is needed by a state that was read later was needed all the time.
//
//	fsck.go         the check from beginning to end
//	fsck_map.go     the maps are walked: every node, every entry
//	fsck_block.go   what the copies of a block come to
//	fsck_copies.go  the copies of all blocks are read
//	fsck_lost.go    what cannot be read is looked for in the volume and its snapshots
//	fsck_mend.go    peers are told what to mend

const (
	// fsckPatience bounds the wait for peers without which an INode cannot be read, and for the first connections.
	fsckPatience = 5 * time.Second
	// fsckBytes bounds the copies of blocks in memory, one block's at least.
	fsckBytes = 64 << 20
	// maxFindings bounds those that are listed.
	maxFindings = 1 << 16
	// fsckReloads bounds how often the state is read anew for the same thing.
	fsckReloads = 20
)

// FsckConfig is what it takes to check a volume.
type FsckConfig struct {
	Config // Loop, Dist, MDS, Volume, BlockSize, Replication, MapBytes and Log are used
	// At is a pinned moment to be checked by itself; nil: everything that is needed.
	At *models.Moment
	// Of is how the findings name that moment.
	Of string
	// Repair has peers mend what there is a good copy of, and waits for it.
	Repair bool
	Rate   uint64 // bytes a second that are read at most; 0: no bound
	// Stop is asked now and then: an error ends the check. nil: never.
	Stop func() error
	// Progress is called now and then; nil: never. Both in bytes.
	Progress func(done, total uint64)
}

// FindingKind says what is wrong.
type FindingKind string

// The kinds of findings.
const (
	FindMissing   FindingKind = "missing"     // a peer that is to hold a block does not
	FindShort     FindingKind = "short"       // it holds less of it than is needed
	FindDamaged   FindingKind = "damaged"     // what it holds is not what it was
	FindFewer     FindingKind = "too-few"     // a block is to be on fewer peers than it should
	FindDiffer    FindingKind = "differ"      // copies are intact and say different things
	FindLost      FindingKind = "lost"        // nobody has a good copy of some of a block
	FindUnknown   FindingKind = "unavailable" // none of those that could be asked has, and others could not be asked
	FindINode     FindingKind = "inode"       // an INode cannot be read, or is not what it should be
	FindMap       FindingKind = "map"         // a node of a map cannot be read
	FindEntry     FindingKind = "entry"       // a map points to what is not there
	FindLostPages FindingKind = "lost-pages"  // a map says that pages were lost before
	FindLive      FindingKind = "live-count"  // the table counts other live pages than the map has
	FindLog       FindingKind = "log"         // the log that a snapshot needs is not whole
	FindMoment    FindingKind = "unopenable"  // a snapshot cannot be opened
)

// Finding is one thing that is wrong.
type Finding struct {
	Kind FindingKind
	Ref  torus.BlockRef // zero: it is not about one block
	Peer torus.PeerID   // zero: it is not about one peer
	What string         // what was seen
	Good torus.PeerList // who has a good copy; several if each has only parts of it
	Away torus.PeerList // who may have one, and could not be asked
	// Lost is what users cannot read on account of it.
	Lost   []LostPages
	Mended bool
}

// LostPages is a run of pages that cannot be read.
type LostPages struct {
	Of           string // "": the volume as it is now, or the moment that is checked; "@NAME": a snapshot; "clone ID"; "past": what it can be rewound to
	First, Count uint64 // pages of the volume
}

// FsckReport is what a check has found.
type FsckReport struct {
	State     *models.VolumeState     // as it was read last
	INodes    uint64                  // read
	Nodes     uint64                  // of maps, read
	Entries   uint64                  // of them that point to data, each once a map
	Blocks    uint64                  // of which all copies were to be read
	Copies    uint64                  // read
	Bytes     uint64                  // of copies
	Unchecked map[torus.PeerID]uint64 // copies at peers that could not be asked
	Counted   bool                    // live pages were counted: the volume stood still for as long as that took
	Findings  []*Finding
	More      uint64 // findings beyond those
}

// Left is how many findings are not mended.
func (r *FsckReport) Left() (n uint64) {
	n = r.More
	for _, x := range r.Findings {
		if !x.Mended {
			n++
		}
	}
	return n
}

// Fsck checks a volume. done is called once, on the loop: with an error if it could not be done to its end, and what was found until then.
func Fsck(cfg FsckConfig, done func(*FsckReport, error)) {
	cfg.setDefaults()
	loop.Go(cfg.Loop, func(t *loop.Task) {
		c := &fsck{cfg: cfg, t: t, vol: torus.VolumeID(cfg.Volume.Id), blockPages: int(cfg.BlockSize / pageSize)}
		c.report.Unchecked = map[torus.PeerID]uint64{}
		c.lost, c.odd = map[torus.BlockRef]*lostBlock{}, map[torus.BlockRef]*lostBlock{}
		c.badAt = map[badPlace]bool{}
		err := c.run()
		c.report.State = c.st.VolumeState
		if err != nil {
			err = fmt.Errorf("check volume %s: %w", cfg.Volume.Name, err)
		}
		done(&c.report, err)
	})
}

// fsck is a check under way. All of it runs in one task, and what that starts and waits for.
type fsck struct {
	cfg        FsckConfig
	t          *loop.Task
	vol        torus.VolumeID
	blockPages int
	st         torus.VolumeState
	f          *File     // reads; its table is that of the newest INode
	v          Inventory // what of it is needed
	at         *pins     // what the one moment that is checked needs; nil: all is checked
	claims     []*claims // by slot of the table; nil: nothing points there
	moved      bool      // the newest INode is another one than it was at first
	deadline   time.Duration
	report     FsckReport
	bad        []badNode
	badAt      map[badPlace]bool
	lost       map[torus.BlockRef]*lostBlock // blocks of which something is lost
	odd        map[torus.BlockRef]*lostBlock // blocks that are not what maps say
	done       uint64                        // bytes
	total      uint64
	paced      time.Duration // loop time before which nothing more is read
}

func (c *fsck) run() error {
	if err := c.connect(); err != nil {
		return err
	}
	if err := c.load(); err != nil || c.f == nil {
		return err
	}
	if err := c.walkAll(); err != nil {
		return err
	}
	if err := c.checkBlocks(); err != nil {
		return err
	}
	if err := c.attribute(); err != nil {
		return err
	}
	if c.cfg.Repair {
		return c.mend()
	}
	return nil
}

func (c *fsck) stopped() error {
	if c.cfg.Stop != nil {
		return c.cfg.Stop()
	}
	return nil
}

// connect waits until the peers that are said to be alive are connected, but not for long.
func (c *fsck) connect() error {
	d := c.cfg.Dist
	until := c.cfg.Loop.Now() + fsckPatience
	for {
		if err := c.stopped(); err != nil {
			return err
		}
		ring := d.Ring()
		if ring != nil && !slices.ContainsFunc(ring.Members(), func(p torus.PeerID) bool { return (d.Alive(p) || d.Known(p)) && !d.Healthy(p) }) {
			return nil
		}
		if c.cfg.Loop.Now() >= until {
			if ring == nil {
				return fmt.Errorf("the ring is not known: %w", torus.ErrMetadataUnavailable)
			}
			return nil
		}
		c.t.Sleep(20 * time.Millisecond)
	}
}

func (c *fsck) add(x *Finding) {
	if len(c.report.Findings) < maxFindings {
		c.report.Findings = append(c.report.Findings, x)
	} else {
		c.report.More++
	}
}

func (c *fsck) readState() (st torus.VolumeState, err error) {
	c.t.Call(func() {
		ctx, cancel := context.WithTimeout(context.Background(), mdsTimeout)
		defer cancel()
		st, err = c.cfg.MDS.VolumeState(ctx, c.vol)
	})
	return st, err
}

// until ends the waits of reads.
func (c *fsck) until() error {
	if err := c.stopped(); err != nil {
		return err
	}
	if c.cfg.Loop.Now() >= c.deadline {
		return fmt.Errorf("peers that have it are not there: %w", torus.ErrBlockUnavailable)
	}
	return nil
}

func (c *fsck) reader(size uint64) *File {
	f := newReader(c.cfg.Config, size)
	f.vol, f.errFn = c.vol, c.until
	return f
}

// load reads the state, and the INode and the table that it names. Nothing committed: c.f stays nil, and so it does if they cannot be read, which is a finding.
func (c *fsck) load() error {
	for tries := 0; ; tries++ {
		st, err := c.readState()
		if err != nil {
			return err
		}
		again := tries > 0 && st.Revision == c.st.Revision
		c.st = st
		switch {
		case c.cfg.At != nil && !Kept(st.VolumeState, c.cfg.At):
			return fmt.Errorf("what is to be checked is not kept: %w", torus.ErrNotExist)
		case st.Head == nil:
			return nil
		}
		f := c.reader(locateSize) // of whatever size it was
		c.deadline = c.cfg.Loop.Now() + fsckPatience
		err = f.loadInode(c.t, c.vol, st.Head)
		if err == nil {
			c.adopt(f)
			return nil
		}
		if stopped := c.stopped(); stopped != nil {
			return stopped
		}
		if again || tries >= fsckReloads {
			c.f = nil
			x := &Finding{Kind: FindINode, What: fmt.Sprintf("the newest INode, number %d, or its block table cannot be read: %v", st.Head.Number, err), Lost: []LostPages{{Count: pagesOf(st.Head.SizeBytes)}}}
			if unavailable(err) {
				x.Kind = FindUnknown
			}
			if checkExtent(st.Head.Inode, c.cfg.BlockSize) == nil {
				x.Ref = extentRef(c.vol, st.Head.Inode)
				for _, p := range c.cfg.Dist.Set(x.Ref, st.Head.Inode.Set) {
					if !c.cfg.Dist.Healthy(p) {
						x.Away = append(x.Away, p)
					}
				}
			}
			c.add(x)
			return nil
		}
		c.t.Sleep(50 * time.Millisecond)
	}
}

// unavailable reports whether an error is for want of a peer, rather than because of what peers have.
func unavailable(err error) bool {
	away := errors.Is(err, torus.ErrBlockUnavailable) || errors.Is(err, torus.ErrNoPeer) || errors.Is(err, torus.ErrAgain) || errors.Is(err, torus.ErrClosed)
	return away && !errors.Is(err, torus.ErrCorrupt)
}

func pagesOf(size uint64) uint64 { return (size + pageSize - 1) / pageSize }

// adopt goes on by an INode that was just read. What was claimed of blocks that are still listed stays true, as they never change.
func (c *fsck) adopt(f *File) {
	old := c.claims
	c.f, c.claims = f, make([]*claims, len(f.table.e))
	for _, x := range old {
		if x == nil {
			continue
		}
		if slot, ok := f.table.byRef[x.ref]; ok {
			c.claims[slot] = x
		}
	}
	c.v = Inventory{table: &f.table, roots: map[torus.BlockRef]bool{extentRef(c.vol, c.st.Head.Inode): true}}
	for _, x := range f.table.pages {
		c.v.roots[pageRef(c.vol, x)] = true
	}
	c.judge()
	c.checkTable()
}

// judge sets what is needed by the present state.
func (c *fsck) judge() {
	c.v.state, c.v.pins = c.st.VolumeState, newPins(c.st.VolumeState, c.st.KeptFrom)
	if c.st.Deleted {
		c.v.pins.from = 0
	}
	if c.cfg.At != nil {
		p := newPins(&models.VolumeState{Pins: []*models.Pin{{At: c.cfg.At}}}, 0)
		c.at = &p
	}
}

// refresh reads the state anew, and the INode if there is a newer one; moved: there is.
func (c *fsck) refresh() (moved bool, err error) {
	st, err := c.readState()
	if err != nil {
		return false, err
	}
	if c.cfg.At != nil && !Kept(st.VolumeState, c.cfg.At) {
		return false, fmt.Errorf("what is being checked was deleted meanwhile: %w", torus.ErrNotExist)
	}
	if h := c.st.Head; st.Head.GetNumber() == h.Number && st.Head.GetEpoch() == h.Epoch {
		c.st = st
		c.judge()
		return false, nil
	}
	c.moved = true
	if err := c.load(); err != nil {
		return true, err
	}
	if c.f == nil {
		return true, errNoINode
	}
	return true, nil
}

// errNoINode ends a check whose last finding is that the newest INode cannot be read.
var errNoINode = errors.New("without the newest INode nothing more can be checked")

// needed reports whether anything that is checked needs a block of the table.
func (c *fsck) needed(slot uint32) bool {
	e := &c.f.table.e[slot]
	if !e.used || e.length == 0 {
		return false
	}
	if c.at == nil {
		return c.v.need(e)
	}
	x := *e
	if x.death == 0 {
		x.death = c.st.Head.Number + 1
	}
	return c.at.need(&x) || c.v.roots[e.ref]
}

// still reports whether a block is needed, by a state that is read now. A block is never needed again when it was not.
func (c *fsck) still(ref torus.BlockRef) (slot uint32, ok bool, err error) {
	if _, err := c.refresh(); err != nil {
		return 0, false, err
	}
	slot, ok = c.f.table.byRef[ref]
	return slot, ok && c.needed(slot), nil
}

// checkTable verifies the table by itself.
func (c *fsck) checkTable() {
	for i := range c.f.table.e {
		e := &c.f.table.e[i]
		if !e.used {
			continue
		}
		what := ""
		if other := c.f.table.byRef[e.ref]; other != uint32(i) {
			what = fmt.Sprintf("the block table lists it twice, as %d and %d", i, other)
		} else if int(e.length) > c.blockPages {
			what = fmt.Sprintf("the block table says that it has %d pages, of %d at most", e.length, c.blockPages)
			e.length = 0 // not to be looked at further
		}
		if what != "" && !c.found(FindINode, e.ref) {
			c.add(&Finding{Kind: FindINode, Ref: e.ref, What: what})
		}
	}
}

// found reports whether there is such a finding already.
func (c *fsck) found(kind FindingKind, ref torus.BlockRef) bool {
	return slices.ContainsFunc(c.report.Findings, func(x *Finding) bool { return x.Kind == kind && x.Ref == ref })
}

// progress tells how far it has got.
func (c *fsck) progress() {
	if c.cfg.Progress != nil {
		c.cfg.Progress(min(c.done, c.total), c.total)
	}
}

// pace keeps to the rate.
func (c *fsck) pace(bytes int) {
	if c.cfg.Rate == 0 {
		return
	}
	now := c.cfg.Loop.Now()
	c.paced = max(c.paced, now) + time.Duration(float64(bytes)/float64(c.cfg.Rate)*float64(time.Second))
	for c.paced > c.cfg.Loop.Now() && c.stopped() == nil {
		c.t.Sleep(min(c.paced-c.cfg.Loop.Now(), time.Second))
	}
}

// moments lists what of the volume users can read: as it is now, its snapshots, and what clones begin with.
func (c *fsck) moments() (l []named) {
	if c.cfg.At != nil {
		return []named{{c.cfg.Of, c.cfg.At}}
	}
	if h := c.st.Head; !c.st.Deleted {
		l = append(l, named{"", &models.Moment{Base: h, Seq: h.Seq, SizeBytes: h.SizeBytes}})
	}
	for _, p := range c.st.Pins {
		l = append(l, named{PinName(p), p.At})
	}
	return l
}

// named is a moment with its name.
type named struct {
	of string
	at *models.Moment
}

// PinName names what a pin keeps, as in LostPages.
func PinName(p *models.Pin) string {
	if p.Clone != 0 {
		return fmt.Sprintf("clone %d", p.Clone)
	}
	return "@" + p.Name
}

// addLost adds a run of pages to what is lost, as part of the last run if it adjoins.
func addLost(l []LostPages, x LostPages) []LostPages {
	if k := len(l) - 1; k >= 0 && l[k].Of == x.Of && l[k].First+l[k].Count == x.First {
		l[k].Count += x.Count
		return l
	}
	return append(l, x)
}

// peerNames names peers for a text.
func (c *fsck) peerNames(l torus.PeerList) string {
	var names []string
	for _, p := range l {
		names = append(names, c.cfg.Dist.Describe(p))
	}
	return strings.Join(names, ", ")
}

func sortHeads(l []*models.Head) {
	slices.SortFunc(l, func(x, y *models.Head) int { return cmp.Compare(y.Number, x.Number) })
}

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
	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/record"
)

const (
	// fenceGrace is how long an attach waits for the rest of the peers when it has heard enough: a restarted one may have lost
	// an unsynced tail that another still has.
	fenceGrace = 300 * time.Millisecond
	// fencePatience is how long it waits for one of them that is connected: it will answer, or be found silent. What it has may be
	// the only good copy of what another has lost to rot.
	fencePatience = 5 * time.Second
	// doubtPatience is how long it waits for peers that nobody has given up, connected or not, which may hold more of a block than those that
	// have answered, all of which say that they may have lost some of it.
	doubtPatience = time.Minute
	// roomPatience is how long it tries again when there is no room for what it has to write: a peer that was full may have news, and a
	// store whose disk had no space looks again after 5 s.
	roomPatience = 10 * time.Second
	// corruptTries is how many attempts may meet with damage before it is final.
	corruptTries = 3
	// scanBytes is how many bytes of headers are asked for at a time.
	scanBytes = 512 << 10
	// copyBytes bounds a copy in one request, and copyBatch what a recovery holds in memory.
	copyBytes = 1 << 20
	copyBatch = 16 << 20
	// replayAhead is for how many records ahead the leaves of the map are being loaded.
	replayAhead = 64
)

// Open attaches a volume for writing; this is the only way to get a File. It fences every older writer, finds what they left
// behind, makes it durable and commits it; done is called with a File that serves, or with the reason it cannot:
// an error wrapping torus.ErrLocked if somebody else holds the volume. It waits, saying so in the log, as
// long as peers are missing without which the end of the history cannot be known.
// cancel ends an attach that is still under way: done is then called with an error, soon.
func Open(cfg Config, done func(*File, error)) (cancel func()) {
	cfg.setDefaults()
	o := &opening{}
	o.ctx, o.stop = context.WithCancel(context.Background())
	loop.Go(cfg.Loop, func(t *loop.Task) {
		for {
			f, err := attach(t, cfg, o)
			if o.cancelled && err != nil {
				err = device.ErrShutdown
			}
			if err == nil || !errors.Is(err, torus.ErrAgain) {
				o.stop()
				done(f, err)
				return
			}
			cfg.Log.Warn("attach interrupted, beginning again", "err", err)
			t.Sleep(time.Second)
		}
	})
	return o.cancel
}

// opening is an attach that may be called off.
type opening struct {
	f         *File // of the present attempt
	cancelled bool
	ctx       context.Context // of the calls to the MDS that nobody needs any more when the attach is called off
	stop      context.CancelFunc
	fullSince time.Duration // loop time; 0: there was room
	corrupt   int           // attempts that met with damage
}

// judge decides whether an attempt that failed is followed by another: its error then wraps torus.ErrAgain.
func (o *opening) judge(err error, now time.Duration) error {
	if errors.Is(err, torus.ErrCorrupt) && !errors.Is(err, torus.ErrFenced) {
		// A peer may have lost power between two answers: what it said before does not fit what it says then.
		if o.corrupt++; o.corrupt < corruptTries {
			return fmt.Errorf("%w: %w", torus.ErrAgain, err)
		}
		return err
	}
	if !errors.Is(err, torus.ErrOutOfSpace) {
		o.fullSince = 0
		return err
	}
	if o.fullSince == 0 {
		o.fullSince = now
	}
	if now-o.fullSince < roomPatience {
		return again(err)
	}
	return fmt.Errorf("no room for what its last writer left and the metadata of a new one: %w (%v)", torus.ErrOutOfSpace, err)
}

func (o *opening) cancel() {
	o.cancelled = true
	o.stop()
	if o.f != nil {
		o.f.fail(device.ErrShutdown)
	}
}

// recovery is one attach under way.
type recovery struct {
	f       *File
	t       *loop.Task
	old     *models.Window
	blocks  []*oldBlock
	peers   map[torus.PeerID]*oldPeer
	order   []torus.PeerID
	event   func() // wakes the task
	found   []foundRec
	seqUpTo uint64
	// committed is the highest record that is known to have been flushed.
	committed uint64
	rebased   bool // the map has been taken from another moment or volume: it has to be committed
}

// oldBlock is a block of the window as it was found.
type oldBlock struct {
	ref    torus.BlockRef
	set    torus.PeerList
	ps     *models.PlacementSet
	length uint32 // the longest valid tail
	recs   []foundRec
	used   uint32 // bytes that the recovered history needs
	whole  bool   // every peer of the set has those, durably, under our epoch
	slot   uint32
	listed bool
	atHead bool // the head that was found lists it
}

type oldPeer struct {
	asked, answered bool
	failed          bool          // it could not answer, and is asked again now and then
	askAgain        time.Duration // loop time
	tails           map[torus.IndexID]uint32
	suspect         map[torus.IndexID]bool // there may have been more than that
	committed       uint64
}

// foundRec is one copy of a record.
type foundRec struct {
	hdr record.Header
	blk *oldBlock
}

func sortRecs(l []foundRec) {
	slices.SortStableFunc(l, func(x, y foundRec) int { return cmp.Compare(x.hdr.Seq, y.hdr.Seq) })
}

func (x *foundRec) end() uint32 { return x.hdr.Offset + uint32(x.hdr.Size()) }

func attach(t *loop.Task, cfg Config, o *opening) (_ *File, err error) {
	f := &File{
		cfg: cfg, loop: cfg.Loop, dist: cfg.Dist, log: cfg.Log, vol: torus.VolumeID(cfg.Volume.Id), size: cfg.Volume.SizeBytes,
		repl: cfg.Replication, avoided: map[uint32]avoided{},
	}
	f.sealFn, f.wearFn, f.errFn = f.sealDeferred, f.worn, f.Err
	o.f = f
	defer func() { o.f = nil }()
	if o.cancelled {
		return nil, device.ErrShutdown
	}
	began := f.loop.Now()
	for warn := began + time.Second; f.dist.Ring() == nil || len(f.dist.Ring().Members()) == 0; {
		if f.loop.Now() >= warn {
			warn = f.loop.Now() + 5*time.Second
			f.log.Warn("attach waits for the ring to have members; see `torusctl peer add`")
		}
		t.Sleep(20 * time.Millisecond)
		if f.err != nil {
			return nil, f.err
		}
	}
	if f.repl == 0 {
		f.repl = f.dist.Ring().Replication()
	}
	// Step 1: a new epoch, and what the last one left.
	t.Call(func() {
		ctx, cancel := context.WithTimeout(o.ctx, mdsTimeout)
		defer cancel()
		f.state, err = cfg.MDS.Attach(ctx, f.vol, cfg.Lease, cfg.Holder, cfg.Force)
	})
	if err != nil {
		hint := ""
		if errors.Is(err, torus.ErrLocked) {
			hint = "Wait until it is released or its lease has expired (10 s after its holder died), or take over with --force."
		}
		return nil, &torus.Error{Op: "attach", Obj: "volume " + cfg.Volume.Name, Err: err, Hint: hint}
	}
	f.epoch = f.state.Epoch
	f.log = f.log.With("epoch", f.epoch)
	a := &recovery{f: f, t: t, old: f.state.Open, peers: map[torus.PeerID]*oldPeer{}}
	if err := a.run(); err != nil {
		if f.err == nil {
			f.err = err
		}
		err = o.judge(err, f.loop.Now())
		if !errors.Is(err, torus.ErrAgain) {
			patience := mdsTimeout
			if o.cancelled {
				patience = time.Second
			}
			t.Call(func() {
				ctx, cancel := context.WithTimeout(context.Background(), patience)
				defer cancel()
				_ = cfg.MDS.Unlock(ctx, f.vol, f.epoch) // else its lease ends it
			})
		}
		hint := ""
		if errors.Is(err, torus.ErrOutOfSpace) {
			hint = "Nothing has been changed. Make room, then attach again: add a peer (torusctl peer add), restart peers with a larger --size, or delete or trim other volumes."
		}
		return nil, &torus.Error{Op: "attach", Obj: "volume " + cfg.Volume.Name, Err: err, Hint: hint}
	}
	if f.err != nil { // called off in the last moment
		return nil, f.err
	}
	f.log.Info("attached", "took", f.loop.Now()-began, "seq", f.last, "recovered", len(a.found))
	f.lastCkpt = f.loop.Now()
	f.tick = f.loop.After(time.Second, f.housekeeping)
	f.unwatch = f.dist.Watch(func() {
		if f.err == nil && !f.closed {
			f.checkRoom()
			f.pump()
			f.maybeExtend()
		}
	})
	f.answer()
	return f, nil
}

func (a *recovery) run() error {
	f, t := a.f, a.t
	if f.state.Deleted {
		return fmt.Errorf("it has been deleted, and is kept for its clones: %w", torus.ErrNotExist)
	}
	if err := a.size(); err != nil {
		return err
	}
	head := f.state.Head
	f.table.init()
	f.m.init(f.size, f.cfg.MapBytes, f.readNode, f.checkNode)
	f.meta.typ = torus.TypeINode
	f.moves = sideWriter{typ: torus.TypeMoved, late: true}
	defer f.dist.Watch(a.happened)()
	if err := a.window(); err != nil {
		return err
	}
	if err := a.fence(); err != nil { // step 2, 3
		return err
	}
	if err := a.load(head); err != nil {
		return err
	}
	a.seqUpTo = head.GetSeq()
	for _, b := range a.blocks {
		_, b.atHead = f.table.byRef[b.ref]
	}
	if err := a.scan(); err != nil { // step 4
		return err
	}
	a.goOnFrom(a.seqUpTo)
	// Enough peers must be there; and those that are alive get a moment to connect, lest the whole first window be placed on the
	// few that were quickest.
	grace := f.loop.Now() + fenceGrace
	for warn := f.loop.Now() + time.Second; ; {
		if f.err != nil {
			return f.err
		}
		healthy, _ := f.dist.Room()
		if healthy >= f.repl && (a.allConnected() || f.loop.Now() >= grace) {
			break
		}
		if f.loop.Now() >= warn {
			warn = f.loop.Now() + 5*time.Second
			f.log.Warn("attach waits for peers", "healthy", healthy, "need", f.repl)
		}
		a.wait(fenceGrace)
	}
	if err := a.copies(); err != nil { // step 5
		return err
	}
	if err := a.replay(); err != nil {
		return err
	}
	fresh := func(s *models.VolumeState) error {
		span := f.newSpan(f.next, windowBlocks)
		s.Open = &models.Window{Epoch: f.epoch, Spans: []*models.Span{span}}
		f.win.spans = []*models.Span{span}
		if to := f.cfg.To; to != nil && !Kept(s, to) {
			return errNotKept
		}
		return nil
	}
	if len(a.found) > 0 || a.rebased {
		f.checkpointing = true
		err := f.checkpoint(t, fresh)
		f.checkpointing = false
		if err != nil {
			return again(err)
		}
	} else {
		f.takeMeta(t)
		err := f.commit(t, fresh)
		f.releaseMeta()
		if err != nil {
			return err
		}
	}
	a.discard()
	f.sealBlocks(f.next) // step 6: the window's blocks, those of the rescue, and what the new INode was written to
	return nil
}

// goOnFrom makes seq the last record of the log.
func (a *recovery) goOnFrom(seq uint64) {
	f := a.f
	a.seqUpTo = seq
	f.applied, f.flushed, f.held, f.sent, f.last, f.acked, f.tried = seq, seq, seq, seq, seq, seq, seq
}

// discard deletes the blocks of the old window that the recovered history has no use for: copies of records that are whole elsewhere, and
// records beyond the first gap. No INode lists them, pinned or not, as one that lists a block of its window goes on doing so until the
// window has left it; and the window that named them is gone.
func (a *recovery) discard() {
	f := a.f
	for _, b := range a.blocks {
		if _, listed := f.table.byRef[b.ref]; listed || b.atHead {
			continue
		}
		for _, p := range b.set {
			if a.peers[p].tails[b.ref.Index] == 0 {
				continue
			}
			f.dist.Submit(p, &torus.Request{Op: torus.OpDelete, Ref: b.ref, Epoch: f.epoch, Peer: p, Done: func(r *torus.Request) {
				if r.Err != nil {
					f.log.Debug("delete", "block", r.Ref.String(), "peer", r.Peer, "err", r.Err)
				}
			}})
		}
	}
}

// size finds out how large the volume is by now: it may have grown while this attach waited. From here on whoever has it grow asks us.
func (a *recovery) size() (err error) {
	f := a.f
	var v *models.Volume
	a.t.Call(func() {
		ctx, cancel := context.WithTimeout(context.Background(), mdsTimeout)
		defer cancel()
		v, err = f.cfg.MDS.Volume(ctx, f.cfg.Volume.Name)
	})
	switch {
	case errors.Is(err, torus.ErrNotExist) || err == nil && v.Id != uint64(f.vol):
		return fmt.Errorf("it has been deleted: %w", torus.ErrNotExist)
	case err != nil:
		return again(err)
	}
	f.size = v.SizeBytes
	return nil
}

// load reads what was committed: the head, or what the volume is to be taken back to, or what it was cloned from.
func (a *recovery) load(head *models.Head) error {
	f := a.f
	switch origin := f.cfg.Volume.Origin; {
	case f.cfg.To != nil:
		if a.old != nil {
			return fmt.Errorf("the volume was not released in order and has to be attached once: %w", torus.ErrInvalid)
		}
		if !Kept(f.state.VolumeState, f.cfg.To) {
			return fmt.Errorf("nothing is kept of the moment to go back to: %w", torus.ErrNotExist)
		}
		a.rebased = true
		return f.rebase(a.t, f.vol, head, f.cfg.To)
	case head == nil && origin != nil:
		a.rebased = true
		return a.clone(origin)
	case head != nil:
		return f.loadInode(a.t, f.vol, head)
	}
	return nil
}

// clone begins a volume with the contents of another's moment.
func (a *recovery) clone(o *models.Origin) error {
	f := a.f
	var st torus.VolumeState
	var err error
	a.t.Call(func() {
		ctx, cancel := context.WithTimeout(context.Background(), mdsTimeout)
		defer cancel()
		st, err = f.cfg.MDS.VolumeState(ctx, torus.VolumeID(o.Volume))
	})
	switch {
	case err != nil:
		return again(fmt.Errorf("volume %d, which this one was cloned from: %w", o.Volume, err))
	case !slices.ContainsFunc(st.Pins, func(p *models.Pin) bool { return p.Clone == uint64(f.vol) }):
		return fmt.Errorf("volume %d keeps nothing for this clone, whose creation was not finished: delete it: %w", o.Volume, torus.ErrNotExist)
	case !Settled(st.VolumeState, o.At):
		return again(errNotSettled)
	}
	return f.rebase(a.t, torus.VolumeID(o.Volume), st.Head, o.At)
}

// allConnected reports whether every member of the ring that is said to be alive can be talked to.
func (a *recovery) allConnected() bool {
	d := a.f.dist
	return !slices.ContainsFunc(d.Ring().Members(), func(p torus.PeerID) bool { return d.Alive(p) && !d.Healthy(p) })
}

// again says that an attach that failed for want of a peer is worth beginning anew.
func again(err error) error {
	if errors.Is(err, torus.ErrFenced) || errors.Is(err, torus.ErrCorrupt) || errors.Is(err, errNotKept) {
		return err
	}
	return fmt.Errorf("%w: %w", torus.ErrAgain, err)
}

// errNotKept ends an attach that was to go back to a moment which has passed out of what is kept meanwhile. Nothing brings it back.
var errNotKept = fmt.Errorf("the moment to go back to is not kept any more: %w", torus.ErrNotExist)

// window lists the blocks an older writer may have appended to, and their registered sets.
func (a *recovery) window() error {
	if a.old == nil {
		return nil
	}
	f := a.f
	for _, s := range a.old.Spans {
		if err := f.dist.NeedRing(a.t, s.RingVersion); err != nil {
			return again(err)
		}
		for i := s.Lo; i < s.Hi; i++ {
			b := &oldBlock{ref: torus.BlockRef{Type: torus.TypeBlock, Volume: f.vol, INode: torus.INodeID(a.old.Epoch), Index: torus.IndexID(i)}}
			b.ps = spanPlacement(a.old.Spans, i)
			b.set = f.dist.Set(b.ref, b.ps)
			a.blocks = append(a.blocks, b)
			for _, p := range b.set {
				if a.peers[p] == nil {
					a.peers[p] = &oldPeer{}
					a.order = append(a.order, p)
				}
			}
		}
	}
	return nil
}

// wait lets the task sleep until something has happened, or for d.
func (a *recovery) wait(d time.Duration) {
	a.t.Wait(func(wake func()) {
		var timer *loop.Timer
		a.event = func() {
			a.event = nil
			timer.Stop()
			wake()
		}
		timer = a.f.loop.After(d, func() {
			if a.event != nil {
				a.event()
			}
		})
	})
}

func (a *recovery) happened() {
	if a.event != nil {
		a.event()
	}
}

// fence is step 2: every peer that may hold a block of the window promises to refuse older epochs and says how much it has.
// At least one peer of the registered set of every block must answer, empty blocks included: never guess.
func (a *recovery) fence() error {
	f := a.f
	if len(a.blocks) == 0 {
		return nil
	}
	lo, hi := a.blocks[0].ref.Index, a.blocks[len(a.blocks)-1].ref.Index+1
	var fencedBy uint64
	var covered time.Duration = -1
	warn := f.loop.Now() + time.Second
	for {
		if f.err != nil {
			return f.err
		}
		for _, p := range a.order {
			op := a.peers[p]
			if op.asked || op.answered || !f.dist.Healthy(p) || op.failed && f.loop.Now() < op.askAgain {
				continue
			}
			op.asked = true
			f.dist.Submit(p, &torus.Request{
				Op: torus.OpFence, Epoch: f.epoch, Peer: p, Len: uint32(hi - lo),
				Ref: torus.BlockRef{Type: torus.TypeBlock, Volume: f.vol, INode: torus.INodeID(a.old.Epoch), Index: lo},
				Done: func(r *torus.Request) {
					op.asked = false
					switch {
					case errors.Is(r.Err, torus.ErrFenced):
						fencedBy = r.Fence
					case r.Err != nil:
						f.log.Warn("fence", "peer", r.Peer, "err", r.Err)
						op.failed, op.askAgain = true, f.loop.Now()+fenceGrace
					default:
						op.answered = true
						op.committed = r.Committed
						op.tails, op.suspect = map[torus.IndexID]uint32{}, map[torus.IndexID]bool{}
						for _, x := range r.Tails {
							op.tails[x.Ref.Index] = x.Length
							op.suspect[x.Ref.Index] = x.Suspect
						}
					}
					a.happened()
				},
			})
		}
		if fencedBy > f.epoch {
			return fmt.Errorf("%w: epoch %d is being attached, this is %d", torus.ErrFenced, fencedBy, f.epoch)
		}
		missing, connected, coming := a.missing()
		now := f.loop.Now()
		if len(missing) == 0 {
			if covered < 0 {
				covered = now
			}
			wait := time.Duration(0)
			doubt := a.doubt()
			switch {
			case len(doubt) > 0:
				wait = doubtPatience
				if now >= warn {
					warn = now + 5*time.Second
					f.log.Warn("attach waits for peers: the copies of some blocks of the log at those that have answered are damaged", "peers", strings.Join(doubt, ", "))
				}
			case connected:
				wait = fencePatience
			case coming:
				wait = fenceGrace
			}
			if now >= covered+wait {
				break
			}
		} else if now >= warn {
			warn = now + 5*time.Second
			f.log.Warn("attach waits for peers: some blocks of the log can only be answered for by them", "peers", strings.Join(missing, ", "))
		}
		a.wait(50 * time.Millisecond)
	}
	for _, b := range a.blocks { // step 3: the longest valid tail
		for _, p := range b.set {
			if op := a.peers[p]; op.answered {
				b.length = max(b.length, op.tails[b.ref.Index])
			}
		}
	}
	return nil
}

// missing names the peers of blocks that nobody has answered for, and says whether there are peers that have not answered and are
// connected, or alive and may soon be.
func (a *recovery) missing() (names []string, connected, coming bool) {
	want := map[torus.PeerID]bool{}
	for _, b := range a.blocks {
		ok := false
		for _, p := range b.set {
			ok = ok || a.peers[p].answered
		}
		if !ok {
			for _, p := range b.set {
				want[p] = true
			}
		}
	}
	for _, p := range a.order {
		if want[p] {
			names = append(names, a.f.dist.Describe(p))
		}
		if !a.peers[p].answered {
			connected = connected || a.f.dist.Healthy(p) && !a.peers[p].failed
			coming = coming || a.f.dist.Alive(p)
		}
	}
	return names, connected, coming
}

// doubt names the peers that have not answered, and may come back, of blocks of which all who have answered know their copy to be damaged.
func (a *recovery) doubt() (names []string) {
	want := map[torus.PeerID]bool{}
	for _, b := range a.blocks {
		sure := false
		for _, p := range b.set {
			sure = sure || a.peers[p].answered && !a.peers[p].suspect[b.ref.Index]
		}
		for _, p := range b.set {
			want[p] = want[p] || !sure && !a.peers[p].answered && a.f.dist.Known(p)
		}
	}
	for _, p := range a.order {
		if want[p] {
			names = append(names, a.f.dist.Describe(p))
		}
	}
	return names
}

func (f *File) readRaw(t *loop.Task, ref torus.BlockRef, set torus.PeerList, off, n uint32) ([]byte, error) {
	b := make([]byte, n)
	var err error
	t.Wait(func(wake func()) {
		rd := f.dist.NewRead()
		rd.Ref, rd.Off, rd.Data, rd.Set = ref, off, b, set
		rd.Done = func(rd *read) {
			err = rd.Err
			rd.Release()
			wake()
		}
		rd.Start()
	})
	return b, err
}

// holders are the peers of a block that have its first n bytes, in the order of its set.
func (a *recovery) holders(b *oldBlock, n uint32) (l torus.PeerList) {
	for _, p := range b.set {
		if op := a.peers[p]; op.answered && op.tails[b.ref.Index] >= n {
			l = append(l, p)
		}
	}
	return l
}

// scan is step 4 but for the map: it reads the headers of all records of the window, and keeps, in sequence order and without
// duplicates, those from the head on to the first gap.
func (a *recovery) scan() error {
	f := a.f
	for _, p := range a.order {
		a.committed = max(a.committed, a.peers[p].committed)
	}
	for _, p := range f.state.Pins { // what is pinned was flushed
		a.committed = max(a.committed, p.At.GetSeq())
	}
	var busy []*oldBlock
	for _, b := range a.blocks {
		if b.length > 0 {
			busy = append(busy, b)
		}
	}
	var failed error
	for i := 0; i < len(busy); i += 16 {
		part := busy[i:min(i+16, len(busy))]
		a.t.All(len(part), func(k int, done func()) {
			f.scanBlock(part[k], 0, a.holders(part[k], part[k].length), func(err error) {
				if err != nil {
					failed = err
				}
				done()
			})
		})
		if failed != nil {
			return again(failed)
		}
	}
	var all []foundRec
	for _, b := range busy {
		for _, r := range b.recs {
			a.committed = max(a.committed, r.hdr.Flushed)
			if err := f.checkExtents(&r.hdr); err != nil {
				return err
			}
			if r.hdr.Seq > a.seqUpTo {
				all = append(all, r)
			}
		}
	}
	sortRecs(all)
	for _, r := range all {
		if r.hdr.Seq > a.seqUpTo+1 {
			break
		}
		a.seqUpTo = r.hdr.Seq
		a.found = append(a.found, r) // every copy: which one counts is decided when it is known which are whole
	}
	if a.seqUpTo < a.committed {
		return &torus.Error{
			Op: "recover", Obj: "volume " + f.cfg.Volume.Name,
			Err:  fmt.Errorf("%w: the log ends at record %d, but record %d was flushed", torus.ErrCorrupt, a.seqUpTo, a.committed),
			Hint: "Flushed data is missing on every peer that answered. Bring back the peers that hold it; nothing has been changed.",
		}
	}
	for i := range a.found {
		b := a.found[i].blk
		b.used = max(b.used, a.found[i].end())
	}
	return nil
}

func (f *File) scanBlock(b *oldBlock, off uint32, from torus.PeerList, done func(error)) {
	if off >= b.length {
		done(nil)
		return
	}
	if len(from) == 0 {
		done(fmt.Errorf("headers of %v: %w", b.ref, torus.ErrBlockUnavailable))
		return
	}
	epoch := f.epoch
	if b.ref.Volume != f.vol {
		epoch = 0 // fences are a volume's own
	}
	f.dist.Submit(from[0], &torus.Request{
		Op: torus.OpScan, Ref: b.ref, Epoch: epoch, Off: off, Len: scanBytes, Peer: from[0],
		Done: func(r *torus.Request) {
			at := off
			rest := r.Data
			err := r.Err
			for err == nil && len(rest) > 0 && at < b.length {
				var x foundRec
				if rest, err = record.NextScanEntry(rest, &x.hdr); err == nil {
					if x.hdr.Ref != b.ref || x.hdr.Offset != at {
						err = torus.ErrCorrupt
						break
					}
					x.blk = b
					b.recs = append(b.recs, x)
					at = x.end()
				}
			}
			if errors.Is(err, torus.ErrFenced) {
				done(err)
				return
			}
			if err != nil || at == off {
				f.log.Warn("scan", "block", b.ref.String(), "peer", from[0], "at", at, "of", b.length, "err", err)
				f.scanBlock(b, at, from[1:], done)
				return
			}
			f.scanBlock(b, at, from, done)
		},
	})
}

// copies is step 5: every recovered record becomes durable on its whole set. In place where the whole registered set of its
// block confirms, else, once more, in a block of this epoch.
func (a *recovery) copies() error {
	whole := map[uint64]bool{} // records that have a copy which is whole
	for _, slots := range []bool{false, true} {
		for _, b := range a.blocks {
			// Blocks that lack a peer take a slot there, of which there may be few: they come last, and only if there is need of them.
			if b.used == 0 || a.slotless(b) != slots || slots && !a.needed(b, whole) {
				continue
			}
			if err := a.complete(b); err != nil {
				if errors.Is(err, torus.ErrFenced) {
					return err
				}
				a.f.log.Info("block cannot be completed in place", "block", b.ref.String(), "err", err)
				continue
			}
			for _, r := range b.recs {
				whole[r.hdr.Seq] = whole[r.hdr.Seq] || r.end() <= b.used
			}
		}
	}
	return nil
}

// slotless reports whether a peer of a block's set has nothing of it.
func (a *recovery) slotless(b *oldBlock) bool {
	for _, p := range b.set {
		if a.peers[p].tails[b.ref.Index] == 0 {
			return true
		}
	}
	return false
}

// needed reports whether a block holds a record of the recovered history that is not whole elsewhere.
func (a *recovery) needed(b *oldBlock, whole map[uint64]bool) bool {
	for _, r := range b.recs {
		if s := r.hdr.Seq; s <= a.seqUpTo && r.end() <= b.used && !whole[s] && s > a.f.state.Head.GetSeq() {
			return true
		}
	}
	return false
}

// complete brings every peer of a block's set to the length the history needs, durably.
func (a *recovery) complete(b *oldBlock) error {
	f := a.f
	for _, p := range b.set {
		// Only a peer that has promised us its fence counts (model rule 6).
		if !f.dist.Healthy(p) || !a.peers[p].answered {
			return fmt.Errorf("peer %s: %w", f.dist.Describe(p), torus.ErrNoPeer)
		}
	}
	have := a.holders(b, b.used)
	for _, p := range b.set {
		at := a.peers[p].tails[b.ref.Index]
		for at < b.used {
			// As many whole records as fit.
			end := at
			for _, r := range b.recs {
				if r.hdr.Offset >= at && r.end() <= b.used && (r.end()-at <= copyBytes || end == at) {
					end = r.end()
				}
			}
			if end == at {
				return fmt.Errorf("no record at %d of %v: %w", at, b.ref, torus.ErrCorrupt)
			}
			data, err := f.readRaw(a.t, b.ref, have, at, end-at)
			if err != nil {
				return err
			}
			if err := a.ask(&torus.Request{Op: torus.OpAppend, Ref: b.ref, Epoch: f.epoch, Off: at, Len: end - at, Data: data, Peer: p, Reserve: true}); err != nil {
				return err
			}
			at = end
		}
	}
	var failed error
	var reqs []*torus.Request
	for _, p := range b.set {
		reqs = append(reqs, &torus.Request{Op: torus.OpSync, Ref: b.ref, Epoch: f.epoch, Len: b.used, Peer: p})
	}
	f.all(a.t, reqs, func(r *torus.Request) {
		if r.Err != nil {
			failed = r.Err
		}
	})
	b.whole = failed == nil
	return failed
}

func (a *recovery) ask(r *torus.Request) error {
	a.t.Wait(func(wake func()) {
		r.Done = func(*torus.Request) { wake() }
		a.f.dist.Submit(r.Peer, r)
	})
	return r.Err
}

// replay puts the recovered records into the map, each at a place where it is durable.
func (a *recovery) replay() error {
	f := a.f
	side := sideWriter{typ: torus.TypeBlock, next: f.next}
	var batch []*sideRec
	bytes := 0
	flush := func() error {
		err := f.writeSide(a.t, batch)
		for _, r := range batch {
			r.b.Release()
		}
		batch, bytes = nil, 0
		f.next = side.next
		if err != nil {
			return again(err)
		}
		return nil
	}
	ahead := 0
	for i := 0; i < len(a.found); {
		for ; ahead < min(i+replayAhead, len(a.found)); ahead++ {
			f.prefetch(&a.found[ahead].hdr)
		}
		j := i
		pick := i
		for ; j < len(a.found) && a.found[j].hdr.Seq == a.found[i].hdr.Seq; j++ {
			if a.found[j].blk.whole {
				pick = j
			}
		}
		r, copies := &a.found[pick], a.found[i:j]
		var slot, first uint32
		if r.blk.whole {
			if !r.blk.listed {
				r.blk.listed = true
				var ok bool
				if r.blk.slot, ok = f.table.byRef[r.blk.ref]; !ok {
					r.blk.slot = f.table.add(r.blk.ref, r.blk.ps, r.blk.set)
				}
				f.table.setLength(r.blk.slot, r.blk.used/pageSize)
			}
			slot, first = r.blk.slot, r.hdr.Offset/pageSize+1
		} else {
			c, err := a.rescueOne(&side, copies)
			if errors.Is(err, torus.ErrCorrupt) && r.hdr.Seq > a.committed && a.allAnswered(copies) {
				f.log.Error("the only copies of a record that nobody is known to have flushed are damaged: the log ends before it",
					"record", r.hdr.Seq, "block", r.blk.ref.String(), "dropped", a.seqUpTo+1-r.hdr.Seq)
				a.found = a.found[:i]
				a.goOnFrom(r.hdr.Seq - 1)
				break
			}
			if err != nil {
				return err
			}
			batch = append(batch, c)
			slot, first = c.blk.slot, c.off/pageSize+1
			if bytes += len(c.mem()); bytes >= copyBatch {
				if err := flush(); err != nil {
					return err
				}
			}
		}
		if err := f.loadLeaves(a.t, &r.hdr); err != nil {
			return err
		}
		f.applyExtents(slot, first, &r.hdr)
		i = j
		f.appliedStamp = r.hdr.Time
	}
	f.lastStamp = max(f.lastStamp, f.appliedStamp)
	if len(batch) > 0 {
		if err := flush(); err != nil {
			return err
		}
	}
	f.next = max(f.next, side.next)
	return nil
}

// rescueOne copies a record into a block of this epoch, from any of the blocks that have it.
func (a *recovery) rescueOne(w *sideWriter, copies []foundRec) (c *sideRec, err error) {
	for i := range copies {
		if c, err = a.rescue(w, &copies[i]); !errors.Is(err, torus.ErrCorrupt) {
			return c, err
		}
	}
	return nil, &torus.Error{
		Op: "recover", Obj: "volume " + a.f.cfg.Volume.Name,
		Err:  fmt.Errorf("record %d of the log is damaged on every peer that answered: %w", copies[0].hdr.Seq, err),
		Hint: "Bring back the peers that hold another copy; nothing has been changed.",
	}
}

// allAnswered reports whether nobody is missing who might have a good copy of a record.
func (a *recovery) allAnswered(copies []foundRec) bool {
	for _, r := range copies {
		for _, p := range r.blk.set {
			if !a.peers[p].answered || !a.f.dist.Healthy(p) {
				return false
			}
		}
	}
	return true
}

// rescue copies a record into a block of this epoch.
func (a *recovery) rescue(w *sideWriter, r *foundRec) (*sideRec, error) {
	f := a.f
	raw := buf.Get(r.hdr.Size())
	defer raw.Release()
	var err error
	a.t.Wait(func(wake func()) {
		rd := f.dist.NewRead()
		rd.Ref, rd.Off, rd.Data = r.blk.ref, r.hdr.Offset, raw.Bytes()[:r.hdr.Size()]
		rd.Set = a.holders(r.blk, r.end())
		rd.Verify = func(rd *read) bool {
			var h record.Header
			_, err := record.Check(r.blk.ref, r.hdr.Offset, rd.Data, &h)
			return err == nil
		}
		rd.Done = func(rd *read) {
			err = rd.Err
			rd.Release()
			wake()
		}
		rd.Start()
	})
	if err != nil {
		return nil, again(err)
	}
	c, err := w.record(f, r.hdr.Pages(), false)
	if err != nil {
		return nil, again(err)
	}
	for _, p := range c.blk.set {
		if err := a.promise(p); err != nil {
			return nil, again(err)
		}
	}
	c.pages = r.hdr.Pages()
	copy(c.mem()[record.HeaderSize:], raw.Bytes()[record.HeaderSize:r.hdr.Size()])
	c.hdr.Seq, c.hdr.Time, c.hdr.Extents, c.hdr.CRCs = r.hdr.Seq, r.hdr.Time, r.hdr.Extents, r.hdr.CRCs
	w.close(f, c)
	return c, nil
}

// promise has a peer that is not of the old window fenced as well: a copy counts only at a peer that has persisted our
// epoch (model rule 6).
func (a *recovery) promise(p torus.PeerID) error {
	op := a.peers[p]
	if op == nil {
		op = &oldPeer{}
		a.peers[p] = op
	}
	if op.answered {
		return nil
	}
	err := a.ask(&torus.Request{Op: torus.OpFence, Epoch: a.f.epoch, Peer: p, Ref: torus.BlockRef{Type: torus.TypeBlock, Volume: a.f.vol}})
	op.answered = err == nil
	return err
}

// loadLeaves loads what a record is about to change of the map.
func (f *File) loadLeaves(t *loop.Task, h *record.Header) error {
	r := rec{hdr: *h}
	for {
		page, missing := f.missing(&r)
		if !missing {
			return nil
		}
		var err error
		t.Wait(func(wake func()) {
			f.m.load(page, func(e error) {
				err = e
				wake()
			})
		})
		if err != nil {
			return err
		}
	}
}

// checkExtents refuses a record that does not fit this volume: its checksum is right, so whoever wrote it was wrong, or newer.
func (f *File) checkExtents(h *record.Header) error {
	pages := (f.size + pageSize - 1) / pageSize
	for _, x := range h.Extents {
		known := x.Kind == record.Data || x.Kind == record.Zero || x.Kind == record.Trim || x.Kind == record.Moved && h.Ref.Type == torus.TypeMoved
		if !known || x.Count == 0 || x.Page >= pages || uint64(x.Count) > pages-x.Page {
			return fmt.Errorf("record %d in %v: extent of kind %d, %d pages from %d, in a volume of %d: %w", h.Seq, h.Ref, x.Kind, x.Count, x.Page, pages, torus.ErrCorrupt)
		}
	}
	return nil
}

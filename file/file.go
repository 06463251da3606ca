// Package file is the primitive under every volume: a log-structured virtual disk. The one attached writer
// appends records to its open block on every replica; what is flushed enters the map, which says where each
// page's newest bytes are; a checkpoint writes the map's changed nodes and commits a new INode.
//
// A File is a state machine on one loop: requests and replies in, requests and completions out; nothing
// in it blocks. Only attach, checkpoint and window extension, which wait for the MDS, are loop.Tasks.
//
// How far the log has got is five sequence numbers, each at most the next:
//
//	applied ≤ flushed ≤ held ≤ sent ≤ last
//
//	applied  in the map; forgotten by the log
//	flushed  durable on the whole registered set of a window block (flush.go)
//	held     in memory on the whole registered set of a window block (ack.go)
//	sent     on its way to the replicas of the open block (send.go)
//	last     made into a record (write.go)
//
// acked is the highest held ever was: acknowledgement is in sequence order, across blocks. When a replica
// fails (roll), sent and held fall back to before its block, and everything from there on goes to the next block;
// acked stays. Records above applied are retained in memory, and reads look there first (overlay.go).
package file

import (
	"errors"
	"log/slog"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/distributor"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/models"
)

const pageSize = torus.PageSize

// Config is what a File is made of.
type Config struct {
	Loop   loop.Loop
	Dist   *distributor.Distributor
	MDS    torus.MetadataService
	Volume *models.Volume
	// BlockSize is the cluster's, in bytes.
	BlockSize uint32
	// Replication is how many copies a block gets; 0: what the ring says.
	Replication int
	// Lease is the one the holding of the volume is recorded under.
	Lease torus.LeaseID
	// Holder describes this process to whoever finds the volume locked.
	Holder *models.Holder
	// Force takes over from a holder whose lease still lives.
	Force bool

	// To, if set, is the moment to take the volume back to: one that is pinned, or within what is kept for that. The volume must have been
	// released in order. Everything since is undone, and can be gone forward to again for as long as it is kept itself.
	To *models.Moment

	RetainBytes     int    // bound of what is kept in memory until it is flushed; default 32 MiB
	MapBytes        int    // bound of the map's leaves in memory; default 64 MiB
	CheckpointBytes uint64 // of log between checkpoints; default 256 MiB
	// Utilisation is the part of what data blocks hold that compaction keeps alive: DefaultUtilisation unless set; negative: no compaction.
	Utilisation float64
	// CompactSlack is how many blocks' worth of dead data there may be however small the volume is; default 8.
	CompactSlack    int
	CheckpointEvery time.Duration // at the latest, if anything was written; default 30 s
	WindowAhead     time.Duration // how long the registered window should last at the present rate; default 60 s

	Log       *slog.Logger     // nil: none
	WallClock func() time.Time // for time stamps people read; default time.Now
	// OnFail is called once when the file has failed for good: fenced by a newer attach.
	OnFail func(error)
}

func (c *Config) setDefaults() {
	def := func(p *int, v int) {
		if *p == 0 {
			*p = v
		}
	}
	def(&c.RetainBytes, 32<<20)
	def(&c.MapBytes, 64<<20)
	def(&c.CompactSlack, 8)
	if c.CheckpointBytes == 0 {
		c.CheckpointBytes = 256 << 20
	}
	if c.CheckpointEvery == 0 {
		c.CheckpointEvery = 30 * time.Second
	}
	if c.Utilisation == 0 {
		c.Utilisation = DefaultUtilisation
	}
	if c.WindowAhead == 0 {
		c.WindowAhead = time.Minute
	}
	if c.WallClock == nil {
		c.WallClock = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	c.Log = c.Log.With("volume", c.Volume.Name)
}

// DefaultUtilisation is what Config.Utilisation is unless it is set, and MaxUtilisation the most that makes sense: the nearer to 1, the more is moved.
const (
	DefaultUtilisation = 0.75
	MaxUtilisation     = 0.95
)

// Stats is a file's account of itself.
type Stats struct {
	Epoch                              uint64
	Acked, Flushed, Applied            uint64 // sequence numbers
	LogBytes                           uint64 // appended since attach, one replica, headers included
	MovedBytes                         uint64 // … by compaction
	Paced                              uint64 // writes that had to wait for compaction
	Rolls, Checkpoints, Syncs, Records uint64
	RetainedBytes                      int
	LiveBytes, StoredBytes             uint64
	AheadBytes, AheadUsed              uint64 // read ahead, and given of that to who came for it
	Leaves, DirtyLeaves                int
}

// File is an attached file: the one writer of its volume. See the package comment.
type File struct {
	cfg  Config
	loop loop.Loop
	dist *distributor.Distributor
	log  *slog.Logger
	vol  torus.VolumeID
	size uint64 // bytes
	repl int

	state    torus.VolumeState // as last committed or read
	epoch    uint64
	metaBusy bool // a transaction is under way; see commit
	metaWait []func()

	// The log.
	recs                                      []*rec // ring, by seq & mask
	applied, flushed, held, sent, last, acked uint64
	tried                                     uint64 // the highest sent ever was
	building                                  *rec
	refusedBy                                 torus.PeerID // a peer that called a request invalid
	sealing                                   bool         // a Defer of sealFn is pending
	sealFn                                    func()       // seals the building record
	seg                                       *segment
	retained                                  int // bytes of records above applied
	unflushed                                 int // … above flushed
	freeRecs                                  []*rec
	spareReqs                                 []*device.Request
	freeOps                                   []*appendOp
	freeSyncs                                 []*syncOp
	over                                      overlay
	applying                                  bool // waiting for a leaf
	loadTries                                 int  // how often that one could not be loaded

	// Blocks.
	win    window
	next   uint64       // first index of the window not used yet
	blk    *openBlock   // takes the next record; nil: none yet
	blocks []*openBlock // with unflushed records, in order; blk is the last
	full   bool         // no room in the cluster: new writes fail with ErrOutOfSpace

	// Flushes.
	syncing   bool
	syncLeft  int
	habit     habit
	syncGen   uint64
	waiters   []flushWaiter
	waiting   []*pending // writes held back: no room to retain them, or compaction is behind
	locked    map[uint64]struct{}
	blocked   []*pending // writes to a page whose read-modify-write is under way
	freeReads []*readOp
	freeRuns  []*readRun
	ahead     ahead
	reading   uint64 // bytes of reads under way

	m     fmap
	table table

	meta          metaWriter
	moves         sideWriter // of compaction
	checkpointing bool
	compacting    bool
	flattening    bool          // what is of the origin is being copied
	tighten       uint64        // somebody has asked for the blocks listed before this INode to be compacted, all of them; 0: nobody
	tightAsks     []uint64      // who has: Ask.compact
	tidied        uint64        // the newest INode when nodes of metadata blocks were last called changed
	compactAfter  time.Duration // loop time; it has failed, and housekeeping tries again
	avoided       map[uint32]avoided
	emptying      bool    // of compacting, the part that empties blocks, and may have a pace
	pace          float64 // bytes that may be written for each that compaction moves; 0: any number
	allowance     int64   // bytes that may be written now, if there is a pace
	unseen        int64   // bytes that may be written before wearFn
	wearFn        func()  // finds out how worn the blocks are
	pinning       bool    // a moment is being pinned; see answer
	listing       listing
	sinceCkpt     uint64 // log bytes applied since the last checkpoint began
	lastCkpt      time.Duration
	number        uint64         // of the newest INode
	history       []*models.Head // earlier INodes: see models.INode
	marks         []*models.Mark
	lastStamp     uint64 // of the newest record
	appliedStamp  uint64 // of the last applied one
	closing       bool
	closeBy       time.Duration // loop time at which a close gives up
	probed        uint64        // what had been sent at the last tick
	closed        bool
	err           error // failed for good
	errFn         func() error
	lostSince     time.Duration // loop time since when a peer of the open block is away; see leaveLost
	tick          *loop.Timer
	unwatch       func()
	stats         Stats
	rate          rate
}

// Size is the size of the file in bytes.
func (f *File) Size() uint64 { return f.size }

// ReadOnly is false: a File is attached for writing.
func (f *File) ReadOnly() bool { return false }

// Epoch is the fencing token this file writes under.
func (f *File) Epoch() uint64 { return f.epoch }

// Err is why the file has failed for good, or nil.
func (f *File) Err() error { return f.err }

// Stats returns the present counts.
func (f *File) Stats() Stats {
	s := f.stats
	s.Epoch, s.Acked, s.Flushed, s.Applied = f.epoch, f.acked, f.flushed, f.applied
	s.RetainedBytes, s.Leaves, s.DirtyLeaves = f.retained, f.m.leaves, f.m.dirtyLeaves
	s.LiveBytes, s.StoredBytes = f.table.usage()
	return s
}

// stamp is the time by the clock on the wall, in microseconds, but never earlier than the last time.
func (f *File) stamp() uint64 {
	f.lastStamp = max(f.lastStamp, uint64(max(0, f.cfg.WallClock().UnixMicro())))
	return f.lastStamp
}

// Submit starts a request; see device.Device.
func (f *File) Submit(r *device.Request) {
	if f.err != nil {
		r.Finish(f.err)
		return
	}
	if f.closing {
		r.Finish(device.ErrShutdown)
		return
	}
	if r.Op != device.Flush && (r.Off > f.size || r.Len > f.size-r.Off) {
		r.Finish(device.ErrRange)
		return
	}
	switch r.Op {
	case device.Read:
		f.read(r)
	case device.Write, device.Trim, device.WriteZeroes:
		f.write(r)
	case device.Flush:
		f.flush(r)
	case device.Status:
		f.status(r)
	case device.Prefetch:
		r.Finish(nil)
	default:
		r.Finish(device.ErrNotSupported)
	}
}

// fail ends the file: everything under way and everything to come fails with err.
func (f *File) fail(err error) {
	if f.err != nil {
		return
	}
	f.err = err
	if err != device.ErrShutdown {
		f.log.Error("volume failed for good", "err", err)
	}
	f.tick.Stop()
	f.syncGen++
	for _, b := range f.blocks {
		b.dead = true
	}
	for s := f.flushed + 1; s <= f.last; s++ {
		for _, r := range f.rec(s).reqs {
			r.Finish(err)
		}
		f.rec(s).reqs = nil
	}
	if f.building != nil {
		for _, r := range f.building.reqs {
			r.Finish(err)
		}
		f.building = nil
	}
	for _, w := range f.waiters {
		w.r.Finish(err)
	}
	f.waiters = nil
	for _, l := range [][]*pending{f.waiting, f.blocked} {
		for _, p := range l {
			p.drop().Finish(err)
		}
	}
	f.waiting, f.blocked = nil, nil
	f.ahead.clear()
	if f.unwatch != nil {
		f.unwatch()
		f.unwatch = nil
	}
	if f.cfg.OnFail != nil {
		f.cfg.OnFail(err)
	}
}

// housekeeping runs once a second.
func (f *File) housekeeping() {
	if f.err != nil || f.closed {
		return
	}
	f.tick = f.loop.After(time.Second, f.housekeeping)
	f.rate.tick(f.stats.LogBytes, time.Second)
	if f.held > f.flushed {
		f.startSync()
	}
	f.probe()
	f.checkRoom()
	f.leaveLost()
	f.maybeCheckpoint()
	f.maybeCompact()
	f.allow(paceTick)
	f.maybeExtend()
	f.pump()
}

// probe asks, when nothing else has for a second, the peers of a block of the window whether this epoch is still obeyed. A writer
// that is cut off from the MDS, and has nothing to write or cannot, would else serve old contents without knowing: whoever
// attached since has been promised obedience by at least one peer of every block of the window.
func (f *File) probe() {
	sent := f.stats.LogBytes + f.stats.Syncs
	if sent != f.probed {
		f.probed = sent
		return
	}
	ref := torus.BlockRef{Type: torus.TypeBlock, Volume: f.vol, INode: torus.INodeID(f.epoch), Index: torus.IndexID(f.next)}
	var set torus.PeerList
	if f.blk != nil {
		ref, set = f.blk.ref, f.blk.set
	} else if ps := f.win.placement(f.next); ps != nil {
		set = f.dist.Set(ref, ps)
	}
	for _, p := range set {
		f.dist.Submit(p, &torus.Request{Op: torus.OpRead, Ref: ref, Epoch: f.epoch, Peer: p, Done: func(r *torus.Request) {
			if errors.Is(r.Err, torus.ErrFenced) && f.err == nil {
				f.fenced(r.Fence)
			}
		}})
	}
}

// Close flushes, checkpoints and gives the volume up. Requests under way are completed first; new ones are refused.
// done is called once, with nil if nothing is left for a recovery to do.
func (f *File) Close(done func(error)) {
	loop.Go(f.loop, func(t *loop.Task) { done(f.close(t)) })
}

// Abandon stops the file where it is, as a crash would, except that pending requests fail with err.
func (f *File) Abandon(err error) {
	f.fail(err)
	f.stop()
}

func (f *File) stop() {
	f.closed = true
	f.tick.Stop()
	if f.unwatch != nil {
		f.unwatch()
		f.unwatch = nil
	}
}

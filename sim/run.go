package sim

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime/debug"
	"slices"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/metadata/temp"
	"github.com/coreos/torus/models"
)

// Run is one seeded schedule: volumes on a few peers, each with a writer that keeps a history and moves from host to host, and a nemesis. A
// safety phase, in which nothing may go wrong that DESIGN §8 forbids; then everything is healed, and the cluster must come to a state in
// which every volume serves all that was acknowledged, in full replication.
type Run struct {
	*Cluster
	// Attaches that were compared with the history, writes acknowledged; at the end, copies of blocks of volumes that nobody lists, and of volumes that
	// have been deleted.
	Attaches, Acks, Leaked, Left int
	// Snapshots taken, views of moments compared, clones made and flattened, times a volume was taken back.
	Snapshots, Views, Clones, Flattened, Returns int
	Faults                                       map[string]int // by kind
	Trace                                        uint64         // hash of every event in order

	p         profile
	rng       *rand.Rand
	vols      []*volume
	n         int // processes made
	err       error
	faults    []fault
	again     time.Duration // when an attach that failed is tried again
	victim    *Peer         // has lost data, and alone may be hurt
	wiped     bool
	slowUntil time.Duration
	excess    bool // more has been damaged than anybody promises to survive

	boss    *temp.Client // an administrator's
	viewers []*viewer
	buried  []*volume // deleted
	named   int       // snapshots asked for

	mdsWeights []int
	mdsSlow    func(*rand.Rand) time.Duration
}

// profile is what one schedule is made of.
type profile struct {
	peers, replication, volumes int
	pages                       uint64
	blockSize                   uint64
	slotsPerFile, bulkBytes     int
	checkpoints                 time.Duration // at the latest, after that
	steps                       int
	harmEvery, moveEvery        int // steps
	kinds                       []int
	excess, repair              bool
	profilePast
}

// profilePast is what a schedule does with moments, and to compact.
type profilePast struct {
	past         bool          // snapshots, clones and all that
	retain       time.Duration // for rewinding
	utilisation  float64       // 0: compaction as by default, and so none
	pace         time.Duration // of steps, at most
	compactSlack int
}

// drawPast draws it from a source of its own.
func drawPast(rng *rand.Rand, p *profile) {
	if rng.IntN(2) == 0 {
		return
	}
	p.pace = time.Duration(1+rng.IntN(100)) * time.Millisecond
	p.utilisation, p.compactSlack = 0.7+0.25*rng.Float64(), 1
	p.moveEvery *= 1 + rng.IntN(3)
	if rng.IntN(5) == 0 || p.excess {
		return
	}
	p.past = true
	p.volumes = 1 + p.volumes/2
	if rng.IntN(3) == 0 {
		p.retain = time.Duration(1+rng.IntN(20)) * time.Second
	}
}

// draw draws the profile of a schedule: each has its own mix of faults, as many together hide what few bring about.
func draw(rng *rand.Rand) profile {
	p := profile{
		peers: 3, replication: 2, volumes: 1 + rng.IntN(3)*rng.IntN(2), pages: uint64(60 + rng.IntN(200)), blockSize: 64 << 10 << rng.IntN(3),
		slotsPerFile: 2 << rng.IntN(4), checkpoints: 300 * time.Millisecond << rng.IntN(6),
		steps: 60 + rng.IntN(140), harmEvery: 5 + rng.IntN(30), moveEvery: 20 + rng.IntN(60), excess: rng.IntN(6) == 0, repair: rng.IntN(2) == 0,
	}
	switch rng.IntN(6) {
	case 0:
		p.peers, p.replication = 4, 3
	case 1:
		p.peers = 4
	}
	one := rng.IntN(3) == 0 // one peer loses data by rot
	most := 1 + rng.IntN(8)
	for _, i := range rng.Perm(len(kinds)) {
		switch k := &kinds[i]; {
		case k.name == "rot":
			if one {
				p.kinds = append(p.kinds, i)
			}
		case one && !k.spares || len(p.kinds) >= most:
		default:
			p.kinds = append(p.kinds, i)
		}
	}
	if len(p.kinds) == 0 {
		p.kinds = append(p.kinds, 0)
	}
	return p
}

// Play runs the schedule of a seed; the error says what was violated.
func Play(seed uint64, log *slog.Logger) (r *Run, err error) {
	rng := rand.New(rand.NewPCG(seed, 2))
	p := draw(rng)
	drawPast(rand.New(rand.NewPCG(seed, 3)), &p)
	p.bulkBytes = []int{0, 1, 8 << 10, 24 << 10}[rand.New(rand.NewPCG(seed, 4)).IntN(4)]
	c, err := New(seed, Options{
		Peers: p.peers, Replication: p.replication, BlockSize: p.blockSize, PeerBytes: 768 * p.blockSize, Slots: 32, SlotsPerFile: p.slotsPerFile, BulkBytes: p.bulkBytes, Repair: p.repair, Log: log,
	})
	if err != nil {
		return nil, err
	}
	r = &Run{Cluster: c, rng: rng, p: p, Faults: map[string]int{}}
	defer func() {
		if p := recover(); p != nil {
			err = violated("panic", "%v\n%s", p, debug.Stack())
		}
		if err != nil {
			err = fmt.Errorf("%w (at %v)", err, c.V.Now())
		}
		c.V.Close()
	}()
	c.V.SetTrace(func(e loop.Event) {
		r.hash(uint64(e.At))
		r.hash(uint64(e.Kind))
		for i := range len(e.Loop) {
			r.hash(uint64(e.Loop[i]))
		}
	})
	c.Witness.fail = r.fail
	c.PeerMDS = r.mdsFault
	r.boss = c.MDS.Client()
	r.boss.SetFaults(r.mdsFault)
	for i := range p.volumes {
		info, err := c.CreateVolume(fmt.Sprint("v", i), p.pages*PageSize)
		if err != nil {
			return r, err
		}
		v := r.newVolume(info, NewHistory(seed<<8+uint64(i)+1))
		if p.retain > 0 {
			v.amend(func(s *models.VolumeState) { s.RetainMs = uint64(p.retain.Milliseconds()) })
		}
	}
	// After every transaction: it may have moved a head, or a window.
	eye := c.MDS.Client()
	eye.OnChange(func() {
		for _, v := range r.vols {
			id := torus.VolumeID(v.info.Id)
			st := c.MDS.Peek(id)
			if st == nil {
				continue // it is being deleted
			}
			if now := (version{st.GetTxn(), st.GetEpoch()}); now != v.version {
				v.version = now
				c.Witness.Committed(id)
			}
			if p.past {
				v.pinned()
			}
		}
	})
	return r, r.play()
}

func (r *Run) hash(x uint64) {
	r.Trace = (r.Trace ^ x) * 0x100000001b3
	r.Trace ^= r.Trace >> 29
}

func (r *Run) say(format string, args ...any) {
	if r.log.Enabled(nil, slog.LevelInfo) { //nolint:staticcheck // no context here
		r.log.Info("schedule: "+fmt.Sprintf(format, args...), "now", r.V.Now())
	}
}

// fail notes a violation; the first one counts.
func (r *Run) fail(err error) {
	if r.err == nil {
		r.err = err
	}
}

// check takes up what writers have found.
func (r *Run) check() bool {
	for _, v := range r.vols {
		for _, s := range v.sessions {
			if s.w != nil && s.w.Err != nil {
				r.fail(fmt.Errorf("%w (volume %s)", s.w.Err, v.info.Name))
			}
		}
	}
	return r.err == nil
}

func (r *Run) runUntil(cond func() bool, limit time.Duration) bool {
	// Asked now and then only: a condition costs more than an event.
	for end := r.V.Now() + limit; ; {
		if !r.check() || cond() {
			return true
		}
		if r.V.Now() >= end {
			return false
		}
		r.V.RunFor(5 * time.Millisecond)
	}
}

func (r *Run) tune(c *file.Config) {
	c.CheckpointBytes = uint64(16<<10 + r.rng.IntN(128<<10<<r.rng.IntN(5)))
	c.RetainBytes = 128<<10 + r.rng.IntN(2<<20)
	c.CheckpointEvery = r.p.checkpoints
	c.MapBytes = 1
	c.Utilisation, c.CompactSlack = r.p.utilisation, r.p.compactSlack
}

func (r *Run) play() error {
	for range r.p.steps {
		r.vols[r.rng.IntN(len(r.vols))].act()
		if r.rng.IntN(r.p.harmEvery) == 0 {
			r.harm()
		}
		d := time.Duration(r.rng.IntN(600)) * time.Microsecond
		switch r.rng.IntN(40) {
		case 0, 1:
			d = time.Duration(r.rng.IntN(50)) * time.Millisecond
		case 2:
			d = time.Duration(r.rng.IntN(1500)) * time.Millisecond
		case 3:
			if r.rng.IntN(6) == 0 {
				d = time.Duration(r.rng.IntN(20)) * time.Second
			}
		}
		if r.p.pace > 0 {
			d += time.Duration(r.rng.Int64N(int64(r.p.pace)))
		}
		if r.p.past {
			r.attend()
		}
		r.V.RunFor(d)
		r.mend(false)
		if r.rng.IntN(40) == 0 {
			r.MDS.Deliver() // late, by any number of other requests
		}
		if !r.check() {
			return r.err
		}
	}
	if err := r.heal(); err != nil {
		return err
	}
	return r.converge()
}

// attend lets administrators and lookers-on do something.
func (r *Run) attend() {
	if r.p.retain > 0 {
		for _, v := range r.vols {
			v.point()
		}
	}
	for _, v := range r.vols {
		if v.info.Origin != nil && r.MDS.Peek(torus.VolumeID(v.info.Id)).GetOwn() && r.rng.IntN(20) == 0 {
			v.flatten()
		}
		if r.rng.IntN(60) == 0 {
			v.compact()
		}
	}
	if r.rng.IntN(5) == 0 {
		r.vols[r.rng.IntN(len(r.vols))].govern()
	}
	r.viewers = slices.DeleteFunc(r.viewers, func(w *viewer) bool {
		if !w.over && r.rng.IntN(12) == 0 {
			switch {
			case r.rng.IntN(3) == 0:
				w.end()
			case w.view != nil:
				w.cl.Loop.Post(w.read)
			}
		}
		return w.over
	})
}

// heal ends all faults.
func (r *Run) heal() error {
	r.say("heal")
	r.mend(true)
	r.Net.HealAll()
	r.MDS.Deliver()
	for _, p := range r.Peers {
		if p.Up && (p.Store.Stats().Failed || p.ailing) {
			p.Kill() // what it could not read when it started it must read again
		}
		r.start(p)
	}
	// Time for what takes time by itself: silence is noticed, the directory has news of peers that were full. A store that had no
	// room looks again after 5 s.
	r.V.RunFor(2 * time.Second)
	if r.Faults["full"] > 0 {
		r.V.RunFor(4 * time.Second)
	}
	return r.err
}

// converge asks of a healthy cluster that everything is well in the end.
func (r *Run) converge() error {
	for _, v := range r.vols {
		if err := v.settle(); err != nil {
			return err
		}
		if err := v.overtaken(); err != nil {
			return err
		}
	}
	if r.p.excess && r.victim == nil && !r.wiped {
		return r.ruin()
	}
	for _, v := range r.vols {
		if err := v.finish(); err != nil {
			return err
		}
	}
	for _, v := range r.vols {
		if err := r.examine(v); err != nil {
			return err
		}
	}
	if r.rng.IntN(2) == 0 && r.victim == nil {
		r.blackout()
		r.mend(true)
	}
	r.V.RunFor(time.Second) // what was sent, such as seals and deletes, is done
	if !r.check() {
		return r.err
	}
	if err := r.repaired(); err != nil {
		return err
	}
	if r.p.repair {
		if err := r.fsck(); err != nil {
			return err
		}
	}
	heads, listed, err := r.heads()
	if err != nil {
		return err
	}
	if err := r.Witness.CheckBytes(listed); err != nil {
		return err
	}
	for _, v := range r.vols {
		if err := r.examine(v); err != nil {
			return err
		}
	}
	if r.p.past {
		if err := r.windDown(); err != nil {
			return err
		}
		if heads, listed, err = r.heads(); err != nil {
			return err
		}
		if r.p.repair {
			r.V.RunFor(2*repairEvery + 2*time.Second) // peers delete what nothing needs
		}
		for _, v := range r.buried {
			if r.MDS.Peek(torus.VolumeID(v.info.Id)) != nil {
				continue // kept for a clone
			}
			r.Left += (&committed{c: r.Cluster, vol: v.info}).leaked(listed)
		}
	}
	if r.p.repair && r.Left > 0 {
		return violated("LIVE", "%d copies of blocks of deleted volumes are still stored", r.Left)
	}
	for _, x := range heads {
		r.Leaked += x.leaked(listed)
	}
	for _, v := range r.vols {
		for _, s := range v.sessions {
			if s.w != nil {
				r.Acks += s.w.Acks
			}
		}
	}
	return r.err
}

// heads reads from the disks what every volume has committed, and compares it with its history; listed is what is listed.
func (r *Run) heads() (heads []*committed, listed map[torus.BlockRef]bool, err error) {
	listed = map[torus.BlockRef]bool{}
	for _, v := range r.vols {
		x, err := r.readCommitted(v.info)
		switch {
		case x != nil:
			x.list(listed)
			err = x.compare(v.h, v.pages, 1)
			heads = append(heads, x)
		case err == nil: // nothing was ever committed
			zero := make([]byte, PageSize)
			_, err = v.h.Check(func(uint64) ([]byte, error) { return zero, nil }, v.h.Acked())
		}
		if err != nil {
			return nil, nil, fmt.Errorf("%w (volume %s as committed)", err, v.info.Name)
		}
	}
	return heads, listed, nil
}

// repaired waits until the peers say that every copy is where it belongs, and have read everything since it was last harmed.
func (r *Run) repaired() error {
	if !r.p.repair {
		return nil
	}
	scrubs := map[*Peer]uint64{}
	for _, p := range r.alive() {
		scrubs[p] = p.Repair.Stats().Scrubs
	}
	whole := func() bool {
		for _, p := range r.alive() {
			x := p.Repair.Stats()
			if x.Ring != r.ring || x.Short > 0 || x.Unknown > 0 || r.victim != nil && x.Scrubs < scrubs[p]+2 {
				return false
			}
		}
		return true
	}
	r.V.RunFor(repairEvery + 2*time.Second) // one pass at least
	if !r.runUntil(func() bool { return r.err != nil || whole() }, 5*time.Minute) {
		said := ""
		for _, p := range r.alive() {
			said += fmt.Sprintf("; %s: %+v", p.Name, p.Repair.Stats())
		}
		return violated("LIVE", "copies are still missing though everything is well%s", said)
	}
	return r.err
}

// ruin destroys every copy of a record that was flushed, where a later one says so. Nobody promises to survive that; but an
// attach must notice, and stop, rather than serve what is left as if it were everything (step 4).
func (r *Run) ruin() error {
	v := r.vols[0]
	for range 6 {
		v.cur.w.Write(1, false, false)
		if err := v.settle(); err != nil {
			return err
		}
	}
	v.cur.end()
	st := r.MDS.Peek(torus.VolumeID(v.info.Id))
	var all []*sighting
	for ref, l := range r.Witness.recs {
		if ref.Type == torus.TypeBlock && ref.Volume == torus.VolumeID(v.info.Id) && uint64(ref.INode) == v.epoch {
			if set, _ := r.Witness.registered(st, ref); set != nil {
				all = append(all, l...)
			}
		}
	}
	slices.SortFunc(all, func(a, b *sighting) int {
		return bytes.Compare(a.ref.ToBytes(), b.ref.ToBytes())*2 + int(a.seq) - int(b.seq)
	})
	flushed := uint64(0)
	for _, s := range all {
		flushed = max(flushed, s.flushed)
	}
	var may []uint64
	for _, s := range all {
		if s.seq > st.GetHead().GetSeq() && s.seq <= flushed {
			may = append(may, s.seq)
		}
	}
	if len(may) == 0 {
		return nil
	}
	slices.Sort(may)
	victim := may[r.rng.IntN(len(may))]
	// The records that say how much was flushed must stay.
	type place struct {
		ref torus.BlockRef
		off uint32
	}
	var headers []place
	for _, s := range all {
		if s.seq == victim {
			headers = append(headers, place{s.ref, s.off})
		}
	}
	r.say("ruin record %d of %s, which was flushed", victim, v.info.Name)
	r.excess = true
	for _, p := range r.Peers {
		doomed := func(_ string, _ int64, page []byte) bool {
			h := &r.Witness.hdr
			return h.Decode(page) == nil && slices.Contains(headers, place{h.Ref, h.Offset})
		}
		for p.FS.Rot(r.rng, doomed) > 0 { // until it has hit what counts
		}
		p.Kill()
		r.start(p)
	}
	s := v.attach(false)
	r.runUntil(func() bool { return s.over || s.w != nil }, 30*time.Second)
	if r.err != nil {
		return r.err
	}
	if s.err != nil && !errors.Is(s.err, torus.ErrCorrupt) {
		return violated("D1", "a flushed record is destroyed everywhere, and an attach says only: %w", s.err)
	}
	return nil
}

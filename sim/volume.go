package sim

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/models"
)

// volume is a volume of a Run and the sessions that have, or believe they have, it attached.
type volume struct {
	r        *Run
	info     *models.Volume
	h        *History
	pages    uint64
	sessions []*session
	cur      *session // the one that serves what was decided last
	epoch    uint64   // of that
	version  version  // of the state, as last seen

	snaps    []*snap
	asked    map[string]uint64 // by the name of a snapshot: what had been flushed when it was asked for
	pointing *snap
	from     *snap    // what a clone begins with, until somebody has looked
	wish     *snap    // what it is to be taken back to, once it is released
	back     *session // takes it back to something, or may have done so
	doomed   bool     // it is being deleted
}

// version tells states apart that a writer has changed.
type version struct{ txn, epoch uint64 }

// session is one process that attaches a volume.
type session struct {
	v         *volume
	cl        *Client
	f         *file.File
	w         *Writer // once it serves
	err       error   // of the attach
	over      bool    // the attach has failed, or the process has ended
	polite    bool    // it waits for the holder's lease to expire
	closing   bool
	closed    bool
	closeIs   error
	to        *snap // it takes the volume back to that
	n, overAt int   // how many processes there were when it began, and when it was over
}

// attach starts a process that attaches the volume.
func (v *volume) attach(polite bool) *session { return v.attachTo(polite, nil) }

// attachTo is attach; to, if not nil, is what it takes the volume back to.
func (v *volume) attachTo(polite bool, to *snap) *session {
	r := v.r
	r.n++
	s := &session{v: v, polite: polite, to: to, n: r.n, cl: r.NewClient(fmt.Sprintf("%s-client%d", v.info.Name, r.n))}
	s.cl.skew = time.Duration(r.rng.IntN(7200)-3600) * time.Second
	if r.p.retain > 0 {
		s.cl.skew = 0 // times have to mean the same to everybody
	}
	if to != nil {
		v.back = s
	}
	if r.p.past {
		s.follow()
	}
	s.cl.MDS.SetFaults(r.mdsFault)
	if r.mdsSlow != nil {
		s.cl.Loop.SetOffloadDelay(r.mdsSlow)
	}
	v.sessions = append(v.sessions, s)
	r.say("attach %s by %s, polite %v", v.info.Name, s.cl.Name, polite)
	s.open()
	return s
}

func (s *session) open() {
	s.cl.Attach(s.v.info, func(c *file.Config) {
		s.v.r.tune(c)
		c.Force = !s.polite
		if s.to != nil {
			c.To = s.to.at
		}
	}, s.attached)
}

// attached is the end of an attach.
func (s *session) attached(f *file.File, err error) {
	r := s.v.r
	s.f, s.err = f, err
	switch {
	case err == nil:
		s.look()
	case errors.Is(err, torus.ErrLocked) && s.polite:
		s.cl.Loop.After(time.Second, s.open)
	default:
		r.say("attach of %s by %s: %v", s.v.info.Name, s.cl.Name, err)
		s.end()
	}
}

// look reads the whole volume, right after the attach.
func (s *session) look() {
	img := make([]byte, s.f.Size())
	s.f.Submit(&device.Request{Op: device.Read, Len: uint64(len(img)), Data: img, Done: func(q *device.Request) { s.judge(img, q.Err) }})
}

// judge compares what an attach serves with the history, and takes it as decided: C1, D1, W1.
func (s *session) judge(img []byte, err error) {
	v, r := s.v, s.v.r
	if s.f.Err() != nil || s.f.Epoch() < v.epoch {
		return // overtaken already
	}
	if err != nil {
		r.fail(violated("C1", "read of volume %s after the attach of epoch %d: %w", v.info.Name, s.f.Epoch(), err))
		return
	}
	read := pages(img)
	n, err := uint64(0), error(nil)
	if s.to == nil {
		n, err = v.h.Check(read, v.h.Promised())
	}
	back := s.to
	if err != nil && v.back != nil {
		back = v.back.to
	}
	switch {
	case back != nil:
		if e := back.compare(img); e != nil {
			err = errors.Join(err, e)
			break
		}
		err = nil
		r.say("%s serves %s at epoch %d, taken back to %s", s.cl.Name, v.info.Name, s.f.Epoch(), back.name)
		v.h.Return(back.found)
		r.Returns++
	case err == nil:
		if v.from != nil {
			if err = v.from.compare(img); err != nil {
				break
			}
		}
		r.say("%s serves %s at epoch %d: %d writes of %d, acked %d, flushed %d, promised %d", s.cl.Name, v.info.Name, s.f.Epoch(), n, v.h.Last(), v.h.Acked(), v.h.Flushed(), v.h.Promised())
		err = v.h.Decide(n, read)
	}
	if err != nil {
		r.fail(fmt.Errorf("%w (volume %s, attach of epoch %d)", err, v.info.Name, s.f.Epoch()))
		return
	}
	r.Attaches++
	v.from = nil
	if v.back != nil && (v.back == s || v.back.over && s.n > v.back.overAt) {
		v.back = nil
	}
	v.epoch = s.f.Epoch()
	v.pages = max(v.pages, s.f.Size()/PageSize)
	for _, x := range v.sessions {
		if x.w != nil {
			x.w.Over = true
		}
	}
	s.w = NewWriter(v.h, s.f, s.cl.Loop, r.rng, s.f.Size()/PageSize, 1)
	s.w.Most = 12
	epoch := s.f.Epoch()
	s.w.Acked = func(page uint64, b []byte) error {
		return r.Witness.Acked(torus.VolumeID(v.info.Id), epoch, page, b)
	}
	s.w.Flushed = func() func() error {
		id := torus.VolumeID(v.info.Id)
		seq := r.Witness.upTo(id, epoch)
		return func() error { return r.Witness.Flushed(id, epoch, seq) }
	}
	v.cur = s
}

// end ends the process.
func (s *session) end() {
	if !s.over {
		s.over, s.overAt = true, s.v.r.n
		if s.w != nil {
			s.w.Over = s.w.Over || s.v.cur != s
		}
		s.cl.Kill()
	}
}

// serving reports whether the volume can be written to, as far as is known.
func (v *volume) serving() bool {
	return v.cur != nil && !v.cur.over && !v.cur.closing && v.cur.f.Err() == nil
}

// attaching counts the attaches under way.
func (v *volume) attaching() (n int) {
	for _, s := range v.sessions {
		if !s.over && s.w == nil && (s.f == nil || s.f.Err() == nil && s.f.Epoch() > v.epoch) {
			n++
		}
	}
	return n
}

// close detaches in order.
func (s *session) close() {
	if s.closing || s.over {
		return
	}
	s.closing = true
	s.v.r.say("close %s by %s", s.v.info.Name, s.cl.Name)
	s.cl.Loop.Post(func() {
		s.f.Close(func(err error) {
			s.closed, s.closeIs = true, err
			s.v.r.say("closed %s by %s: %v", s.v.info.Name, s.cl.Name, err)
			if err == nil && !s.w.Over {
				s.v.h.Flush(s.v.h.Acked())
			}
			s.end()
		})
	})
}

// act does the next thing to a volume.
func (v *volume) act() {
	r := v.r
	if v.doomed {
		v.bury()
		return
	}
	if v.serving() && v.cur.f.Size()/PageSize > v.pages {
		v.pages = v.cur.f.Size() / PageSize
		v.cur.w.Pages = v.pages
	}
	for _, s := range v.sessions {
		if s.w != nil && s != v.cur && !s.over && !s.closing && s.f.Err() == nil && r.rng.IntN(4) == 0 {
			s.w.Step() // one that does not know that it is over
		}
	}
	if v.cur != nil && v.cur.f.Err() != nil && !v.cur.closing {
		v.cur.end()
	}
	if !v.serving() {
		if v.wish != nil && v.attaching() == 0 && v.cur != nil && v.cur.closed {
			if v.cur.closeIs == nil && !v.wish.gone {
				v.attachTo(false, v.wish)
			}
			v.wish = nil
		}
		switch n := v.attaching(); {
		case n == 0 && (v.cur == nil || !v.cur.closing || v.cur.closed || r.rng.IntN(10) == 0):
			v.attach(false)
		case n > 0 && n < 3 && r.rng.IntN(60) == 0:
			v.attach(false) // several at once
		case n > 0 && r.rng.IntN(60) == 0:
			s := v.sessions[len(v.sessions)-1]
			r.say("kill %s, which attaches", s.cl.Name)
			s.end() // crashes before it has attached: the next one does it again
		}
		return
	}
	s := v.cur
	if r.rng.IntN(r.p.moveEvery) != 0 {
		if !s.cl.Loop.Paused() {
			for range 1 + r.rng.IntN(3) {
				s.w.Step()
			}
		}
		return
	}
	switch k := r.rng.IntN(8); k {
	case 0, 1: // crashes, and another host takes over
		r.say("kill %s", s.cl.Name)
		s.end()
		v.attach(k == 1)
	case 2: // detached in order
		s.close()
	case 3: // frozen, taken over, and woken at some time
		r.freeze(s.cl, time.Duration(r.rng.IntN(8000))*time.Millisecond)
		v.attach(false)
	case 4: // cut off from some peers or all, and taken over
		for _, p := range r.Peers {
			if r.rng.IntN(3) > 0 && r.mayHurt(p) {
				r.cut(s.cl.Name, p.Name, time.Duration(r.rng.IntN(5000))*time.Millisecond)
			}
		}
		v.attach(false)
	case 5: // two or three want it at once
		for range 2 + r.rng.IntN(2) {
			v.attach(false)
		}
	default: // taken over while it runs
		v.attach(false)
	}
}

// settle brings the volume to a state in which it serves, everything submitted is done, and everything acknowledged is flushed.
func (v *volume) settle() error {
	r := v.r
	ready := func() bool {
		for _, s := range v.sessions {
			if s.polite && v.serving() && s.f == nil {
				s.end() // it would wait as long as the holder lives
			}
		}
		if r.err != nil || v.serving() && v.attaching() == 0 {
			return true
		}
		if v.cur != nil && v.cur.f.Err() != nil && !v.cur.closing {
			v.cur.end()
		}
		if v.attaching() == 0 && (v.cur == nil || v.cur.over) && r.V.Now() >= r.again {
			r.again = r.V.Now() + time.Second
			v.attach(false)
		}
		return false
	}
	if !r.runUntil(ready, 3*time.Minute) {
		who := ""
		var last error
		for _, s := range v.sessions {
			if s.err != nil {
				last = s.err
			}
			if !s.over {
				who += fmt.Sprintf(" %s (attached %v, judged %v, polite %v)", s.cl.Name, s.f != nil, s.w != nil, s.polite)
			}
		}
		return violated("LIVE", "volume %s cannot be attached though everything is well, last: %w; alive:%s", v.info.Name, last, who)
	}
	s := v.cur
	if !r.runUntil(func() bool { return r.err != nil || s.f.Err() != nil || s.w.Idle() && s.w.Reading == 0 }, time.Minute) {
		return violated("LIVE", "volume %s: %d writes, %d reads are never done though everything is well: %+v", v.info.Name, len(s.w.inflight), s.w.Reading, s.f.Stats())
	}
	s.w.Flush()
	if !r.runUntil(func() bool { return r.err != nil || s.f.Err() != nil || s.w.Flushing == 0 }, time.Minute) {
		return violated("LIVE", "volume %s: a flush is never done though everything is well: %+v", v.info.Name, s.f.Stats())
	}
	if r.err == nil && s.f.Err() == nil && v.h.Flushed() < v.h.Acked() {
		return violated("LIVE", "volume %s: a flush failed though everything is well", v.info.Name)
	}
	return r.err
}

// finish detaches the volume and reads what is left from the disks: everything acknowledged, in full replication.
func (v *volume) finish() error {
	r := v.r
	var last error
	for range 4 {
		if err := v.settle(); err != nil {
			return err
		}
		s := v.cur
		s.close()
		if !r.runUntil(func() bool { return r.err != nil || s.closed }, time.Minute) {
			return violated("LIVE", "volume %s cannot be detached though everything is well", v.info.Name)
		}
		if r.err != nil {
			return r.err
		}
		if s.closeIs == nil {
			return nil
		}
		// It may have met, once, what a fault has left: a block that lost its tail, a late duplicate of an attach that was given up. Nothing is
		// lost by that, and the next one must do.
		r.say("detach of %s: %v", v.info.Name, s.closeIs)
		last = s.closeIs
		r.MDS.Deliver()
	}
	return violated("LIVE", "volume %s cannot be detached though everything is well: %w", v.info.Name, last)
}

// overtaken checks that every writer that was overtaken knows it (L1).
func (v *volume) overtaken() error {
	unaware := func() *session {
		for _, s := range v.sessions {
			if s.f != nil && !s.over && !s.closing && s != v.cur && s.f.Epoch() < v.epoch && s.f.Err() == nil {
				return s
			}
		}
		return nil
	}
	if !v.r.runUntil(func() bool { return v.r.err != nil || unaware() == nil }, 10*time.Second) {
		return violated("L1", "epoch %d of volume %s has not noticed epoch %d", unaware().f.Epoch(), v.info.Name, v.epoch)
	}
	return v.r.err
}

// CreateVolume makes a volume.
func (c *Cluster) CreateVolume(name string, size uint64) (*models.Volume, error) {
	v := &models.Volume{Name: name, Type: "block", SizeBytes: size, BlockSpec: "crc"}
	if err := c.admin.CreateVolume(context.Background(), v); err != nil {
		return nil, err
	}
	return c.admin.Volume(context.Background(), name)
}

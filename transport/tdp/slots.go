package tdp

import "github.com/coreos/torus"

// slots is the table of the requests under way on a connection. A request's id on the wire is its slot's index
// and, above that, the slot's generation, which tells a late reply from the one that is due. Slots under way are
// chained in the order of their submission, so that the oldest is found at once.
type slots struct {
	tab   []slot
	free  int32 // chain through next; -1 is its end
	first int32 // oldest under way
	last  int32
	n     int
}

type slot struct {
	req        *torus.Request // nil: free
	gen        uint32
	prev, next int32
	sent       uint64 // the client's tick at submission
	own        bool   // the client looks for the answer itself: the peer has not been asked
}

const (
	slotBits = 16
	maxSlots = 1 << slotBits
)

func newSlots() slots { return slots{free: -1, first: -1, last: -1} }

// take puts r into a slot and returns its id; false if all are taken.
func (s *slots) take(r *torus.Request, now uint64) (uint32, bool) {
	i := s.free
	switch {
	case i >= 0:
		s.free = s.tab[i].next
	case len(s.tab) < maxSlots:
		i = int32(len(s.tab))
		s.tab = append(s.tab, slot{})
	default:
		return 0, false
	}
	t := &s.tab[i]
	t.gen = (t.gen + 1) & (maxSlots - 1)
	if t.gen == 0 {
		t.gen = 1 // so that no id is 0
	}
	t.req, t.sent, t.own, t.prev, t.next = r, now, false, s.last, -1
	if s.last >= 0 {
		s.tab[s.last].next = i
	} else {
		s.first = i
	}
	s.last = i
	s.n++
	return t.gen<<slotBits | uint32(i), true
}

// get returns the request of an id; nil if none of that id is under way.
func (s *slots) get(id uint32) *torus.Request {
	i := id & (maxSlots - 1)
	if int(i) >= len(s.tab) || s.tab[i].gen != id>>slotBits {
		return nil
	}
	return s.tab[i].req
}

// asked is get for what a peer says: nil if it has not been asked.
func (s *slots) asked(id uint32) *torus.Request {
	r := s.get(id)
	if r != nil && s.tab[id&(maxSlots-1)].own {
		return nil
	}
	return r
}

// setOwn says whether the client looks for the answer to a request, which get has found, itself.
func (s *slots) setOwn(id uint32, own bool) { s.tab[id&(maxSlots-1)].own = own }

// replace puts with in the slot of old; false if there is none.
func (s *slots) replace(old, with *torus.Request) bool {
	for i := s.first; i >= 0; i = s.tab[i].next {
		if s.tab[i].req == old {
			s.tab[i].req = with
			return true
		}
	}
	return false
}

// drop frees the slot of an id that get has found.
func (s *slots) drop(id uint32) {
	i := int32(id & (maxSlots - 1))
	t := &s.tab[i]
	if t.prev >= 0 {
		s.tab[t.prev].next = t.next
	} else {
		s.first = t.next
	}
	if t.next >= 0 {
		s.tab[t.next].prev = t.prev
	} else {
		s.last = t.prev
	}
	t.req, t.next = nil, s.free
	s.free = i
	s.n--
}

// oldest returns the request that has been under way for the longest time, its id and when it was sent.
func (s *slots) oldest() (r *torus.Request, id uint32, sent uint64) {
	if s.first < 0 {
		return nil, 0, 0
	}
	t := &s.tab[s.first]
	return t.req, t.gen<<slotBits | uint32(s.first), t.sent
}

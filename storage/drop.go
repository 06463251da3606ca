package storage

import (
	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
)

// What was appended through the page cache leaves it soon after it has become durable, but for metadata. It is seldom read from there: whoever uses
// a volume has a cache of his own. And pages that come free at once are the next ones to be used, which costs an append a fraction of what others cost: those the kernel takes from somebody else or, in a virtual
// machine, first has to get from the host (docs/performance.md).
const (
	// dropBytes is how much of a block is in the page cache before it is dropped.
	dropBytes = 256 << 10
	// dropAlign: the kernel keeps a page of the cache of which only a part is named, and they are of up to so many bytes. So what was named before is named again with what
	// comes behind it.
	dropAlign = 2 << 20
)

// span is a part of a file.
type span struct{ off, n int64 }

// dropper forgets what is in the page cache of a file, and on the medium. It does so on a helper.
type dropper struct {
	f       *file
	next    []span // to be dropped
	now     []span // being dropped
	running bool
}

var _ loop.Job = (*dropper)(nil)

// durable is called when more of an open block has become so.
func (p *dropper) durable(s uint32) {
	d := p.f.d
	x := &d.slots[s]
	o := &d.opens[x.open]
	if o.cached < dropBytes || o.durable <= o.dropped || x.key.ref().Type == torus.TypeINode {
		return
	}
	_, place := d.place(s)
	from := max(place, (place+int64(o.dropped))&^(dropAlign-1))
	p.next = append(p.next, span{from, place + int64(o.durable) - from})
	o.dropped, o.cached = o.durable, x.length-o.durable
	if !p.running {
		p.begin()
	}
}

func (p *dropper) begin() {
	p.running = true
	p.now, p.next = p.next, p.now[:0]
	p.f.d.loop.Offload(p)
}

// Work implements loop.Job.
func (p *dropper) Work() {
	if !p.f.d.enter() {
		return
	}
	defer p.f.d.leave()
	for _, x := range p.now {
		_ = p.f.f.DropCache(x.off, x.n) // what stays costs memory, no more
	}
}

// Done implements loop.Job.
func (p *dropper) Done() {
	p.running = false
	if d := p.f.d; !d.closed && len(p.next) > 0 {
		p.begin()
	}
}

package sock

import (
	"context"
	"fmt"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/transport"
	"golang.org/x/sys/unix"
)

const (
	dialTimeout = 2 * time.Second
	// A unix socket whose backlog is full refuses for now and does not tell when to come again.
	backlogRetry = time.Millisecond
)

// Dial implements transport.Network. It gives up after two seconds. What is written before Opened is sent then.
func (n *Network) Dial(l loop.Loop, addr string, h transport.Handler) transport.Stream {
	s := &stream{h: h, remote: addr}
	sh, err := n.on(l)
	var a address
	if err == nil {
		a, err = parse(addr)
	}
	if err == nil && a.path == "" && a.port == 0 {
		err = fmt.Errorf("%w: port 0", torus.ErrInvalid)
	}
	if err != nil {
		s.closed = true
		l.Post(func() { h.Closed(s, fmt.Errorf("connect to %s: %w", addr, err)) })
		return s
	}
	s.init(sh)
	d := &dialing{s: s, addr: a, tcpOnly: n.tcpOnly, until: sh.loop.Now() + dialTimeout}
	s.dialing = d
	d.timer = sh.loop.After(dialTimeout, func() { d.fail(unix.ETIMEDOUT) })
	if sa, ok := a.literal(); ok {
		d.left = []unix.Sockaddr{sa}
		d.next()
	} else {
		sh.loop.Offload(d)
	}
	return s
}

// dialing is a stream that is not connected yet: name → addresses → one after the other, until one answers.
type dialing struct {
	s       *stream
	addr    address
	tcpOnly bool
	until   time.Duration // the end of all attempts
	left    []unix.Sockaddr
	timer   *loop.Timer // of the whole
	try     *loop.Timer // of one attempt, or its repetition
	err     error       // of the last attempt, or of the lookup

	reg *loop.Registration
}

// Work looks the name up, on a helper.
func (d *dialing) Work() {
	ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
	defer cancel()
	d.left, d.err = d.addr.lookup(ctx)
}

// Done goes on with what was found.
func (d *dialing) Done() {
	if d.s.dialing == d {
		d.next()
	}
}

// next tries the next address.
func (d *dialing) next() {
	if len(d.left) == 0 {
		d.fail(d.err)
		return
	}
	l := d.s.sh.loop
	sa := d.left[0]
	d.left = d.left[1:]
	// An address that swallows everything must leave time for those behind it.
	if n := len(d.left); n > 0 {
		d.try = l.After((d.until-l.Now())/time.Duration(n+1), func() { d.failed(unix.ETIMEDOUT) })
	}
	if !d.tcpOnly {
		if fd := dialShort(sa); fd >= 0 {
			tuneShort(fd)
			d.s.lendable(fd)
			d.await(fd)
			return
		}
	}
	fd, err := socket(family(sa))
	if err != nil {
		d.failed(err)
		return
	}
	tune(fd, sa)
	// What is ready now is reported on the next turn, so nothing is called from within Dial.
	switch err := unix.Connect(fd, sa); err {
	case nil, unix.EINPROGRESS, unix.EINTR:
		d.await(fd)
	case unix.EAGAIN:
		unix.Close(fd)
		d.left = append(d.left, sa)
		d.try = l.After(backlogRetry, d.next)
	default:
		unix.Close(fd)
		d.failed(err)
	}
}

// await waits for the end of an attempt.
func (d *dialing) await(fd int) {
	var err error
	if d.reg, err = d.s.sh.loop.Add(fd, unix.EPOLLOUT, d); err != nil {
		unix.Close(fd)
		d.failed(err)
	}
}

// Ready is called when an attempt has come to an end.
func (d *dialing) Ready(uint32) {
	fd := d.reg.FD()
	if errno, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err != nil {
		d.failed(err)
		return
	} else if errno != 0 {
		d.failed(unix.Errno(errno))
		return
	}
	if toItself(fd) {
		d.failed(unix.ECONNREFUSED)
		return
	}
	s := d.s
	d.stop()
	d.reg.Remove()
	reg, err := s.sh.loop.Add(fd, inputEvents, s)
	if err != nil {
		unix.Close(fd)
		d.reg = nil
		d.fail(err)
		return
	}
	s.dialing, s.reg = nil, reg
	s.h.Opened(s)
	if s.queued > 0 || s.ending {
		s.schedule()
	}
}

// failed ends one attempt. The next one, or the end, comes on a later turn.
func (d *dialing) failed(err error) {
	d.err = err
	d.s.greeting = greeting{}
	if d.reg != nil {
		d.reg.Close()
		d.reg = nil
	}
	d.try.Stop()
	d.s.sh.loop.Post(func() {
		if d.s.dialing == d {
			d.next()
		}
	})
}

// fail ends the stream that never was.
func (d *dialing) fail(err error) {
	d.s.fail(fmt.Errorf("connect to %s: %w", d.addr.text, err))
}

// stop forgets the timers.
func (d *dialing) stop() {
	d.timer.Stop()
	d.try.Stop()
}

// abort is what Close does to a stream that is not connected.
func (d *dialing) abort() {
	d.stop()
	if d.reg != nil {
		d.reg.Close()
	}
}

// toItself reports whether the connection is one with itself: a port of this machine that nobody listened on, but which
// the kernel chose as our own.
func toItself(fd int) bool {
	local, err1 := unix.Getsockname(fd)
	remote, err2 := unix.Getpeername(fd)
	return err1 == nil && err2 == nil && family(local) != unix.AF_UNIX && format(local) == format(remote)
}

package sock

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/transport"
	"golang.org/x/sys/unix"
)

const (
	backlog        = 4096 // the kernel cuts it to net.core.somaxconn
	acceptsPerTurn = 64
	// How long to leave new connections waiting when there are no descriptors left.
	acceptPause = 100 * time.Millisecond
)

type listener struct {
	sh     *shared
	reg    *loop.Registration
	addr   string
	path   string // of a unix socket, as bound
	inode  uint64 // of that path: it is removed only if it is still ours
	accept func(s transport.Stream) transport.Handler
	resume *loop.Timer

	short   *listener // for those on this machine; nil: there is none
	isShort bool
}

// Listen implements transport.Network. A host name is looked up at once, which may block; a unix socket that
// nobody serves any more is replaced.
func (n *Network) Listen(l loop.Loop, addr string, accept func(s transport.Stream) transport.Handler) (transport.Listener, error) {
	sh, err := n.on(l)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", addr, err)
	}
	a, err := parse(addr)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	sa, ok := a.literal()
	if !ok {
		ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
		defer cancel()
		all, err := a.lookup(ctx)
		if err != nil {
			return nil, &torus.Error{Op: "listen", Obj: "on " + addr, Err: err, Hint: "Name an address of this machine."}
		}
		sa = all[0]
	}
	ln := &listener{sh: sh, accept: accept, addr: addr, path: a.path}
	fd, err := ln.bind(a, sa)
	if err != nil {
		return nil, explain(addr, a, err)
	}
	if a.path == "" {
		if sa, err = unix.Getsockname(fd); err != nil {
			unix.Close(fd)
			return nil, fmt.Errorf("listen on %s: %w", addr, err)
		}
		ln.addr = format(sa)
	}
	if ln.reg, err = sh.loop.Add(fd, unix.EPOLLIN, ln); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("listen on %s: %w", addr, err)
	}
	if a.path == "" {
		if fd := listenShort(sa, a.host == ""); fd >= 0 {
			ln.short = &listener{sh: sh, accept: accept, addr: ln.addr, isShort: true}
			if ln.short.reg, err = sh.loop.Add(fd, unix.EPOLLIN, ln.short); err != nil {
				unix.Close(fd)
				ln.short = nil
			}
		}
	}
	return ln, nil
}

// bind returns a listening socket.
func (ln *listener) bind(a address, sa unix.Sockaddr) (int, error) {
	fd, err := socket(family(sa))
	if err != nil && a.path == "" && a.host == "" { // no IPv6 here
		sa = &unix.SockaddrInet4{Port: a.port}
		fd, err = socket(unix.AF_INET)
	}
	if err != nil {
		return -1, err
	}
	if a.path == "" {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		if family(sa) == unix.AF_INET6 {
			only := 1
			if a.host == "" { // every address, of both kinds
				only = 0
			}
			unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, only)
		}
	}
	err = unix.Bind(fd, sa)
	if err == unix.EADDRINUSE && a.path != "" && stale(a.path) {
		if err = os.Remove(a.path); err == nil {
			err = unix.Bind(fd, sa)
		}
	}
	if err == nil && a.path != "" {
		var st unix.Stat_t
		if err = unix.Stat(a.path, &st); err == nil {
			ln.inode = st.Ino
		}
	}
	if err == nil {
		err = unix.Listen(fd, backlog)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// stale reports whether path is a socket whose owner is gone.
func stale(path string) bool {
	st, err := os.Lstat(path)
	if err != nil || st.Mode().Type() != os.ModeSocket {
		return false
	}
	fd, err := socket(unix.AF_UNIX)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return unix.Connect(fd, &unix.SockaddrUnix{Name: path}) == unix.ECONNREFUSED
}

// explain adds to an error of bind what to do about it.
func explain(addr string, a address, err error) error {
	e := &torus.Error{Op: "listen", Obj: "on " + addr, Err: err}
	switch {
	case errors.Is(err, unix.EADDRINUSE) && a.path != "":
		if st, serr := os.Lstat(a.path); serr == nil && st.Mode().Type() != os.ModeSocket {
			e.Hint = a.path + " exists and is not a socket: choose another path."
		} else {
			e.Hint = "Another process serves " + a.path + ": stop it, or choose another path."
		}
	case errors.Is(err, unix.EADDRINUSE):
		e.Hint = fmt.Sprintf("Another process listens on port %d (`ss -ltnp sport = :%d` shows which): stop it, or choose another port.", a.port, a.port)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		e.Hint = "This machine has no such address (`ip addr` lists those it has)."
	case errors.Is(err, unix.EACCES) && a.path == "":
		e.Hint = "Ports below 1024 need CAP_NET_BIND_SERVICE: choose a higher one."
	case errors.Is(err, unix.ENOENT) && a.path != "":
		e.Hint = "Create the directory of the socket first."
	}
	return e
}

// Ready accepts what waits; what is more than a turn's share is reported again, as the listener is level-triggered.
func (ln *listener) Ready(uint32) {
	for range acceptsPerTurn {
		fd, sa, err := unix.Accept4(ln.reg.FD(), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		switch err {
		case nil:
			ln.accepted(fd, sa)
			if ln.reg == nil {
				return // closed by the handler
			}
		case unix.EAGAIN:
			return
		case unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM:
			// It would be reported again at once, for ever.
			if ln.reg.Modify(0) == nil {
				ln.resume = ln.sh.loop.After(acceptPause, func() { _ = ln.reg.Modify(unix.EPOLLIN) })
			}
			return
		default: // that connection is gone; the next one may be well
		}
	}
}

func (ln *listener) accepted(fd int, sa unix.Sockaddr) {
	s := &stream{remote: ln.addr}
	switch {
	case ln.isShort:
		tuneShort(fd)
		s.lendable(fd)
	case ln.path == "":
		s.remote = format(sa)
		tune(fd, sa)
	}
	s.init(ln.sh)
	reg, err := ln.sh.loop.Add(fd, inputEvents, s)
	if err != nil {
		unix.Close(fd)
		return
	}
	s.reg = reg
	s.h = ln.accept(s)
	switch {
	case s.h == nil:
		s.release()
	case !s.closed:
		s.h.Opened(s)
	}
}

// Addr implements transport.Listener.
func (ln *listener) Addr() string { return ln.addr }

// Close implements transport.Listener; to be called on the loop. It removes the path of a unix socket.
func (ln *listener) Close() error {
	if ln.reg == nil {
		return nil
	}
	if ln.short != nil {
		_ = ln.short.Close()
	}
	ln.resume.Stop()
	if ln.path != "" {
		var st unix.Stat_t
		if unix.Lstat(ln.path, &st) == nil && st.Ino == ln.inode {
			os.Remove(ln.path)
		}
	}
	ln.reg.Close()
	ln.reg = nil
	return nil
}

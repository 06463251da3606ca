package sock

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/coreos/torus"
	"golang.org/x/sys/unix"
)

// address is a parsed tcp://host:port or unix:/path.
type address struct {
	text string
	path string // of a unix socket; "" for TCP
	host string // "" is every address of this machine
	port int
}

const maxPath = 107 // of sun_path, less the terminating NUL

func parse(text string) (address, error) {
	bad := func(why string) (address, error) {
		return address{}, &torus.Error{Op: "parse", Obj: fmt.Sprintf("address %q", text), Err: fmt.Errorf("%w: %s", torus.ErrInvalid, why),
			Hint: "An address is tcp://HOST:PORT or unix:/PATH."}
	}
	a := address{text: text}
	if rest, ok := strings.CutPrefix(text, "unix:"); ok {
		a.path = strings.TrimPrefix(rest, "//")
		switch {
		case a.path == "":
			return bad("the path is missing")
		case len(a.path) > maxPath:
			return bad(fmt.Sprintf("the path has %d bytes, a unix socket's may have %d", len(a.path), maxPath))
		case strings.IndexByte(a.path, 0) >= 0:
			return bad("a NUL in the path")
		}
		return a, nil
	}
	rest, ok := strings.CutPrefix(text, "tcp://")
	if !ok {
		return bad("neither tcp:// nor unix:")
	}
	host, port, err := net.SplitHostPort(rest)
	if err != nil {
		return bad(strings.TrimPrefix(err.Error(), "address "))
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return bad(fmt.Sprintf("port %q is not a number up to 65535", port))
	}
	if strings.IndexByte(host, 0) >= 0 {
		return bad("a NUL in the host")
	}
	a.host, a.port = host, int(n)
	return a, nil
}

// literal returns the socket address if no name has to be looked up for it.
func (a address) literal() (unix.Sockaddr, bool) {
	if a.path != "" {
		return &unix.SockaddrUnix{Name: a.path}, true
	}
	if a.host == "" {
		return &unix.SockaddrInet6{Port: a.port}, true
	}
	ip, err := netip.ParseAddr(a.host)
	if err != nil {
		return nil, false
	}
	return sockaddr(ip, a.port), true
}

// lookup resolves the host name; it blocks.
func (a address) lookup(ctx context.Context) ([]unix.Sockaddr, error) {
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", a.host)
	if err != nil {
		return nil, err
	}
	if len(ips) == 0 {
		return nil, fmt.Errorf("host %s has no address", a.host)
	}
	var v4, v6 []unix.Sockaddr
	for _, ip := range ips {
		if ip = ip.Unmap(); ip.Is4() {
			v4 = append(v4, sockaddr(ip, a.port))
		} else {
			v6 = append(v6, sockaddr(ip, a.port))
		}
	}
	return append(v4, v6...), nil
}

func sockaddr(ip netip.Addr, port int) unix.Sockaddr {
	if ip = ip.Unmap(); ip.Is4() {
		return &unix.SockaddrInet4{Port: port, Addr: ip.As4()}
	}
	sa := &unix.SockaddrInet6{Port: port, Addr: ip.As16()}
	if zone := ip.Zone(); zone != "" {
		if n, err := strconv.ParseUint(zone, 10, 32); err == nil {
			sa.ZoneId = uint32(n)
		} else if ifi, err := net.InterfaceByName(zone); err == nil {
			sa.ZoneId = uint32(ifi.Index)
		}
	}
	return sa
}

func family(sa unix.Sockaddr) int {
	switch sa.(type) {
	case *unix.SockaddrUnix:
		return unix.AF_UNIX
	case *unix.SockaddrInet6:
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// format is the text of a TCP socket address, in the form Dial takes.
func format(sa unix.Sockaddr) string {
	var ip netip.Addr
	var port int
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		ip, port = netip.AddrFrom4(sa.Addr), sa.Port
	case *unix.SockaddrInet6:
		ip, port = netip.AddrFrom16(sa.Addr).Unmap(), sa.Port
		if sa.ZoneId != 0 {
			ip = ip.WithZone(strconv.Itoa(int(sa.ZoneId)))
		}
	default:
		return ""
	}
	return "tcp://" + netip.AddrPortFrom(ip, uint16(port)).String()
}

// socket makes a non-blocking stream socket.
func socket(family int) (int, error) {
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	return fd, nil
}

// local reports whether the address is of this machine or of a private network.
func local(sa unix.Sockaddr) bool {
	var ip netip.Addr
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		ip = netip.AddrFrom4(sa.Addr)
	case *unix.SockaddrInet6:
		ip = netip.AddrFrom16(sa.Addr).Unmap()
	}
	return ip.IsLoopback() || ip.IsPrivate() || ip.IsLinkLocalUnicast()
}

// tune sets what every TCP connection wants. It is best effort: without, it is slower or dies later.
func tune(fd int, sa unix.Sockaddr) {
	if family(sa) == unix.AF_UNIX {
		return
	}
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1) // we gather ourselves
	if cc, err := unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION); err == nil && cc == "bbr" && local(sa) {
		// BBR paces what it sends by timers. That is for paths that lose packets; on a local network it is only work.
		unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, "cubic")
	}
	// A peer that vanished without a word is noticed within a minute even by protocols without pings.
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 30)
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 10)
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 3)
}

package sock

import (
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// Who listens on a TCP port listens on a unix socket as well, whose name is made of the address and the port, in the abstract namespace (unix(7)), which
// like the port is that of the network namespace. Who dials an address of this machine tries that first: it does the same work at two
// thirds of the cost of TCP over the loopback interface (docs/performance.md). Where there is none TCP is used, as from everywhere else.

// shortcutName is the name of the unix socket of a TCP address. everyAddress is the host of a listener on those of both kinds.
func shortcutName(host string, port int) string {
	return "@torus/tcp/" + host + "/" + strconv.Itoa(port)
}

const everyAddress = "*"

func addrPort(sa unix.Sockaddr) (ip netip.Addr, port int, ok bool) {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrFrom4(sa.Addr), sa.Port, true
	case *unix.SockaddrInet6:
		return netip.AddrFrom16(sa.Addr).Unmap(), sa.Port, true
	}
	return ip, 0, false
}

// listenShort returns a socket that listens for those who dial sa, or, if all, any address, from this machine; -1 if there can be none.
func listenShort(sa unix.Sockaddr, all bool) int {
	ip, port, _ := addrPort(sa)
	host := ip.String()
	if all {
		host = everyAddress
	}
	fd, err := socket(unix.AF_UNIX)
	if err != nil {
		return -1
	}
	if unix.Bind(fd, &unix.SockaddrUnix{Name: shortcutName(host, port)}) != nil || unix.Listen(fd, backlog) != nil {
		unix.Close(fd)
		return -1
	}
	return fd
}

// dialShort connects to who listens on sa, if that is on this machine, by the shortcut; -1 if there is none.
func dialShort(sa unix.Sockaddr) int {
	ip, port, ok := addrPort(sa)
	if !ok || ip.IsLinkLocalUnicast() || !ofThisMachine(ip) { // link-local addresses are told apart by their interface only
		return -1
	}
	any := netip.IPv6Unspecified()
	if ip.Is4() {
		any = netip.IPv4Unspecified()
	}
	for _, host := range []string{ip.String(), any.String(), everyAddress} {
		if fd := connectShort(shortcutName(host, port)); fd >= 0 {
			return fd
		}
	}
	return -1
}

func connectShort(name string) int {
	fd, err := socket(unix.AF_UNIX)
	if err != nil {
		return -1
	}
	if unix.Connect(fd, &unix.SockaddrUnix{Name: name}) == nil && trusted(fd) {
		return fd
	}
	unix.Close(fd)
	return -1
}

// trusted reports whether who listens is the superuser or we ourselves: anybody may take a name, if before the one whose it should be.
func trusted(fd int) bool {
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	return err == nil && (cred.Uid == 0 || int(cred.Uid) == os.Geteuid())
}

func ofThisMachine(ip netip.Addr) bool {
	if ip.IsLoopback() {
		return true
	}
	all, err := net.InterfaceAddrs()
	return err == nil && slices.ContainsFunc(all, func(a net.Addr) bool {
		p, err := netip.ParsePrefix(a.String())
		return err == nil && p.Addr().Unmap() == ip.WithZone("")
	})
}

// shortcutBuffer is what may be on its way through a shortcut: a unix socket does not find out by itself how much that should be.
const shortcutBuffer = 400 << 10

func tuneShort(fd int) {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, shortcutBuffer) != nil {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, shortcutBuffer) // the kernel cuts it to net.core.wmem_max
	}
}

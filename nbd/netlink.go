package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// netlink is a generic netlink socket: one question at a time, integers in the machine's byte order.
type netlink struct {
	fd  int
	seq uint32
}

// netlinkTimeout is how long the kernel may take to answer; it answers while it is being asked.
const netlinkTimeout = 10 * time.Second

func openNetlink() (*netlink, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_GENERIC)
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EAFNOSUPPORT) {
		return nil, fmt.Errorf("generic netlink: %w: %w", err, ErrNoKernel)
	}
	if err != nil {
		return nil, fmt.Errorf("generic netlink: %w", os.NewSyscallError("socket", err))
	}
	nl := &netlink{fd: fd}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		nl.close()
		return nil, fmt.Errorf("generic netlink: %w", os.NewSyscallError("bind", err))
	}
	timeout := unix.NsecToTimeval(int64(netlinkTimeout))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		nl.close()
		return nil, fmt.Errorf("generic netlink: %w", os.NewSyscallError("setsockopt", err))
	}
	return nl, nil
}

func (nl *netlink) close() { unix.Close(nl.fd) }

// family asks for the number of a generic netlink family. The nbd driver registers its own when it is loaded.
func (nl *netlink) family(name string) (uint16, error) {
	reply, err := nl.ask(unix.GENL_ID_CTRL, unix.CTRL_CMD_GETFAMILY, 1, appendAttr(nil, unix.CTRL_ATTR_FAMILY_NAME, append([]byte(name), 0)))
	if errors.Is(err, unix.ENOENT) {
		return 0, ErrNoKernel
	}
	if err != nil {
		return 0, fmt.Errorf("generic netlink family %q: %w", name, err)
	}
	v, ok := findAttr(reply, unix.CTRL_ATTR_FAMILY_ID)
	if !ok || len(v) != 2 {
		return 0, fmt.Errorf("generic netlink family %q: the kernel's answer has no number", name)
	}
	return binary.NativeEndian.Uint16(v), nil
}

// message encodes one request.
func message(family uint16, cmd, version uint8, seq uint32, attrs []byte) []byte {
	n := binary.NativeEndian
	b := n.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+unix.GENL_HDRLEN+len(attrs)))
	b = n.AppendUint16(b, family)
	b = n.AppendUint16(b, unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	b = n.AppendUint32(b, seq)
	b = n.AppendUint32(b, 0) // port: the kernel fills it in
	b = append(b, cmd, version, 0, 0)
	return append(b, attrs...)
}

// ask sends one request and waits for its acknowledgement. It returns the attributes of the reply before it, if
// there is one; an error is the kernel's errno.
func (nl *netlink) ask(family uint16, cmd, version uint8, attrs []byte) (reply []byte, err error) {
	nl.seq++
	if _, err := unix.Write(nl.fd, message(family, cmd, version, nl.seq, attrs)); err != nil {
		return nil, os.NewSyscallError("netlink send", err)
	}
	buf := make([]byte, 64<<10)
	for {
		got, err := unix.Read(nl.fd, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, os.NewSyscallError("netlink receive", err)
		}
		for b := buf[:got]; len(b) > 0; {
			if len(b) < unix.SizeofNlMsghdr {
				return nil, errors.New("netlink: half a message")
			}
			n := int(binary.NativeEndian.Uint32(b))
			if n < unix.SizeofNlMsghdr || n > len(b) {
				return nil, errors.New("netlink: a message of a wrong length")
			}
			typ, seq, body := binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint32(b[8:]), b[unix.SizeofNlMsghdr:n]
			b = b[min(align(n), len(b)):]
			switch {
			case seq != nl.seq: // an answer to an earlier question
			case typ == unix.NLMSG_ERROR:
				if len(body) < 4 {
					return nil, errors.New("netlink: half an acknowledgement")
				}
				if code := int32(binary.NativeEndian.Uint32(body)); code != 0 {
					return nil, unix.Errno(-code)
				}
				return reply, nil
			case typ == family && len(body) >= unix.GENL_HDRLEN:
				reply = append([]byte(nil), body[unix.GENL_HDRLEN:]...)
			}
		}
	}
}

func align(n int) int { return (n + unix.NLA_ALIGNTO - 1) &^ (unix.NLA_ALIGNTO - 1) }

// appendAttr appends one attribute, padded.
func appendAttr(b []byte, typ uint16, v []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.SizeofNlAttr+len(v)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, v...)
	return append(b, make([]byte, align(len(v))-len(v))...)
}

func appendAttrU32(b []byte, typ uint16, v uint32) []byte {
	return appendAttr(b, typ, binary.NativeEndian.AppendUint32(nil, v))
}

func appendAttrU64(b []byte, typ uint16, v uint64) []byte {
	return appendAttr(b, typ, binary.NativeEndian.AppendUint64(nil, v))
}

// flagBits are the bits of an attribute's type that are not its number.
const flagBits = unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER

// findAttr returns the value of the first attribute of that type.
func findAttr(b []byte, typ uint16) ([]byte, bool) {
	for len(b) >= unix.SizeofNlAttr {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofNlAttr || n > len(b) {
			return nil, false
		}
		if binary.NativeEndian.Uint16(b[2:])&^flagBits == typ {
			return b[unix.SizeofNlAttr:n], true
		}
		b = b[min(align(n), len(b)):]
	}
	return nil, false
}

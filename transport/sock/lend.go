package sock

import (
	"fmt"
	"os"
	"unsafe"

	"github.com/coreos/torus"
	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/transport"
	"golang.org/x/sys/unix"
)

// The ends of a shortcut can share memory. With its first bytes each sends the descriptor of the file in which its shared buffers lie (buf.Share), if it has
// one and the other side is the superuser or the same user; the other side maps that, to read only. To lend is then to say where something
// lies, and to fetch is to copy it from there: a quarter of what sending it through the socket costs (docs/performance.md).

var _ transport.Lender = (*stream)(nil)

// fetchSize is how much is copied at a time. What is copied at once in pieces of a megabyte goes past the processor's caches, and who verifies it right after that has
// to wait for it.
const fetchSize = 64 << 10

// greeting is what is left to be done of the exchange of descriptors.
type greeting struct {
	send   bool // ours has not been sent
	expect bool // nothing has been received
}

// lendable has s exchange descriptors, as the first thing that it does.
func (s *stream) lendable(fd int) {
	if cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil && (cred.Uid == 0 || int(cred.Uid) == os.Geteuid()) {
		s.greeting = greeting{send: buf.SharedFD() >= 0, expect: true}
	}
}

// Lend implements transport.Lender.
func (s *stream) Lend(b []byte) (at uint64, ok bool) {
	if !s.lends || !s.writable() {
		return 0, false
	}
	return buf.SharedAt(b)
}

// CanFetch implements transport.Lender.
func (s *stream) CanFetch() bool { return s.theirs != nil }

// Fetch implements transport.Lender.
func (s *stream) Fetch(dst []byte, at uint64) error {
	if s.closed {
		return torus.ErrClosed
	}
	if size := uint64(len(s.theirs)); at > size || uint64(len(dst)) > size-at {
		return fmt.Errorf("fetch from %s: %d bytes at %#x: %w", s.remote, len(dst), at, torus.ErrInvalid)
	}
	for n, from := 0, s.theirs[at:]; n < len(dst); {
		n += copy(dst[n:min(n+fetchSize, len(dst))], from[n:])
	}
	// Whoever lends shuts the socket down before it uses the memory again, so that this tells.
	fds := [1]unix.PollFd{{Fd: int32(s.reg.FD()), Events: unix.POLLRDHUP}}
	for {
		n, err := unix.Poll(fds[:], 0)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return fmt.Errorf("fetch from %s: %w", s.remote, err)
		case n > 0:
			return fmt.Errorf("fetch from %s: it has closed the connection: %w", s.remote, torus.ErrClosed)
		default:
			return nil
		}
	}
}

// unlend ends all of that. Nothing can be fetched any more from the moment that the socket is shut down, even if somebody has a copy of the descriptor.
func (s *stream) unlend() {
	if s.lends {
		s.lends = false
		_ = unix.Shutdown(s.reg.FD(), unix.SHUT_RDWR)
	}
	if s.theirs != nil {
		_ = unix.Munmap(s.theirs)
		s.theirs = nil
	}
}

// sendGreeting sends what iovecs hold along with our descriptor.
func (s *stream) sendGreeting(hdr *unix.Msghdr) (n int, errno unix.Errno) {
	oob := unix.UnixRights(buf.SharedFD())
	hdr.Control = &oob[0]
	hdr.SetControllen(len(oob))
	r, _, errno := unix.Syscall(unix.SYS_SENDMSG, uintptr(s.reg.FD()), uintptr(unsafe.Pointer(hdr)), unix.MSG_NOSIGNAL)
	if errno != 0 {
		return 0, errno
	}
	s.greeting.send, s.lends = false, true
	return int(r), 0
}

// receiveGreeting receives into iovecs, and takes the descriptor that came along.
func (s *stream) receiveGreeting(iovecs []unix.Iovec) (n int, errno unix.Errno) {
	oob := make([]byte, unix.CmsgSpace(4))
	hdr := unix.Msghdr{Iov: &iovecs[0], Control: &oob[0]}
	hdr.SetIovlen(len(iovecs))
	hdr.SetControllen(len(oob))
	r, _, errno := unix.Syscall(unix.SYS_RECVMSG, uintptr(s.reg.FD()), uintptr(unsafe.Pointer(&hdr)), unix.MSG_CMSG_CLOEXEC)
	if errno != 0 {
		return 0, errno
	}
	if r > 0 {
		s.greeting.expect = false
	}
	messages, err := unix.ParseSocketControlMessage(oob[:hdr.Controllen])
	if err != nil {
		return int(r), 0
	}
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			continue
		}
		for _, fd := range fds {
			if s.theirs == nil {
				s.theirs = mapTheirs(fd)
			}
			unix.Close(fd)
		}
	}
	return int(r), 0
}

// mapTheirs maps the memory of the other side; nil if it is not such that it could not hurt us.
func mapTheirs(fd int) []byte {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil || st.Size <= 0 {
		return nil
	}
	if seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0); err != nil || seals&unix.F_SEAL_SHRINK == 0 {
		return nil // to read behind its end would be our end
	}
	mem, err := unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return nil
	}
	return mem
}

package sock

import (
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/coreos/torus"
	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/transport"
	"github.com/coreos/torus/vfs"
	"golang.org/x/sys/unix"
)

// The ends of a shortcut can share memory. With its first bytes each sends the descriptor of the file in which its shared buffers lie (buf.Share), if it has
// one and the other side is the superuser or the same user; the other side maps that, to read only. To lend is then to say where something
// lies: nothing is copied (docs/performance.md).
//
// An end that is trusted like that can be handed files, too, whose descriptors come with later bytes: to it who says that it expects one, since to
// receive them costs more than bytes alone.
//
// Whoever has borrowed something does not close its socket, and does not shut it down, before it has given everything back. So a socket on which the other side has
// closed its half, or which has lost the other side altogether, since that was killed, tells its owner that what it has lent is its own again. Only that the disk may still
// read what one has asked it to write who was killed, from the very pages: those are not used again (buf.Abandon).

var _ transport.Lender = (*stream)(nil)

// greeting is what is left to be done of the exchange of descriptors.
type greeting struct {
	send   bool // ours has not been sent
	expect bool // nothing has been received
	trust  bool // what comes is taken
}

// loan is something that is lent.
type loan struct {
	owner transport.Releaser
	size  int
}

// passing is files on their way between the ends.
type passing struct {
	out    vfs.Reader // goes with the next bytes; nil: none
	in     vfs.Reader // has come
	expect bool
}

// memory is that of both ends, as far as it is shared. It outlives its stream while something is lent or borrowed.
type memory struct {
	lends    bool // the other side has our descriptor
	loans    map[uint32]loan
	lent     int    // bytes of them
	theirs   []byte // memory of the other side; nil: none
	borrowed int    // pieces of it
	parting  *parting
}

// lendable has s exchange descriptors, as the first thing that it does. One that is not wanted may come all the same, and is closed.
func (s *stream) lendable(fd int) {
	s.greeting.expect = true
	if cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil && (cred.Uid == 0 || int(cred.Uid) == os.Geteuid()) {
		s.greeting.send, s.greeting.trust = buf.SharedFD() >= 0, true
	}
}

// Lend implements transport.Lender.
func (s *stream) Lend(b []byte, id uint32, owner transport.Releaser) (at uint64, ok bool) {
	if _, twice := s.memory.loans[id]; twice || !s.memory.lends || !s.writable() || kept.bytes.Load() > maxKept {
		return 0, false
	}
	if at, ok = buf.SharedAt(b); ok {
		if s.memory.loans == nil {
			s.memory.loans = map[uint32]loan{}
		}
		s.memory.loans[id] = loan{owner, len(b)}
		s.memory.lent += len(b)
	}
	return at, ok
}

// Reclaim implements transport.Lender.
func (s *stream) Reclaim(id uint32) bool {
	x, ok := s.memory.loans[id]
	if ok {
		delete(s.memory.loans, id)
		s.memory.lent -= x.size
		x.owner.Release()
	}
	return ok
}

// Lent implements transport.Lender.
func (s *stream) Lent() int { return s.memory.lent }

// CanBorrow implements transport.Lender.
func (s *stream) CanBorrow() bool { return s.memory.theirs != nil }

// Borrow implements transport.Lender.
func (s *stream) Borrow(at uint64, n int) ([]byte, error) {
	if s.closed {
		return nil, torus.ErrClosed
	}
	m := &s.memory
	if size := uint64(len(m.theirs)); at > size || uint64(n) > size-at {
		return nil, fmt.Errorf("borrow %d bytes at %#x from %s: %w", n, at, s.remote, torus.ErrInvalid)
	}
	m.borrowed++
	return m.theirs[at:][:n:n], nil
}

// GiveBack implements transport.Lender.
func (s *stream) GiveBack() {
	m := &s.memory
	if m.borrowed--; m.borrowed == 0 && m.parting != nil {
		m.parting.gaveBack()
	}
}

// Show implements transport.Lender.
func (s *stream) Show(b []byte) (at uint64, ok bool) {
	if !s.memory.lends || !s.writable() {
		return 0, false
	}
	return buf.SharedAt(b)
}

// SendFile implements transport.Lender.
func (s *stream) SendFile(f vfs.Reader) bool {
	if !s.memory.lends || !s.writable() || s.passing.out != nil || f.Descriptor(0, 1) < 0 {
		return false
	}
	s.passing.out = f
	return true
}

// ExpectFile implements transport.Lender.
func (s *stream) ExpectFile() { s.passing.expect = true }

// TakeFile implements transport.Lender.
func (s *stream) TakeFile() vfs.Reader {
	f := s.passing.in
	s.passing = passing{out: s.passing.out}
	return f
}

// drop closes the files that nobody has got.
func (p *passing) drop() {
	for _, f := range []vfs.Reader{p.out, p.in} {
		if f != nil {
			f.Close()
		}
	}
	*p = passing{}
}

// kept is all that is lent on connections that have ended. While the other sides of those hang, no more than maxKept bytes of it gather.
var kept struct {
	sync.Mutex
	all   map[*parting]struct{} // also those that cannot be waited for, so that nobody uses their memory again
	bytes atomic.Int64
}

const maxKept = 32 << 20

func (p *parting) keep() {
	kept.Lock()
	defer kept.Unlock()
	if kept.all == nil {
		kept.all = map[*parting]struct{}{}
	}
	kept.all[p] = struct{}{}
	kept.bytes.Add(int64(p.m.lent))
}

func (p *parting) done() {
	p.reg.Close()
	kept.Lock()
	defer kept.Unlock()
	delete(kept.all, p)
}

// parting is the end of a connection on which something is still lent or borrowed. Its stream has been released already.
type parting struct {
	m   *memory
	reg *loop.Registration
}

var _ loop.FD = (*parting)(nil)

// part ends the life of the socket and of the memory, as soon as may be.
func (s *stream) part() {
	m := &s.memory
	if m.borrowed == 0 && len(m.loans) == 0 {
		m.unmap()
		s.reg.Close()
		return
	}
	s.reg.Remove()
	p := &parting{m: m}
	p.keep()
	reg, err := s.sh.loop.Add(s.reg.FD(), unix.EPOLLRDHUP|unix.EPOLLET, p)
	if err != nil { // the kernel is out of memory: what is lent stays lent, and the descriptor open
		return
	}
	p.reg, m.parting = reg, p
	if m.borrowed == 0 {
		p.gaveBack()
	}
}

// gaveBack: nothing is borrowed any more.
func (p *parting) gaveBack() {
	p.m.unmap()
	if len(p.m.loans) == 0 {
		p.done()
		return
	}
	_ = unix.Shutdown(p.reg.FD(), unix.SHUT_WR)
}

// Ready is called when the other side has nothing borrowed any more.
func (p *parting) Ready(uint32) {
	for id, x := range p.m.loans {
		delete(p.m.loans, id)
		x.owner.Abandon()
	}
	kept.bytes.Add(-int64(p.m.lent))
	p.m.lent = 0
	if p.m.borrowed == 0 {
		p.done()
	}
}

// mapped is what there is of other processes' memory in this one.
var mapped struct {
	sync.Mutex
	all map[*byte][]byte
}

// take makes mem, unless it is nil, the memory of the other side.
func (m *memory) take(mem []byte) {
	if mem == nil {
		return
	}
	mapped.Lock()
	defer mapped.Unlock()
	if mapped.all == nil {
		mapped.all = map[*byte][]byte{}
	}
	mapped.all[&mem[0]] = mem
	m.theirs = mem
}

func (m *memory) unmap() {
	if m.theirs != nil {
		mapped.Lock()
		defer mapped.Unlock()
		delete(mapped.all, &m.theirs[0])
		_ = unix.Munmap(m.theirs)
		m.theirs = nil
	}
}

// LetGo takes what was borrowed out of this process's page tables, where it would stay, and be counted as memory of this process, too, for as long as the connection
// lives. It comes back as it is looked at.
func LetGo() {
	mapped.Lock()
	defer mapped.Unlock()
	for _, mem := range mapped.all {
		_ = unix.Madvise(mem, unix.MADV_DONTNEED)
	}
}

// accompanied reports whether a descriptor is to go along with the next bytes.
func (s *stream) accompanied() bool { return s.greeting.send || s.passing.out != nil }

// sendAlong sends what iovecs hold along with a descriptor: with the first bytes of all that of our memory, later that of a file.
func (s *stream) sendAlong(hdr *unix.Msghdr) (n int, errno unix.Errno) {
	greets := s.greeting.send
	fd := buf.SharedFD()
	if !greets {
		fd = s.passing.out.Descriptor(0, 1)
	}
	oob := unix.UnixRights(fd)
	hdr.Control = &oob[0]
	hdr.SetControllen(len(oob))
	r, _, errno := unix.Syscall(unix.SYS_SENDMSG, uintptr(s.reg.FD()), uintptr(unsafe.Pointer(hdr)), unix.MSG_NOSIGNAL)
	if errno != 0 && errno != unix.ETOOMANYREFS {
		return 0, errno
	}
	if greets {
		s.greeting.send, s.memory.lends = false, errno == 0
	} else {
		s.passing.out.Close()
		s.passing.out = nil
	}
	if errno != 0 { // too many descriptors are on their way to processes that do not take them
		return 0, unix.EINTR // once more, without
	}
	return int(r), 0
}

// receiveAlong receives into iovecs, and takes the descriptor that came along.
func (s *stream) receiveAlong(iovecs []unix.Iovec) (n int, errno unix.Errno) {
	greets := s.greeting.expect
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
			s.receiveDescriptor(fd, greets)
		}
	}
	return int(r), 0
}

func (s *stream) receiveDescriptor(fd int, greets bool) {
	p := &s.passing
	switch {
	case !s.greeting.trust:
	case greets && s.memory.theirs == nil:
		s.memory.take(mapTheirs(fd))
	case !greets && p.expect && p.in == nil:
		if f, err := vfs.FromDescriptor(fd); err == nil {
			p.in = f
		}
		return
	}
	unix.Close(fd)
}

// mapTheirs maps the memory of the other side; nil if it is not such that it could not hurt us: to read behind the end of a file, or what the kernel cannot find
// a page for, would be our end.
func mapTheirs(fd int) []byte {
	if seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0); err != nil || seals&unix.F_SEAL_SHRINK == 0 {
		return nil
	}
	var st unix.Stat_t // it does not become smaller from here on
	if unix.Fstat(fd, &st) != nil || st.Size <= 0 || st.Size > buf.SharedSize {
		return nil
	}
	var fs unix.Statfs_t
	if unix.Fstatfs(fd, &fs) != nil || fs.Type != unix.TMPFS_MAGIC {
		return nil
	}
	mem, err := unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return nil
	}
	return mem
}

package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The bytes of a CONNECT message, worked out by hand from linux/netlink.h, genetlink.h and nbd-netlink.h.
func TestConnectMessage(t *testing.T) {
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Fatal("the golden bytes are little endian; write them down for this machine, too")
	}
	d := kernelDevice{index: 7, size: 1 << 30, blockSize: 512, flags: 0xd6d, timeout: 1500 * time.Millisecond, dead: 30 * time.Second, sockets: []int{5, 9}}
	got := message(0x1b, nlConnect, nlVersion, 3, d.attributes())
	want := strings.ReplaceAll(`
		8c000000 1b00 0500 03000000 00000000   length, family, REQUEST|ACK, sequence, port
		01 01 0000                             CONNECT, version
		0800 0100 07000000                     index 7
		0c00 0200 0000004000000000             1 GiB
		0c00 0300 0002000000000000             blocks of 512
		0c00 0500 6d0d000000000000             transmission flags
		0c00 0400 0200000000000000             timeout 2 s
		0c00 0800 1e00000000000000             dead connection timeout 30 s
		1c00 0780                              sockets, nested
		  0c00 0180 0800 0100 05000000         item, nested: descriptor 5
		  0c00 0180 0800 0100 09000000         item, nested: descriptor 9
	`, "\t", " ")
	var digits strings.Builder
	for _, line := range strings.Split(want, "\n") {
		line, _, _ = strings.Cut(strings.TrimLeft(line, " "), "  ")
		digits.WriteString(strings.ReplaceAll(line, " ", ""))
	}
	if w, err := hex.DecodeString(digits.String()); err != nil {
		t.Fatal(err)
	} else if binary.LittleEndian.PutUint32(w, uint32(len(w))); !bytes.Equal(got, w) {
		t.Errorf("got  %x\nwant %x", got, w)
	}
}

// The netlink code talks to the running kernel: the controller's own family is always there.
func TestNetlinkFamily(t *testing.T) {
	nl, err := openNetlink()
	if err != nil {
		t.Fatal(err)
	}
	defer nl.close()
	id, err := nl.family("nlctrl")
	if err != nil || id != unix.GENL_ID_CTRL {
		t.Fatalf("nlctrl is %d, %v", id, err)
	}
	if _, err := nl.family("torus_none"); !errors.Is(err, ErrNoKernel) || !strings.Contains(err.Error(), "modprobe nbd") {
		t.Errorf("a family that is not there: %v", err)
	}
	if id, err = nl.family("nlctrl"); err != nil || id != unix.GENL_ID_CTRL {
		t.Fatalf("after an error: %d, %v", id, err)
	}
}

// fakeKernel answers netlink requests in place of the kernel.
func fakeKernel(t *testing.T, answer func(family uint16, cmd uint8, attrs []byte) (reply []byte, errno unix.Errno)) *netlink {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 64<<10)
		for {
			n, err := unix.Read(fds[1], buf)
			if err != nil || n == 0 {
				return
			}
			b := buf[:n]
			family, seq := binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint32(b[8:])
			reply, errno := answer(family, b[16], bytes.Clone(b[20:]))
			stale := netlinkMessage(unix.NLMSG_ERROR, seq-1, binary.NativeEndian.AppendUint32(nil, 0))
			out := append(stale, netlinkMessage(unix.NLMSG_ERROR, seq, binary.NativeEndian.AppendUint32(nil, uint32(-int32(errno))))...)
			if reply != nil {
				out = append(netlinkMessage(family, seq, append([]byte{b[16], 1, 0, 0}, reply...)), out...)
			}
			if _, err := unix.Write(fds[1], out); err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() { unix.Close(fds[0]); <-done; unix.Close(fds[1]) })
	return &netlink{fd: fds[0]}
}

func netlinkMessage(typ uint16, seq uint32, body []byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(body)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, 0)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = binary.NativeEndian.AppendUint32(b, 0)
	b = append(b, body...)
	return append(b, make([]byte, align(len(b))-len(b))...)
}

const fakeFamily = 0x23

// loaded is a kernel with an nbd driver that answers CONNECT and DISCONNECT so.
func loaded(t *testing.T, reply []byte, errno unix.Errno, seen func(cmd uint8, attrs []byte)) *netlink {
	return fakeKernel(t, func(family uint16, cmd uint8, attrs []byte) ([]byte, unix.Errno) {
		if family == unix.GENL_ID_CTRL {
			if v, ok := findAttr(attrs, unix.CTRL_ATTR_FAMILY_NAME); cmd != unix.CTRL_CMD_GETFAMILY || !ok || string(v) != "nbd\x00" {
				return nil, unix.EINVAL
			}
			return appendAttr(appendAttr(nil, unix.CTRL_ATTR_FAMILY_NAME, []byte("nbd\x00")), unix.CTRL_ATTR_FAMILY_ID, binary.NativeEndian.AppendUint16(nil, fakeFamily)), 0
		}
		if family != fakeFamily {
			return nil, unix.EOPNOTSUPP
		}
		seen(cmd, attrs)
		return reply, errno
	})
}

func TestAttachKernel(t *testing.T) {
	s := newStand(t)
	dial := func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", s.sock)
	}
	// The kernel duplicates the first socket, as it would keep it.
	var kept int
	nl := loaded(t, appendAttrU32(nil, nlAttrIndex, 12), 0, func(cmd uint8, attrs []byte) {
		size, _ := findAttr(attrs, nlAttrSize)
		flags, _ := findAttr(attrs, nlAttrFlags)
		sockets, _ := findAttr(attrs, nlAttrSockets)
		if cmd != nlConnect || binary.NativeEndian.Uint64(size) != standSize || binary.NativeEndian.Uint64(flags) != uint64(flagsSimple) || len(sockets) != 3*12 {
			t.Errorf("command %d %x", cmd, attrs)
			return
		}
		item, _ := findAttr(sockets, nlSockItem)
		fd, _ := findAttr(item, nlSockFD)
		var err error
		if kept, err = unix.Dup(int(binary.NativeEndian.Uint32(fd))); err != nil {
			t.Error(err)
		}
	})
	path, err := attachKernel(t.Context(), nl, "", dial, KernelOptions{Export: "disk", Connections: 3})
	if err != nil || path != "/dev/nbd12" {
		t.Fatal(path, err)
	}
	s.until("only the kernel's connection is left", func() bool { return s.srv.Sessions() == 1 && s.dir.Attached["disk"] == 1 })
	// What is kept is in transmission, with nothing read too much or too little.
	if err := unix.SetNonblock(kept, false); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Write(kept, pack(uint32(magicRequest), uint16(0), uint16(cmdRead), uint64(77), uint64(1), uint32(3))); err != nil {
		t.Fatal(err)
	}
	var reply [simpleSize + 3]byte
	if _, err := io.ReadFull(fdReader(kept), reply[:]); err != nil || !bytes.Equal(reply[:], pack(uint32(magicSimple), uint32(0), uint64(77), "\x00\x00\x00")) {
		t.Errorf("%x %v", reply, err)
	}
	unix.Close(kept)

	for name, x := range map[string]struct {
		device, export string
		o              KernelOptions
		errno          unix.Errno
		want           string
	}{
		"busy":        {device: "/dev/nbd3", errno: unix.EBUSY, want: "/dev/nbd3 is connected already"},
		"not root":    {device: "/dev/nbd3", errno: unix.EPERM, want: "needs root"},
		"no device":   {device: "/dev/nbd99", errno: unix.EINVAL, want: "is there such a device"},
		"not a path":  {device: "/dev/sda", want: "is not a kernel nbd device"},
		"no export":   {device: "/dev/nbd3", export: "nope", want: "the server refuses"},
		"odd blocks":  {device: "/dev/nbd3", o: KernelOptions{BlockSize: 1000}, want: "block size of 1000"},
		"huge blocks": {device: "/dev/nbd3", o: KernelOptions{BlockSize: 8192}, want: "block size of 8192"},
	} {
		t.Run(name, func(t *testing.T) {
			x.o.Export = x.export
			nl := loaded(t, nil, x.errno, func(uint8, []byte) {})
			_, err := attachKernel(t.Context(), nl, x.device, dial, x.o)
			if err == nil || !strings.Contains(err.Error(), x.want) {
				t.Errorf("error %v", err)
			}
		})
	}
}

type fdReader int

func (f fdReader) Read(b []byte) (int, error) { return unix.Read(int(f), b) }

func TestAttachKernelWithoutDriver(t *testing.T) {
	nl := fakeKernel(t, func(uint16, uint8, []byte) ([]byte, unix.Errno) { return nil, unix.ENOENT })
	dialed := false
	_, err := attachKernel(t.Context(), nl, "/dev/nbd0", func(context.Context) (net.Conn, error) { dialed = true; return nil, errors.New("no") }, KernelOptions{})
	if !errors.Is(err, ErrNoKernel) || dialed {
		t.Errorf("error %v, dialed %v", err, dialed)
	}
	if err := detachKernel(nl, "/dev/nbd0"); !errors.Is(err, ErrNoKernel) {
		t.Errorf("detach: %v", err)
	}
}

func TestDetachKernel(t *testing.T) {
	var got []byte
	nl := loaded(t, nil, 0, func(cmd uint8, attrs []byte) { got = append([]byte{cmd}, attrs...) })
	if err := detachKernel(nl, "/dev/nbd5"); err != nil {
		t.Fatal(err)
	}
	if want := append([]byte{nlDisconnect}, appendAttrU32(nil, nlAttrIndex, 5)...); !bytes.Equal(got, want) {
		t.Errorf("sent %x, not %x", got, want)
	}
	if err := detachKernel(nl, "/dev/nbd5p1"); err == nil {
		t.Error("a partition was detached")
	}
}

func TestResizeKernel(t *testing.T) {
	var got []byte
	nl := loaded(t, nil, 0, func(cmd uint8, attrs []byte) { got = append([]byte{cmd}, attrs...) })
	if err := resizeKernel(nl, "/dev/nbd5", 3<<30); err != nil {
		t.Fatal(err)
	}
	if want := append([]byte{3}, appendAttrU64(appendAttrU32(nil, nlAttrIndex, 5), nlAttrSize, 3<<30)...); !bytes.Equal(got, want) {
		t.Errorf("sent %x, not %x", got, want)
	}
	if err := resizeKernel(loaded(t, nil, unix.EPERM, func(uint8, []byte) {}), "/dev/nbd5", 3<<30); err == nil || !strings.Contains(err.Error(), "/dev/nbd5 to 3221225472 bytes") {
		t.Errorf("error %v", err)
	}
}

// A server that says nothing does not hold the caller for longer than its context.
func TestHandshakeOfSilentServer(t *testing.T) {
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	conn, err := net.Dial("unix", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, _, err := enterExport(ctx, conn, "x"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
}

// What a hostile or broken server says is an error, never a panic or a large allocation.
func FuzzEnterExport(f *testing.F) {
	greeting := pack("NBDMAGIC", "IHAVEOPT", uint16(3))
	info := pack(uint64(magicOptReply), uint32(optGo), uint32(repInfo), uint32(12), uint16(0), uint64(1<<20), uint16(1))
	f.Add(pack(greeting, info, uint64(magicOptReply), uint32(optGo), uint32(repAck), uint32(0)))
	f.Add(pack(greeting, uint64(magicOptReply), uint32(optGo), uint32(repErrUnknown), uint32(3), "\xffno"))
	f.Add(pack(greeting, uint64(magicOptReply), uint32(optGo), uint32(repInfo), ^uint32(0)))
	f.Add(pack("NBDMAGIC", uint64(0x420281861253), make([]byte, 200)))
	f.Fuzz(func(t *testing.T, server []byte) {
		a, b := net.Pipe()
		go io.Copy(io.Discard, b)
		go func() { b.Write(server); b.Close() }()
		size, _, err := enterExport(t.Context(), a, "disk")
		if err == nil && !bytes.Contains(server, pack(uint16(infoExport), size)) {
			t.Errorf("a size of %d from nowhere", size)
		}
		a.Close()
	})
}

// Netlink attributes from the kernel are checked like anybody else's bytes.
func FuzzFindAttr(f *testing.F) {
	f.Add(appendAttrU64(appendAttrU32(nil, 1, 2), 3, 4), uint16(3))
	f.Add([]byte{4, 0, 1, 0, 3, 0}, uint16(1))
	f.Fuzz(func(t *testing.T, b []byte, typ uint16) {
		if v, ok := findAttr(b, typ); ok && len(v) > len(b)-unix.SizeofNlAttr {
			t.Error("too long")
		}
	})
}

package nbd

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNoKernel: this kernel has no nbd driver, or has not loaded it.
var ErrNoKernel = errors.New("the kernel has no nbd driver\n" +
	"load it with `modprobe nbd`, or use a client in user space, such as nbdfuse, qemu or nbdcopy")

// KernelOptions say how AttachKernel sets up the kernel's device. Zero values mean the defaults.
type KernelOptions struct {
	// Export is the name of the export; "" is the server's default.
	Export string
	// Connections is how many connections the kernel uses; it has a queue for each. Default 1.
	Connections int
	// BlockSize is the device's logical block size in bytes, a power of 2 from 512 to 4096. Default 512, which
	// every disk image expects.
	BlockSize int
	// Timeout is after how long without a reply the kernel gives a connection up, in whole seconds. 0: never.
	Timeout time.Duration
	// DeadTimeout is for how long the kernel holds requests back after the last connection broke, waiting for a new
	// one, before it fails them, in whole seconds. 0: they fail at once.
	DeadTimeout time.Duration
}

// AttachKernel connects the kernel's nbd driver to a server: it negotiates on connections made by dial, which must
// be TCP or unix sockets, and hands them to the kernel through its netlink interface. devicePath is such as /dev/nbd0; if
// it is empty the kernel chooses. It returns the path of the device, which lives on, with the connections,
// after the process has ended: DetachKernel ends it. It blocks; ctx bounds the dialing and the negotiation.
func AttachKernel(ctx context.Context, devicePath string, dial func(context.Context) (net.Conn, error), o KernelOptions) (string, error) {
	nl, err := openNetlink()
	if err != nil {
		return "", err
	}
	defer nl.close()
	return attachKernel(ctx, nl, devicePath, dial, o)
}

// DetachKernel disconnects a device that AttachKernel has connected. The kernel fails what is still under way, so
// unmount first.
func DetachKernel(_ context.Context, devicePath string) error {
	nl, err := openNetlink()
	if err != nil {
		return err
	}
	defer nl.close()
	return detachKernel(nl, devicePath)
}

// ResizeKernel tells the kernel that what a device is connected to has grown, or shrunk, to size bytes (Linux 5.8).
func ResizeKernel(_ context.Context, devicePath string, size uint64) error {
	nl, err := openNetlink()
	if err != nil {
		return err
	}
	defer nl.close()
	return resizeKernel(nl, devicePath, size)
}

// Generic netlink family "nbd" (linux/nbd-netlink.h).
const (
	nlFamily         = "nbd"
	nlVersion        = 1
	nlConnect        = 1
	nlDisconnect     = 2
	nlReconfigure    = 3
	nlAttrIndex      = 1
	nlAttrSize       = 2
	nlAttrBlockSize  = 3
	nlAttrTimeout    = 4
	nlAttrFlags      = 5
	nlAttrSockets    = 7
	nlAttrDead       = 8
	nlSockItem       = 1
	nlSockFD         = 1
	devicePathPrefix = "/dev/nbd"
)

// kernelDevice is what the kernel is told about a device.
type kernelDevice struct {
	index     int // -1: the kernel's choice
	size      uint64
	blockSize uint64
	flags     uint64 // transmission flags
	timeout   time.Duration
	dead      time.Duration
	sockets   []int
}

// attributes encodes the device for the CONNECT message.
func (d kernelDevice) attributes() []byte {
	var b []byte
	if d.index >= 0 {
		b = appendAttrU32(b, nlAttrIndex, uint32(d.index))
	}
	b = appendAttrU64(b, nlAttrSize, d.size)
	b = appendAttrU64(b, nlAttrBlockSize, d.blockSize)
	b = appendAttrU64(b, nlAttrFlags, d.flags)
	if d.timeout > 0 {
		b = appendAttrU64(b, nlAttrTimeout, seconds(d.timeout))
	}
	if d.dead > 0 {
		b = appendAttrU64(b, nlAttrDead, seconds(d.dead))
	}
	var items []byte
	for _, fd := range d.sockets {
		items = appendAttr(items, nlSockItem|unix.NLA_F_NESTED, appendAttrU32(nil, nlSockFD, uint32(fd)))
	}
	return appendAttr(b, nlAttrSockets|unix.NLA_F_NESTED, items)
}

// seconds rounds up: a second is the kernel's unit.
func seconds(d time.Duration) uint64 { return uint64((d + time.Second - 1) / time.Second) }

func attachKernel(ctx context.Context, nl *netlink, devicePath string, dial func(context.Context) (net.Conn, error), o KernelOptions) (_ string, err error) {
	index := -1
	if devicePath != "" {
		if index, err = deviceIndex(devicePath); err != nil {
			return "", err
		}
	}
	d := kernelDevice{index: index, blockSize: uint64(cmp.Or(o.BlockSize, 512)), timeout: o.Timeout, dead: o.DeadTimeout}
	if d.blockSize < 512 || d.blockSize > 4096 || d.blockSize&(d.blockSize-1) != 0 {
		return "", fmt.Errorf("attach %s: a block size of %d bytes; it is 512, 1024, 2048 or 4096", devicePath, d.blockSize)
	}
	family, err := nl.family(nlFamily)
	if err != nil {
		return "", fmt.Errorf("attach export %q to the kernel: %w", o.Export, err)
	}
	for i := range cmp.Or(o.Connections, 1) {
		conn, err := dial(ctx)
		if err != nil {
			return "", fmt.Errorf("attach export %q to the kernel: %w", o.Export, err)
		}
		defer conn.Close() // the kernel keeps its own reference
		size, flags, err := enterExport(ctx, conn, o.Export)
		if err != nil {
			return "", fmt.Errorf("attach export %q to the kernel: %w", o.Export, err)
		}
		if i > 0 && (size != d.size || flags != d.flags) {
			return "", fmt.Errorf("attach export %q to the kernel: connections disagree about it; try again", o.Export)
		}
		if d.size, d.flags = size, flags; i > 0 && flags&flagCanMultiConn == 0 {
			return "", fmt.Errorf("attach export %q to the kernel: the server allows one connection only", o.Export)
		}
		fd, err := socketOf(conn)
		if err != nil {
			return "", fmt.Errorf("attach export %q to the kernel: %w", o.Export, err)
		}
		d.sockets = append(d.sockets, fd)
	}
	reply, err := nl.ask(family, nlConnect, nlVersion, d.attributes())
	if err != nil {
		return "", fmt.Errorf("attach export %q to %s: %w", o.Export, cmp.Or(devicePath, "the kernel"), explainErrno(err, devicePath))
	}
	if index >= 0 {
		return devicePath, nil
	}
	v, ok := findAttr(reply, nlAttrIndex)
	if !ok || len(v) != 4 {
		return "", fmt.Errorf("attach export %q: the kernel does not say which device it chose; look for it in /sys/block", o.Export)
	}
	return devicePathPrefix + strconv.Itoa(int(binary.NativeEndian.Uint32(v))), nil
}

func resizeKernel(nl *netlink, devicePath string, size uint64) error {
	index, err := deviceIndex(devicePath)
	if err != nil {
		return err
	}
	family, err := nl.family(nlFamily)
	if err != nil {
		return fmt.Errorf("resize %s: %w", devicePath, err)
	}
	attrs := appendAttrU64(appendAttrU32(nil, nlAttrIndex, uint32(index)), nlAttrSize, size)
	if _, err := nl.ask(family, nlReconfigure, nlVersion, attrs); err != nil {
		return fmt.Errorf("resize %s to %d bytes: %w", devicePath, size, explainErrno(err, devicePath))
	}
	return nil
}

func detachKernel(nl *netlink, devicePath string) error {
	index, err := deviceIndex(devicePath)
	if err != nil {
		return err
	}
	family, err := nl.family(nlFamily)
	if err != nil {
		return fmt.Errorf("detach %s: %w", devicePath, err)
	}
	if _, err := nl.ask(family, nlDisconnect, nlVersion, appendAttrU32(nil, nlAttrIndex, uint32(index))); err != nil {
		return fmt.Errorf("detach %s: %w", devicePath, explainErrno(err, devicePath))
	}
	return nil
}

// deviceIndex is the 7 of /dev/nbd7.
func deviceIndex(path string) (int, error) {
	digits, ok := strings.CutPrefix(path, devicePathPrefix)
	index, err := strconv.ParseUint(digits, 10, 20) // the kernel's minors
	if !ok || err != nil {
		return 0, fmt.Errorf("%q is not a kernel nbd device; they are called %s0, %s1, …", path, devicePathPrefix, devicePathPrefix)
	}
	return int(index), nil
}

// explainErrno adds what to do to an errno of the kernel.
func explainErrno(err error, devicePath string) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w\nthis needs root (CAP_SYS_ADMIN)", err)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w\n%s is connected already; choose another one, or detach it first", err, devicePath)
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV):
		return fmt.Errorf("%w\nis there such a device? see /sys/block; `modprobe nbd nbds_max=N` makes more", err)
	}
	return err
}

// socketOf is the descriptor of a connection, valid while it is open.
func socketOf(conn net.Conn) (fd int, err error) {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return 0, fmt.Errorf("a %T has no socket the kernel could use", conn)
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return 0, err
	}
	if err := raw.Control(func(p uintptr) { fd = int(p) }); err != nil {
		return 0, err
	}
	return fd, nil
}

// enterExport is the client's side of the handshake, as far as the kernel needs it: simple replies, nothing read
// beyond the last reply. On return conn is in transmission.
func enterExport(ctx context.Context, conn net.Conn, export string) (size, flags uint64, err error) {
	if len(export) > maxString {
		return 0, 0, fmt.Errorf("a name of %d bytes; NBD allows %d", len(export), maxString)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() && err == nil {
			err = ctx.Err()
		} else if ctx.Err() != nil {
			err = fmt.Errorf("handshake: %w", ctx.Err())
		}
	}()
	var b [greetingSize]byte
	if _, err := io.ReadFull(conn, b[:]); err != nil {
		return 0, 0, fmt.Errorf("handshake: %w", err)
	}
	if binary.BigEndian.Uint64(b[:]) != magicInit || binary.BigEndian.Uint64(b[8:]) != magicOption {
		return 0, 0, errors.New("handshake: this is no newstyle NBD server")
	}
	out := binary.BigEndian.AppendUint32(nil, uint32(binary.BigEndian.Uint16(b[16:])&(flagFixedNewstyle|flagNoZeroes)))
	out = binary.BigEndian.AppendUint64(out, magicOption)
	out = binary.BigEndian.AppendUint32(out, optGo)
	out = binary.BigEndian.AppendUint32(out, uint32(4+len(export)+2))
	out = binary.BigEndian.AppendUint32(out, uint32(len(export)))
	out = append(out, export...)
	out = binary.BigEndian.AppendUint16(out, 0)
	if _, err := conn.Write(out); err != nil {
		return 0, 0, fmt.Errorf("handshake: %w", err)
	}
	known := false
	for {
		var h [optReplySize]byte
		if _, err := io.ReadFull(conn, h[:]); err != nil {
			return 0, 0, fmt.Errorf("handshake: %w", err)
		}
		typ, n := binary.BigEndian.Uint32(h[12:]), binary.BigEndian.Uint32(h[16:])
		if binary.BigEndian.Uint64(h[:]) != magicOptReply || binary.BigEndian.Uint32(h[8:]) != optGo || n > maxOption {
			return 0, 0, errors.New("handshake: the server's reply makes no sense")
		}
		data := make([]byte, n)
		if _, err := io.ReadFull(conn, data); err != nil {
			return 0, 0, fmt.Errorf("handshake: %w", err)
		}
		switch {
		case typ == repAck && known:
			return size, flags, nil
		case typ == repInfo && n == 12 && binary.BigEndian.Uint16(data) == infoExport:
			size, flags, known = binary.BigEndian.Uint64(data[2:]), uint64(binary.BigEndian.Uint16(data[10:])), true
		case typ == repInfo:
		case typ&(1<<31) != 0:
			return 0, 0, fmt.Errorf("the server refuses: %s", cmp.Or(clip(string(data), maxMessage), fmt.Sprintf("error %#x", typ)))
		default:
			return 0, 0, errors.New("handshake: the server's reply makes no sense")
		}
	}
}

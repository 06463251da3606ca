package sock

import (
	"bufio"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/transport"
	"golang.org/x/sys/unix"
)

// dialled dials addr and says of which family the connection was, after a byte has gone through it and back.
func dialled(t *testing.T, addr string) (int, error) {
	t.Helper()
	l, err := loop.NewEpoll(nil)
	if err != nil {
		t.Fatal(err)
	}
	end := make(chan error, 1)
	h := &echoed{end: end}
	go l.Run() //nolint:errcheck // ended by Stop
	var s transport.Stream
	l.Post(func() { s = New().Dial(l, addr, h) })
	select {
	case err = <-end:
	case <-time.After(10 * time.Second):
		err = fmt.Errorf("nothing came back")
	}
	done := make(chan struct{})
	l.Post(func() { s.Close(); close(done) })
	<-done
	l.Stop()
	return h.family, err
}

type echoed struct {
	end    chan error
	family int
}

func (h *echoed) Opened(s transport.Stream) {
	sa, _ := unix.Getsockname(s.(*stream).reg.FD())
	h.family = family(sa)
	s.Write([]byte("x"))
}

func (h *echoed) Data(_ transport.Stream, b []byte) (int, int) {
	h.end <- nil
	return len(b), 0
}

func (h *echoed) Closed(_ transport.Stream, err error) {
	select {
	case h.end <- fmt.Errorf("closed: %w", err):
	default:
	}
}

type echoes struct{}

func (echoes) Opened(transport.Stream)        {}
func (echoes) Closed(transport.Stream, error) {}
func (echoes) Data(s transport.Stream, b []byte) (int, int) {
	s.Write(b)
	return len(b), 0
}

// serving listens on addr with what every Network listens with.
func serving(t *testing.T, addr string) (actual string, stop func()) {
	t.Helper()
	l, err := loop.NewEpoll(nil)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := New().Listen(l, addr, func(transport.Stream) transport.Handler { return echoes{} })
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { l.Run(); close(done) }() //nolint:errcheck // ended by Stop
	return ln.Addr(), func() {
		l.Post(func() { ln.Close(); l.Stop() }) //nolint:errcheck // a listener's Close does not fail
		<-done
	}
}

// Who dials an address of this machine gets the shortcut, also where every address is listened on; once nobody listens, nobody answers.
func TestShortcut(t *testing.T) {
	for _, addr := range []string{"tcp://127.0.0.1:0", "tcp://[::1]:0", "tcp://:0", "tcp://0.0.0.0:0"} {
		at, stop := serving(t, addr)
		_, port, err := net.SplitHostPort(strings.TrimPrefix(at, "tcp://"))
		if err != nil {
			t.Fatal(err)
		}
		host := "127.0.0.1"
		if strings.Contains(addr, "::1") {
			host = "::1"
		}
		to := "tcp://" + net.JoinHostPort(host, port)
		if f, err := dialled(t, to); err != nil || f != unix.AF_UNIX {
			t.Errorf("%s, dialled as %s: family %d, %v", addr, to, f, err)
		}
		stop()
		if _, err := dialled(t, to); err == nil {
			t.Errorf("%s answers although nobody listens any more", to)
		}
	}
}

// A shortcut leads nowhere that TCP would not.
func TestShortcutIsNoDetour(t *testing.T) {
	at, stop := serving(t, "tcp://0.0.0.0:0")
	defer stop()
	_, port, err := net.SplitHostPort(strings.TrimPrefix(at, "tcp://"))
	if err != nil {
		t.Fatal(err)
	}
	if f, err := dialled(t, "tcp://[::1]:"+port); err == nil {
		t.Errorf("a listener on IPv4 answers who dials IPv6, family %d", f)
	}
	for _, ip := range []string{"203.0.113.7", "fe80::1"} {
		a := netip.MustParseAddr(ip)
		fd, err := socket(unix.AF_UNIX)
		if err == nil {
			err = unix.Bind(fd, &unix.SockaddrUnix{Name: shortcutName(ip, 40000)})
		}
		if err == nil {
			err = unix.Listen(fd, 1)
		}
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if fd := dialShort(sockaddr(a, 40000)); fd >= 0 {
			t.Errorf("%s, which is no address of this machine or one of many, was found on it", ip)
		}
	}
}

// Whoever listens without a shortcut is reached by TCP.
func TestNoShortcut(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go echoOnce(ln)
	if f, err := dialled(t, "tcp://"+ln.Addr().String()); err != nil || f != unix.AF_INET {
		t.Errorf("family %d, %v", f, err)
	}
}

func echoOnce(ln net.Listener) {
	c, err := ln.Accept()
	if err != nil {
		return
	}
	b := make([]byte, 1)
	if _, err := c.Read(b); err == nil {
		c.Write(b) //nolint:errcheck // the test notices
	}
}

// A name that somebody else has taken leads nowhere: the connection is made by TCP.
func TestShortcutOfSomebodyElse(t *testing.T) {
	if name := os.Getenv("TORUS_TEST_SQUAT"); name != "" {
		fd, err := socket(unix.AF_UNIX)
		if err == nil {
			err = unix.Bind(fd, &unix.SockaddrUnix{Name: name})
		}
		if err == nil {
			err = unix.Listen(fd, 10)
		}
		fmt.Println("squatting", err)
		time.Sleep(time.Minute)
		return
	}
	if os.Geteuid() != 0 {
		t.Fatal("needs to be root, to be somebody else")
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go echoOnce(ln)
	at := ln.Addr().(*net.TCPAddr).AddrPort()
	exe := "/proc/self/exe"
	cmd := exec.Command(exe, "-test.run", "TestShortcutOfSomebodyElse", "-test.v")
	cmd.Env = append(os.Environ(), "TORUS_TEST_SQUAT="+shortcutName(at.Addr().String(), int(at.Port())))
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	cmd.Dir = "/"
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("cannot run as somebody else: %v", err)
	}
	defer func() { cmd.Process.Kill(); cmd.Wait() }() //nolint:errcheck // it is killed
	squatting := false
	for lines := bufio.NewScanner(out); !squatting && lines.Scan(); {
		squatting = lines.Text() == "squatting <nil>"
	}
	if !squatting {
		t.Fatal("the other process did not take the name")
	}
	if f, err := dialled(t, "tcp://"+at.String()); err != nil || f != unix.AF_INET {
		t.Errorf("family %d, %v", f, err)
	}
}

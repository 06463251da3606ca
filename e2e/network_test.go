package e2e

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// network is a private network: each node has a namespace and an address of its own, all joined by a bridge. It is
// gone when the processes that hold the namespaces are, and those die with the tests.
type network struct {
	bridge *namespace
	taps   int
	nodes  map[string]*namespace
}

// namespace is one node's network.
type namespace struct {
	name   string
	ip     string
	path   string // of the namespace
	holder *process
	ports  int // given out
}

// The nodes of a cluster's network. admin is where the test itself looks on from: it is never cut off.
const (
	clientNode = "client"
	etcdNode   = "etcd"
	adminNode  = "admin"
)

func newNetwork(t *testing.T, dir string, names ...string) *network {
	t.Helper()
	n := &network{nodes: map[string]*namespace{}}
	n.bridge = newNamespace(t, dir, "bridge")
	n.bridge.run(t, "ip", "link", "add", "br0", "type", "bridge")
	n.bridge.run(t, "ip", "link", "set", "br0", "up")
	for i, name := range names {
		ns := newNamespace(t, dir, name)
		ns.ip = fmt.Sprintf("10.77.0.%d", i+1)
		pid := fmt.Sprint(ns.holder.pid())
		n.bridge.run(t, "ip", "link", "add", "v"+fmt.Sprint(i), "type", "veth", "peer", "name", "eth0", "netns", pid)
		n.bridge.run(t, "ip", "link", "set", "v"+fmt.Sprint(i), "master", "br0", "up")
		ns.run(t, "ip", "addr", "add", ns.ip+"/24", "dev", "eth0")
		ns.run(t, "ip", "link", "set", "eth0", "up")
		n.nodes[name] = ns
	}
	return n
}

// tap makes an interface of the bridge's namespace, for a virtual machine, and returns the address that is meant for it.
func (n *network) tap(t *testing.T, name string) (ip string) {
	t.Helper()
	n.bridge.run(t, "ip", "tuntap", "add", "dev", name, "mode", "tap")
	n.bridge.run(t, "ip", "link", "set", name, "master", "br0", "up")
	n.taps++
	return fmt.Sprintf("10.77.0.%d", 100+n.taps)
}

func newNamespace(t *testing.T, dir, name string) *namespace {
	t.Helper()
	ns := &namespace{name: name, holder: newProcess(dir, "net-"+name, "unshare", "--net", "sleep", "infinity")}
	ns.holder.start(t)
	t.Cleanup(ns.holder.kill)
	ns.path = fmt.Sprintf("/proc/%d/ns/net", ns.holder.pid())
	ours, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, startLimit, "a network namespace is made", func() error {
		its, err := os.Readlink(ns.path)
		if err == nil && its == ours {
			err = errNotYet
		}
		return err
	})
	ns.run(t, "ip", "link", "set", "lo", "up")
	return ns
}

// enter is the command that runs args within the namespace; the process is that of args.
func (ns *namespace) enter(args []string) []string {
	if ns == nil {
		return args
	}
	return append([]string{"nsenter", "--net=" + ns.path, "--"}, args...)
}

// run runs a command within the namespace.
func (ns *namespace) run(t testing.TB, args ...string) {
	t.Helper()
	tool(t, ns.enter(args)...)
}

// client is an HTTP client within the namespace.
func (ns *namespace) client() *http.Client {
	if ns == nil {
		return http.DefaultClient
	}
	return &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: ns.dial}}
}

// dial makes a connection from within the namespace: a socket belongs to the one that its thread is in.
func (ns *namespace) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result)
	go func() {
		if err := ns.join(); err != nil {
			done <- result{nil, err}
			return
		}
		conn, err := new(net.Dialer).DialContext(ctx, network, addr)
		done <- result{conn, err}
	}()
	r := <-done
	return r.conn, r.err
}

// join brings the calling goroutine, and the thread it keeps until it ends, into the namespace.
func (ns *namespace) join() error {
	runtime.LockOSThread() // and never unlocked: so the thread ends with the goroutine
	fd, err := unix.Open(ns.path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		err = unix.Setns(fd, unix.CLONE_NEWNET)
		unix.Close(fd) //nolint:errcheck // only read
	}
	if err != nil {
		return fmt.Errorf("enter the network of %s: %w", ns.name, err)
	}
	return nil
}

// cut is a direction in which no packet passes. To the sender it looks like silence.
type cut struct{ from, to string }

func (c cut) String() string { return c.from + "→" + c.to }

// bothWays cuts two nodes off from each other.
func bothWays(a, b string) []cut { return []cut{{a, b}, {b, a}} }

// isolated cuts a node off from every other, except the one that only looks on.
func (n *network) isolated(name string) (cuts []cut) {
	for other := range n.nodes {
		if other != name && other != adminNode {
			cuts = append(cuts, bothWays(name, other)...)
		}
	}
	return cuts
}

// cut drops these packets, and no others, from now on.
func (n *network) cut(t testing.TB, cuts ...cut) {
	t.Helper()
	rules := map[string][]string{}
	for name := range n.nodes {
		rules[name] = nil
	}
	for _, c := range cuts {
		rules[c.to] = append(rules[c.to], "-A INPUT -s "+n.nodes[c.from].ip+" -j DROP")
	}
	for name, r := range rules {
		text := "*filter\n:INPUT ACCEPT [0:0]\n" + strings.Join(append(r, "COMMIT"), "\n") + "\n"
		args := n.nodes[name].enter([]string{"iptables-restore"})
		ctx, cancel := context.WithTimeout(context.Background(), toolTimeout)
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.Stdin = strings.NewReader(text)
		out, err := cmd.CombinedOutput()
		cancel()
		if err != nil {
			t.Fatalf("iptables-restore at %s: %v\n%s", name, err, out)
		}
	}
}

// heal lets everything pass.
func (n *network) heal(t testing.TB) {
	t.Helper()
	n.cut(t)
}

// A cut does what it says, in its direction and in no other.
func TestControlCut(t *testing.T) {
	n := newNetwork(t, tempDir(t), "a", "b", "c")
	l := make(chan net.PacketConn)
	go func() {
		if err := n.nodes["b"].join(); err != nil {
			t.Error(err)
		}
		conn, err := net.ListenPacket("udp", n.nodes["b"].ip+":7")
		if err != nil {
			t.Error(err)
		}
		l <- conn
	}()
	b := <-l
	if b == nil {
		t.FailNow()
	}
	defer b.Close()
	arrives := func(from string) bool {
		conn, err := n.nodes[from].dial(t.Context(), "udp", n.nodes["b"].ip+":7")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := conn.Write([]byte(from)); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 10)
		b.SetReadDeadline(time.Now().Add(200 * time.Millisecond)) //nolint:errcheck // the read would say so
		k, who, err := b.ReadFrom(got)
		if err == nil && (string(got[:k]) != from || who.(*net.UDPAddr).IP.String() != n.nodes[from].ip) {
			t.Errorf("from %s came %q of %v", from, got[:k], who)
		}
		return err == nil
	}
	for _, c := range []struct {
		cuts []cut
		a, c bool
	}{
		{nil, true, true},
		{[]cut{{"a", "b"}}, false, true},
		{[]cut{{"b", "a"}, {"a", "c"}}, true, true},
		{bothWays("c", "b"), true, false},
		{nil, true, true},
	} {
		n.cut(t, c.cuts...)
		if a, cc := arrives("a"), arrives("c"); a != c.a || cc != c.c {
			t.Errorf("with %v: a reaches b: %v, c reaches b: %v", c.cuts, a, cc)
		}
	}
}

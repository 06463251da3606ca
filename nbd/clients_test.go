package nbd

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/coreos/torus/device"
	"github.com/coreos/torus/device/devicetest"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/transport/sock"
)

// The clients that people use, against a server on a real socket. They are required, not optional: a test fails if
// its client is not installed (Debian: libnbd-bin qemu-utils fio nbdkit).

// stand is a server on a unix socket with a device of 64 MiB that completes later and in any order.
type stand struct {
	t    *testing.T
	sock string
	l    *loop.Epoll
	srv  *Server
	dir  *devicetest.Directory
	disk *devicetest.Memory
}

const standSize = 64 << 20

func newStand(t *testing.T) *stand {
	t.Helper()
	l, err := loop.NewEpoll(nil)
	if err != nil {
		t.Fatal(err)
	}
	s := &stand{t: t, l: l, sock: filepath.Join(t.TempDir(), "s"), dir: devicetest.NewDirectory(), disk: devicetest.NewMemory(standSize, false)}
	s.disk.Deliver = shuffled(l)
	s.dir.Add("disk", "the test's disk", s.disk)
	frozen := devicetest.NewMemory(1<<20, true)
	copy(frozen.Bytes(), pattern(1<<20, 5))
	s.dir.Add("frozen", "", frozen)
	s.srv, err = Serve(l, sock.New(), "unix:"+s.sock, Config{Directory: s.dir, Log: testLog(t)})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- l.Run() }()
	t.Cleanup(func() {
		drained := make(chan struct{})
		l.Post(func() { s.srv.Shutdown(func() { close(drained) }) })
		select {
		case <-drained:
		case <-time.After(20 * time.Second):
			t.Error("Shutdown is not done")
		}
		l.Stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if s.dir.Attached["disk"] != 0 || s.dir.Attached["frozen"] != 0 || s.srv.Sessions() != 0 {
			t.Errorf("left attached: %v, sessions: %d", s.dir.Attached, s.srv.Sessions())
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// shuffled completes some requests at once, some at the end of the turn, and some later, out of order.
func shuffled(l loop.Loop) func(*device.Request, func()) {
	r := rand.New(rand.NewPCG(1, 2))
	return func(_ *device.Request, finish func()) {
		switch n := r.IntN(10); {
		case n < 3:
			finish()
		case n < 6:
			l.Defer(finish)
		default:
			l.After(time.Duration(r.IntN(300))*time.Microsecond, finish)
		}
	}
}

// on runs fn on the loop and waits for it.
func (s *stand) on(fn func()) {
	done := make(chan struct{})
	s.l.Post(func() { fn(); close(done) })
	<-done
}

// uri is how libnbd's tools and qemu call an export.
func (s *stand) uri(export string) string { return "nbd+unix:///" + export + "?socket=" + s.sock }

// tool runs a program that must succeed, and returns its standard output.
func (s *stand) tool(name string, args ...string) string {
	s.t.Helper()
	out, err := s.try(name, args...)
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

func (s *stand) try(name string, args ...string) (string, error) {
	cmd := exec.CommandContext(s.t.Context(), name, args...)
	cmd.Dir = s.t.TempDir()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %w\n%s%s", name, strings.Join(args, " "), err, out.String(), errs.String())
	}
	return out.String(), nil
}

// image is a file of random data and holes.
func (s *stand) image(size int) (path string, contents []byte) {
	s.t.Helper()
	contents = make([]byte, size)
	r := rand.New(rand.NewPCG(3, uint64(size)))
	for off := 0; off < size; off += 192 << 10 {
		b := contents[off:min(off+64<<10, size)]
		for i := range b {
			b[i] = byte(r.Uint32())
		}
	}
	path = filepath.Join(s.t.TempDir(), "image")
	if err := os.WriteFile(path, contents, 0o600); err != nil {
		s.t.Fatal(err)
	}
	return path, contents
}

// holds compares the device with what it should hold.
func (s *stand) holds(want []byte) {
	s.t.Helper()
	s.on(func() {
		got := s.disk.Bytes()[:len(want)]
		for i := range want {
			if got[i] != want[i] {
				s.t.Errorf("byte %d is %#x, not %#x", i, got[i], want[i])
				break
			}
		}
	})
}

func TestNbdinfo(t *testing.T) {
	s := newStand(t)
	if got := strings.TrimSpace(s.tool("nbdinfo", "--size", s.uri("disk"))); got != strconv.Itoa(standSize) {
		t.Errorf("size %s", got)
	}
	for what, want := range map[string]bool{
		"cache": true, "df": true, "fast-zero": true, "flush": true, "fua": true, "multi-conn": true, "read": true,
		"trim": true, "write": true, "zero": true, "rotational": false, "structured reply": true, "tls": false,
	} {
		_, err := s.try("nbdinfo", append([]string{"--can"}, what, s.uri("disk"))...)
		if (err == nil) != want {
			t.Errorf("nbdinfo --can %s: %v", what, err)
		}
	}
	for _, what := range []string{"write", "trim", "zero", "fast-zero"} {
		if _, err := s.try("nbdinfo", "--can", what, s.uri("frozen")); err == nil {
			t.Errorf("a read-only export can %s", what)
		}
	}
	s.tool("nbdinfo", "--is", "read-only", s.uri("frozen"))

	var list struct {
		Protocol   string
		Structured bool
		Exports    []struct {
			Name        string `json:"export-name"`
			Description string
			Size        int64    `json:"export-size"`
			ReadOnly    bool     `json:"is_read_only"`
			Contexts    []string `json:"contexts"`
			Min         int      `json:"block_size_minimum"`
			Preferred   int      `json:"block_size_preferred"`
			Max         int      `json:"block_size_maximum"`
		}
	}
	out := s.tool("nbdinfo", "--list", "--json", s.uri(""))
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatal(err, out)
	}
	if list.Protocol != "newstyle-fixed" || len(list.Exports) != 2 {
		t.Fatalf("%s", out)
	}
	d, f := list.Exports[0], list.Exports[1]
	if d.Name != "disk" || d.Description != "the test's disk" || d.Size != standSize || d.ReadOnly || len(d.Contexts) != 1 ||
		d.Contexts[0] != contextAllocation || d.Min != 1 || d.Preferred != 4096 || d.Max != 32<<20 || f.Name != "frozen" || !f.ReadOnly {
		t.Errorf("%s", out)
	}
	s.on(func() {
		if s.dir.Attached["disk"] != 0 {
			t.Error("nbdinfo left the disk attached")
		}
	})

	s.tool("nbdinfo", s.uri("disk"))
	s.tool("qemu-io", "-f", "raw", "-c", "write -P 1 1M 64k", s.uri("disk"))
	var extents []struct{ Offset, Length, Type int64 }
	if err := json.Unmarshal([]byte(s.tool("nbdinfo", "--map", "--json", s.uri("disk"))), &extents); err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(extents) != "[{0 1048576 3} {1048576 65536 0} {1114112 65994752 3}]" {
		t.Errorf("map %v", extents)
	}
	if _, err := s.try("nbdinfo", s.uri("nope")); err == nil || !strings.Contains(err.Error(), "nope") {
		t.Errorf("an unknown export: %v", err)
	}
}

func TestNbdcopy(t *testing.T) {
	s := newStand(t)
	in, contents := s.image(standSize)
	s.tool("nbdcopy", "--connections=4", "--requests=64", "--flush", in, s.uri("disk"))
	s.holds(contents)
	s.on(func() {
		if !bytes.Equal(s.disk.Durable(), contents) {
			t.Error("not durable after --flush (D1)")
		}
	})
	out := filepath.Join(t.TempDir(), "out")
	s.tool("nbdcopy", "--connections=4", "--requests=64", s.uri("disk"), out)
	s.tool("cmp", in, out)
	s.tool("nbdcopy", "--synchronous", "--request-size=262144", "--no-extents", s.uri("disk"), out)
	s.tool("cmp", in, out)
	s.tool("nbdcopy", "--request-size=33554432", s.uri("disk"), out)
	s.tool("cmp", in, out)
	s.tool("nbdcopy", "--", s.uri("disk"), "[", "nbdkit", "--exit-with-parent", "memory", "64M", "]")
}

func TestQemuImg(t *testing.T) {
	s := newStand(t)
	in, contents := s.image(standSize)
	s.tool("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", in, s.uri("disk"))
	s.holds(contents)
	s.tool("qemu-img", "compare", "-f", "raw", "-F", "raw", in, s.uri("disk"))
	out := filepath.Join(t.TempDir(), "out")
	s.tool("qemu-img", "convert", "-f", "raw", "-O", "raw", s.uri("disk"), out)
	s.tool("cmp", in, out)
	var extents []struct {
		Start, Length int64
		Zero, Data    bool
	}
	if err := json.Unmarshal([]byte(s.tool("qemu-img", "map", "-f", "raw", "--output=json", s.uri("disk"))), &extents); err != nil {
		t.Fatal(err)
	}
	var end, data int64
	for _, e := range extents {
		if e.Start != end {
			t.Fatalf("a gap at %d: %v", end, extents)
		}
		if end += e.Length; e.Data {
			data += e.Length
		}
		if e.Zero && bytes.Trim(contents[e.Start:end], "\x00") != nil {
			t.Errorf("data at %d is said to be zero", e.Start)
		}
	}
	if end != standSize || data == 0 || data == standSize {
		t.Errorf("the map ends at %d with %d bytes of data", end, data)
	}
	for _, args := range [][]string{{}, {"-w", "--flush-interval=64"}, {"-w", "-s", "1000", "-S", "1500"}, {"-s", "3", "-o", "1021"}} {
		args = append([]string{"bench", "-f", "raw", "-t", "none", "-c", "4000", "-d", "16"}, args...)
		s.tool("qemu-img", append(args, s.uri("disk"))...)
	}
}

func TestQemuIO(t *testing.T) {
	s := newStand(t)
	run := func(commands ...string) {
		t.Helper()
		args := []string{"-f", "raw", "-t", "writeback", "-d", "unmap"}
		for _, c := range commands {
			args = append(args, "-c", c)
		}
		out := s.tool("qemu-io", append(args, s.uri("disk"))...)
		if strings.Contains(out, "failed") || strings.Contains(out, "rror") {
			t.Error(out)
		}
	}
	run("write -P 0xab 1M 64k", "write -f -P 0xcd 2M 4k", "flush", "read -P 0xab 1M 64k", "read -P 0xcd 2M 4k")
	s.on(func() {
		if got := s.disk.Durable()[2<<20]; got != 0xcd {
			t.Errorf("FUA: %#x is durable (D1)", got)
		}
	})
	run("discard 1M 4k", "read -P 0 1M 4k", "read -P 0xab 1028k 60k")
	run("write -z -u 2M 4k", "read -P 0 2M 4k", "write -P 0x11 2M 64k", "write -z 2052k 4k", "read -P 0 2052k 4k", "read -P 0x11 2M 4k")
	run("write -P 0x77 1 1", "write -P 0x78 4095 3", "read -P 0x77 1 1", "read -P 0 0 1", "read -P 0x78 4095 3", "read -P 0 4098 10")
	run("write -P 0x42 33554431 30000001", "read -P 0x42 33554431 30000001", "discard 5 100000", "read -P 0 5 100000")
	run("write -z -f 100 100", "write -z -u -f 5000 9000", "write -f -P 9 67108863 1", "read -P 9 67108863 1")
	s.on(func() { s.disk.SlowZeroes = true })
	run("write -z 3M 1M", "read -P 0 3M 1M")
	if _, err := s.try("qemu-io", "-f", "raw", "-c", "read -P 1 3M 1M", s.uri("disk")); err == nil {
		t.Error("qemu-io does not notice a wrong pattern")
	}
	if out, err := s.try("qemu-io", "-r", "-f", "raw", "-c", "write 0 512", s.uri("frozen")); err == nil && !strings.Contains(out, "read-only") {
		t.Errorf("wrote to a read-only export: %s", out)
	}
	s.on(func() {
		s.disk.Fail = func(r *device.Request) error {
			if r.Op == device.Write {
				return fmt.Errorf("full: %w", device.ErrOutOfSpace)
			}
			return nil
		}
	})
	if out, err := s.try("qemu-io", "-f", "raw", "-c", "write 0 512", s.uri("disk")); !strings.Contains(out+fmt.Sprint(err), "No space left") {
		t.Errorf("a full disk: %s %v", out, err)
	}
}

// Every read is compared with a plain file by qemu itself.
func TestQemuDifferential(t *testing.T) {
	s := newStand(t)
	ref, contents := s.image(standSize)
	s.on(func() { copy(s.disk.Bytes(), contents) })
	s.on(func() { // all of it is allocated
		for off := uint64(0); off < standSize; off += 4096 {
			r := &device.Request{Op: device.Write, Off: off, Len: 1, Data: contents[off : off+1], Done: func(*device.Request) {}}
			s.disk.Submit(r)
		}
	})
	r := rand.New(rand.NewPCG(7, 7))
	args := []string{"--image-opts", "driver=blkverify,raw.driver=file,raw.filename=" + ref + ",test.driver=nbd,test.export=disk,test.server.type=unix,test.server.path=" + s.sock}
	for i := range 300 {
		off, n := r.IntN(standSize/512)*512, (1+r.IntN(600))*512
		n = min(n, standSize-off)
		c := fmt.Sprintf("read %d %d", off, n)
		if i%2 == 0 {
			c = fmt.Sprintf("write -P %d %d %d", 1+i%255, off, n)
		}
		args = append(args, "-c", c)
	}
	out := s.tool("qemu-io", args...)
	if strings.Contains(out, "mismatch") || strings.Contains(out, "failed") {
		t.Error(out)
	}
	s.tool("qemu-img", "compare", "-f", "raw", "-F", "raw", ref, s.uri("disk"))
}

func TestFio(t *testing.T) {
	s := newStand(t)
	s.tool("fio", "--name=verify", "--ioengine=nbd", "--uri="+s.uri("disk"), "--rw=randrw", "--rwmixread=30", "--size=64M", "--io_size=96M",
		"--bssplit=512/10:4k/40:12k/10:64k/30:1m/10", "--blockalign=512", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--fsync=64",
		"--randrepeat=1", "--output-format=json")
}

// nbdkit's nbd plugin as a proxy in between, and its log of what went through.
func TestNbdkitProxy(t *testing.T) {
	s := newStand(t)
	in, contents := s.image(standSize)
	s.tool("nbdkit", "-U", "-", "--exit-with-parent", "nbd", "socket="+s.sock, "export=disk", "--run",
		`nbdcopy --flush "`+in+`" "$uri" && qemu-img compare -f raw -F raw "`+in+`" "$uri" && nbdinfo "$uri" > /dev/null && qemu-io -f raw -c "write -f -P 5 4M 5k" -c "read -P 5 4M 5k" "$uri"`)
	for i := range 5 << 10 {
		contents[4<<20+i] = 5
	}
	s.holds(contents)
}

// A client may be killed at any moment; the server gives the device back and serves the next one.
func TestClientKilled(t *testing.T) {
	s := newStand(t)
	for i := range 5 {
		cmd := exec.Command("qemu-img", "bench", "-f", "raw", "-t", "none", "-w", "-c", "100000000", "-d", "64", "-s", "65536", s.uri("disk"))
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		s.until("the client is busy", func() bool { return s.disk.Count[device.Write] > 500*(i+1) })
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // killed
		s.until("the device is given back", func() bool { return s.dir.Attached["disk"] == 0 && s.srv.Sessions() == 0 })
	}
	s.tool("qemu-io", "-f", "raw", "-c", "write -P 1 0 4k", "-c", "read -P 1 0 4k", s.uri("disk"))
}

// until waits for a condition on the loop.
func (s *stand) until(what string, cond func() bool) {
	s.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		ok := false
		s.on(func() { ok = cond() })
		if ok {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("%s: not within 30 s", what)
		}
	}
}

// A client that asks for much more than it takes: the server holds a bounded part of it, and the rest comes when the
// client reads.
func TestStuckClientOnSocket(t *testing.T) {
	s := newStand(t)
	s.on(func() { copy(s.disk.Bytes(), pattern(standSize, 1)) })
	conn, err := net.Dial("unix", s.sock)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, _, err := enterExport(t.Context(), conn, "disk"); err != nil {
		t.Fatal(err)
	}
	const n, size = 300, 1 << 20
	go func() {
		for i := range uint64(n) {
			if _, err := conn.Write(pack(uint32(magicRequest), uint16(0), uint16(cmdRead), i, i%64*size, uint32(size))); err != nil {
				t.Error(err)
			}
		}
	}()
	most := 0
	s.until("the session is paused", func() bool {
		if len(s.srv.sessions) == 0 {
			return false
		}
		most = max(most, s.srv.sessions[0].holds())
		return s.srv.sessions[0].paused && s.srv.sessions[0].inflight == 0
	})
	if limit := 64<<20 + size; most > limit {
		t.Errorf("%d bytes held, more than %d", most, limit)
	}
	seen := [n]bool{}
	reply := make([]byte, simpleSize+size)
	var want []byte
	s.on(func() { want = bytes.Clone(s.disk.Bytes()) })
	for got := range n {
		if err := conn.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(conn, reply); err != nil {
			s.on(func() {
				x := s.srv.sessions[0]
				t.Logf("session: phase %d paused %v inflight %d queued %d look %v", x.phase, x.paused, x.inflight, x.st.Queued(), x.look)
			})
			t.Fatalf("reply %d: %v", got, err)
		}
		i := binary.BigEndian.Uint64(reply[8:])
		if i >= n || seen[i] || !bytes.Equal(reply[simpleSize:], want[i%64*size:][:size]) {
			t.Fatalf("reply %x", reply[:simpleSize])
		}
		seen[i] = true
	}
}

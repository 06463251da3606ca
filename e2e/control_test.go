package e2e

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coreos/torus/device/devicetest"
	"github.com/coreos/torus/e2e/nbdclient"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/nbd"
	"github.com/coreos/torus/transport/sock"
)

// Controls of the tests themselves: what a server must not do is done here, and has to be noticed.

// standIn is an NBD server in this process with a device in memory, whose contents can be tampered with.
type standIn struct {
	l    *loop.Epoll
	disk *devicetest.Memory
	addr nbdclient.Address
}

func newStandIn(t *testing.T, size uint64) *standIn {
	t.Helper()
	l, err := loop.NewEpoll(nil)
	if err != nil {
		t.Fatal(err)
	}
	s := &standIn{l: l, disk: devicetest.NewMemory(size, false), addr: nbdclient.Unix(filepath.Join(tempDir(t), "s"), "disk")}
	dir := devicetest.NewDirectory()
	dir.Add("disk", "", s.disk)
	if _, err := nbd.Serve(l, sock.New(), "unix:"+s.addr.Addr, nbd.Config{Directory: dir}); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- l.Run() }()
	t.Cleanup(func() {
		l.Stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		l.Close() //nolint:errcheck // the test is over
	})
	return s
}

// tamper changes the contents between two requests.
func (s *standIn) tamper(change func(b []byte)) {
	done := make(chan struct{})
	s.l.Post(func() { change(s.disk.Bytes()); close(done) })
	<-done
}

func TestControlChecker(t *testing.T) {
	s := newStandIn(t, 32<<20)
	c := dial(t, s.addr, startLimit)
	defer c.Close()
	w := newStamper(1, 16, 4096, 16)
	w.runFor(t, c, 300*time.Millisecond)
	w.flush(t, c)
	var flushed []byte
	s.tamper(func(b []byte) { flushed = slices.Clone(b) })
	_, _, before := w.counts()
	// Pages that none of what follows touches come later; these are written once more, one by one, and not flushed.
	for at := range uint64(100) {
		b := make([]byte, pageSize)
		n := w.write(at*17, b, false)
		if err := c.WriteAt(b, (w.first+at*17)*pageSize, 0); err != nil {
			t.Fatal(err)
		}
		w.hist.Ack(n)
	}
	last, acked, durable := w.counts()
	if acked != last || durable != before || acked != durable+100 {
		t.Fatalf("%d writes, %d acknowledged, %d flushed", last, acked, durable)
	}
	img, err := w.image(c)
	if err != nil {
		t.Fatal(err)
	}
	for _, atLeast := range []uint64{0, durable, acked} {
		if n, err := w.check(img, atLeast); err != nil || n != last {
			t.Fatalf("the whole history: %d, %v", n, err)
		}
	}
	// What a power cut leaves of an honest disk.
	old := flushed[w.first*pageSize:][:len(img)]
	if n, err := w.check(old, durable); err != nil || n != durable {
		t.Fatalf("what was flushed: %d, %v", n, err)
	}
	if _, err := w.check(old, acked); err == nil {
		t.Error("W1: the loss of acknowledged writes was not noticed")
	}
	if _, err := w.check(make([]byte, len(img)), durable); err == nil {
		t.Error("D1: the loss of everything was not noticed")
	}
	for name, spoil := range map[string]func(b []byte){
		"a flipped byte":             func(b []byte) { b[17*pageSize+1000] ^= 4 },
		"a torn page":                func(b []byte) { copy(b[17*pageSize:17*pageSize+2048], old[17*pageSize:]) },
		"a lost write in the middle": func(b []byte) { copy(b[17*pageSize:18*pageSize], old[17*pageSize:]) },
		"a page that is elsewhere":   func(b []byte) { copy(b[17*pageSize:18*pageSize], b[34*pageSize:]) },
		"a page lost to zeroes":      func(b []byte) { clear(b[17*pageSize : 18*pageSize]) },
	} {
		bad := slices.Clone(img)
		spoil(bad)
		if bytes.Equal(bad, img) {
			t.Fatalf("%s: the control changes nothing", name)
		}
		if _, err := w.check(bad, 0); err == nil {
			t.Errorf("%s was not noticed", name)
		}
	}
	// Part of one request of several pages.
	at := uint64(3000)
	b := make([]byte, 4*pageSize)
	lo := w.hist.Last() + 1
	for i := range uint64(4) {
		w.write(at+i, b[i*pageSize:(i+1)*pageSize], false)
	}
	w.whole = append(w.whole, span{lo, lo + 3})
	copy(img[at*pageSize:], b[:2*pageSize])
	if _, err := w.check(img, acked); err == nil || !strings.Contains(err.Error(), "within one request") {
		t.Errorf("half a request was not noticed: %v", err)
	}
	copy(img[at*pageSize:], b)
	if n, err := w.check(img, acked); err != nil || n != lo+3 {
		t.Errorf("the whole request: %d, %v", n, err)
	}
}

// The reads that the writer does on its way compare.
func TestControlReads(t *testing.T) {
	s := newStandIn(t, 4<<20)
	c := dial(t, s.addr, startLimit)
	defer c.Close()
	w := newStamper(1, 0, 1024, 16)
	stop := w.start(c)
	eventually(t, 10*time.Second, "the writer notices a wrong byte", func() error {
		s.tamper(func(b []byte) {
			for i := 777; i < len(b); i += pageSize {
				b[i] ^= 1
			}
		})
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.wrong == nil {
			return errNotYet
		}
		return nil
	})
	if err := stop(); err != nil {
		t.Error(err)
	}
	r := startStream(t, s.addr, 0, 64, 0)
	eventually(t, 10*time.Second, "the stream notices a wrong byte", func() error {
		s.tamper(func(b []byte) { b[777] ^= 1 })
		if r.running(nil) {
			return errNotYet
		}
		return nil
	})
	if err := r.end(); err == nil {
		t.Error("no error")
	}
}

// A server that forgets what was flushed when it is killed, which is what the attach tests are there to find.
func TestControlForgetfulServer(t *testing.T) {
	dir := tempDir(t)
	a := nbdclient.Unix(filepath.Join(dir, "s"), "")
	p := newProcess(dir, "nbdkit", "nbdkit", "-f", "-U", a.Addr, "memory", "16M")
	p.start(t)
	t.Cleanup(p.kill)
	c := dial(t, a, startLimit)
	w := newStamper(1, 0, 4096, 16)
	w.runFor(t, c, 200*time.Millisecond)
	w.flush(t, c)
	w.mustEqual(t, c)
	p.kill()
	c.Close()
	if err := os.Remove(a.Addr); err != nil {
		t.Fatal(err)
	}
	p.start(t)
	c = dial(t, a, startLimit)
	defer c.Close()
	img, err := w.image(c)
	if err != nil {
		t.Fatal(err)
	}
	_, _, flushed := w.counts()
	if _, err := w.check(img, flushed); err == nil {
		t.Error("D1: the loss of everything was not noticed")
	}
}

// A server that stops for a while, and a stream that says for how long.
func TestControlStall(t *testing.T) {
	dir := tempDir(t)
	a := nbdclient.Unix(filepath.Join(dir, "s"), "")
	p := newProcess(dir, "nbdkit", "nbdkit", "-f", "-U", a.Addr, "memory", "16M")
	p.start(t)
	t.Cleanup(p.kill)
	r := startStream(t, a, 0, 64, 0)
	time.Sleep(200 * time.Millisecond)
	if s := r.look(); s.writes == 0 || s.reads == 0 || s.max() > time.Second {
		t.Errorf("undisturbed: %v", s)
	}
	p.freeze()
	time.Sleep(1500 * time.Millisecond)
	p.thaw()
	time.Sleep(200 * time.Millisecond)
	if s := r.look(); s.write < 1400*time.Millisecond || s.read < 1400*time.Millisecond {
		t.Errorf("stopped for 1.5 s: %v", s)
	}
	if err := r.end(); err != nil {
		t.Error(err)
	}
}

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coreos/torus/e2e/nbdclient"
)

// The disk under one of three peers is throttled, hangs, cannot be read, cannot be written: nobody who uses the volume sees an
// error or a wrong byte (D1, W1); once the disk is well and the peer was started again, the cluster is.
func TestSickDisk(t *testing.T) {
	dir := openDir(t)
	d := newSickDisk(t, dir)
	c := &cluster{dir: dir, peerSize: "768MiB"}
	if err := os.Symlink(d.mounted.at, c.peerDir(peerName(0))); err != nil {
		t.Fatal(err)
	}
	c.started(t)
	sick := c.peers[0]
	volume := c.newVolume(t, "512MiB")
	b := c.newBlk(t)
	conn := dial(t, b.export(volume), startLimit)
	w := newStamper(101, 0, 8192, 16)
	w.pace = 2 * time.Millisecond
	w.overwriteAll(t, conn)
	stop := w.start(conn)
	s := startStream(t, b.export(volume), 32<<8, 1024, 2*time.Millisecond)
	hold := 2 * time.Second
	if soaking() {
		hold = 20 * time.Second
	}
	for _, fault := range []struct {
		name       string
		hurt, mend func()
		restart    bool // it is of no use before it is started again
	}{
		{"at work for a tenth of the time", d.stutter, d.steady, false},
		{"hanging", d.server.freeze, d.server.thaw, false},
		{"unreadable", func() { d.fail(t, "read", true) }, func() { d.fail(t, "read", false) }, true},
		{"unwritable", func() { d.fail(t, "write", true) }, func() { d.fail(t, "write", false) }, true},
	} {
		s.look()
		_, before, _ := w.counts()
		mark := sick.mark()
		fault.hurt()
		d.forget(t)
		time.Sleep(hold)
		_, after, _ := w.counts()
		t.Logf("SICK the disk of %s is %s: %d writes; %v", sick.name, fault.name, after-before, s.look())
		if after == before {
			t.Errorf("%s: nothing went on", fault.name)
		}
		if text := strings.TrimSpace(sick.printed(mark)); text != "" {
			t.Logf("%s says: %s", sick.name, clip(text))
		}
		fault.mend()
		if fault.restart {
			sick.kill()
			d.remount(t)
			sick.start(t)
		}
		c.waitHealthy(t, 30*time.Second)
		if w.hasFailed() || !s.running(nil) {
			break
		}
	}
	if err := errors.Join(stop(), s.end()); err != nil {
		t.Errorf("I/O error: %v", err)
	}
	w.mustBeRight(t)
	w.flush(t, conn)
	w.mustEqual(t, conn)
	conn.Close()
	c.stopBlks(t)
	sick.kill()
}

// sickDisk is an ext4 on a loop device on an NBD server that can be told to do badly.
type sickDisk struct {
	dir     string
	server  *process
	address nbdclient.Address
	mounted *mountedDisk

	steadied chan struct{}
	wg       sync.WaitGroup
}

func newSickDisk(t *testing.T, dir string) *sickDisk {
	t.Helper()
	d := &sickDisk{dir: dir, address: nbdclient.Unix(filepath.Join(dir, "sick.sock"), "")}
	image := filepath.Join(dir, "sick.raw")
	tool(t, "truncate", "-s", "1G", image)
	tool(t, "mkfs.ext4", "-q", "-F", image)
	args := []string{"nbdkit", "-f", "-U", d.address.Addr, "--filter=error", "file", image, "error=EIO"}
	for _, what := range []string{"read", "write"} {
		args = append(args, "error-p"+what+"-rate=100%", "error-p"+what+"-file="+d.file(what))
	}
	d.server = newProcess(dir, "nbdkit", args...)
	d.server.start(t)
	t.Cleanup(d.server.kill)
	t.Cleanup(d.server.thaw)
	var err error
	if d.mounted, err = attachMount(t, dir, d.address); err != nil {
		t.Fatal(err)
	}
	if err := d.mounted.mount("ext4"); err != nil {
		t.Fatal(err)
	}
	// The control: each of the faults is one.
	probe := func(what string) error {
		_, err := try(t.Context(), "dd", "if=/dev/zero", "of="+filepath.Join(d.mounted.at, "probe"), "bs=1M", "count=2", "conv=fsync")
		if what == "read" {
			d.forgetFile(t, filepath.Join(d.mounted.at, "probe"))
			_, err = try(t.Context(), "cat", filepath.Join(d.mounted.at, "probe"))
		}
		return err
	}
	for _, what := range []string{"read", "write"} {
		if err := probe(what); err != nil {
			t.Fatal(err)
		}
		d.fail(t, what, true)
		if err := probe(what); err == nil {
			t.Errorf("a disk that fails every %s is not noticed", what)
		}
		d.fail(t, what, false)
	}
	d.remount(t)
	d.server.freeze()
	hung := make(chan error, 1)
	go func() { hung <- probe("write") }()
	select {
	case err := <-hung:
		t.Errorf("a disk that hangs has written: %v", err)
	case <-time.After(300 * time.Millisecond):
	}
	d.server.thaw()
	if err := <-hung; err != nil {
		t.Fatal(err)
	}
	return d
}

func (d *sickDisk) file(name string) string { return filepath.Join(d.dir, "sick."+name) }

// stutter lets the disk do nothing for nine tenths of the time, until steady.
func (d *sickDisk) stutter() {
	d.steadied = make(chan struct{})
	d.wg.Go(func() {
		for {
			d.server.freeze()
			select {
			case <-d.steadied:
				d.server.thaw()
				return
			case <-time.After(90 * time.Millisecond):
			}
			d.server.thaw()
			time.Sleep(10 * time.Millisecond)
		}
	})
}

func (d *sickDisk) steady() {
	close(d.steadied)
	d.wg.Wait()
}

// fail makes every read, or every write, fail from now on, or no longer.
func (d *sickDisk) fail(t *testing.T, what string, on bool) {
	t.Helper()
	var err error
	if on {
		err = os.WriteFile(d.file(what), nil, 0o644)
	} else {
		err = os.Remove(d.file(what))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// remount unmounts, as far as that works after errors, replays the journal and mounts again.
func (d *sickDisk) remount(t *testing.T) {
	t.Helper()
	d.mounted.undo[len(d.mounted.undo)-1]() //nolint:errcheck // mounting will say so
	d.mounted.undo = d.mounted.undo[:len(d.mounted.undo)-1]
	if _, err := try(t.Context(), "e2fsck", "-fy", d.mounted.loop); err != nil {
		t.Logf("repaired: %v", err) // its exit status says that it has repaired something
	}
	if err := d.mounted.mount("ext4"); err != nil {
		t.Fatal(err)
	}
}

// forget drops what the page cache holds of the peer's files, so that they are read from the disk.
func (d *sickDisk) forget(t *testing.T) {
	t.Helper()
	for _, f := range slotFiles(t, d.mounted.at) {
		d.forgetFile(t, f)
	}
}

func (d *sickDisk) forgetFile(t *testing.T, name string) {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
}

// Rot in every copy: what is lost is an error, for as long as it is lost, and never a wrong byte; everything else can be read; and
// what is written anew is there.
func TestRotInEveryCopy(t *testing.T) {
	const pages = 4096
	c := ownCluster(t)
	volume, in, img, b := c.filledVolume(t, pages, 7)
	lost := func(page uint64) bool { return page%8 == 3 }
	flipped := 0
	for _, p := range c.peers { // all at once: a peer that starts beside one whose copies are good still would mend its own
		p.kill()
	}
	for _, p := range c.peers {
		for _, f := range slotFiles(t, c.peerDir(p.name)) {
			flipped += flipBytes(t, f, in, lost)
		}
	}
	for _, p := range c.peers {
		p.start(t)
	}
	if want := 2 * pages / 8; flipped != want {
		t.Fatalf("%d pages were found in files, not %d", flipped, want)
	}
	c.waitHealthy(t, startLimit)
	b.serve(t)
	conn := dial(t, b.export(volume), startLimit)
	defer conn.Close()
	wrong, failed := 0, 0
	page := make([]byte, pageSize)
	for i := range uint64(pages) {
		err := conn.ReadAt(page, i*pageSize)
		switch {
		case err != nil && !errors.Is(err, syscall.EIO):
			t.Fatalf("page %d: %v", i, err)
		case err != nil:
			failed++
			if !lost(i) {
				t.Errorf("page %d has good copies: %v", i, err)
			}
		case !bytes.Equal(page, img[i*pageSize:(i+1)*pageSize]):
			wrong++
		case lost(i):
			t.Errorf("page %d has no good copy, and was read", i)
		}
	}
	t.Logf("ROT %d pages without a good copy: %d read errors, %d wrong", pages/8, failed, wrong)
	if wrong != 0 {
		t.Errorf("D2: %d pages were read wrong", wrong)
	}
	for i := range uint64(pages) {
		if lost(i) {
			if err := conn.WriteAt(img[i*pageSize:(i+1)*pageSize], i*pageSize, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(c.dir, "out")
	tool(t, "nbdcopy", b.export(volume).URI(), out)
	if err := sameBytes(out, img); err != nil {
		t.Error(err)
	}
}

func sameBytes(name string, want []byte) error {
	got, err := os.ReadFile(name)
	if err == nil && !bytes.Equal(got[:len(want)], want) {
		err = fmt.Errorf("%s differs", name)
	}
	return err
}

// A cluster without room: a writer is told so (ENOSPC), and nothing else; everything acknowledged can be read, attached anew or not, also
// when somebody else has filled the disks to the last byte, and after that (D1, W1, C1).
func TestNoRoom(t *testing.T) {
	c := &cluster{dir: tempDir(t), peerSize: "256MiB"}
	for i := range 3 {
		at := c.peerDir(peerName(i))
		if err := os.Mkdir(at, 0o755); err != nil {
			t.Fatal(err)
		}
		tool(t, "mount", "-t", "tmpfs", "-o", "size=320M", "tmpfs", at)
		t.Cleanup(func() {
			if _, err := try(context.Background(), "umount", "-l", at); err != nil {
				t.Log(err)
			}
		})
	}
	c.started(t)
	volume := c.newVolume(t, "1GiB")
	b := c.newBlk(t, "--force")
	conn := dial(t, b.export(volume), startLimit)
	w := newStamper(111, 0, 8192, 16)
	w.overwriteAll(t, conn)
	w.runFor(t, conn, 200*time.Millisecond)
	w.flush(t, conn)
	chunk := bytes.Repeat([]byte{0x5a}, 1<<20)
	written, began := uint64(0), time.Now()
	var err error
	for off := uint64(64 << 20); off < conn.Size() && err == nil; off += uint64(len(chunk)) {
		if err = conn.WriteAt(chunk, off, 0); err == nil {
			written = off + uint64(len(chunk))
		}
	}
	t.Logf("after %d MiB and %v: %v", written>>20, time.Since(began).Round(time.Millisecond), err)
	if !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("a full cluster says %v", err)
	}
	w.mustEqual(t, conn)
	again := func() {
		t.Helper()
		b.kill()
		conn.Close()
		b.serve(t)
		conn = dial(t, b.export(volume), startLimit)
		w.settle(t, conn, true)
	}
	// The writer is killed while everything is full: it attaches again, nothing is gone, and what it trims can be written again.
	again()
	page := make([]byte, pageSize)
	intact := func() {
		t.Helper()
		for off := uint64(64 << 20); off < written; off += 1 << 20 {
			if err := conn.ReadAt(page, off); err != nil || !bytes.Equal(page, chunk[:pageSize]) {
				t.Fatalf("at %d, acknowledged: %v", off, err)
			}
		}
	}
	intact()
	const trimmed = 64 << 20
	written -= trimmed
	if err := errors.Join(conn.Trim(written, trimmed, 0), conn.Flush()); err != nil {
		t.Fatalf("trim in a full cluster: %v", err)
	}
	began = time.Now()
	writable := func() { // soon, as writers hear of room within seconds
		t.Helper()
		for err = conn.WriteAt(chunk, written, 0); errors.Is(err, syscall.ENOSPC) && time.Since(began) < startLimit; err = conn.WriteAt(chunk, written, 0) {
			time.Sleep(100 * time.Millisecond)
		}
		if err != nil {
			t.Fatalf("write where there is room again: %v", err)
		}
		written += uint64(len(chunk))
	}
	for to := written + trimmed/2; written < to; {
		writable()
	}
	t.Logf("what was trimmed could be written again after %v", time.Since(began).Round(time.Millisecond))
	w.mustEqual(t, conn)
	// Two more peers give room, and the writer goes on.
	full := slices.Clone(c.peers)
	for i := range 2 {
		p := c.newPeer(t, peerName(3+i))
		p.args = append(p.args, "--auto-join")
		p.start(t)
		c.peers = append(c.peers, p)
		c.waitReady(t, p)
	}
	again()
	began = time.Now()
	writable()
	w.runFor(t, conn, 200*time.Millisecond)
	w.flush(t, conn)
	// Somebody else takes the last byte. Peers that run go on; one that is started starts, and answers for what it has.
	filler := func(p *peer) string { return filepath.Join(c.peerDir(p.name), "filler") }
	for _, p := range full {
		if _, err := try(t.Context(), "dd", "if=/dev/zero", "of="+filler(p), "bs=4k"); err == nil {
			t.Error("there was no end to it")
		}
	}
	again()
	for _, p := range full {
		p.kill()
		p.start(t)
		c.waitReady(t, p)
	}
	again()
	for _, p := range full {
		if err := os.Remove(filler(p)); err != nil {
			t.Fatal(err)
		}
	}
	again()
	defer func() { conn.Close() }()
	intact()
}

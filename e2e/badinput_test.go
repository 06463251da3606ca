package e2e

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coreos/torus/e2e/nbdclient"
)

// mustFail runs a command that must end with an error of at most three lines that says all of words, and no stack or usage page.
func mustFail(t *testing.T, words []string, args ...string) {
	t.Helper()
	out, err := try(t.Context(), args...)
	if err == nil {
		t.Errorf("%s succeeded:\n%s", strings.Join(args, " "), out)
		return
	}
	_, text, _ := strings.Cut(err.Error(), "\n")
	checkError(t, strings.Join(args, " "), text, words)
}

func checkError(t *testing.T, what, text string, words []string) {
	t.Helper()
	for _, w := range words {
		if !strings.Contains(text, w) {
			t.Errorf("%s: the error does not say %q:\n%s", what, w, text)
		}
	}
	if n := strings.Count(strings.TrimSpace(text), "\n") + 1; n > 3 || strings.Contains(text, "goroutine ") {
		t.Errorf("%s: an error of %d lines:\n%s", what, n, text)
	}
}

func TestVolumeErrors(t *testing.T) {
	c := sharedCluster(t)
	volume := c.newVolume(t, "64MiB")
	ctl := func(args ...string) []string { return append([]string{c.torusctl, "-C", c.etcdURL}, args...) }
	mustFail(t, []string{volume, "already exists"}, ctl("volume", "create-block", volume, "1GiB")...)
	mustFail(t, []string{"nosuch", "does not exist"}, ctl("volume", "delete", "nosuch")...)
	mustFail(t, []string{"nosuch", "does not exist"}, ctl("volume", "info", "nosuch")...)

	b, other := c.newBlk(t), c.newBlk(t)
	mustRefuse := func(a nbdclient.Address, words ...string) {
		t.Helper()
		_, err := a.Dial(t.Context())
		var refused *nbdclient.Refused
		if !errors.As(err, &refused) {
			t.Errorf("%s: %v", a.URI(), err)
			return
		}
		checkError(t, a.URI(), refused.Message, words)
	}
	mustRefuse(b.export("nosuch"), "nosuch", "no such device")
	conn := dial(t, b.export(volume), startLimit)
	defer conn.Close()
	if v := c.volume(t, volume); v.Status != "attached" || !strings.Contains(v.AttachedTo, fmt.Sprint(b.cmd.Process.Pid)) {
		t.Errorf("attached, but torusctl says %s to %q (pid %d)", v.Status, v.AttachedTo, b.cmd.Process.Pid)
	}
	mustRefuse(other.export(volume), volume, "locked", "--force", fmt.Sprint(b.cmd.Process.Pid))
	mustFail(t, []string{volume, "locked"}, ctl("volume", "delete", volume)...)
	if err := conn.WriteAt(make([]byte, 4096), 0, nbdclient.FUA); err != nil {
		t.Errorf("the holder after an attach was refused elsewhere: %v", err)
	}
	// Released, it can be had at once.
	conn.Close()
	eventually(t, 5*time.Second, "the volume is released", func() error {
		if v := c.volume(t, volume); v.AttachedTo != "" {
			return fmt.Errorf("%s", v.AttachedTo)
		}
		return nil
	})
	dial(t, other.export(volume), startLimit).Close()
	// --force takes over from a holder that lives, and that one's client is told.
	conn = dial(t, b.export(volume), startLimit)
	defer conn.Close()
	forced := dial(t, c.newBlk(t, "--force").export(volume), startLimit)
	defer forced.Close()
	if err := forced.WriteAt(make([]byte, 4096), 0, nbdclient.FUA); err != nil {
		t.Error(err)
	}
	if err := conn.WriteAt(make([]byte, 4096), 0, nbdclient.FUA); err == nil {
		t.Error("L1: the holder that lost the volume was told of a success")
	}
}

func TestPeerErrors(t *testing.T) {
	c := sharedCluster(t)
	args := func(dir, etcd string) []string {
		return []string{program(t, "torusd"), "--etcd", etcd, "--data-dir", dir, "--size", "1GiB", "--peer-address", "tdp://" + freePort(t)}
	}
	mustFail(t, []string{c.peerDir("peer1"), "in use"}, args(c.peerDir("peer1"), c.etcdURL)...)
	if !c.peers[0].alive() {
		t.Error("the torusd whose data dir it is has ended")
	}

	// A data dir of one cluster, taken to another.
	dir := tempDir(t)
	stray := newProcess(dir, "stray", args(filepath.Join(dir, "data"), c.etcdURL)...)
	stray.start(t)
	t.Cleanup(stray.kill)
	eventually(t, startLimit, "a fourth peer registers", func() error {
		peers, err := c.peerList(t.Context())
		if err == nil && len(peers) != 4 {
			err = errNotYet
		}
		return err
	})
	stray.interrupt(t, syscall.SIGTERM, 10*time.Second)
	second := &cluster{dir: dir, torusctl: c.torusctl}
	second.startEtcd(t)
	t.Cleanup(second.kill)
	second.ctl(t, "init")
	mustFail(t, []string{filepath.Join(dir, "data"), "another cluster"}, args(filepath.Join(dir, "data"), second.etcdURL)...)
	mustFail(t, []string{"already"}, c.torusctl, "-C", second.etcdURL, "init")
}

// Rot on one peer: bytes flipped in its data file, then the file cut short. What is read is right all the time, from the
// other replica; torusd says what is wrong; the cluster serves on.
func TestRot(t *testing.T) {
	c := ownCluster(t)
	volume := c.newVolume(t, "192MiB")
	dir := tempDir(t)
	in, out := filepath.Join(dir, "in"), filepath.Join(dir, "out")
	image(t, in, 3)
	b := c.newBlk(t)
	tool(t, "nbdcopy", "--flush", in, b.export(volume).URI())
	equal := func(when string) {
		t.Helper()
		os.Remove(out) //nolint:errcheck // it is written anew
		began := time.Now()
		if _, err := try(t.Context(), "nbdcopy", b.export(volume).URI(), out); err != nil {
			t.Errorf("%s: %v", when, err)
			return
		}
		if _, err := try(t.Context(), "cmp", in, out); err != nil {
			t.Errorf("%s: %v", when, err)
		}
		t.Logf("%s: read and compared in %v", when, time.Since(began).Round(time.Millisecond))
	}
	equal("before")

	rotten := c.peers[0]
	files := slotFiles(t, c.peerDir(rotten.name))
	flipped := 0
	for _, f := range files {
		flipped += flipBytes(t, f, in, func(page uint64) bool { return page%10 == 0 })
	}
	t.Logf("one byte flipped in each of %d pages on %s", flipped, rotten.name)
	if flipped < 100 {
		t.Fatalf("only %d pages of the image were found on %s", flipped, rotten.name)
	}
	equal("with flipped bytes")
	rotten.kill()
	rotten.start(t)
	c.waitHealthy(t, startLimit)
	equal("after a restart of the peer")

	rotten.kill()
	cut := files[0]
	st, err := os.Stat(cut)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(cut, st.Size()/2); err != nil {
		t.Fatal(err)
	}
	mark := rotten.mark()
	rotten.start(t)
	rotten.waitPrinted(t, mark, startLimit, filepath.Base(cut)+`: it has \d+ bytes, not \d+`)
	t.Logf("a file cut short: %s", strings.TrimSpace(rotten.printed(mark)))
	equal("with a file cut short")
	w := newStamper(41, 0, 8192, 16)
	conn := dial(t, b.export(volume), startLimit)
	defer conn.Close()
	w.overwriteAll(t, conn)
	w.runFor(t, conn, time.Second)
	w.flush(t, conn)
	w.mustEqual(t, conn)
}

// Rot on every peer, but of each page one copy at most: all of it can still be read, also after the peers have read
// their files anew (D3: what cannot be verified is no reason to forget what can).
func TestRotEverywhere(t *testing.T) {
	t.Run("sealed", func(t *testing.T) { testRotEverywhere(t, false) })
	// The last blocks of a volume that is attached are still open.
	t.Run("open", func(t *testing.T) { testRotEverywhere(t, true) })
}

func testRotEverywhere(t *testing.T, attached bool) {
	c := ownCluster(t)
	volume := c.newVolume(t, "192MiB")
	dir := tempDir(t)
	in, out := filepath.Join(dir, "in"), filepath.Join(dir, "out")
	image(t, in, 4)
	b := c.newBlk(t)
	if attached {
		defer dial(t, b.export(volume), startLimit).Close()
	}
	tool(t, "nbdcopy", "--flush", in, b.export(volume).URI())
	for i, p := range c.peers {
		flipped := 0
		for _, f := range slotFiles(t, c.peerDir(p.name)) {
			flipped += flipBytes(t, f, in, func(page uint64) bool { return page%10 == 0 && page/10%3 == uint64(i) })
		}
		t.Logf("one byte flipped in each of %d pages on %s", flipped, p.name)
		if flipped < 100 {
			t.Fatalf("only %d pages of the image were found on %s", flipped, p.name)
		}
	}
	tool(t, "nbdcopy", b.export(volume).URI(), out)
	sameFile(t, in, out)
	for _, p := range c.peers {
		p.kill()
		p.start(t)
		c.waitHealthy(t, startLimit)
	}
	os.Remove(out) //nolint:errcheck // it is written anew
	tool(t, "nbdcopy", b.export(volume).URI(), out)
	sameFile(t, in, out)
}

// filledVolume makes a volume full of random pages, and releases it. in is a file with what it holds, img, and b the torusblk it was written by.
func (c *cluster) filledVolume(t *testing.T, pages int, seed byte) (volume, in string, img []byte, b *blk) {
	t.Helper()
	volume = c.newVolume(t, fmt.Sprint(pages*pageSize))
	img = make([]byte, pages*pageSize)
	rand.NewChaCha8([32]byte{seed}).Read(img) //nolint:errcheck // it cannot fail
	in = filepath.Join(c.dir, "in")
	if err := os.WriteFile(in, img, 0o644); err != nil {
		t.Fatal(err)
	}
	b = c.newBlk(t)
	tool(t, "nbdcopy", "--flush", in, b.export(volume).URI())
	b.interrupt(t, syscall.SIGTERM, 15*time.Second)
	return volume, in, img, b
}

// slotFiles are the files in which a peer keeps blocks.
func slotFiles(t *testing.T, dir string) (files []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() && d.Name() == "lost+found" {
			return filepath.SkipDir // the peer does not look there, and the disk may be sick
		}
		if err == nil && !d.IsDir() && strings.HasPrefix(d.Name(), "slots") {
			files = append(files, path)
		}
		return err
	})
	if err != nil || len(files) == 0 {
		t.Fatalf("no data files in %s: %v", dir, err)
	}
	return files
}

// flipBytes finds pages of the image in a peer's file and flips a byte in those that are chosen by their number.
func flipBytes(t *testing.T, name, image string, choose func(page uint64) bool) (flipped int) {
	t.Helper()
	img, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	pages := map[uint64]uint64{} // by their first bytes
	for off := 0; off < len(img); off += pageSize {
		if x := binary.LittleEndian.Uint64(img[off:]); x != 0 {
			pages[x] = uint64(off / pageSize)
		}
	}
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1<<20)
	for off := int64(0); ; off += int64(len(b)) {
		n, err := f.ReadAt(b, off)
		for i := 0; i+pageSize <= n; i += pageSize {
			page, ok := pages[binary.LittleEndian.Uint64(b[i:])]
			if !ok || !choose(page) {
				continue
			}
			if _, err := f.WriteAt([]byte{b[i+1000] ^ 0x10}, off+int64(i)+1000); err != nil {
				t.Fatal(err)
			}
			flipped++
		}
		if err != nil {
			return flipped
		}
	}
}

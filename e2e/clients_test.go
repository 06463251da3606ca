package e2e

import (
	"context"
	"encoding/json"
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

// The clients that people use, against a volume on a cluster.

const imageSize = 192 << 20

// image makes a file of random data, zeroes and holes.
func image(t *testing.T, path string, seed uint64) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rng := rand.NewChaCha8([32]byte{byte(seed)})
	const chunk = 3 << 20
	for off := int64(0); off < imageSize; off += chunk {
		if off/chunk%4 == 3 {
			continue // a hole
		}
		b := make([]byte, min(chunk, imageSize-off))
		rng.Read(b) //nolint:errcheck // it cannot fail
		if off/chunk%4 == 2 {
			clear(b[1<<20 : 2<<20])
		}
		if _, err := f.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(imageSize); err != nil {
		t.Fatal(err)
	}
}

func sameFile(t *testing.T, a, b string) {
	t.Helper()
	if _, err := try(t.Context(), "cmp", a, b); err != nil {
		t.Error(err)
	}
}

// clientVolume is a new volume with a torusblk that serves it.
func clientVolume(t *testing.T, size string) (*cluster, *blk, nbdclient.Address) {
	t.Helper()
	c := sharedCluster(t)
	volume := c.newVolume(t, size)
	b := c.newBlk(t)
	return c, b, b.export(volume)
}

func TestNBDInfo(t *testing.T) {
	_, b, a := clientVolume(t, "192MiB")
	var info struct {
		Protocol string
		Exports  []struct {
			Name string `json:"export-name"`
			Size uint64 `json:"export-size"`
			Can  map[string]any
		}
	}
	if err := json.Unmarshal([]byte(tool(t, "nbdinfo", "--json", a.URI())), &info); err != nil {
		t.Fatal(err)
	}
	if len(info.Exports) != 1 || info.Exports[0].Size != imageSize || !strings.HasPrefix(info.Protocol, "newstyle-fixed") {
		t.Errorf("nbdinfo: %+v", info)
	}
	for _, can := range []string{"flush", "fua", "trim", "zero", "multi-conn"} {
		tool(t, "nbdinfo", "--can", can, a.URI())
	}
	if out := tool(t, "nbdinfo", "--list", nbdclient.Unix(b.socket, "").URI()); !strings.Contains(out, a.Export) {
		t.Errorf("nbdinfo --list shows no %s:\n%s", a.Export, out)
	}
	// The map: nothing, then what is written, then nothing again.
	type extent struct{ Offset, Length, Type uint64 }
	mapOf := func() (out []extent) {
		if err := json.Unmarshal([]byte(tool(t, "nbdinfo", "--map", "--json", a.URI())), &out); err != nil {
			t.Fatal(err)
		}
		return out
	}
	const hole, data = 3, 0
	check := func(want ...extent) {
		t.Helper()
		if got := mapOf(); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("nbdinfo --map: %v, want %v", got, want)
		}
	}
	check(extent{0, imageSize, hole})
	tool(t, "qemu-io", "-f", "raw", "-c", "write -P 1 1M 64k", "-c", "flush", a.URI())
	check(extent{0, 1 << 20, hole}, extent{1 << 20, 64 << 10, data}, extent{1<<20 + 64<<10, imageSize - 1<<20 - 64<<10, hole})
	tool(t, "qemu-io", "-f", "raw", "-d", "unmap", "-c", "discard 1M 64k", "-c", "flush", a.URI())
	check(extent{0, imageSize, hole})
}

func TestNBDCopy(t *testing.T) {
	c, b, a := clientVolume(t, "192MiB")
	dir := tempDir(t)
	in, out := filepath.Join(dir, "in"), filepath.Join(dir, "out")
	image(t, in, 1)
	tool(t, "nbdcopy", "--connections=4", "--requests=64", "--flush", in, a.URI())
	tool(t, "nbdcopy", "--connections=4", "--requests=64", a.URI(), out)
	sameFile(t, in, out)
	// The same from a torusblk that has just attached it: from the map, not from memory.
	os.Remove(out) //nolint:errcheck // it is written anew
	b.interrupt(t, syscall.SIGTERM, 15*time.Second)
	tool(t, "nbdcopy", c.newBlk(t).export(a.Export).URI(), out)
	sameFile(t, in, out)
}

func TestQemuImg(t *testing.T) {
	_, _, a := clientVolume(t, "192MiB")
	dir := tempDir(t)
	in, out := filepath.Join(dir, "in"), filepath.Join(dir, "out")
	image(t, in, 2)
	tool(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", in, a.URI())
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", in, a.URI())
	tool(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", a.URI(), out)
	sameFile(t, in, out)
	if out, err := try(t.Context(), "qemu-img", "compare", "-f", "raw", "-F", "raw", "-s", in, "null-co://"); err == nil {
		t.Errorf("the control compares equal: %s", out)
	}
	tool(t, "qemu-img", "bench", "-f", "raw", "-t", "none", "-w", "-c", "20000", "-d", "16", "-s", "4096", "--flush-interval=64", a.URI())
	tool(t, "qemu-img", "bench", "-f", "raw", "-t", "none", "-c", "20000", "-d", "16", "-s", "4096", a.URI())
}

func TestQemuIO(t *testing.T) {
	_, _, a := clientVolume(t, "64MiB")
	io := func(cmds ...string) error {
		args := []string{"qemu-io", "-f", "raw", "-d", "unmap"}
		for _, c := range cmds {
			args = append(args, "-c", c)
		}
		_, err := try(t.Context(), append(args, a.URI())...)
		return err
	}
	for _, cmds := range [][]string{
		{"write -P 0xab 1M 64k", "write -f -P 0xcd 2M 4k", "flush", "read -P 0xab 1M 64k", "read -P 0xcd 2M 4k", "read -P 0 0 1M"},
		{"discard 1M 4k", "read -P 0 1M 4k", "read -P 0xab 1028k 60k"},
		{"write -z -u 2M 4k", "read -P 0 2M 4k", "write -z 1040k 8k", "read -P 0 1040k 8k", "read -P 0xab 1048k 8k", "flush"},
		{"write -P 7 513 1023", "read -P 0 0 513", "read -P 7 513 1023", "read -P 0 1536 512"}, // not aligned to anything
		{"write -f -P 8 4095 2", "read -P 8 4095 2", "read -P 0 4097 100"},
		{"write -P 9 63M 1M", "read -P 9 63M 1M"},
		{"write -z -f 63M 4097", "read -P 0 63M 4097", "read -P 9 66064385 1044479"},
		{"aio_write -P 1 8M 1M", "aio_write -P 2 9M 1M", "aio_write -P 3 10M 1M", "aio_flush", "read -P 1 8M 1M", "read -P 2 9M 1M", "read -P 3 10M 1M"},
	} {
		if err := io(cmds...); err != nil {
			t.Errorf("%v: %v", cmds, err)
		}
	}
	// The control: a wrong pattern is noticed.
	if err := io("read -P 1 9M 1M"); err == nil {
		t.Error("qemu-io does not notice a wrong pattern")
	}
	// Every read compared with a plain file.
	ref := filepath.Join(tempDir(t), "ref")
	tool(t, "nbdcopy", a.URI(), ref)
	args := []string{"qemu-io"}
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range 300 {
		off, n := rng.IntN(60<<20), 1+rng.IntN(200<<10)
		switch rng.IntN(3) {
		case 0:
			off, n = off&^511, (n+511)&^511
		case 1:
			off, n = off&^4095, (n+4095)&^4095
		}
		cmd := fmt.Sprintf("write -P %d %d %d", i%255+1, off, n)
		switch rng.IntN(6) {
		case 0:
			cmd = fmt.Sprintf("write -P 0 %d %d", off, n) // blkverify knows no write -z
		case 1, 2:
			cmd = fmt.Sprintf("read %d %d", off, n)
		case 3:
			cmd = fmt.Sprintf("write -f -P %d %d %d", i%255+1, off, n)
		}
		args = append(args, "-c", cmd)
	}
	tool(t, append(args, "--image-opts", "driver=blkverify,raw.driver=file,raw.filename="+ref+",test.driver=nbd,test.server.type=unix,test.server.path="+a.Addr+",test.export="+a.Export)...)
	out := filepath.Join(tempDir(t), "out")
	tool(t, "nbdcopy", a.URI(), out)
	sameFile(t, ref, out)
}

// Odd sizes at odd places, mixed, verified.
func TestFio(t *testing.T) {
	_, _, a := clientVolume(t, "512MiB")
	dir := tempDir(t)
	for _, job := range [][]string{
		{"--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=64m"},
		{"--rw=randwrite", "--bssplit=512/10:4k/40:12k/10:64k/30:1m/10", "--blockalign=512", "--iodepth=16", "--offset=64m", "--size=192m"},
		{"--rw=randrw", "--bssplit=512/10:4k/40:12k/10:64k/30:1m/10", "--blockalign=512", "--iodepth=8", "--offset=256m", "--size=128m", "--verify_backlog=64", "--fsync=32"},
		{"--rw=write", "--bs=1m", "--iodepth=8", "--offset=384m", "--size=128m"},
	} {
		slow, err := fio(t.Context(), dir, a, job...)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%v: slowest request %v", job, slow.Round(time.Millisecond))
	}
}

// ext4 and xfs on the volume, through FUSE and a loop device: flush, trim and zeroes come from a kernel.
func TestFileSystems(t *testing.T) {
	src := filepath.Join(strings.TrimSpace(tool(t, "go", "env", "GOROOT")), "src")
	for _, fs := range []struct {
		name        string
		mkfs, check []string
	}{
		{"ext4", []string{"mkfs.ext4", "-q", "-F"}, []string{"e2fsck", "-fn"}},
		{"xfs", []string{"mkfs.xfs", "-q", "-f"}, []string{"xfs_repair", "-n"}},
	} {
		t.Run(fs.name, func(t *testing.T) {
			c, b, a := clientVolume(t, "1GiB")
			volume := a.Export
			dir := tempDir(t)
			mount := filepath.Join(dir, "mnt")
			if err := os.Mkdir(mount, 0o755); err != nil {
				t.Fatal(err)
			}
			tree := filepath.Join(mount, "src")

			d := attachLoop(t, c, dir, a)
			tool(t, append(fs.mkfs, d.loop)...)
			tool(t, "mount", "-t", fs.name, d.loop, mount)
			umount := cleanupOnce(t, "umount", mount)
			tool(t, "cp", "-a", src, tree)
			tool(t, "cp", "-a", src, tree+"2")
			tool(t, "rm", "-r", tree+"2")
			tool(t, "sync", "-f", mount)
			t.Log(strings.TrimSpace(tool(t, "fstrim", "-v", mount)))
			umount()
			tool(t, append(fs.check, d.loop)...)
			d.detach()

			b.kill()
			a = c.newBlk(t, "--force").export(volume)
			d = attachLoop(t, c, dir, a)
			tool(t, append(fs.check, d.loop)...)
			tool(t, "mount", "-t", fs.name, d.loop, mount)
			umount = cleanupOnce(t, "umount", mount)
			if out, err := try(t.Context(), "diff", "-r", src, tree); err != nil {
				t.Errorf("the tree is not what was copied: %v\n%s", err, clip(out))
			}
			umount()
			d.detach()
		})
	}
}

// loopDevice is an export as a block device of this kernel.
type loopDevice struct {
	loop   string
	detach func()
}

func attachLoop(t *testing.T, c *cluster, dir string, a nbdclient.Address) *loopDevice {
	t.Helper()
	at := filepath.Join(dir, "fuse")
	if err := os.MkdirAll(at, 0o755); err != nil {
		t.Fatal(err)
	}
	fuse := newProcess(dir, "nbdfuse", "nbdfuse", at, a.URI())
	fuse.start(t)
	unfuse := cleanupOnce(t, "umount", at)
	file := filepath.Join(at, "nbd")
	eventually(t, startLimit, "nbdfuse serves", func() error {
		_, err := os.Stat(file)
		return err
	})
	d := &loopDevice{loop: strings.TrimSpace(tool(t, "losetup", "--direct-io=on", "-f", "--show", file))}
	unloop := cleanupOnce(t, "losetup", "-d", d.loop)
	d.detach = func() {
		unloop()
		// The loop device lets go of the file a moment after it was detached.
		eventually(t, startLimit, "the loop device lets go", func() error {
			out, err := try(t.Context(), "losetup", "-j", file)
			if err == nil && out != "" {
				err = fmt.Errorf("%s", out)
			}
			return err
		})
		unfuse()
		if err := fuse.wait(); err != nil {
			t.Errorf("nbdfuse: %v", err)
		}
	}
	return d
}

// cleanupOnce returns a function that runs a command; it is run at the end of the test unless it was before.
func cleanupOnce(t *testing.T, args ...string) func() {
	t.Helper()
	done := false
	t.Cleanup(func() {
		if !done {
			if _, err := try(context.Background(), args...); err != nil {
				t.Log(err)
			}
		}
	})
	return func() {
		t.Helper()
		done = true
		tool(t, args...)
	}
}

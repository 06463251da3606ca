package e2e

import (
	"bytes"
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coreos/torus/e2e/nbdclient"
)

// guest is a machine: QEMU without hardware acceleration, Debian's kernel, an initramfs with busybox and our programs, and a
// disk. Its console is the log.
type guest struct {
	*process
	disk *guestDisk // nil: none
	ip   string
}

// guestBoots is how long a boot may take.
const guestBoots = 2 * time.Minute

// newGuest is a machine on the network, which is not running yet. On boot it mounts its disk, if any, at /data and runs a script,
// which is given its address. programs are ours, by name, and those of this machine, by path.
func newGuest(t *testing.T, dir, name string, n *network, disk *guestDisk, modules []string, script func(ip string) string, programs ...string) *guest {
	t.Helper()
	g := &guest{disk: disk, ip: n.tap(t, "tap-"+name)}
	kernel, paths := guestKernel(t)
	initramfs := filepath.Join(dir, name+".initramfs")
	mount := ""
	if disk != nil {
		mount = "mount -t " + disk.fs + " /dev/vda /data || echo MOUNT FAILED\n"
		modules = append([]string{"virtio_blk", disk.fs}, modules...)
	}
	files := map[string][]byte{}
	var order []string
	for _, path := range moduleClosure(t, paths, append([]string{"virtio_pci", "virtio_net", "crc32c_generic"}, modules...)) {
		at := "modules/" + filepath.Base(path)
		files[at] = readFile(t, path)
		order = append(order, "/"+at)
	}
	files["init"] = []byte(`#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
mount -t tmpfs none /tmp
echo 3 > /proc/sys/kernel/printk
for m in ` + strings.Join(order, " ") + `; do insmod $m || echo "insmod $m failed"; done
ip link set lo up
ip addr add ` + g.ip + `/24 dev eth0
ip link set eth0 up
` + mount + `echo BOOTED
. /script
sync
poweroff -f
`)
	files["script"] = []byte(script(g.ip))
	files["bin/busybox"] = readFile(t, "/usr/bin/busybox")
	for _, p := range programs {
		if !filepath.IsAbs(p) {
			p = program(t, p)
		}
		files["bin/"+filepath.Base(p)] = readFile(t, p)
		for _, lib := range libraries(p) {
			files[lib[1:]] = readFile(t, lib)
		}
	}
	if err := os.WriteFile(initramfs, cpio(files, "proc", "sys", "dev", "tmp", "data", "bin"), 0o644); err != nil {
		t.Fatal(err)
	}
	args := []string{"qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1", "-m", "640", "-display", "none", "-serial", "stdio", "-monitor", "none",
		"-nodefaults", "-no-reboot", "-kernel", kernel, "-initrd", initramfs, "-append", "console=ttyS0 quiet panic=-1 random.trust_cpu=on mitigations=off",
		"-netdev", "tap,id=n,ifname=tap-" + name + ",script=no,downscript=no", "-device", "virtio-net-pci,netdev=n,romfile=", "-device", "virtio-rng-pci"}
	if disk != nil {
		args = append(args, "-blockdev", "driver=nbd,node-name=d,server.type=unix,server.path="+disk.socket, "-device", "virtio-blk-pci,drive=d,write-cache=on")
	}
	g.process = newProcess(dir, name, args...)
	g.net = n.bridge
	t.Cleanup(g.powerCut)
	return g
}

// boot starts it and waits until its disk is mounted.
func (g *guest) boot(t *testing.T) {
	t.Helper()
	if g.disk != nil {
		g.disk.start(t)
	}
	mark := g.mark()
	g.start(t)
	g.waitPrinted(t, mark, guestBoots, `BOOTED`)
	if strings.Contains(g.printed(mark), "MOUNT FAILED") {
		t.Fatalf("the guest's file system cannot be mounted:\n%s", g.tail(20))
	}
}

// powerCut ends it between two instructions, and what its disk had not flushed is gone.
func (g *guest) powerCut() {
	if g.disk != nil {
		g.disk.server.signal(syscall.SIGKILL)
	}
	g.kill()
	if g.disk != nil {
		g.disk.server.kill()
	}
}

// guestDisk is a disk with a write cache of its own, which is lost with the power: a flush, and nothing else, brings what was written to the
// file.
type guestDisk struct {
	dir, fs, socket, file string
	server                *process
	lies                  bool // it answers flushes without doing them
}

func newGuestDisk(t *testing.T, dir, fs, size string) *guestDisk {
	t.Helper()
	d := &guestDisk{dir: dir, fs: fs, socket: filepath.Join(dir, "disk.sock"), file: filepath.Join(dir, "disk.raw")}
	tool(t, "truncate", "-s", size, d.file)
	tool(t, "mkfs."+fs, "-q", map[string]string{"ext4": "-F", "xfs": "-f"}[fs], d.file)
	return d
}

func (d *guestDisk) start(t *testing.T) {
	t.Helper()
	os.Remove(d.socket) //nolint:errcheck // else what is waited for is there already
	mode := "writeback"
	if d.lies {
		mode = "unsafe"
	}
	d.server = newProcess(d.dir, "guest-disk", "nbdkit", "-f", "-U", d.socket, "--filter=cache", "file", d.file, "cache="+mode)
	d.server.start(t)
	dial(t, nbdclient.Unix(d.socket, ""), startLimit).Close()
}

// guestKernel is where `make bin/guest-kernel` has unpacked Debian's kernel: its image, and its modules by name.
func guestKernel(t *testing.T) (image string, modules map[string]string) {
	t.Helper()
	const dir = "../bin/guest-kernel"
	found, err := filepath.Glob(dir + "/boot/vmlinuz-*")
	if err != nil || len(found) == 0 {
		t.Fatalf("no kernel in %s (make bin/guest-kernel fetches one): %v", dir, err)
	}
	modules = map[string]string{}
	err = filepath.WalkDir(dir+"/lib/modules", func(path string, _ os.DirEntry, err error) error {
		if name, ok := strings.CutSuffix(filepath.Base(path), ".ko"); ok {
			modules[strings.ReplaceAll(name, "-", "_")] = path
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found[len(found)-1], modules
}

// moduleClosure are the files of kernel modules and of all they need, in the order in which they can be loaded.
func moduleClosure(t *testing.T, paths map[string]string, names []string) (order []string) {
	t.Helper()
	seen := map[string]bool{}
	var add func(name string)
	add = func(name string) {
		if seen[name] {
			return
		}
		seen[name] = true
		f, err := elf.Open(paths[name])
		if err != nil {
			t.Fatalf("kernel module %s: %v", name, err)
		}
		defer f.Close()
		info, err := f.Section(".modinfo").Data()
		if err != nil {
			t.Fatalf("kernel module %s: %v", name, err)
		}
		for _, field := range strings.Split(string(info), "\x00") {
			if needs, ok := strings.CutPrefix(field, "depends="); ok && needs != "" {
				for _, n := range strings.Split(needs, ",") {
					add(strings.ReplaceAll(n, "-", "_"))
				}
			}
		}
		order = append(order, paths[name])
	}
	for _, name := range names {
		add(name)
	}
	return order
}

// libraries are the files that a program of this machine needs; a static one needs none.
func libraries(program string) (paths []string) {
	out, err := exec.Command("ldd", program).Output()
	if err != nil {
		return nil // "not a dynamic executable"
	}
	for _, word := range strings.Fields(string(out)) {
		if strings.HasPrefix(word, "/") {
			paths = append(paths, word)
		}
	}
	return paths
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// cpio is an initramfs in the "newc" format: directories, executable files and a console.
func cpio(files map[string][]byte, dirs ...string) []byte {
	var b bytes.Buffer
	inode := 0
	entry := func(name string, mode, major, minor int, data []byte) {
		inode++
		fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
			inode, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name)+1, 0, name)
		pad := func() { b.Write(make([]byte, -b.Len()&3)) }
		pad()
		b.Write(data)
		pad()
	}
	made := map[string]bool{".": true}
	var mkdir func(name string)
	mkdir = func(name string) {
		if !made[name] {
			made[name] = true
			mkdir(filepath.Dir(name))
			entry(name, 0o40755, 0, 0, nil)
		}
	}
	for _, d := range dirs {
		mkdir(d)
	}
	entry("dev/console", 0o20600, 5, 1, nil)
	for name, data := range files {
		mkdir(filepath.Dir(name))
		entry(name, 0o100755, 0, 0, data)
	}
	entry("TRAILER!!!", 0, 0, 0, nil)
	return b.Bytes()
}

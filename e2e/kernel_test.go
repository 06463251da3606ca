package e2e

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// torusblk nbd on a real kernel: a virtual machine attaches a volume of this machine's peers as /dev/nbd0, makes a file system,
// writes, trims, checks, reads back and detaches: by command, by signal, and after torusblk was killed. What it leaves is what others read.
func TestKernelDevice(t *testing.T) {
	c := networkCluster(t)
	volume := c.newVolume(t, "48MiB")
	path := func(name string) string {
		for _, dir := range []string{"/sbin/", "/usr/sbin/", "/usr/bin/"} {
			if _, err := os.Stat(dir + name); err == nil {
				return dir + name
			}
		}
		t.Fatalf("no program %s", name)
		return ""
	}
	g := newGuest(t, c.dir, "guest", c.net, nil, []string{"nbd", "ext4"}, func(string) string {
		return `
attach() {
	: > /tmp/out
	torusblk -C ` + c.etcdURL + ` $2 nbd ` + volume + ` $1 > /tmp/out 2> /tmp/err &
	blk=$!
	for i in $(seq 300); do
		grep -q ^/dev/nbd /tmp/out && break
		kill -0 $blk 2> /dev/null || break
		sleep 0.1
	done
	dev=$(cat /tmp/out)
	echo "ATTACHED $dev"
}
ended() { wait $blk; echo "ENDED $1 $?"; cat /tmp/err; nbd-client -c $dev; echo "CLIENT $1 $?"; }
queue() { for q in $*; do echo "QUEUE $q $(cat /sys/block/nbd0/queue/$q)"; done; }

nbd-client -c /dev/nbd0; echo "CLIENT before $?"
attach /dev/nbd0
nbd-client -c $dev; echo "CLIENT attached $?"
echo "SIZE $(blockdev --getsize64 $dev)"
queue logical_block_size write_cache fua discard_max_bytes write_zeroes_max_bytes
e2fsck -fn $dev > /dev/null 2>&1; echo "EMPTY $?"
mkfs.ext4 -q -F $dev; echo "MKFS $?"
mount -t ext4 $dev /data; echo "MOUNT $?"
dd if=/dev/urandom of=/data/keep bs=64k count=64 2> /dev/null
dd if=/dev/urandom of=/data/drop bs=64k count=128 2> /dev/null
keep=$(sha256sum < /data/keep)
sync
rm /data/drop
fstrim -v /data; echo "TRIM $?"
umount /data; echo "UMOUNT $?"
torusblk nbd --detach $dev; echo "DETACH $?"
ended detached

attach
echo 3 > /proc/sys/vm/drop_caches
e2fsck -fn $dev > /tmp/fsck 2>&1; echo "FSCK $?"
mount -t ext4 $dev /data
[ "$(sha256sum < /data/keep)" = "$keep" ]; echo "KEPT $?"
touch /data/late
umount /data
echo "SHA $(sha256sum < $dev)"
kill -TERM $blk
ended stopped

attach /dev/nbd0
kill -KILL $blk
wait $blk
torusblk nbd --detach $dev; echo "DETACH killed $?"
nbd-client -c $dev; echo "CLIENT killed $?"
echo "LEFT $(ls /tmp | grep -c torusblk)"
attach /dev/nbd0 --force
e2fsck -fn $dev > /tmp/fsck 2>&1; echo "FSCK forced $?"
kill -TERM $blk
ended again
echo DONE
`
	}, "torusblk", path("mkfs.ext4"), path("e2fsck"), path("nbd-client"), path("blockdev"), path("fstrim"))
	c.ended = append(c.ended, &blk{process: g.process}) // its console is worth reading when the test fails
	g.boot(t)
	g.waitPrinted(t, 0, guestBoots, `DONE\s`)
	said := g.printed(0)
	for _, want := range []string{
		`CLIENT before 1`, `ATTACHED /dev/nbd0`, `CLIENT attached 0`, `SIZE 50331648`, `QUEUE logical_block_size 512`, `QUEUE write_cache write back`, `QUEUE fua 1`,
		`QUEUE discard_max_bytes [1-9]`, `QUEUE write_zeroes_max_bytes \d`, `EMPTY [1-9]`, `MKFS 0`, `MOUNT 0`, `TRIM 0`, `UMOUNT 0`, `DETACH 0`, `ENDED detached 0`,
		`CLIENT detached 1`, `ATTACHED /dev/nbd\d`, `FSCK 0`, `KEPT 0`, `ENDED stopped 0`, `CLIENT stopped 1`,
		`DETACH killed 0`, `CLIENT killed 1`, `LEFT 0`, `FSCK forced 0`, `ENDED again 0`, `CLIENT again 1`,
	} {
		if !regexp.MustCompile(want).MatchString(said) {
			t.Errorf("the guest did not say %q", want)
		}
	}
	sum := regexp.MustCompile(`SHA ([0-9a-f]{64})`).FindStringSubmatch(said)
	if sum == nil {
		t.Fatal("the guest did not say what is on its device")
	}
	out := filepath.Join(c.dir, "out")
	tool(t, "nbdcopy", c.newBlk(t).export(volume).URI(), out)
	if now := strings.Fields(tool(t, "sha256sum", out))[0]; now != sum[1] {
		t.Errorf("the volume is %s, but the guest had %s", now, sum[1])
	}
	t.Log(strings.TrimSpace(regexp.MustCompile(`/data: .*trimmed`).FindString(said)))
}

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// checkTools says at once what would be missing later.
func checkTools(o *options) error {
	need := []string{"fio", "sync"}
	if slices.Contains(o.contestants, "qemu") {
		need = append(need, "qemu-storage-daemon")
	}
	for _, dir := range torusDirs(o) {
		for _, program := range []string{"torusd", "torusctl", "torusblk"} {
			need = append(need, filepath.Join(dir, program))
		}
	}
	if o.oldRef != "" {
		need = append(need, "git", "go")
	}
	for _, program := range need {
		if _, err := exec.LookPath(program); err != nil {
			hint := "make setup installs the tools"
			if filepath.IsAbs(program) {
				hint = "make build makes the programs; --bin and --old say where they are"
			}
			return fmt.Errorf("%s is missing: %w\n%s", program, err, hint)
		}
	}
	if slices.ContainsFunc(o.cells, cell.reads) {
		f, err := os.OpenFile(dropCaches, os.O_WRONLY, 0)
		if err != nil {
			return fmt.Errorf("cold caches: %w\nrun it as root, or choose --cells that only write", err)
		}
		f.Close()
	}
	return nil
}

// torusDirs are where the programs of Torus have to be by now.
func torusDirs(o *options) (dirs []string) {
	if slices.Contains(o.contestants, "torus") {
		dirs = append(dirs, o.bin)
	}
	if o.old != "" {
		dirs = append(dirs, o.old)
	}
	return dirs
}

// logBytesPerSecond is more than a writer puts into the log, as far as it is not freed at once.
const logBytesPerSecond = 256 << 20

// peerBytes is what each of three peers may store: of two copies of the volume, what it was before, and the log of the cells that write.
func (o *options) peerBytes() byteSize {
	if o.peerSize > 0 {
		return o.peerSize
	}
	log := byteSize(0)
	for _, c := range o.cells {
		if !c.cold() {
			log += byteSize(o.seconds) * logBytesPerSecond
		}
	}
	return 2*o.size + log
}

// diskBytes is what is surely needed in --dir.
func (o *options) diskBytes() uint64 {
	sum := uint64(0)
	for _, c := range o.contestants {
		switch c {
		case "raw", "qemu":
			sum += uint64(o.size)
		default:
			sum += 3 * uint64(o.size) // two copies, and some log
		}
	}
	return sum
}

const tmpfsMagic = 0x01021994 // statfs(2)

func checkDisk(o *options) error {
	var st syscall.Statfs_t
	if err := syscall.Statfs(o.dir, &st); err != nil {
		return fmt.Errorf("--dir %s: %w", o.dir, err)
	}
	if st.Type == tmpfsMagic {
		return fmt.Errorf("--dir %s is in memory: name a directory of the disk to be measured", o.dir)
	}
	if free, need := st.Bavail*uint64(st.Bsize), o.diskBytes(); free < need {
		return fmt.Errorf("--dir %s: %d MiB are free and %d MiB are needed: choose another, or a smaller --size", o.dir, free>>20, need>>20)
	}
	// The address of a unix socket has room for 107 bytes (unix(7)).
	if longest := filepath.Join(o.dir, "torus-bench-4294967295", "torus", "nbd.sock"); len(longest) > 107 {
		return fmt.Errorf("--dir %s: too long for the sockets within it: choose a shorter one", o.dir)
	}
	return nil
}

// buildRef builds an earlier state of this repository in a work tree of its own and returns where the programs are.
func buildRef(ctx context.Context, ref, dir string, progress io.Writer) (bin string, err error) {
	if strings.HasPrefix(ref, "-") {
		return "", fmt.Errorf("--old-ref %s is no name of a commit", ref)
	}
	fmt.Fprintf(progress, "building %s\n", ref)
	src, bin := filepath.Join(dir, "src"), filepath.Join(dir, "old-bin")
	if _, err := command(ctx, "", "git", "worktree", "add", "--detach", src, ref); err != nil {
		return "", fmt.Errorf("--old-ref %s: %w", ref, err)
	}
	defer func() {
		// The context may have ended, and the repository is not to remember the work tree all the same.
		_, e := command(context.WithoutCancel(ctx), "", "git", "worktree", "remove", "--force", src)
		err = errors.Join(err, e)
	}()
	if _, err := command(ctx, src, "go", "build", "-trimpath", "-o", bin+"/", "./cmd/torusd", "./cmd/torusctl", "./cmd/torusblk"); err != nil {
		return "", fmt.Errorf("--old-ref %s: %w", ref, err)
	}
	return bin, nil
}

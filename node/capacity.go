package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/coreos/torus"
)

// Capacity is how much a peer offers: a number of bytes, or a share of the file system its data is on.
type Capacity struct {
	Bytes   uint64
	Percent float64 // used if Bytes is 0
}

// resolve turns c into bytes for the data dir, given the file system's size and free space, and refuses what
// does not fit. What the data dir takes already counts as free.
func (c Capacity) resolve(dir string, free, size, blockSize uint64) (uint64, error) {
	n := c.Bytes
	if n == 0 {
		n = uint64(float64(size) * c.Percent / 100)
	}
	bad := func(why, hint string) (uint64, error) {
		return 0, &torus.Error{Op: "offer", Obj: fmt.Sprintf("%d bytes in %s", n, dir), Err: fmt.Errorf("%s: %w", why, torus.ErrInvalid), Hint: hint}
	}
	const minBlocks = 4
	if n < minBlocks*blockSize {
		return bad("that is too little", fmt.Sprintf("give --size of at least %d blocks: %d bytes", minBlocks, minBlocks*blockSize))
	}
	if n > size {
		return bad(fmt.Sprintf("the file system has %d bytes", size), "give a smaller --size, such as 80%, or another --data-dir")
	}
	taken, err := diskUsage(dir)
	if err != nil {
		return 0, err
	}
	if n > free+taken {
		return bad(fmt.Sprintf("only %d bytes are free there", free+taken), "give a smaller --size, make room, or give another --data-dir")
	}
	return n, nil
}

// diskUsage is how many bytes the files below dir take on the disk.
func diskUsage(dir string) (uint64, error) {
	var n uint64
	dir, err := filepath.EvalSymlinks(dir) // a data dir is often a link to a disk; WalkDir would stop at it
	if err != nil {
		return 0, err
	}
	err = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			n += uint64(st.Blocks) * 512
		}
		return nil
	})
	return n, err
}

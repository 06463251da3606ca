package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// cell is one line of the tables: a load.
type cell struct {
	Name  string `json:"name"`
	Title string `json:"title"`

	rw        string // as fio calls it
	blockSize int    // bytes
	depth     int
	fsync     bool // a flush after each write
	bandwidth bool // reported in MB/s, not operations a second
	fresh     bool // Torus' volume is trimmed and written anew before it
	bulk      bool // it has the second half of the volume, and bulk writes go over the first meanwhile, of which only the rate is reported
}

// cells are in the order they run in: what writes least to and fro comes first, and before the first that does so in small pieces the volume is written
// anew, so that most meet one that has been written once, from the first byte to the last. Those called worn meet what the random writes before them have left.
// The one beside bulk writes comes after them, as it writes half of the volume in order, which undoes wear; and it is not to meet what they leave.
func cells() []cell {
	return []cell{
		{Name: "read-1m-8", Title: "1 MiB sequential read, depth 8, cold", rw: "read", blockSize: 1 << 20, depth: 8, bandwidth: true},
		{Name: "write-1m-8", Title: "1 MiB sequential write, depth 8", rw: "write", blockSize: 1 << 20, depth: 8, bandwidth: true},
		{Name: "read-16k-1", Title: "16 KiB sequential read, depth 1, cold", rw: "read", blockSize: 16 << 10, depth: 1},
		{Name: "mixed-64k-64", Title: "64 KiB random 75 % read 25 % write, depth 64", rw: "randrw", blockSize: 64 << 10, depth: 64},
		{Name: "read-4k-1", Title: "4 KiB random read, depth 1, cold", rw: "randread", blockSize: 4 << 10, depth: 1},
		{Name: "read-4k-32", Title: "4 KiB random read, depth 32, cold", rw: "randread", blockSize: 4 << 10, depth: 32},
		{Name: "write-4k-1", Title: "4 KiB random write, depth 1", rw: "randwrite", blockSize: 4 << 10, depth: 1, fresh: true},
		{Name: "write-4k-fsync", Title: "4 KiB random write + flush each", rw: "randwrite", blockSize: 4 << 10, depth: 1, fsync: true},
		{Name: "write-4k-32", Title: "4 KiB random write, depth 32", rw: "randwrite", blockSize: 4 << 10, depth: 32},
		{Name: "worn-read-1m-8", Title: "1 MiB sequential read, depth 8, cold, worn", rw: "read", blockSize: 1 << 20, depth: 8, bandwidth: true},
		{Name: "worn-mixed-64k-64", Title: "64 KiB random 75 % read 25 % write, depth 64, worn", rw: "randrw", blockSize: 64 << 10, depth: 64},
		{Name: "worn-write-1m-8", Title: "1 MiB sequential write, depth 8, worn", rw: "write", blockSize: 1 << 20, depth: 8, bandwidth: true},
		{Name: "flush-beside-bulk", Title: "4 KiB random write + flush each, beside 1 MiB writes at depth 8", rw: "randwrite", blockSize: 4 << 10, depth: 1, fsync: true, fresh: true, bulk: true},
	}
}

// minSize is the smallest volume: less would be in some cache whatever is done.
const minSize = 64 << 20

func cellNames() []string {
	var names []string
	for _, c := range cells() {
		names = append(names, c.Name)
	}
	return names
}

func parseCells(list string) ([]cell, error) {
	names, err := choose(cellNames(), list)
	if err != nil {
		return nil, err
	}
	all := cells()
	return slices.DeleteFunc(all, func(c cell) bool { return !slices.Contains(names, c.Name) }), nil
}

// choose returns those of all that the list names, in the order of all; an empty list names every one.
func choose(all []string, list string) ([]string, error) {
	if list == "" {
		return all, nil
	}
	want := strings.Split(list, ",")
	for _, name := range want {
		if !slices.Contains(all, name) {
			return nil, fmt.Errorf("no %q: there are %s", name, strings.Join(all, ","))
		}
	}
	return slices.DeleteFunc(slices.Clone(all), func(name string) bool { return !slices.Contains(want, name) }), nil
}

// reads says whether the cell reads at all, and hence begins with empty caches.
func (c cell) reads() bool { return c.rw != "write" && c.rw != "randwrite" }

// cold says whether nothing the cell reads is in a cache: it ends when all has been read, if that comes before its time.
func (c cell) cold() bool { return c.rw == "read" || c.rw == "randread" }

// rate is the figure of the cell: operations, or 10⁶ bytes, a second.
func (c cell) rate(s sample) float64 {
	if c.bandwidth {
		return s.MBPerSecond
	}
	return s.IOPS
}

func (c cell) unit() string {
	if c.bandwidth {
		return "MB/s"
	}
	return "IOPS"
}

// byteSize is a size as a flag: 2GiB, 512MiB, or bytes.
type byteSize uint64

func (s *byteSize) Set(text string) error {
	number, shift := text, 0
	for i, suffix := range []string{"KiB", "MiB", "GiB", "TiB"} {
		if n, ok := strings.CutSuffix(text, suffix); ok {
			number, shift = n, 10*(i+1)
		}
	}
	n, err := strconv.ParseUint(number, 10, 64)
	if err != nil || n<<shift>>shift != n {
		return fmt.Errorf("size %q: write it as 2GiB or 512MiB", text)
	}
	*s = byteSize(n << shift)
	return nil
}

func (s byteSize) String() string {
	for i, suffix := range []string{"TiB", "GiB", "MiB", "KiB"} {
		if shift := 40 - 10*i; s > 0 && s%(1<<shift) == 0 {
			return strconv.FormatUint(uint64(s)>>shift, 10) + suffix
		}
	}
	return strconv.FormatUint(uint64(s), 10)
}

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

const (
	// fioGrace is what a measurement may take beyond its length: connecting, and draining what is under way.
	fioGrace  = 60 * time.Second
	fillLimit = 15 * time.Minute
	// bulkJob is fio's job that is not measured, beside the one that is.
	bulkJob = "bulk"
)

// fioArgs is the command line that measures the cell on what target names. The same seed gives the same offsets to
// every contestant.
func (c cell) fioArgs(target []string, size byteSize, seconds, seed int) []string {
	if c.bulk {
		size /= 2
	}
	args := append([]string{
		"--name=" + c.Name, "--rw=" + c.rw, "--bs=" + strconv.Itoa(c.blockSize), "--iodepth=" + strconv.Itoa(c.depth),
		"--size=" + strconv.FormatUint(uint64(size), 10), "--runtime=" + strconv.Itoa(seconds),
		"--randseed=" + strconv.Itoa(seed),
	}, target...)
	if !c.cold() {
		args = append(args, "--time_based", "--norandommap")
	} // else nothing is read twice: it would come from somebody's cache
	if c.fsync {
		args = append(args, "--fsync=1")
	}
	if c.rw == "randrw" {
		args = append(args, "--rwmixread=75")
	}
	if c.bulk {
		bulk := cell{Name: bulkJob, rw: "write", blockSize: 1 << 20, depth: 8}
		args = append(args, "--offset="+strconv.FormatUint(uint64(size), 10))
		args = append(args, bulk.fioArgs(target, size, seconds, seed)...)
		args = append(args, "--new_group") // else fio reports both as one
	}
	return args
}

// fillArgs is the command line that writes the whole volume once.
func fillArgs(target []string, size byteSize) []string {
	return append([]string{
		"--name=fill", "--rw=write", "--bs=1M", "--iodepth=8", "--size=" + strconv.FormatUint(uint64(size), 10), "--end_fsync=1",
	}, target...)
}

// runFio runs fio with args, in dir, for at most limit.
func runFio(ctx context.Context, dir string, limit time.Duration, args []string) (fioResult, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	out := filepath.Join(dir, "fio.json")
	defer os.Remove(out)
	args = append([]string{"fio", "--thread", "--group_reporting", "--lat_percentiles=1", "--clat_percentiles=0",
		"--output-format=json+", "--output=" + out}, args...)
	if _, err := command(ctx, dir, args...); err != nil {
		return fioResult{}, err
	}
	b, err := os.ReadFile(out)
	if err != nil {
		return fioResult{}, err
	}
	return parseFio(b)
}

// fioResult is what one run of fio measured.
type fioResult struct {
	ops     uint64 // reads and writes
	bytes   uint64
	seconds float64
	latency histogram // of reads and writes, from submission to completion
	flush   histogram
	bulk    float64 // bytes a second of the bulk writes beside it, which are in nothing else here; 0 without
}

type fioLatency struct {
	Bins map[string]uint64 `json:"bins"` // nanoseconds: count
}

type fioDirection struct {
	Ops     uint64     `json:"total_ios"`
	Bytes   uint64     `json:"io_bytes"`
	Runtime uint64     `json:"runtime"` // ms
	Latency fioLatency `json:"lat_ns"`
}

type fioJob struct {
	Name  string       `json:"jobname"`
	Error int          `json:"error"`
	Read  fioDirection `json:"read"`
	Write fioDirection `json:"write"`
	Sync  fioDirection `json:"sync"`
}

// parseFio reads fio's json+ output of one job, or of one and the bulk writes beside it.
func parseFio(b []byte) (fioResult, error) {
	var out struct {
		Jobs []fioJob `json:"jobs"`
	}
	// Engines put messages before it.
	b = b[max(0, bytes.IndexByte(b, '{')):]
	if err := json.NewDecoder(bytes.NewReader(b)).Decode(&out); err != nil {
		return fioResult{}, fmt.Errorf("output of fio: %w", err)
	}
	var measured []fioResult
	bulk := 0.0
	for _, j := range out.Jobs {
		r, err := j.result()
		if err != nil {
			return fioResult{}, err
		}
		if j.Name == bulkJob {
			bulk = float64(r.bytes) / r.seconds
		} else {
			measured = append(measured, r)
		}
	}
	if len(measured) != 1 {
		return fioResult{}, fmt.Errorf("output of fio: %d jobs, not one", len(measured))
	}
	measured[0].bulk = bulk
	return measured[0], nil
}

func (j fioJob) result() (fioResult, error) {
	if j.Error != 0 {
		return fioResult{}, fmt.Errorf("fio: I/O error %d", j.Error)
	}
	r := fioResult{ops: j.Read.Ops + j.Write.Ops, bytes: j.Read.Bytes + j.Write.Bytes}
	r.seconds = float64(max(j.Read.Runtime, j.Write.Runtime)) / 1000
	if r.ops == 0 || r.seconds == 0 {
		return fioResult{}, errors.New("fio did nothing: give it more --seconds")
	}
	for _, l := range []fioLatency{j.Read.Latency, j.Write.Latency} {
		if err := r.latency.add(l.Bins); err != nil {
			return fioResult{}, err
		}
	}
	if err := r.flush.add(j.Sync.Latency.Bins); err != nil {
		return fioResult{}, err
	}
	return r, nil
}

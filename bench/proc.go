package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// userHZ is the unit of times in /proc/PID/stat: 1/100 s on every Linux that Go runs on (proc(5), sysconf(_SC_CLK_TCK)).
const userHZ = 100

// processUsage is what a process has used so far.
type processUsage struct {
	cpuSeconds float64           // user and system, of all its threads that ever were
	switches   map[string]uint64 // context switches of each thread there is, by its id
}

// usage is that of several processes, by name.
type usage map[string]processUsage

// switchesSince leaves out threads that have ended.
func (u processUsage) switchesSince(before processUsage) uint64 {
	n := uint64(0)
	for tid, s := range u.switches {
		if b := before.switches[tid]; b <= s { // else it is another thread of the same id
			s -= b
		}
		n += s
	}
	return n
}

func readUsage(pid int) (u processUsage, err error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	b, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return u, err
	}
	ticks, err := parseStat(b)
	if err != nil {
		return u, fmt.Errorf("%s/stat: %w", dir, err)
	}
	u.cpuSeconds, u.switches = float64(ticks)/userHZ, map[string]uint64{}
	threads, err := os.ReadDir(filepath.Join(dir, "task"))
	if err != nil {
		return u, err
	}
	for _, t := range threads {
		b, err := os.ReadFile(filepath.Join(dir, "task", t.Name(), "status"))
		if err != nil {
			continue // it has just ended
		}
		f, err := parseStatus(b, "voluntary_ctxt_switches", "nonvoluntary_ctxt_switches")
		if err != nil {
			return u, fmt.Errorf("%s/task/%s/status: %w", dir, t.Name(), err)
		}
		u.switches[t.Name()] = f[0] + f[1]
	}
	return u, nil
}

// memory of a process in bytes: resident; the same with pages that several processes have counted in parts; and of that what is not backed by files of a disk, but
// anonymous or shared memory (proc_pid_smaps(5)). Rest is RSS when it has had nothing to do for a while.
type memory struct {
	RSS  uint64 `json:"rss_bytes"`
	PSS  uint64 `json:"pss_bytes"`
	Own  uint64 `json:"own_bytes"`
	Rest uint64 `json:"rest_bytes"`
}

func readMemory(pid int) (memory, error) {
	path := fmt.Sprintf("/proc/%d/smaps_rollup", pid)
	b, err := os.ReadFile(path)
	if err != nil {
		return memory{}, err
	}
	f, err := parseStatus(b, "Rss", "Pss", "Pss_Anon", "Pss_Shmem") // kB, by which the kernel means KiB
	if err != nil {
		return memory{}, fmt.Errorf("%s: %w", path, err)
	}
	return memory{RSS: f[0] << 10, PSS: f[1] << 10, Own: (f[2] + f[3]) << 10}, nil
}

// parseStat returns utime + stime of /proc/PID/stat, in ticks. The name of the program, in parentheses, may contain anything.
func parseStat(b []byte) (ticks uint64, err error) {
	_, rest, ok := bytes.Cut(b[max(0, bytes.LastIndexByte(b, ')')):], []byte(")"))
	fields := strings.Fields(string(rest))
	if !ok || len(fields) < 13 {
		return 0, errors.New("not of the known form")
	}
	for _, f := range fields[11:13] { // fields 14 and 15 of proc(5)
		n, err := strconv.ParseUint(f, 10, 64)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	return ticks, nil
}

// parseStatus returns the numbers of lines "NAME: NUMBER [kB]".
func parseStatus(b []byte, names ...string) ([]uint64, error) {
	out := make([]uint64, len(names))
	for i, name := range names {
		found := false
		for line := range strings.Lines(string(b)) {
			value, ok := strings.CutPrefix(line, name+":")
			if !ok {
				continue
			}
			n, err := strconv.ParseUint(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")), 10, 64)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			out[i], found = n, true
		}
		if !found {
			return nil, fmt.Errorf("no line %s", name)
		}
	}
	return out, nil
}

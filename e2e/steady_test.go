package e2e

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// A volume that is written and read without a pause, at random and in order, with flushes, and nothing fails: memory stays as it is, and
// nobody waits longer than the machine makes everybody wait. The short run only shows that the long one would work.
func TestSteady(t *testing.T) {
	c := sharedCluster(t)
	const volume = "steady"
	c.ctl(t, "volume", "create-block", volume, "1GiB")
	c.forget(t, volume)
	b := c.newBlk(t)
	length := 20 * time.Second
	if soaking() {
		length = 10 * time.Minute
	}
	dial(t, b.export(volume), startLimit).Close()
	ctx, cancel := context.WithTimeout(t.Context(), length+startLimit)
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		_, err := try(ctx, "fio", "--ioengine=nbd", "--uri="+b.export(volume).URI(), "--time_based", "--runtime="+strconv.Itoa(int(length.Seconds())), "--norandommap", "--size=768m",
			"--name=random", "--rw=randrw", "--rwmixread=30", "--bs=4k", "--iodepth=24", "--fsync=32",
			"--name=order", "--rw=rw", "--bs=128k", "--iodepth=2", "--rate=8m,8m")
		ended <- err
	}()
	s := startStream(t, b.export(volume), 800<<8, 1024, time.Millisecond)
	processes := []*process{b.process}
	for _, p := range c.peers {
		processes = append(processes, p.process)
	}
	var memory [][]int // MiB, by process
	for range processes {
		memory = append(memory, nil)
	}
	var worst stall
	var own, over time.Duration
	looks := 0
	for running := true; running; {
		select {
		case err := <-ended:
			if err != nil {
				t.Fatal(err)
			}
			running = false
		case <-time.After(length / 20):
		}
		for i, p := range processes {
			memory[i] = append(memory[i], resident(t, p.pid()))
		}
		x := s.look()
		worst.write, worst.read, worst.noise = max(worst.write, x.write), max(worst.read, x.read), max(worst.noise, x.noise)
		own = max(own, x.own())
		if x.max() > 100*time.Millisecond {
			over = max(over, x.max()-x.noise)
			looks++
		}
	}
	if err := s.end(); err != nil {
		t.Error(err)
	}
	t.Logf("STALL in %v without a fault: writes and flushes %v, reads %v, the machine alone %v; without that at most %v; %d looks of %d saw one over 100ms, the machine apart %v (target 0)", length,
		worst.write.Round(time.Millisecond), worst.read.Round(time.Millisecond), worst.noise.Round(time.Millisecond), own.Round(time.Millisecond), looks, len(memory[0]), over.Round(time.Millisecond))
	if own > time.Second {
		t.Error("somebody waited for long")
	}
	for i, p := range processes {
		l := memory[i]
		early, late := l[len(l)/4], l[len(l)-1]
		t.Logf("MEMORY of %s: %d MiB after a quarter of the time, %d MiB at the end", p.name, early, late)
		if late > early+early/4+16 {
			t.Errorf("the memory of %s grows: %v MiB", p.name, l)
		}
	}
}

// resident is the memory of a process in MiB, what it has mapped of files apart: that is the kernel's to take back. What it shares with others counts in each.
func resident(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	kinds, sum := 0, 0
	for line := range strings.Lines(string(b)) {
		for _, kind := range []string{"RssAnon:", "RssShmem:"} {
			if rest, ok := strings.CutPrefix(line, kind); ok {
				kb, err := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(rest), " kB"))
				if err != nil {
					t.Fatal(err)
				}
				kinds, sum = kinds+1, sum+kb
			}
		}
	}
	if kinds != 2 {
		t.Fatalf("no account of the memory of %d", pid)
	}
	return sum >> 10
}

package nbdclient

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"
)

// nbdkit serves 8 MiB of memory; it is somebody else's server, so this tests the client.
func nbdkit(t *testing.T, plugin ...string) (Address, *exec.Cmd) {
	t.Helper()
	a := Unix(filepath.Join(t.TempDir(), "s"), "")
	cmd := exec.Command("nbdkit", append([]string{"-f", "-U", a.Addr}, plugin...)...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() }) //nolint:errcheck // it is killed
	return a, cmd
}

func dial(t *testing.T, a Address) *Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := a.DialUntil(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestCommands(t *testing.T) {
	a, _ := nbdkit(t, "memory", "8M")
	c := dial(t, a)
	defer c.Close()
	if c.Size() != 8<<20 || c.Flags()&FlagSendFlush == 0 || c.Flags()&FlagReadOnly != 0 {
		t.Errorf("size %d, flags %#x", c.Size(), c.Flags())
	}
	want := bytes.Repeat([]byte{1, 2, 3, 4, 5, 6, 7, 8}, 8192)
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ok(c.WriteAt(want, 4096, 0))
	ok(c.WriteAt(want[:4096], 1<<20, FUA))
	ok(c.Trim(4096, 4096, 0))
	ok(c.WriteZeroes(8192, 8192, FUA))
	ok(c.Flush())
	clear(want[:12288])
	got := make([]byte, len(want))
	ok(c.ReadAt(got, 4096))
	if !bytes.Equal(got, want) {
		t.Error("what was read is not what was written")
	}
	if err := c.ReadAt(got, c.Size()-1); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("read beyond the end: %v", err)
	}
	ok(c.Flush()) // an error ends a request, not the connection
}

// Many requests are under way at once, and each reply finds its own.
func TestPipeline(t *testing.T) {
	a, _ := nbdkit(t, "memory", "8M", "--filter=delay", "rdelay=1ms", "wdelay=1ms")
	c := dial(t, a)
	defer c.Close()
	const n, size = 256, 4096
	var wg sync.WaitGroup
	for i := range n {
		wg.Add(1)
		c.Start(&Op{Cmd: Write, Off: uint64(i * size), Data: bytes.Repeat([]byte{byte(i)}, size), Done: func(op *Op) {
			if op.Err != nil {
				t.Error(op.Err)
			}
			wg.Done()
		}})
	}
	wg.Wait()
	for _, i := range rand.Perm(n) {
		wg.Add(1)
		c.Start(&Op{Cmd: Read, Off: uint64(i * size), Data: make([]byte, size), Done: func(op *Op) {
			if op.Err != nil || !bytes.Equal(op.Data, bytes.Repeat([]byte{byte(i)}, size)) {
				t.Errorf("block %d: %v", i, op.Err)
			}
			wg.Done()
		}})
	}
	wg.Wait()
}

// A server that dies ends every request under way, each once, and a new connection can be made.
func TestServerDies(t *testing.T) {
	a, cmd := nbdkit(t, "memory", "8M", "--filter=delay", "wdelay=10")
	c := dial(t, a)
	ends := make(chan error, 16)
	for range 16 {
		c.Start(&Op{Cmd: Write, Data: make([]byte, 4096), Done: func(op *Op) { ends <- op.Err }})
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for range 16 {
		if err := <-ends; !errors.Is(err, ErrLost) {
			t.Fatal(err)
		}
	}
	<-c.Ended()
	if err := c.Flush(); !errors.Is(err, ErrLost) {
		t.Errorf("after the end: %v", err)
	}
	c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := a.DialUntil(ctx); err == nil {
		t.Error("connected to a dead server")
	}
}

func TestRefused(t *testing.T) {
	a := Unix(filepath.Join(t.TempDir(), "s"), "none")
	cmd := exec.Command("qemu-storage-daemon", "--blockdev", "null-co,node-name=n,size=1048576", "--nbd-server", "addr.type=unix,addr.path="+a.Addr,
		"--export", "nbd,id=e,node-name=n,name=there,writable=on")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() }) //nolint:errcheck // it is killed
	there := a
	there.Export = "there"
	dial(t, there).Close()
	var refused *Refused
	if _, err := a.Dial(t.Context()); !errors.As(err, &refused) || refused.Message == "" {
		t.Errorf("an export that is not there: %v", err)
	}
}

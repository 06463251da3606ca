package node

import (
	"runtime"
	"runtime/debug"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coreos/torus/buf"
)

// Buffers that were needed for a moment are not kept for ever.
func TestKeepMemory(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // no garbage collection but that of keepMemory
	t.Setenv("GOGC", "off")
	synctest.Test(t, func(t *testing.T) {
		stop := keepMemory()
		const burst = 64 << 20
		before := inUse()
		var bufs []*buf.Buf
		for range burst >> 20 {
			b := buf.Get(1 << 20)
			clear(b.Bytes())
			bufs = append(bufs, b)
		}
		if grown := inUse() - before; grown < burst/2 {
			t.Fatalf("64 MiB of buffers are %d bytes", grown)
		}
		for _, b := range bufs {
			b.Release()
		}
		clear(bufs)
		time.Sleep(3 * trimEvery)
		synctest.Wait()
		if left := inUse() - before; left > burst/8 {
			t.Errorf("%d bytes of 64 MiB are still there after 15 s in which nobody needed them", left)
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
}

// inUse is what the heap has of the operating system's memory, in bytes.
func inUse() int64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapSys - m.HeapReleased)
}

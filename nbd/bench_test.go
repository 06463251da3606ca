package nbd

import (
	"testing"

	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/device/devicetest"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/transport"
)

// sinkStream takes everything and keeps nothing.
type sinkStream struct{ dst []byte }

var _ transport.Stream = (*sinkStream)(nil)

func (*sinkStream) Write([]byte)                       {}
func (*sinkStream) WriteShared([]byte)                 {}
func (*sinkStream) WriteBuf(b *buf.Buf, _ int)         { b.Release() }
func (s *sinkStream) ReadInto(dst []byte, done func()) { s.dst = dst; done() }
func (*sinkStream) Pause()                             {}
func (*sinkStream) Resume()                            {}
func (*sinkStream) Queued() int                        { return 0 }
func (*sinkStream) Close()                             {}
func (*sinkStream) CloseAfterWrite()                   {}
func (*sinkStream) RemoteAddr() string                 { return "sink" }

// null is a device that does nothing.
type null struct{}

func (null) Size() uint64             { return 1 << 40 }
func (null) ReadOnly() bool           { return false }
func (null) Submit(r *device.Request) { r.Finish(nil) }

// busy is a session on the null device, and depth requests as they come from a client in one piece.
func busy(tb testing.TB, structured bool, typ uint16, size, depth int) (*session, []byte) {
	dir := devicetest.NewDirectory()
	dir.Add("null", "", null{})
	srv, err := newServer(loop.NewVirtual(1).NewLoop("bench"), Config{Directory: dir})
	if err != nil {
		tb.Fatal(err)
	}
	st := &sinkStream{}
	s := srv.accept(st).(*session)
	s.Opened(st)
	s.Data(st, pack(uint32(3)))
	if structured {
		s.Data(st, pack("IHAVEOPT", uint32(optStructuredReply), uint32(0)))
	}
	s.Data(st, pack("IHAVEOPT", uint32(optExportName), uint32(4), "null"))
	if s.phase != phaseTransmission {
		tb.Fatal("not attached")
	}
	var b []byte
	for i := range depth {
		b = append(b, pack(uint32(magicRequest), uint16(0), typ, uint64(i), uint64(i*size), uint32(size))...)
		if typ == cmdWrite && size <= smallWrite {
			b = append(b, make([]byte, size)...)
		}
	}
	return s, b
}

var workloads = []struct {
	name       string
	structured bool
	typ        uint16
	size       int
}{
	{"read/4KiB/simple", false, cmdRead, 4096},
	{"read/4KiB/structured", true, cmdRead, 4096},
	{"read/1MiB/structured", true, cmdRead, 1 << 20},
	{"write/4KiB", false, cmdWrite, 4096},
	{"write/64KiB", false, cmdWrite, 64 << 10},
	{"flush", false, cmdFlush, 0},
}

// BenchmarkSession is one request through a session, from bytes to reply, with a device that costs nothing.
func BenchmarkSession(b *testing.B) {
	for _, w := range workloads {
		b.Run(w.name, func(b *testing.B) {
			depth := 16
			if w.typ == cmdWrite && w.size > smallWrite {
				depth = 1 // behind ReadInto comes a Data of its own
			}
			s, in := busy(b, w.structured, w.typ, w.size, depth)
			b.ReportAllocs()
			for b.Loop() {
				if n, _ := s.Data(s.st, in); n != len(in) {
					b.Fatal(n)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*depth), "ns/request")
		})
	}
}

// No request costs an allocation in steady state.
func TestNoAllocations(t *testing.T) {
	for _, w := range workloads {
		s, in := busy(t, w.structured, w.typ, w.size, 1)
		if n := testing.AllocsPerRun(2000, func() { s.Data(s.st, in) }); n >= 1 && !raceEnabled {
			t.Errorf("%s: %v allocations per request", w.name, n)
		}
	}
}

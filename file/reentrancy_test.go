package file_test

import (
	"fmt"
	"runtime/debug"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
)

// A connection that answers before Submit returns, as request.go allows.
type nowConn struct{ *fakeConn }

func (c nowConn) Submit(q *torus.Request) {
	if !c.open {
		q.Finish(torus.ErrNoPeer)
		return
	}
	q.Finish(c.p.serve(q))
}

// R16: answers before Submit returns, and a user that submits from Done: each worker's requests, one after the other.
func TestReentrancy(t *testing.T) {
	for _, now := range []bool{false, true} {
		t.Run(fmt.Sprint("now ", now), func(t *testing.T) {
			r := newRig(t, 1, 3, 2, 8<<20)
			r.now = now
			c := r.attach(func(c *file.Config) { c.RetainBytes = 256 << 10 })
			const workers, each = 16, 60
			left := workers * each
			rng := r.rng
			var next func(w, k int)
			next = func(w, k int) {
				if k == each {
					return
				}
				q := &device.Request{Op: device.Write, Off: uint64(w) * 512 << 10, Data: make([]byte, (1+rng.IntN(30))*4096)}
				switch rng.IntN(6) {
				case 0:
					q.Op, q.Data = device.Flush, nil
					q.Off = 0
				case 1:
					q.Flags = device.FUA
				case 2:
					q.Off, q.Data = q.Off+512, q.Data[:1024]
				}
				q.Len = uint64(len(q.Data))
				q.Done = func(q *device.Request) {
					if q.Err != nil {
						t.Errorf("%v", q.Err)
					}
					left--
					next(w, k+1)
				}
				c.f.Submit(q)
			}
			defer func() {
				if p := recover(); p != nil {
					t.Fatalf("panic: %v\n%s", p, debug.Stack())
				}
			}()
			c.l.Post(func() {
				for w := range workers {
					next(w, 0)
				}
			})
			if !r.v.Run(func() bool { return left == 0 }, time.Minute) {
				t.Fatalf("%d requests never complete: %+v", left, c.f.Stats())
			}
		})
	}
}

// A file that fails in the Done of a write still owes an answer to those acknowledged along with it.
func TestFailFromDone(t *testing.T) {
	r := newRig(t, 1, 3, 2, 8<<20)
	c := r.attach(nil)
	left := 2
	c.l.Post(func() {
		c.f.Submit(&device.Request{Op: device.Write, Len: 4096, Data: pg(1, 1), Done: func(*device.Request) {
			left--
			c.f.Abandon(torus.ErrClosed)
		}})
		c.f.Submit(&device.Request{Op: device.Write, Off: 4096, Len: 4096, Data: pg(2, 1), Flags: device.FUA, Done: func(q *device.Request) {
			left--
			if q.Err == nil {
				t.Error("D1: a write with FUA succeeded on a file that had failed")
			}
		}})
	})
	if !r.v.Run(func() bool { return left == 0 }, time.Minute) {
		t.Fatalf("%d requests never complete", left)
	}
}

package tdp

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/transport/mem"
)

// replacing is a client that reads n pages from a server which takes 10 ms for it.
func replacing(t *testing.T, n int) (x *cluster, old, with *torus.Request) {
	x = newCluster(t, 1)
	line := mem.LinkConfig{Delay: time.Millisecond, Bandwidth: 64 << 20}
	x.n.SetLink("s", "c", line)
	x.start()
	ref := torus.BlockRef{Volume: 1}
	if err := x.do(&torus.Request{Op: torus.OpAppend, Ref: ref, Data: pages(n, 3)}); err != nil {
		t.Fatal(err)
	}
	x.store.delay = 10 * time.Millisecond
	old = &torus.Request{Op: torus.OpRead, Ref: ref, Data: pages(n, 9)}
	with = &torus.Request{Op: torus.OpRead, Ref: ref, Data: pages(n, 8)}
	return x, old, with
}

// Once a request has been replaced its memory is not written to, whenever the answer comes, and it is not answered.
func TestReplace(t *testing.T) {
	for _, n := range []int{1, 200} { // within one piece of input; past it, right into Data
		x, old, with := replacing(t, n)
		oldDone, withDone := x.submit(old), new(bool)
		with.Done = func(*torus.Request) { *withDone = true }
		x.v.RunFor(5 * time.Millisecond)
		x.lc.Post(func() {
			if !x.c.Replace(old, with) {
				t.Errorf("%d pages: not replaced", n)
			}
			if x.c.Replace(old, with) {
				t.Errorf("%d pages: replaced twice", n)
			}
		})
		x.wait(func() bool { return *withDone })
		if with.Err != nil || !bytes.Equal(with.Data, pages(n, 3)) {
			t.Errorf("%d pages: %v", n, with.Err)
		}
		x.v.RunFor(time.Second)
		if *oldDone || !bytes.Equal(old.Data, pages(n, 9)) {
			t.Errorf("%d pages: the request that was replaced has been answered", n)
		}
		if x.c.Replace(with, old) {
			t.Errorf("%d pages: a request that is over was replaced", n)
		}
	}
}

// An answer that is arriving cannot be given to another any more.
func TestReplaceArriving(t *testing.T) {
	x, old, with := replacing(t, 200)
	done := x.submit(old)
	x.wait(func() bool { return x.c.link.req == old })
	if x.c.Replace(old, with) {
		t.Error("replaced")
	}
	x.wait(func() bool { return *done })
	if old.Err != nil || !bytes.Equal(old.Data, pages(200, 3)) {
		t.Error(old.Err)
	}
}

// What stands in for another fails with the connection.
func TestReplaceLost(t *testing.T) {
	x, old, with := replacing(t, 200)
	oldDone, withDone := x.submit(old), new(bool)
	with.Done = func(*torus.Request) { *withDone = true }
	x.v.RunFor(5 * time.Millisecond)
	x.lc.Post(func() { x.c.Replace(old, with) })
	x.n.Reset("c", "s")
	x.wait(func() bool { return *withDone })
	if !errors.Is(with.Err, torus.ErrBlockUnavailable) || *oldDone {
		t.Error(with.Err, *oldDone)
	}
}

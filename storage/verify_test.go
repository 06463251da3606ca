package storage_test

import (
	"testing"

	"github.com/coreos/torus"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/vfs"
)

// Whoever looks after the copies of a store hears of what others doubt, there or not; where nobody does, that is said.
func TestVerify(t *testing.T) {
	v := loop.NewVirtual(1)
	defer v.Close()
	d := openNew(t, v.NewLoop("store"), vfs.NewMem(1))
	ref := torus.BlockRef{Volume: 1, INode: 2, Index: 3}
	ask := func() error {
		q := &torus.Request{Op: torus.OpVerify, Ref: ref}
		finished := false
		q.Done = func(*torus.Request) { finished = true }
		d.Submit(q)
		if !finished {
			t.Fatal("it is answered at once")
		}
		return q.Err
	}
	if err := ask(); torus.ErrorCode(err) != torus.ErrorCode(torus.ErrNotSupported) {
		t.Fatal(err)
	}
	var heard []torus.BlockRef
	d.Damaged(func(ref torus.BlockRef) { heard = append(heard, ref) })
	if err := ask(); err != nil || len(heard) != 1 || heard[0] != ref {
		t.Fatal(err, heard)
	}
}

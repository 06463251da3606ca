package torus

import (
	"bytes"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"
)

var update = flag.Bool("update", false, "write golden files anew")

// The encoding of references is on every disk: it must not change (docs/format/blockref.md).
func TestRefsGolden(t *testing.T) {
	var b bytes.Buffer
	for _, r := range []BlockRef{
		{},
		{TypeBlock, 1, 2, 3},
		{TypeINode, VolumeMax, 1<<64 - 1, 1<<64 - 1},
		{1<<24 - 1, 0x123456789a, 0x0102030405060708, 0x1112131415161718},
	} {
		fmt.Fprintf(&b, "%-60v %x\n", r, r.ToBytes())
		if got := BlockRefFromBytes(r.ToBytes()); got != r {
			t.Errorf("%v came back as %v", r, got)
		}
	}
	n := INodeRef{0x123456789a, 0x0102030405060708}
	fmt.Fprintf(&b, "%-60v %x\n", n, n.ToBytes())
	if got := INodeRefFromBytes(n.ToBytes()); got != n {
		t.Errorf("%v came back as %v", n, got)
	}
	const name = "testdata/refs.golden"
	if *update {
		if err := os.WriteFile(name, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b.Bytes(), want) {
		t.Errorf("the encoding has changed:\n%swant\n%s", b.Bytes(), want)
	}
}

// Encoded references sort like (type, volume, INode, index), which OpList relies on.
func TestRefsSort(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for range 10000 {
		x := BlockRef{BlockType(rng.IntN(3)), VolumeID(rng.IntN(3)), INodeID(rng.IntN(3)), IndexID(rng.IntN(1000))}
		y := BlockRef{BlockType(rng.IntN(3)), VolumeID(rng.IntN(3)), INodeID(rng.IntN(3)), IndexID(rng.IntN(1000))}
		less := x.Type < y.Type || x.Type == y.Type && (x.Volume < y.Volume || x.Volume == y.Volume &&
			(x.INode < y.INode || x.INode == y.INode && x.Index < y.Index))
		if got := bytes.Compare(x.ToBytes(), y.ToBytes()) < 0; got != less {
			t.Fatalf("%v before %v: %v", x, y, got)
		}
	}
}

// Meaning survives the wire.
func TestErrorCodes(t *testing.T) {
	for code, err := range wireErrors {
		if err == nil {
			continue
		}
		if got := ErrorCode(fmt.Errorf("somewhere: %w", err)); got != uint8(code) {
			t.Errorf("%v has code %d, not %d", err, got, code)
		}
		if got := ErrorFromCode(uint8(code)); got != err {
			t.Errorf("code %d is %v, not %v", code, got, err)
		}
	}
	if ErrorFromCode(0) != nil || ErrorFromCode(255) != ErrIO {
		t.Error("success, or an unknown code")
	}
}

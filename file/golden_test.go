package file

import (
	"bytes"
	"encoding/hex"
	"flag"
	"os"
	"testing"

	"github.com/coreos/torus"
	"github.com/coreos/torus/models"
	"google.golang.org/protobuf/proto"
)

var update = flag.Bool("update", false, "write golden files anew")

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	name = "testdata/" + name
	text := []byte(hex.Dump(got))
	if *update {
		if err := os.WriteFile(name, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(text, want) {
		t.Errorf("%s: the format has changed:\n%s", name, text)
	}
}

// What checkpoints have written must stay readable (docs/format/inode.md).
func TestFormatGolden(t *testing.T) {
	var node [fanout]entry
	node[0] = dataEntry(1, 2, 0x03abcdef)
	node[1] = dataEntry(maxTable-1, 1<<14-1, 0xffffffff)
	node[2] = zeroEntry
	b := make([]byte, nodeSize)
	encodeNode(&node, b)
	golden(t, "node.v1.golden", b)
	var back [fanout]entry
	decodeNode(b, &back)
	if back != node {
		t.Error("a node does not come back as it was")
	}

	var tab table
	tab.init()
	ps := &models.PlacementSet{RingVersion: 3, Replication: 2}
	tab.add(torus.BlockRef{Type: torus.TypeBlock, Volume: 5, INode: 6, Index: 7}, ps, nil)
	tab.add(torus.BlockRef{Type: torus.TypeINode, Volume: 5, INode: 6, Index: 8}, &models.PlacementSet{RingVersion: 4, Replication: 2}, nil)
	tab.setLength(0, 1024)
	tab.addLive(0, 1000)
	tab.setLength(1, 16)
	tab.addLive(1, 9)
	tab.encodePage(0, b)
	golden(t, "table.v1.golden", b)
	var again table
	again.init()
	again.sets = tab.sets
	if err := again.decodePage(0, b); err != nil {
		t.Fatal(err)
	}
	if len(again.e) < 2 || again.e[0].ref != tab.e[0].ref || again.e[0].live != 1000 || again.e[0].length != 1024 || again.e[1].set != 1 {
		t.Errorf("a table page does not come back as it was: %+v", again.e[:2])
	}

	inode, err := proto.MarshalOptions{Deterministic: true}.Marshal(&models.INode{
		Format: 1, Volume: 5, Epoch: 6, Number: 9, Seq: 1000, SizeBytes: 1 << 30, Top: []uint64{uint64(node[0])},
		Table: []*models.TablePage{{Epoch: 6, Index: 8, Page: 2, Crc32C: 0x01020304, Set: 0}},
		Sets:  []*models.PlacementSet{ps, {RingVersion: 4, Replication: 2, Peers: [][]byte{bytes.Repeat([]byte{1}, 16), bytes.Repeat([]byte{2}, 16)}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "inode.v1.golden", inode)
}

package file

import (
	"encoding/binary"
	"errors"
	"testing"

	"github.com/coreos/torus"
	"github.com/coreos/torus/models"
	"google.golang.org/protobuf/proto"
)

// An INode with a right checksum may still say what cannot be: nobody may follow it there.
func FuzzINode(f *testing.F) {
	set := &models.PlacementSet{RingVersion: 1, Replication: 2}
	add := func(n *models.INode) {
		b, err := proto.Marshal(n)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	add(&models.INode{Format: 1, Table: []*models.TablePage{{Page: 7}}, Sets: []*models.PlacementSet{set}, Top: []uint64{1 << 63}})
	add(&models.INode{Format: 1, Table: []*models.TablePage{{Page: 7}}})
	add(&models.INode{Format: 1, Table: []*models.TablePage{{Page: 1 << 31}}, Sets: []*models.PlacementSet{set}})
	add(&models.INode{Format: 1, Sets: []*models.PlacementSet{{Peers: [][]byte{{1}}}}})
	add(&models.INode{Format: 2})
	f.Fuzz(func(t *testing.T, b []byte) {
		const block = 4 << 20
		n, err := parseINode(b, block)
		if err != nil {
			if !errors.Is(err, torus.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		for _, x := range n.Table {
			if x.Page >= block/pageSize || int(x.Set) >= len(n.Sets) {
				t.Fatalf("%v was let through", x)
			}
		}
		for _, s := range n.Sets {
			if len(s.Peers) == 0 && s.Replication == 0 {
				t.Fatalf("%v was let through", s)
			}
		}
	})
}

// A page of the table and a node, both of any contents: an entry that is let through points into the table.
func FuzzNode(f *testing.F) {
	node := func(e ...entry) (b []byte) {
		for _, x := range e {
			b = binary.LittleEndian.AppendUint64(b, uint64(x))
		}
		return b
	}
	page := make([]byte, pageSize)
	page[0+2], page[30] = 1, 1
	f.Add(page, node(dataEntry(0, 3, 4)))
	f.Add(page, node(dataEntry(maxTable-1, 3, 4)))
	f.Add(page[:100], node(dataEntry(5, 3, 4), zeroEntry, lostEntry))
	f.Fuzz(func(t *testing.T, page, node []byte) {
		var file File
		file.table.init()
		file.table.sets = []*models.PlacementSet{{RingVersion: 1, Replication: 2}}
		if err := file.table.decodePage(0, page); err != nil {
			if !errors.Is(err, torus.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		b := make([]byte, nodeSize)
		copy(b, node)
		var e [fanout]entry
		decodeNode(b, &e)
		for _, leaf := range []bool{true, false} {
			if file.checkNode(&e, leaf) != nil {
				continue
			}
			for _, x := range e {
				if x.kind() == entryData && !file.table.e[x.slot()].used {
					t.Fatalf("%v was let through", x)
				}
			}
		}
	})
}

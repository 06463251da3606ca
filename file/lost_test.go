package file_test

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/record"
)

// A node of the map that is damaged on every replica takes its own part of the volume with it and nothing else: reads there fail, with
// an error and not for ever; writes, flushes and a detach go on; what is written anew reads again, also after an attach.
func TestDamagedNode(t *testing.T) {
	const leafBytes = 2 << 20
	for name, pages := range map[string]int{"leaf": 1, "interior": 2} { // the last pages of a checkpoint's record: leaves, then the interior node
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 1, 3, 2, 4*leafBytes)
			c := r.attach(nil)
			for i := range uint64(2) {
				c.must(&device.Request{Op: device.Write, Off: i * leafBytes, Data: pg(byte(i+1), 4)})
			}
			c.detach()
			damaged := 0
			for _, p := range r.peers {
				for ref, b := range p.blocks {
					if ref.Type != torus.TypeINode {
						continue
					}
					var h record.Header
					for off := 0; off < len(b.data); off += h.Size() {
						if err := h.Decode(b.data[off:]); err != nil {
							t.Fatal(err)
						}
						at := off + record.HeaderSize
						for _, x := range h.Extents {
							for range x.Count {
								if x.Page == uint64(pages) { // its class: 1 a leaf, 2 an interior node
									b.data[at+5] ^= 0xff
									damaged++
									if name == "leaf" {
										x.Page = 0 // only the first
									}
								}
								at += 4096
							}
						}
					}
				}
			}
			if damaged == 0 {
				t.Fatal("there is nothing to damage")
			}
			c = r.attach(nil)
			got := make([]byte, 4*4096)
			fails := func(off uint64) {
				t.Helper()
				if err := c.do(&device.Request{Op: device.Read, Off: off, Data: got}); !errors.Is(err, torus.ErrCorrupt) {
					t.Fatalf("reading at %d: %v", off, err)
				}
			}
			reads := func(off uint64, want []byte) {
				t.Helper()
				c.must(&device.Request{Op: device.Read, Off: off, Data: got[:len(want)]})
				if !bytes.Equal(got[:len(want)], want) {
					t.Fatalf("wrong bytes at %d", off)
				}
			}
			fails(0)
			if name == "leaf" {
				reads(leafBytes, pg(2, 4))
			} else {
				fails(leafBytes)
			}
			c.must(&device.Request{Op: device.Write, Off: 4096, Data: pg(7, 1), Flags: device.FUA})
			c.must(&device.Request{Op: device.Write, Off: 2 * leafBytes, Data: pg(8, 1), Flags: device.FUA})
			r.v.RunFor(5 * time.Second)
			for range 2 {
				reads(4096, pg(7, 1))
				reads(2*leafBytes, pg(8, 1))
				fails(0)
				if err := c.do(&device.Request{Op: device.Write, Off: 100, Data: []byte{1}}); !errors.Is(err, torus.ErrCorrupt) {
					t.Fatalf("writing a part of a lost page: %v", err)
				}
				if name == "leaf" {
					reads(leafBytes, pg(2, 4))
				}
				c.detach()
				c = r.attach(nil)
			}
			c.must(&device.Request{Op: device.Trim, Off: 0, Len: leafBytes})
			reads(0, make([]byte, 4*4096))
		})
	}
}

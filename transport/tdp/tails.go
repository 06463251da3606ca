package tdp

import (
	"encoding/binary"
	"fmt"

	"github.com/coreos/torus"
	"github.com/coreos/torus/record"
)

// A tail on the wire: 24 bytes BlockRef, 32 bits length, 32 bits flags (bit 0: sealed, bit 1: suspect).
const (
	tailSize    = torus.BlockRefByteSize + 8
	tailSealed  = 1
	tailSuspect = 2
)

// appendTails appends the wire form of tails to b.
func appendTails(b []byte, tails []torus.Tail) []byte {
	for i := range tails {
		t := &tails[i]
		flags := uint32(0)
		if t.Sealed {
			flags = tailSealed
		}
		if t.Suspect {
			flags |= tailSuspect
		}
		b = t.Ref.AppendTo(b)
		b = binary.LittleEndian.AppendUint32(b, t.Length)
		b = binary.LittleEndian.AppendUint32(b, flags)
	}
	return b
}

// decodeTails is the inverse of appendTails; f is the header of the frame whose payload p is.
func decodeTails(f *frame, p []byte) ([]torus.Tail, error) {
	if record.Checksum(p) != f.sum {
		return nil, fmt.Errorf("tails: %w", torus.ErrCorrupt)
	}
	if len(p)%tailSize != 0 {
		return nil, fmt.Errorf("tails of %d bytes: %w", len(p), torus.ErrInvalid)
	}
	if len(p) == 0 {
		return nil, nil
	}
	tails := make([]torus.Tail, 0, len(p)/tailSize)
	for ; len(p) > 0; p = p[tailSize:] {
		flags := binary.LittleEndian.Uint32(p[torus.BlockRefByteSize+4:])
		if flags&^(tailSealed|tailSuspect) != 0 {
			return nil, fmt.Errorf("tail with flags %#x: %w", flags, torus.ErrInvalid)
		}
		tails = append(tails, torus.Tail{
			Ref:     torus.BlockRefFromBytes(p),
			Length:  binary.LittleEndian.Uint32(p[torus.BlockRefByteSize:]),
			Sealed:  flags&tailSealed != 0,
			Suspect: flags&tailSuspect != 0,
		})
	}
	return tails, nil
}

package tdp

import (
	"encoding/binary"
	"fmt"

	"github.com/coreos/torus"
	"github.com/coreos/torus/record"
)

// The versions of the protocol that this package speaks. The hello itself is the same in all of them.
const (
	MinVersion = 1
	MaxVersion = 1
)

// What a server can do beside what all do.
const (
	featureBorrow = 1 // it can borrow what the client lends
	featureWhere  = 2 // it says where its blocks lie
)

// Role says which side of the protocol somebody is on.
type Role uint8

// The roles.
const (
	RolePeer   Role = 1 // stores blocks
	RoleClient Role = 2
)

func (r Role) String() string {
	switch r {
	case RolePeer:
		return "peer"
	case RoleClient:
		return "client"
	}
	return fmt.Sprintf("role %d", uint8(r))
}

// Hello is how each side introduces itself in its first frame.
type Hello struct {
	Cluster     string       // torus.GlobalMetadata.ClusterID, 64 bytes at most
	ID          torus.PeerID // of the peer, or of the client process
	Incarnation uint64       // differs with every start of the process
	BlockSize   uint64       // bytes
	Name        string       // for logs, such as "torusd on host a"; 64 bytes at most

	// Filled in by Dial, Serve and the decoder.
	Role       Role
	MinVersion uint16
	MaxVersion uint16
	Features   uint64 // bits for what is optional, of a server: feature*
}

const (
	helloFixed = 48
	maxName    = 64
)

// check refuses what cannot be sent.
func (h *Hello) check() error {
	if len(h.Cluster) > maxName || len(h.Name) > maxName {
		return fmt.Errorf("cluster id or name in hello longer than %d bytes: %w", maxName, torus.ErrInvalid)
	}
	return nil
}

// encode returns the whole frame.
func (h *Hello) encode() []byte {
	le := binary.LittleEndian
	p := make([]byte, helloFixed, helloFixed+len(h.Cluster)+len(h.Name))
	le.PutUint16(p, h.MinVersion)
	le.PutUint16(p[2:], h.MaxVersion)
	p[4] = uint8(h.Role)
	p[5] = uint8(len(h.Cluster))
	p[6] = uint8(len(h.Name))
	le.PutUint64(p[8:], h.Features)
	copy(p[16:], h.ID[:])
	le.PutUint64(p[32:], h.Incarnation)
	le.PutUint64(p[40:], h.BlockSize)
	p = append(p, h.Cluster...)
	p = append(p, h.Name...)
	f := frame{op: opHello, payload: uint32(len(p)), sum: record.Checksum(p)}
	var b [HeaderSize]byte
	f.put(&b)
	return append(b[:], p...)
}

// decodeHello reads the payload of a hello whose header is f. A later version may add to its end.
func decodeHello(f *frame, p []byte) (Hello, error) {
	le := binary.LittleEndian
	if record.Checksum(p) != f.sum {
		return Hello{}, fmt.Errorf("hello: %w", torus.ErrCorrupt)
	}
	if len(p) < helloFixed {
		return Hello{}, fmt.Errorf("hello of %d bytes: %w", len(p), torus.ErrInvalid)
	}
	cluster, name := int(p[5]), int(p[6])
	if cluster > maxName || name > maxName || len(p) < helloFixed+cluster+name {
		return Hello{}, fmt.Errorf("hello of impossible lengths: %w", torus.ErrInvalid)
	}
	return Hello{
		MinVersion:  le.Uint16(p),
		MaxVersion:  le.Uint16(p[2:]),
		Role:        Role(p[4]),
		Features:    le.Uint64(p[8:]),
		ID:          torus.PeerID(p[16:32]),
		Incarnation: le.Uint64(p[32:]),
		BlockSize:   le.Uint64(p[40:]),
		Cluster:     string(p[helloFixed : helloFixed+cluster]),
		Name:        string(p[helloFixed+cluster : helloFixed+cluster+name]),
	}, nil
}

// agree checks that two sides belong together and can talk; both run it and come to the same answer.
func agree(mine, theirs *Hello) error {
	switch {
	case mine.Cluster != theirs.Cluster:
		return fmt.Errorf("%v %q %w: %q is not %q", theirs.Role, theirs.Name, torus.ErrWrongCluster, theirs.Cluster, mine.Cluster)
	case min(mine.MaxVersion, theirs.MaxVersion) < max(mine.MinVersion, theirs.MinVersion):
		return fmt.Errorf("no common version of the protocol: %d to %d there, %d to %d here; update the older side: %w",
			theirs.MinVersion, theirs.MaxVersion, mine.MinVersion, mine.MaxVersion, torus.ErrNotSupported)
	case mine.Role == theirs.Role:
		return fmt.Errorf("both sides are a %v: %w", mine.Role, torus.ErrInvalid)
	case mine.BlockSize != theirs.BlockSize:
		return fmt.Errorf("block size is %d there, %d here: %w", theirs.BlockSize, mine.BlockSize, torus.ErrInvalid)
	}
	return nil
}

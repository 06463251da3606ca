package torus

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"

	"github.com/google/uuid"
)

// PageSize is the unit of the map and of everything stored in a block: 4 KiB.
// Records, and so all appends, are multiples of it.
const PageSize = 4096

// DefaultBlockSize is the size of a block in bytes unless `torusctl init` says otherwise.
const DefaultBlockSize = 4 << 20

// MinBlockSize and MaxBlockSize bound what `torusctl init --block-size` accepts, in bytes.
// A map entry keeps 14 bits for the page within a block: 64 MiB at most.
const (
	MinBlockSize = 256 << 10
	MaxBlockSize = 64 << 20
)

// VolumeID names a volume for ever: 40 bits, never handed out twice.
type VolumeID uint64

// VolumeMax is the largest VolumeID.
const VolumeMax VolumeID = 1<<40 - 1

// INodeID is an INode index: ever-increasing per volume, handed out by the MDS. The one a writer
// holds is its epoch, the fencing token that every mutating request carries.
type INodeID uint64

// IndexID is the index of a block among those of one (volume, INode index, type).
type IndexID uint64

// BlockType says what a block holds. 24 bits.
type BlockType uint32

// The block types.
const (
	TypeBlock BlockType = iota // records of user data: the log
	TypeINode                  // records of metadata: map nodes, block tables, INodes
	TypeMoved                  // user data that a compaction has copied out of other blocks
)

func (t BlockType) String() string {
	switch t {
	case TypeBlock:
		return "data"
	case TypeINode:
		return "inode"
	case TypeMoved:
		return "moved"
	}
	return fmt.Sprintf("type%d", uint32(t))
}

// BlockRefByteSize is the size of an encoded BlockRef: 192 bits.
const BlockRefByteSize = 24

// BlockRef is the name of a block: 24 bits type, 40 bits volume, 64 bits INode index (the epoch
// that wrote it), 64 bits index. A BlockRef is used for one content only, ever (invariant D2).
type BlockRef struct {
	Type   BlockType
	Volume VolumeID
	INode  INodeID
	Index  IndexID
}

// AppendTo appends the 24 bytes of the reference to b: big endian, type first.
func (r BlockRef) AppendTo(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, uint64(r.Type)<<40|uint64(r.Volume))
	b = binary.BigEndian.AppendUint64(b, uint64(r.INode))
	return binary.BigEndian.AppendUint64(b, uint64(r.Index))
}

// ToBytes returns the 24 bytes of the reference.
func (r BlockRef) ToBytes() []byte { return r.AppendTo(make([]byte, 0, BlockRefByteSize)) }

// BlockRefFromBytes is the inverse of ToBytes; b must hold at least BlockRefByteSize bytes.
func BlockRefFromBytes(b []byte) BlockRef {
	_ = b[BlockRefByteSize-1]
	tv := binary.BigEndian.Uint64(b)
	return BlockRef{
		Type:   BlockType(tv >> 40),
		Volume: VolumeID(tv) & VolumeMax,
		INode:  INodeID(binary.BigEndian.Uint64(b[8:])),
		Index:  IndexID(binary.BigEndian.Uint64(b[16:])),
	}
}

func (r BlockRef) String() string {
	return fmt.Sprintf("%s:%x:%x:%x", r.Type, uint64(r.Volume), uint64(r.INode), uint64(r.Index))
}

// INodeRefByteSize is the size of an encoded INodeRef: 128 bits.
const INodeRefByteSize = 16

// INodeRef names a version of a file: its volume and its INode index.
type INodeRef struct {
	Volume VolumeID
	INode  INodeID
}

// ToBytes returns the 16 bytes of the reference, big endian.
func (r INodeRef) ToBytes() []byte {
	b := binary.BigEndian.AppendUint64(make([]byte, 0, INodeRefByteSize), uint64(r.Volume))
	return binary.BigEndian.AppendUint64(b, uint64(r.INode))
}

// INodeRefFromBytes is the inverse of ToBytes; b must hold at least INodeRefByteSize bytes.
func INodeRefFromBytes(b []byte) INodeRef {
	return INodeRef{VolumeID(binary.BigEndian.Uint64(b)), INodeID(binary.BigEndian.Uint64(b[8:]))}
}

func (r INodeRef) String() string { return fmt.Sprintf("%x:%x", uint64(r.Volume), uint64(r.INode)) }

// PeerID is the identity of a peer's data: a UUID made when its data dir is made. A wiped disk
// gets a new one, so that "I do not have it" after a loss never counts as "it was not there".
type PeerID [16]byte

// NewPeerID returns a random identity (RFC 9562 version 4).
func NewPeerID() PeerID { return PeerID(uuid.New()) }

// ParsePeerID reads the textual form of a UUID.
func ParsePeerID(s string) (PeerID, error) {
	u, err := uuid.Parse(s)
	if err != nil {
		return PeerID{}, fmt.Errorf("%q is not a peer UUID: %w", s, ErrInvalid)
	}
	return PeerID(u), nil
}

// IsZero reports whether p is no identity at all.
func (p PeerID) IsZero() bool { return p == PeerID{} }

func (p PeerID) String() string { return uuid.UUID(p).String() }

// Short returns the first eight hexadecimal digits, for logs and tables.
func (p PeerID) Short() string { return hex.EncodeToString(p[:4]) }

// MarshalText lets a PeerID be a JSON value or map key.
func (p PeerID) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText is the inverse of MarshalText.
func (p *PeerID) UnmarshalText(b []byte) (err error) {
	*p, err = ParsePeerID(string(b))
	return err
}

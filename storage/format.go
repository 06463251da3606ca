package storage

import (
	"encoding/binary"
	"fmt"

	"github.com/coreos/torus"
	"github.com/coreos/torus/record"
)

// A slots file: a superblock page, two tables of entries, the slots. docs/format/block-slot.md draws it.
const (
	superMagic   = 0x31544f4c_53524f54 // "TORSLOT1", little endian
	superVersion = 1

	superOffVersion = 8
	superOffCRC     = 12
	superOffPeer    = 16
	superOffNumber  = 32
	superOffSlots   = 36
	superOffBlock   = 40
	superOffCluster = 48 // 16 bits of length, then the id

	entryMagic = 0x45535254 // "TRSE"
	entrySize  = 64

	entryOffState   = 4
	entryOffGen     = 8
	entryOffRef     = 16
	entryOffLength  = 40
	entryOffSlot    = 44
	entryOffFlushed = 48
	entryOffFile    = 56
	entryOffCRC     = 60

	// maxSlotsPerFile bounds what a superblock may claim.
	maxSlotsPerFile = 1 << 20
)

// superblock is the first page of a slots file.
type superblock struct {
	id     Identity
	number uint32 // of the file
	slots  uint32
}

// tableSize is the size of one of the two tables in bytes.
func tableSize(slots uint32) int64 {
	return (int64(slots)*entrySize + torus.PageSize - 1) / torus.PageSize * torus.PageSize
}

// largestPage is the size of the largest pages that the page cache of Linux is made of.
const largestPage = 2 << 20

// dataOffset is where slot 0 begins: so that, with blocks of a multiple of largestPage, no two share a page of the page cache, nor does the
// first with the tables (see flight).
func dataOffset(slots uint32, blockSize uint64) int64 {
	unit := int64(min(blockSize, largestPage))
	return (torus.PageSize + 2*tableSize(slots) + unit - 1) / unit * unit
}

func (s superblock) dataOffset() int64 { return dataOffset(s.slots, s.id.BlockSize) }

func (s superblock) fileSize() int64 {
	return s.dataOffset() + int64(s.slots)*int64(s.id.BlockSize)
}

func (s superblock) encode(page []byte) {
	le := binary.LittleEndian
	clear(page[:torus.PageSize])
	le.PutUint64(page, superMagic)
	le.PutUint16(page[superOffVersion:], superVersion)
	copy(page[superOffPeer:], s.id.Peer[:])
	le.PutUint32(page[superOffNumber:], s.number)
	le.PutUint32(page[superOffSlots:], s.slots)
	le.PutUint64(page[superOffBlock:], s.id.BlockSize)
	le.PutUint16(page[superOffCluster:], uint16(len(s.id.ClusterID)))
	copy(page[superOffCluster+2:], s.id.ClusterID)
	le.PutUint32(page[superOffCRC:], record.Checksum(page[:torus.PageSize]))
}

// decode reads and verifies a superblock; page may be overwritten.
func (s *superblock) decode(page []byte) error {
	le := binary.LittleEndian
	if len(page) < torus.PageSize || le.Uint64(page) != superMagic {
		return fmt.Errorf("not a slots file: %w", torus.ErrCorrupt)
	}
	sum := le.Uint32(page[superOffCRC:])
	le.PutUint32(page[superOffCRC:], 0)
	if record.Checksum(page[:torus.PageSize]) != sum {
		return fmt.Errorf("superblock: %w", torus.ErrCorrupt)
	}
	if v := le.Uint16(page[superOffVersion:]); v != superVersion {
		return fmt.Errorf("slots file of version %d, this program knows %d: %w", v, superVersion, torus.ErrNotSupported)
	}
	copy(s.id.Peer[:], page[superOffPeer:])
	s.number = le.Uint32(page[superOffNumber:])
	s.slots = le.Uint32(page[superOffSlots:])
	s.id.BlockSize = le.Uint64(page[superOffBlock:])
	n := int(le.Uint16(page[superOffCluster:]))
	if n > maxClusterID || s.slots == 0 || s.slots > maxSlotsPerFile {
		return fmt.Errorf("superblock with impossible lengths: %w", torus.ErrCorrupt)
	}
	s.id.ClusterID = string(page[superOffCluster+2:][:n])
	return s.id.validate()
}

// state is what a slot holds. The first three are stored.
type state uint8

const (
	free    state = iota // nothing
	open                 // a block that may grow: its length is that of its valid records
	sealed               // an immutable block
	sealing              // sealed for every caller, but the entry is not written yet
	freeing              // nothing, but the entry may not be durable yet, or somebody still reads
	broken               // neither entry can be read: the slot is left alone
	filling              // takes a copy that is being put: in no index yet
)

// entry describes a slot. Each slot has two places for it, one in each table; a new entry never overwrites the last
// durable one, so that a torn write, wherever it tears, leaves the old state. The higher generation counts.
type entry struct {
	state   state
	gen     uint64 // one more than any before it in this store
	ref     torus.BlockRef
	length  uint32 // bytes; sealed only
	flushed uint64 // sealed only: the highest Flushed of the block's records
	slot    uint32 // within the file
	file    uint32
}

func (e *entry) encode(b []byte) {
	le := binary.LittleEndian
	_ = b[entrySize-1]
	le.PutUint32(b, entryMagic)
	le.PutUint32(b[entryOffState:], uint32(e.state))
	le.PutUint64(b[entryOffGen:], e.gen)
	e.ref.AppendTo(b[entryOffRef:entryOffRef])
	le.PutUint32(b[entryOffLength:], e.length)
	le.PutUint32(b[entryOffSlot:], e.slot)
	le.PutUint64(b[entryOffFlushed:], e.flushed)
	le.PutUint32(b[entryOffFile:], e.file)
	le.PutUint32(b[entryOffCRC:], record.Checksum(b[:entryOffCRC]))
}

var zeroEntry [entrySize]byte

// decode reads an entry. Never written (all zeroes) is a free slot of generation 0.
func (e *entry) decode(b []byte) error {
	le := binary.LittleEndian
	if [entrySize]byte(b) == zeroEntry {
		*e = entry{}
		return nil
	}
	if le.Uint32(b) != entryMagic || record.Checksum(b[:entryOffCRC]) != le.Uint32(b[entryOffCRC:]) {
		return torus.ErrCorrupt
	}
	*e = entry{
		state:   state(le.Uint32(b[entryOffState:])),
		gen:     le.Uint64(b[entryOffGen:]),
		ref:     torus.BlockRefFromBytes(b[entryOffRef:]),
		length:  le.Uint32(b[entryOffLength:]),
		slot:    le.Uint32(b[entryOffSlot:]),
		flushed: le.Uint64(b[entryOffFlushed:]),
		file:    le.Uint32(b[entryOffFile:]),
	}
	if le.Uint32(b[entryOffState:]) > uint32(sealed) || e.gen == 0 {
		return torus.ErrCorrupt
	}
	return nil
}

// decodeFor is decode for the entry of a certain slot of a certain file.
func (e *entry) decodeFor(b []byte, file, slot uint32, blockSize uint64) error {
	if err := e.decode(b); err != nil {
		return err
	}
	if e.gen == 0 {
		return nil
	}
	if e.file != file || e.slot != slot || uint64(e.length) > blockSize || e.length%torus.PageSize != 0 {
		return torus.ErrCorrupt
	}
	return nil
}

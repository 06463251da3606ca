package torus

import (
	"fmt"

	"github.com/coreos/torus/buf"
)

// Op is the kind of a Request. The numbers are part of TDP (docs/format/tdp.md).
type Op uint8

// What can be asked of a BlockStore. "Mutating" requests carry the caller's epoch and are refused
// with ErrFenced below the fence of their volume, in the same critical section as the change.
const (
	// OpPing does nothing. It proves that the other side is alive.
	OpPing Op = 1
	// OpAppend (mutating) stores Data, one or more whole records, at byte Off of block Ref, which must be the
	// block's present length, or lie below it when the very same bytes are sent again; beyond: ErrGap.
	// Success means: in memory (page cache), not yet durable. The first append at Off 0 makes the block.
	// Replies Length: what the block now holds.
	OpAppend Op = 2
	// OpSync (mutating) makes the first Len bytes of Ref durable. Holding less is ErrGap.
	OpSync Op = 3
	// OpFence persists the promise to refuse every epoch of Ref.Volume below Epoch, waits for appends under
	// way, and then replies the tails of all blocks with Type Ref.Type, INode Ref.INode and an Index in
	// [Ref.Index, Ref.Index+Len), damaged ones as Suspect. Refused with ErrFenced only if Epoch is *below* the fence; then
	// Fence is the epoch promised. Len 0 asks for no tails.
	OpFence Op = 4
	// OpSeal (mutating) makes Ref immutable at Len bytes; a longer tail is dropped. A hint, sent after a commit.
	OpSeal Op = 5
	// OpRead fills Data with the bytes of Ref from Off. Reading beyond the block's length is ErrGap, except where
	// a store has found damage in the block: then it gives what is there, for the reader's checksums to judge.
	// Epoch 0 reads as they are; a recovery's reads carry its epoch and are refused below the fence.
	OpRead Op = 6
	// OpScan replies the headers of the records of Ref from byte Off on, in the form of package
	// record's ScanEntry, as many whole ones as fit into Len bytes. None left: an empty reply.
	OpScan Op = 7
	// OpDelete (mutating) drops the block. A block that is not there is a success.
	OpDelete Op = 8
	// OpList replies the tails of all blocks of Ref.Volume (every volume if 0, or if Off is ListEveryVolume) greater
	// than Ref in (type, volume, INode, index) order, Len at most.
	OpList Op = 9
	// OpPut (mutating) stores Data, whole records from byte 0 on, as all there is of Ref: durable and sealed. It takes the place of
	// the copy that is there, if any, which stays until the new one is durable, whatever happens meanwhile. A copy of more than Len
	// bytes is not replaced, as it has grown since the caller looked: ErrAgain. For a peer that mends its own copies; not part of TDP.
	OpPut Op = 10
	// OpVerify says that the copy of Ref here may not be what it should be, or not be here: whoever looks after the copies of this store looks
	// at it soon, and makes it whole if it is not. It is answered at once, needs no epoch, and changes nothing by itself.
	// ErrNotSupported where nobody looks after them.
	OpVerify Op = 11
)

// ListEveryVolume as the Off of an OpList walks all volumes, page by page: Ref is then only where to go on from.
const ListEveryVolume = 1

func (o Op) String() string {
	names := [...]string{1: "Ping", "Append", "Sync", "Fence", "Seal", "Read", "Scan", "Delete", "List", "Put", "Verify"}
	if int(o) < len(names) && names[o] != "" {
		return names[o]
	}
	return fmt.Sprintf("Op(%d)", uint8(o))
}

// Mutating reports whether o changes a block, and so needs an epoch at or above the fence.
func (o Op) Mutating() bool {
	return o == OpAppend || o == OpSync || o == OpSeal || o == OpDelete || o == OpPut
}

// Tail says how much of a block a store holds.
type Tail struct {
	Ref    BlockRef
	Length uint32 // bytes, a whole number of records, each verified by its checksums
	Sealed bool
	// Suspect: the store knows that it has lost some of the block, or cannot read all of it: others may hold more than Length.
	Suspect bool
}

// Request is one operation on a BlockStore and, once Done is called, its result. It is made for
// reuse: the caller owns it before Submit and after Done, the store in between, along with Data.
type Request struct {
	Op    Op
	Ref   BlockRef
	Epoch uint64 // the caller's epoch, see Op
	Off   uint32 // bytes from the start of the block
	Len   uint32 // bytes, or a count; see Op
	Data  []byte // Append, Put: what to store, a multiple of PageSize. Read: where to put it. Scan: set by the store.
	// Buf, of a Read, is the buffer that Data is the beginning of, with nobody else in it, if the store may keep that and put another one here, with the answer in it:
	// then Data is the beginning of the other one, whatever Err says. Whoever looks for the bytes in memory of his own need not copy them then.
	Buf *buf.Buf
	// Owner, of an Append, keeps Data as it is. Where it is nil, nobody looks at Data after Done; else somebody may who has called Retain, until
	// Release: a peer on the same machine that was lent Data, and cannot be asked to give it back.
	Owner Owner
	// Reserve, of an Append or Put, lets it take one of the slots that a store keeps back from ordinary writes: for what a full
	// cluster needs in order to be recovered, and to become less full.
	Reserve bool
	// Durable, of an Append, says that a Sync of it follows at once: a store may make it durable in the same go.
	Durable bool

	// Done is called exactly once, on the loop of whoever submitted, possibly before Submit returns.
	Done func(*Request)

	Err    error
	Length uint32 // Append, Sync: bytes of the block held, or durable
	Fence  uint64 // Err is ErrFenced: the epoch promised to somebody else
	Tails  []Tail // Fence, List: the reply; the caller may keep it
	// Committed is Fence's reply beside Tails: the highest "flushed" sequence number seen in the
	// record headers of those blocks. A recovery that ends below it must stop, loudly.
	Committed uint64

	// Peer and Tag are the caller's own, the store leaves them alone.
	Peer PeerID
	Tag  uint64
	User any
}

// Owner keeps memory from being used for something else until everybody who has called Retain has called Release. It belongs to a loop.
type Owner interface {
	Retain()
	Release()
	// Abandon is Release where another process has ended that had the memory: what it has asked its disk to write may still be read from there, so these very
	// pages must not be written to any more.
	Abandon()
}

// Finish sets the result and calls Done. For implementations of BlockStore.
func (r *Request) Finish(err error) {
	r.Err = err
	r.Done(r)
}

// BlockStore is anything that stores blocks: a disk (package storage), a peer reached over the
// wire (transport/tdp), the serving side of one (peer), memory. It belongs to one loop: Submit is called on
// it, Done is called on it, and no two calls overlap.
type BlockStore interface {
	// Submit starts r. It never blocks; requests of one caller to the same block take effect in order.
	Submit(r *Request)
}

// Store is a BlockStore that owns a medium.
type Store interface {
	BlockStore
	// Kind names the implementation: "disk", "memory".
	Kind() string
	// Stats is cheap and may be called at any time on the store's loop.
	Stats() StoreStats
	// Close syncs what is unsynced and gives the medium back. No Submit may follow.
	Close() error
}

// StoreStats is a store's account of itself, all in bytes.
type StoreStats struct {
	BlockSize uint64
	Size      uint64 // what it may hold of ordinary writes: without the slots that it keeps back, see Request.Reserve
	Used      uint64 // slots taken × block size; kept ones may be among them, so it can exceed Size
	Full      bool   // a new block is refused now, unless it may take a kept slot
	Failed    bool   // the medium failed; nothing more is accepted until it is opened and verified again
}

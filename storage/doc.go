// Package storage keeps blocks: on a disk (Open) or in memory (NewMemory). Both are a torus.Store, driven by one loop.
//
// A disk store is a directory of preallocated files of slots, one block a slot (docs/format/block-slot.md draws them). The
// life of an append: append.go verifies its records; stage.go keeps them in memory that outlives the process; flight.go has them
// written to the block; sync.go makes them durable, many requests with one fdatasync; open.go finds them again after a crash, in the stage and by
// walking the records of every block that was not sealed. grow.go makes files and writes them through in the background, ahead of need.
//
// What is durable when:
//
//   - Append: nothing. It survives the end of the process, not a power cut.
//   - Sync: the first Len bytes of the block, and the block's existence.
//   - Seal: that the block is immutable at this length. Seal waits for the bytes, then for the slot's entry.
//   - Put: that the block is these bytes, sealed; until then the copy before is kept.
//   - Delete: that the block is gone. Its slot is used again only afterwards.
//
// Answers for a block that is not there: Append (at Off > 0) and Sync say ErrGap, Read, Scan and Seal ErrBlockNotExist;
// Delete succeeds.
//
// When the disk fails: a read error is ErrIO for that request. A failed fdatasync or write is final: what was not durable
// in that file is lost, and is said to be lost from then on (ErrIO); what was durable is still read; nothing new is accepted anywhere
// (StoreStats.Failed) until the store is opened anew, which reads every open block from the medium and verifies it.
package storage

// Package torus is the vocabulary of Torus, a distributed storage system coordinated by etcd: the types, interfaces
// and errors that every other package speaks in. It does no I/O.
//
// # The life of a write
//
//	nbd/session.go          a request is parsed; its bytes go to the device
//	block/volume.go         the device: a volume that is attached here
//	file/write.go           the bytes are copied into the record being built, their pages checksummed
//	file/send.go            at the end of the loop's turn the record leaves, in one frame per replica
//	distributor/            to the registered set of the open block: one connection per peer
//	transport/tdp           the frame; one writev for all that is queued
//	peer/service.go         the epoch is checked against the fence
//	storage/append.go       the record is verified and written to the block's slot: pwrite
//	file/ack.go             every replica of the block has it, and every record before it: done
//
// A flush is file/flush.go → OpSync to every replica of every block with unsynced records → one group
// fdatasync at each peer. What is flushed leaves the client's memory and enters the map (file/map.go);
// now and then file/checkpoint.go writes the map's changed nodes and commits a new INode in the MDS.
//
// # The life of a read
//
//	file/read.go            what is not flushed yet is served from memory; else the map says which page of which block
//	file/map.go             a node of the map that is not loaded is read first, in the same way
//	distributor/read.go     adjacent pages in one request to one replica; the next one on an error or a bad checksum
//	transport/tdp/direct.go a peer on this machine is only asked where its bytes lie: they are read from its file
//	storage/read.go         else the peer reads: from the page cache at once, from the disk by a helper
//
// # Opening a volume
//
// file/attach.go is the only way to write: a new epoch, fences, the longest tails, replay, copies, commit.
//
// Requests between all of these are one type, Request; what takes them is a BlockStore.
package torus

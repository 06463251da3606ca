// Package peer is the serving side of a storage node: what stands between the wire and the store.
//
//	service.go   the Service: a BlockStore that refuses what a newer attach has fenced off (invariant L1)
//	fences.go    the journal in which it keeps that promise (docs/format/fences.md)
//	metrics.go   what is counted
package peer

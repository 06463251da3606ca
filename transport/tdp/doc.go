// Package tdp is the Torus Data Protocol: requests to a BlockStore as multiplexed binary frames on one
// TCP connection. A Client is a BlockStore whose blocks are at a peer; a Server hands what it receives
// to the BlockStore behind it. Both are state machines on a loop, over any transport.Network.
//
//	frame.go    the header that every frame begins with
//	hello.go    who speaks, and in which version
//	tails.go    the payload of Fence and List replies
//	client.go   dialling, liveness, requests out and replies in
//	slots.go    the requests under way
//	server.go   accepting, limits, closing
//	conn.go     one accepted connection: requests in, replies out
//
// docs/format/tdp.md draws the frames.
package tdp

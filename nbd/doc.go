// Package nbd serves block devices over the NBD protocol, fixed newstyle. It knows package device, and nothing
// of what is behind it.
//
//	server.go      accepts, counts, drains
//	negotiate.go   a session's handshake: options, until an export is entered
//	session.go     a session's transmission: commands in, requests to the device
//	reply.go       what is sent back
//	protocol.go    the numbers of the wire
//	metrics.go     requests, bytes, latencies
//	kernel.go      the client side: hands a connection to the kernel's nbd driver
//
// A session is a state machine on the server's loop: no goroutine, no lock, no blocking call. What is supported,
// section by section of the specification, is in docs/nbd.md.
package nbd

// Package node is the one place where the parts of Torus are wired together: which metadata service, which
// loop, which network, which file system. A Peer stores blocks, a Frontend serves volumes, a Dev is a
// whole cluster in one process.
package node

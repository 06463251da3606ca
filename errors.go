package torus

import (
	"errors"
	"fmt"
	"strings"
)

// The errors by which callers decide, for errors.Is. The first group is the documented one of
// Torus; the second came with the log. All of them keep their meaning across the wire (ErrorCode).
var (
	ErrAgain             = errors.New("interrupted, try again")
	ErrBlockNotExist     = errors.New("block does not exist")
	ErrBlockUnavailable  = errors.New("block cannot be retrieved")
	ErrClosed            = errors.New("closed")
	ErrCompareFailed     = errors.New("compare failed: somebody else changed it first")
	ErrExists            = errors.New("already exists")
	ErrINodeUnavailable  = errors.New("inode is currently unavailable")
	ErrInvalid           = errors.New("invalid argument")
	ErrIsSymlink         = errors.New("is a symlink")
	ErrLeaseNotFound     = errors.New("lease not found")
	ErrLocked            = errors.New("locked")
	ErrNoGlobalMetadata  = errors.New("no global metadata: the cluster is not initialised (run `torusctl init`)")
	ErrNonSequentialRing = errors.New("non-sequential ring: somebody else changed it first")
	ErrNoPeer            = errors.New("no such peer")
	ErrNotDir            = errors.New("is not a directory")
	ErrNotExist          = errors.New("does not exist")
	ErrNotSupported      = errors.New("not supported")
	ErrOutOfSpace        = errors.New("out of space")
	ErrWrongVolumeType   = errors.New("wrong volume type")

	// ErrFenced: a newer epoch has been promised; the older writer must stop for good (L1).
	ErrFenced = errors.New("fenced by a newer attach")
	// ErrGap: the request starts or ends beyond what the replica holds; it counts as failed.
	ErrGap = errors.New("gap: the replica holds less than that")
	// ErrSealed: the block is immutable.
	ErrSealed = errors.New("block is sealed")
	// ErrCorrupt: stored or received bytes do not match their checksum.
	ErrCorrupt = errors.New("checksum mismatch")
	// ErrIO: the disk failed. After a failed fsync the file stays failed until it is verified again.
	ErrIO = errors.New("input/output error")
	// ErrReadOnly: a write to something opened read-only.
	ErrReadOnly = errors.New("read-only")
	// ErrWrongCluster: the other side belongs to another cluster.
	ErrWrongCluster = errors.New("belongs to another cluster")
	// ErrMetadataUnavailable: the metadata service did not answer; whether it acted is unknown.
	ErrMetadataUnavailable = errors.New("metadata service unavailable")
)

// wireErrors gives each error that crosses the wire its code; the position is the code.
// Append only: the numbers are part of TDP (docs/format/tdp.md). 0 is success.
var wireErrors = [...]error{
	1:  ErrInvalid,
	2:  ErrBlockNotExist,
	3:  ErrFenced,
	4:  ErrGap,
	5:  ErrSealed,
	6:  ErrCorrupt,
	7:  ErrIO,
	8:  ErrOutOfSpace,
	9:  ErrNotSupported,
	10: ErrClosed,
	11: ErrWrongCluster,
	12: ErrNoPeer,
	13: ErrAgain,
	14: ErrBlockUnavailable,
	15: ErrExists,
	16: ErrReadOnly,
}

// ErrorCode returns the wire code of err: 0 for nil, that of ErrIO for what has none.
func ErrorCode(err error) uint8 {
	if err == nil {
		return 0
	}
	for i, e := range wireErrors {
		if e != nil && errors.Is(err, e) {
			return uint8(i)
		}
	}
	return 7
}

// ErrorFromCode is the inverse of ErrorCode; a code it does not know is ErrIO.
func ErrorFromCode(code uint8) error {
	if code == 0 {
		return nil
	}
	if int(code) < len(wireErrors) {
		return wireErrors[code]
	}
	return ErrIO
}

// Error is the one structured error: what was attempted, on what, why it failed, and what to do
// next. Errors.Is and errors.As see through it to the cause.
type Error struct {
	Op   string // what was attempted: "attach", "create volume"
	Obj  string // on what: "volume demo", "peer 1b4e28ba"
	Err  error  // the cause
	Hint string // what to do next; may be empty
}

func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Op)
	if e.Obj != "" {
		b.WriteString(" " + e.Obj)
	}
	fmt.Fprintf(&b, ": %v", e.Err)
	if e.Hint != "" {
		b.WriteString("\n" + e.Hint)
	}
	return b.String()
}

func (e *Error) Unwrap() error { return e.Err }

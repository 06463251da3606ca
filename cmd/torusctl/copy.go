package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/coreos/torus"
)

const (
	pieceSize  = 1 << 20   // of data that one request moves
	inFlight   = 16        // requests under way
	markEvery  = 256 << 20 // bytes between two notes of how far it has got
	verifySize = 16 << 20  // how much of what is there already is compared before a copy goes on
	zeroRun    = 64 << 10  // shorter runs of zeroes within data are data
)

// piece is a run of bytes on its way.
type piece struct {
	off, n uint64
	data   []byte // of length n; nil: zeroes, which nobody reads
	ended  chan error
}

// inOrder copies: plan calls emit for one piece after the other, work moves several of those with data at a time, and finish is called for all
// of them in their order. The first error ends everything. Data come from take and are finish's no longer when it returns.
func inOrder(ctx context.Context, plan func(emit func(piece) error) error, work, finish func(*piece) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	queue := make(chan *piece, inFlight-1)
	var planned error
	go func() {
		defer close(queue)
		planned = plan(func(p piece) error {
			p.ended = make(chan error, 1)
			select {
			case queue <- &p:
			case <-ctx.Done():
				return ctx.Err()
			}
			if p.data == nil {
				p.ended <- nil
			} else {
				go func() { p.ended <- work(&p) }()
			}
			return nil
		})
	}()
	var failed error
	for p := range queue { // to the end in any case: whoever comes next may rely on nothing being under way
		err := <-p.ended
		if err == nil && failed == nil {
			err = errors.Join(ctx.Err(), finish(p))
		}
		if err != nil && failed == nil {
			failed = err
			cancel()
		}
	}
	if failed != nil {
		return failed
	}
	return planned
}

var zeroes [zeroRun]byte

// allZero reports whether b is zeroes.
func allZero(b []byte) bool {
	for len(b) > len(zeroes) {
		if !bytes.Equal(b[:len(zeroes)], zeroes[:]) {
			return false
		}
		b = b[len(zeroes):]
	}
	return bytes.Equal(b, zeroes[:len(b)])
}

// runs splits data into runs of zeroes and of others.
func runs(off uint64, b []byte, zero, data func(off uint64, b []byte) error) error {
	for len(b) > 0 {
		n, z := 0, false
		for n < len(b) {
			step := min(zeroRun-int((off+uint64(n))%zeroRun), len(b)-n)
			if is := allZero(b[n : n+step]); n == 0 {
				z = is
			} else if is != z {
				break
			}
			n += step
		}
		do := data
		if z {
			do = zero
		}
		if err := do(off, b[:n]); err != nil {
			return err
		}
		off, b = off+uint64(n), b[n:]
	}
	return nil
}

// note is what a copy between a file and a volume leaves beside the file, for --resume.
type note struct {
	Volume    string `json:"volume"`
	VolumeID  uint64 `json:"volume_id"`
	Snapshot  string `json:"snapshot,omitempty"`  // what is dumped
	Temporary bool   `json:"temporary,omitempty"` // it was taken for this dump, and goes with it
	Overwrite bool   `json:"overwrite,omitempty"` // the volume held other data before
	SizeBytes uint64 `json:"size_bytes"`          // to copy
	Modified  int64  `json:"modified,omitempty"`  // the file that is loaded: when, in nanoseconds since 1970
	DoneBytes uint64 `json:"done_bytes"`          // of these, durable
}

func readNote(path string) (note, error) {
	var n note
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return n, fmt.Errorf("there is nothing to resume: no %s: %w\nleave --resume out to begin", path, torus.ErrNotExist)
	}
	if err == nil {
		err = json.Unmarshal(b, &n)
	}
	if err == nil && n.DoneBytes > n.SizeBytes {
		err = torus.ErrInvalid
	}
	if err != nil {
		return n, fmt.Errorf("%s: %w\nremove it, and begin anew without --resume", path, err)
	}
	return n, nil
}

func (n note) write(path string) error {
	b, err := json.Marshal(n)
	if err != nil {
		return err
	}
	if err := os.WriteFile(path+".new", append(b, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// sameTail compares the last of what a copy has done before it goes on.
func sameTail(done uint64, a, b interface {
	ReadAt([]byte, int64) (int, error)
}) error {
	for off := done - min(done, verifySize); off < done; off += pieceSize {
		n := min(pieceSize, done-off)
		x, y := make([]byte, n), make([]byte, n)
		if _, err := a.ReadAt(x, int64(off)); err != nil {
			return err
		}
		if _, err := b.ReadAt(y, int64(off)); err != nil {
			return err
		}
		if !bytes.Equal(x, y) {
			return fmt.Errorf("the %d bytes from %d on are not what was copied: %w\nbegin anew without --resume", n, off, torus.ErrCorrupt)
		}
	}
	return nil
}

// bufferPool hands out buffers of pieceSize.
type bufferPool chan []byte

func newBufferPool() bufferPool { return make(bufferPool, 2*inFlight) }

func (p bufferPool) take(n uint64) []byte {
	select {
	case b := <-p:
		return b[:n]
	default:
		return make([]byte, n, pieceSize)
	}
}

func (p bufferPool) give(b []byte) {
	if b == nil {
		return
	}
	select {
	case p <- b:
	default:
	}
}

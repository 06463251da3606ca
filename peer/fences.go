package peer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"

	"github.com/coreos/torus"
	"github.com/coreos/torus/record"
	"github.com/coreos/torus/vfs"
)

// The fences file: a header and then records, each of one size, so that none crosses a sector.
const (
	fencesFile = "fences"
	fencesNew  = "fences.new" // being written; never read

	entrySize     = 32
	fencesMagic   = 0x31434e46_53524f54 // "TORSFNC1", little endian
	fencesVersion = 1

	maxFences = 1 << 28 // bytes

	// A journal of this many entries more than twice what is alive is written anew.
	fencesSlack = 4096
)

// fences is the journal of the epochs promised. It knows nothing of loops: what it does blocks.
type fences struct {
	fs      vfs.FS
	f       vfs.File
	entries uint32 // in the file, dead ones included
	synced  uint32 // of these, how many are durable for certain
	// broken: a write or sync has failed, and nothing may be assumed about what was written since the last
	// success. The file is then replaced as a whole.
	broken bool
}

// promise is what an entry says: no epoch of the volume below this one.
type promise struct {
	volume torus.VolumeID
	epoch  uint64
}

// openFences reads the journal, and makes it if there is none and may be none. The error wraps torus.ErrCorrupt if
// what was durable cannot be read.
func openFences(fsys vfs.FS, mayCreate bool) (*fences, map[torus.VolumeID]uint64, error) {
	j := &fences{fs: fsys}
	if err := fsys.Remove(fencesNew); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, err
	}
	f, err := fsys.Open(fencesFile)
	if errors.Is(err, fs.ErrNotExist) {
		if !mayCreate {
			return nil, nil, &torus.Error{Op: "open", Obj: fencesFile, Err: fmt.Errorf("missing, though blocks are stored here: %w", torus.ErrCorrupt),
				Hint: "without it writers that were shut out could write again; bring the file back, or wipe this peer and let the cluster fill it anew"}
		}
		return j, map[torus.VolumeID]uint64{}, j.rewrite(nil)
	}
	if err != nil {
		return nil, nil, err
	}
	size, err := f.Size()
	if err == nil && size > maxFences {
		err = fmt.Errorf("%s of %d bytes: %w", fencesFile, size, torus.ErrCorrupt)
	}
	var b []byte
	if err == nil {
		b = make([]byte, size)
		_, err = f.ReadAt(b, 0)
	}
	var state map[torus.VolumeID]uint64
	var inOrder int
	if err == nil {
		state, inOrder, err = parseFences(b)
	}
	if err != nil {
		err = errors.Join(err, f.Close())
		return nil, nil, &torus.Error{Op: "read", Obj: fencesFile, Err: err,
			Hint: "do not delete it: writers that were shut out could write again; wipe this peer and let the cluster fill it anew"}
	}
	// What was read may be in the page cache and nowhere else, and even look clean there, after a sync that failed. So it is
	// written to a fresh file at each start; that also does away with an unfinished end.
	err = j.rewrite(state)
	if errors.Is(err, vfs.ErrNoSpace) && inOrder >= 0 {
		// Somebody else has filled the file system. The same bytes in the same place do as well, and need no space.
		if err = j.refresh(f, b[:(1+inOrder)*entrySize]); err == nil {
			return j, state, nil
		}
	}
	if err = errors.Join(err, f.Close()); errors.Is(err, vfs.ErrNoSpace) {
		err = &torus.Error{Op: "open", Obj: fencesFile, Err: err,
			Hint: "The file system of the data dir is full, and not with blocks: make some room on it (a few KiB will do), then start the peer again."}
	}
	return j, state, err
}

// refresh makes what was read from f durable where it is, and goes on behind it.
func (j *fences) refresh(f vfs.File, b []byte) error {
	if err := j.fs.Remove(fencesNew); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if _, err := f.WriteAt(b, 0); err != nil {
		return fmt.Errorf("write %s again: %w", fencesFile, err)
	}
	if err := f.Datasync(); err != nil {
		return fmt.Errorf("write %s again: %w", fencesFile, err)
	}
	j.f, j.broken = f, false
	j.entries = uint32(len(b)/entrySize) - 1
	j.synced = j.entries
	return nil
}

// parseFences reads the whole file. Something unfinished at its end, which nobody was promised, is left out.
//
// What a power cut leaves of writes that were not synced may have holes, with whole entries behind them. Each entry says
// how many were durable when it was written: a bad entry that a later one vouches for is not torn but damaged. inOrder is how
// many good entries there are, one behind the other from the first; -1 if there are others behind a hole.
func parseFences(b []byte) (state map[torus.VolumeID]uint64, inOrder int, err error) {
	le := binary.LittleEndian
	if len(b) < entrySize || le.Uint64(b) != fencesMagic || le.Uint32(b[28:]) != record.Checksum(b[:28]) {
		return nil, 0, fmt.Errorf("no header of a fences file: %w", torus.ErrCorrupt)
	}
	if v := le.Uint32(b[8:]); v != fencesVersion {
		return nil, 0, fmt.Errorf("fences file of version %d, not %d: %w", v, fencesVersion, torus.ErrNotSupported)
	}
	vouched := le.Uint32(b[12:]) // so many were durable when the file got its name
	b = b[entrySize:]
	state = map[torus.VolumeID]uint64{}
	bad, entries := -1, 0 // the first bad entry; how many good ones
	for i := 0; len(b) >= entrySize; i++ {
		var p promise
		number, synced, ok := p.decode(b)
		b = b[entrySize:]
		switch {
		case !ok || number != uint32(i):
			if bad < 0 {
				bad = i
			}
		case bad >= 0 && synced > uint32(bad):
			return nil, 0, fmt.Errorf("entry %d: %w, and entry %d shows that it was durable", bad, torus.ErrCorrupt, i)
		default:
			// Behind a hole, too: a promise too many is harmless.
			state[p.volume] = max(state[p.volume], p.epoch)
			entries++
		}
	}
	if bad >= 0 && uint32(bad) < vouched || bad < 0 && uint32(entries) < vouched {
		return nil, 0, fmt.Errorf("%d of the first %d entries can be read: %w", entries, vouched, torus.ErrCorrupt)
	}
	if bad >= 0 && entries > bad {
		return state, -1, nil
	}
	return state, entries, nil
}

// encode writes the entry of that number to b; synced entries were durable before.
func (p promise) encode(b []byte, number, synced uint32) {
	le := binary.LittleEndian
	le.PutUint64(b, uint64(p.volume))
	le.PutUint64(b[8:], p.epoch)
	le.PutUint32(b[16:], number)
	le.PutUint32(b[20:], synced)
	le.PutUint32(b[24:], 0)
	le.PutUint32(b[28:], record.Checksum(b[:28]))
}

func (p *promise) decode(b []byte) (number, synced uint32, ok bool) {
	le := binary.LittleEndian
	p.volume, p.epoch = torus.VolumeID(le.Uint64(b)), le.Uint64(b[8:])
	// The checksum of zeroes is not zero, so that a hole is no entry.
	return le.Uint32(b[16:]), le.Uint32(b[20:]),
		le.Uint32(b[28:]) == record.Checksum(b[:28]) && p.volume <= torus.VolumeMax && le.Uint32(b[24:]) == 0
}

func (j *fences) bloated(live int) bool { return int(j.entries) > 2*live+fencesSlack }

// add makes promises durable; all is what rewrite needs in its stead when that is due.
func (j *fences) add(ps []promise) error {
	b := make([]byte, len(ps)*entrySize)
	for i, p := range ps {
		p.encode(b[i*entrySize:], j.entries+uint32(i), j.synced)
	}
	_, err := j.f.WriteAt(b, int64(j.entries+1)*entrySize)
	if err == nil {
		err = j.f.Datasync()
	}
	if err != nil {
		j.broken = true
		return fmt.Errorf("write %s: %w", fencesFile, err)
	}
	j.entries += uint32(len(ps))
	j.synced = j.entries
	return nil
}

// rewrite replaces the file by one that holds just state, durably.
func (j *fences) rewrite(state map[torus.VolumeID]uint64) error {
	err := j.replace(state)
	if err != nil {
		j.broken = true
		return fmt.Errorf("write %s anew: %w", fencesFile, err)
	}
	j.broken = false
	return nil
}

func (j *fences) replace(state map[torus.VolumeID]uint64) (err error) {
	if err := j.fs.Remove(fencesNew); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := j.fs.Create(fencesNew)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	le := binary.LittleEndian
	b := make([]byte, (1+len(state))*entrySize)
	le.PutUint64(b, fencesMagic)
	le.PutUint32(b[8:], fencesVersion)
	le.PutUint32(b[12:], uint32(len(state)))
	le.PutUint32(b[28:], record.Checksum(b[:28]))
	// All of the file is durable before it gets its name, so each entry vouches for those before it, and the header for all.
	for i, v := range slices.Sorted(maps.Keys(state)) {
		promise{v, state[v]}.encode(b[(1+i)*entrySize:], uint32(i), uint32(i))
	}
	if _, err := f.WriteAt(b, 0); err != nil {
		return err
	}
	if err := f.Datasync(); err != nil {
		return err
	}
	if err := j.fs.Rename(fencesNew, fencesFile); err != nil {
		return err
	}
	if err := j.fs.SyncDir("."); err != nil {
		return err
	}
	if j.f != nil {
		j.f.Close() // the old file has no name any more; nothing in it matters
	}
	j.f, j.entries = f, uint32(len(state))
	j.synced = j.entries
	return nil
}

func (j *fences) close() error {
	if j.f == nil {
		return nil
	}
	return j.f.Close()
}

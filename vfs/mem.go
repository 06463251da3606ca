package vfs

import (
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Mem is a file system in memory that fails as real ones do. It keeps, beside what a reader sees, what is durable
// and everything done since, so that it can be asked what a crash would leave behind:
//
//   - The end of a process (SIGKILL) loses nothing: the page cache survives. See Kill.
//   - A power cut loses what was not synced, in any combination. See CrashClone.
//   - A failed Datasync leaves pages in memory that look clean and are not on the medium (Errors makes that happen).
//
// Contents are sparse: zeroes that were never anything else take no memory. Everything it does follows from the seed
// and from the order of the calls.
type Mem struct {
	mu         sync.Mutex
	rand       *rand.Rand
	seen       map[string]*memNode // the tree, as a reader sees it
	durable    map[string]*memNode // the tree, as it is on the medium
	pending    []dirOp             // what differs, in order
	locks      map[string]uint64   // name → number of the lock
	lockSeq    uint64
	life       uint64 // counts Kill; files of an earlier life are closed
	boot       uint64
	used       int64
	capacity   int64
	coldReads  float64
	slowSyncs  float64
	byteTears  bool
	slowSyncIs time.Duration
}

// memNode is a file or a directory. What `durable` holds is never changed in place: pages are shared between images
// (and between clones) and copied before they are written.
type memNode struct {
	dir     bool
	seen    image
	durable image
	pending []fileOp // since the last Datasync, in order
	links   int      // names and open files
	failed  uint64   // counts Datasyncs that failed; each open file reports each once
}

type image struct {
	size  int64
	pages map[int64]*page // by number; a missing one is zero
}

const (
	memPageSize = 4096
	sectorSize  = 512
)

type page [memPageSize]byte

var zeroPage page

// fileOp is an unsynced change: a write of data (nil: n zeroes) at off, or a new size.
type fileOp struct {
	resize bool
	off, n int64 // resize: the size is n
	data   []byte
}

// dirOp is an unsynced change of a directory: name now is node (nil: nothing), and, for a rename, was ceases to be.
type dirOp struct {
	name, was string
	node      *memNode
}

// DefaultMemCapacity is the size of a Mem in bytes unless SetCapacity says otherwise.
const DefaultMemCapacity = 1 << 40

// NewMem returns an empty file system.
func NewMem(seed uint64) *Mem {
	root := &memNode{dir: true, links: 1}
	return &Mem{
		rand:       rand.New(rand.NewPCG(seed, 0x76667300)),
		seen:       map[string]*memNode{".": root},
		durable:    map[string]*memNode{".": root},
		locks:      map[string]uint64{},
		capacity:   DefaultMemCapacity,
		coldReads:  0.1,
		slowSyncs:  0.3,
		slowSyncIs: 3 * time.Millisecond,
	}
}

// SetCapacity limits the sum of the sizes of all files, in bytes.
func (m *Mem) SetCapacity(bytes uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.capacity = int64(bytes)
}

// SetColdReads sets which share of calls of ReadAtCached, drawn at random, find nothing in memory; 0.1 by default.
func (m *Mem) SetColdReads(share float64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.coldReads = share
}

// SetSlowSyncs sets which share of Datasyncs claim, by SyncTime, to have taken d; the others claim 50 µs. By default 0.3
// of them, 3 ms. None really takes any time.
func (m *Mem) SetSlowSyncs(share float64, d time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.slowSyncs, m.slowSyncIs = share, d
}

// SetByteTears chooses the harsher medium: a write may be torn at any byte rather than between sectors of 512 bytes.
func (m *Mem) SetByteTears(on bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.byteTears = on
}

// Kill is what the end of the process does: all files are closed, all locks dropped, and everything written stays.
func (m *Mem) Kill() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.life++
	clear(m.locks)
}

// Rot damages stored bytes, as a medium does: of each page of a file for which pick returns true one sector of 512 bytes, drawn from rng, is
// garbage afterwards, in memory too where that holds what the medium does. Pages with unsynced changes, and those that were never written, are passed over.
// pick must keep neither page nor change it. It returns how many pages were damaged.
func (m *Mem) Rot(rng *rand.Rand, pick func(name string, off int64, page []byte) bool) (n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(m.seen)) {
		x := m.seen[name]
		for _, no := range slices.Sorted(maps.Keys(x.durable.pages)) {
			p := x.durable.pages[no]
			if x.seen.pages[no] != p || !pick(name, no*memPageSize, p[:]) {
				continue
			}
			q := *p // a clone may share it
			at := rng.IntN(memPageSize/sectorSize) * sectorSize
			for i := range sectorSize {
				q[at+i] ^= byte(1 + rng.IntN(255))
			}
			x.durable.pages[no], x.seen.pages[no] = &q, &q
			n++
		}
	}
	return n
}

// CrashClone returns what could be found after a power cut at this moment, each possibility drawn from rng; the
// original goes on unharmed. Of each file: what was synced is there. Each later write is kept, dropped, or torn, whatever
// became of the others, so that a later one may survive an earlier one; where two overlap, the older never covers
// the newer. Each later change of size is kept or not. Of each directory: each creation, renaming and removal since its
// last SyncDir has happened or not (and a rename either wholly or not at all).
func (m *Mem) CrashClone(rng *rand.Rand) *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.crashClone(&drawn{rng: rng})
}

// CrashEach calls fn with what could be found after a power cut at this moment, for every combination of fates: each creation, renaming and
// removal, and each change of size, happened or not, and each write was kept, dropped, or torn in the middle, its first or its
// last part kept. If there are more than most combinations it is most of them, drawn from rng. It ends early if fn returns false, and returns how
// many there were.
func (m *Mem) CrashEach(most int, rng *rand.Rand, fn func(*Mem) bool) (n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	fates := &listed{rng: rng}
	m.crashClone(fates) // counts them
	all := 1
	for _, k := range fates.of {
		if all *= k; all > most {
			break
		}
	}
	for more := true; more && n < most; {
		if all > most {
			for i, k := range fates.of {
				fates.is[i] = rng.IntN(k)
			}
		}
		fates.next = 0
		c := m.crashClone(fates)
		n++
		m.mu.Unlock() // fn may do as it likes
		more = fn(c)
		m.mu.Lock()
		more = more && fates.advance()
	}
	return n
}

// fates decides what becomes of unsynced changes.
type fates interface {
	file()               // the next ones are of another file
	happened() bool      // a change of a name or a size
	write(op fileOp) int // 0: dropped, 1: kept, 2: torn; 3 and 4: the first, the last part is kept
	rand() *rand.Rand
}

// drawn are fates drawn at random.
type drawn struct {
	rng  *rand.Rand
	keep float64
}

// A mood for the file as a whole makes "all of it", "nothing of it" and "all but one" likely.
func (d *drawn) file()            { d.keep = [...]float64{0, 0.1, 0.5, 0.9, 1}[d.rng.IntN(5)] }
func (d *drawn) happened() bool   { return d.rng.Float64() < d.keep }
func (d *drawn) rand() *rand.Rand { return d.rng }
func (d *drawn) write(fileOp) int {
	switch {
	case d.rng.Float64() < d.keep:
		return 1
	case d.rng.Float64() < d.keep:
		return 2
	}
	return 0
}

// listed are fates one after another as they are given; asked for more, it makes room.
type listed struct {
	rng  *rand.Rand
	is   []int
	of   []int // how many possibilities each has
	next int
}

func (l *listed) choose(k int) int {
	if l.next == len(l.is) {
		l.is, l.of = append(l.is, 0), append(l.of, k)
	}
	l.next++
	return l.is[l.next-1] % k // which file is asked about may follow from what was decided before
}

// advance goes on to the next combination; false if that was the last.
func (l *listed) advance() bool {
	for i := range l.is {
		if l.is[i]++; l.is[i] < l.of[i] {
			return true
		}
		l.is[i] = 0
	}
	return false
}

func (l *listed) file()            {}
func (l *listed) happened() bool   { return l.choose(2) == 1 }
func (l *listed) rand() *rand.Rand { return l.rng }
func (l *listed) write(op fileOp) int {
	if op.n <= sectorSize {
		return l.choose(2) // a sector is not torn
	}
	return [...]int{0, 1, 3, 4}[l.choose(4)]
}

func (m *Mem) crashClone(d fates) *Mem {
	rng := d.rand()
	c := NewMem(rng.Uint64())
	c.boot = m.boot + 1
	c.capacity, c.coldReads, c.slowSyncs, c.slowSyncIs, c.byteTears = m.capacity, m.coldReads, m.slowSyncs, m.slowSyncIs, m.byteTears

	tree := maps.Clone(m.durable)
	if x, ok := d.(*drawn); ok {
		x.keep = 0.5
	}
	for _, op := range m.pending {
		if d.happened() {
			applyDirOp(tree, op)
		}
	}
	clones := map[*memNode]*memNode{}
	for _, name := range slices.Sorted(maps.Keys(tree)) { // parents sort before what is in them
		if d := c.seen[path.Dir(name)]; name == "." || d == nil || !d.dir {
			continue // the root is there; or its directory was not kept
		}
		n := clones[tree[name]]
		if n == nil {
			n = tree[name].crash(d, m.byteTears)
			clones[tree[name]] = n
			c.used += n.seen.size
		}
		n.links++
		c.seen[name] = n
	}
	c.durable = maps.Clone(c.seen)
	return c
}

// crash decides what is left of a node.
func (n *memNode) crash(d fates, byteTears bool) *memNode {
	img := image{n.durable.size, maps.Clone(n.durable.pages)}
	d.file()
	for _, op := range n.pending {
		if op.resize {
			if d.happened() {
				img.resize(op.n, n.durable.pages)
			}
			continue
		}
		half := op.n / 2 / sectorSize * sectorSize
		if half == 0 {
			half = op.n / 2
		}
		switch d.write(op) {
		case 1:
			img.write(op.off, op.n, op.data, n.durable.pages)
		case 2:
			img.writeTorn(op, n.durable.pages, d.rand(), byteTears)
		case 3:
			img.writePart(op, op.off, op.off+half, n.durable.pages)
		case 4:
			img.writePart(op, op.off+half, op.off+op.n, n.durable.pages)
		}
	}
	return &memNode{dir: n.dir, seen: image{img.size, maps.Clone(img.pages)}, durable: img}
}

// writePart applies what a write does between two places.
func (i *image) writePart(op fileOp, from, to int64, shared map[int64]*page) {
	from, to = max(from, op.off), min(to, op.off+op.n)
	if from >= to {
		return
	}
	var b []byte
	if op.data != nil {
		b = op.data[from-op.off : to-op.off]
	}
	i.write(from, to-from, b, shared)
}

// writeTorn applies a part of a write: a prefix, a suffix, or any selection of sectors.
func (i *image) writeTorn(op fileOp, shared map[int64]*page, rng *rand.Rand, byteTears bool) {
	part := func(from, to int64) { i.writePart(op, from, to, shared) }
	end := op.off + op.n
	cut := op.off + rng.Int64N(op.n+1)
	if !byteTears {
		cut = cut / sectorSize * sectorSize
	}
	switch rng.IntN(3) {
	case 0:
		part(op.off, cut)
	case 1:
		part(cut, end)
	case 2:
		for s := op.off / sectorSize * sectorSize; s < end; s += sectorSize {
			if rng.IntN(2) == 0 {
				part(s, s+sectorSize)
			}
		}
	}
}

// write puts n bytes at off, data or, if that is nil, zeroes. Pages that are also in `shared` are copied first.
func (i *image) write(off, n int64, data []byte, shared map[int64]*page) {
	for n > 0 {
		no, at := off/memPageSize, off%memPageSize
		part := min(n, memPageSize-at)
		p := i.pages[no]
		switch {
		case p == nil && data == nil:
			// zero already
		case data == nil && part == memPageSize:
			delete(i.pages, no)
		default:
			p = i.own(no, shared)
			if data == nil {
				clear(p[at : at+part])
			} else {
				copy(p[at:], data[:part])
			}
		}
		if data != nil {
			data = data[part:]
		}
		off, n = off+part, n-part
		i.size = max(i.size, off)
	}
}

// own returns page no, to be changed in place.
func (i *image) own(no int64, shared map[int64]*page) *page {
	p := i.pages[no]
	if p == nil || p == shared[no] {
		q := new(page)
		if p != nil {
			*q = *p
		}
		p = q
		if i.pages == nil {
			i.pages = map[int64]*page{}
		}
		i.pages[no] = p
	}
	return p
}

func (i *image) resize(size int64, shared map[int64]*page) {
	if size < i.size {
		first := (size + memPageSize - 1) / memPageSize
		for no := range i.pages {
			if no >= first {
				delete(i.pages, no)
			}
		}
		if at := size % memPageSize; at != 0 && i.pages[size/memPageSize] != nil {
			clear(i.own(size/memPageSize, shared)[at:])
		}
	}
	i.size = size
}

func (i *image) read(b []byte, off int64) {
	for len(b) > 0 {
		p := i.pages[off/memPageSize]
		if p == nil {
			p = &zeroPage
		}
		n := copy(b, p[off%memPageSize:])
		b, off = b[n:], off+int64(n)
	}
}

// sync makes durable what is pending. Whole pages are written, as by a kernel: a page that was lost by a failed
// Datasync becomes durable again when it is written to once more.
func (n *memNode) sync() {
	for _, op := range n.pending {
		if op.resize {
			for no := range n.durable.pages {
				if no > op.n/memPageSize {
					delete(n.durable.pages, no)
				}
			}
			n.syncPages(op.n, op.n) // the page at the cut is replaced, not changed: a clone may share it
			continue
		}
		n.syncPages(op.off, op.off+op.n-1)
	}
	n.durable.size = n.seen.size
	n.pending = nil
}

// syncPages puts the pages of the bytes from first to last on the medium.
func (n *memNode) syncPages(first, last int64) {
	if n.durable.pages == nil {
		n.durable.pages = map[int64]*page{}
	}
	for no := first / memPageSize; no <= last/memPageSize; no++ {
		if p := n.seen.pages[no]; p != nil {
			n.durable.pages[no] = p
		} else {
			delete(n.durable.pages, no)
		}
	}
}

// syncRange is sync for the pages of [off, end). What else is pending stays so, unless the size of the file is.
func (n *memNode) syncRange(off, end int64) {
	if slices.ContainsFunc(n.pending, func(op fileOp) bool { return op.resize }) {
		n.sync()
		return
	}
	n.syncPages(off, end-1)
	n.durable.size = max(n.durable.size, end)
	off -= off % memPageSize
	end += -end & (memPageSize - 1)
	var left []fileOp
	for _, op := range n.pending {
		if op.off < off {
			left = append(left, op.part(op.off, min(op.off+op.n, off)))
		}
		if op.off+op.n > end {
			left = append(left, op.part(max(op.off, end), op.off+op.n))
		}
	}
	n.pending = left
}

// part is what a write writes to [off, end), which it covers.
func (op fileOp) part(off, end int64) fileOp {
	p := fileOp{off: off, n: end - off}
	if op.data != nil {
		p.data = op.data[off-op.off : end-op.off]
	}
	return p
}

func applyDirOp(tree map[string]*memNode, op dirOp) {
	if op.was != "" { // whatever its name was: an earlier rename may not have been kept
		maps.DeleteFunc(tree, func(_ string, n *memNode) bool { return n == op.node })
	}
	if op.node == nil {
		delete(tree, op.name)
	} else {
		tree[op.name] = op.node
	}
}

func pathError(op, name string, err error) error { return &fs.PathError{Op: op, Path: name, Err: err} }

// find returns the file or directory of that name.
func (m *Mem) find(op, name string) (*memNode, error) {
	if !fs.ValidPath(name) {
		return nil, pathError(op, name, fs.ErrInvalid)
	}
	n := m.seen[name]
	if n == nil {
		return nil, pathError(op, name, fs.ErrNotExist)
	}
	return n, nil
}

// change checks that the directory of name exists, and records and makes a change of it.
func (m *Mem) change(op string, c dirOp) error {
	d, err := m.find(op, path.Dir(c.name))
	if err != nil {
		return err
	}
	if !d.dir {
		return pathError(op, c.name, syscall.ENOTDIR)
	}
	if old := m.seen[c.name]; old != nil {
		m.unlink(old)
	}
	if c.node != nil && c.was == "" {
		c.node.links++
	}
	applyDirOp(m.seen, c)
	m.pending = append(m.pending, c)
	return nil
}

// unlink drops a name or an open file of n; with the last, its space is free.
func (m *Mem) unlink(n *memNode) {
	if n.links--; n.links == 0 {
		m.used -= n.seen.size
	}
}

func (m *Mem) Create(name string) (File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !fs.ValidPath(name) || name == "." {
		return nil, pathError("create", name, fs.ErrInvalid)
	}
	if m.seen[name] != nil {
		return nil, pathError("create", name, fs.ErrExist)
	}
	n := &memNode{}
	if err := m.change("create", dirOp{name: name, node: n}); err != nil {
		return nil, err
	}
	return m.open(name, n), nil
}

func (m *Mem) Open(name string) (File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.find("open", name)
	if err != nil {
		return nil, err
	}
	if n.dir {
		return nil, pathError("open", name, syscall.EISDIR)
	}
	return m.open(name, n), nil
}

func (m *Mem) open(name string, n *memNode) *memFile {
	n.links++
	return &memFile{m: m, n: n, name: name, life: m.life, failed: n.failed}
}

func (m *Mem) Remove(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.find("remove", name)
	if err != nil {
		return err
	}
	if name == "." || n.dir && len(m.list(name)) > 0 {
		return pathError("remove", name, syscall.ENOTEMPTY)
	}
	return m.change("remove", dirOp{name: name})
}

// Rename works within a directory only.
func (m *Mem) Rename(oldname, newname string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.find("rename", oldname)
	if err != nil {
		return err
	}
	if !fs.ValidPath(newname) || n.dir || path.Dir(oldname) != path.Dir(newname) {
		return pathError("rename", newname, fs.ErrInvalid)
	}
	if oldname == newname {
		return nil
	}
	if to := m.seen[newname]; to != nil && to.dir {
		return pathError("rename", newname, syscall.EISDIR)
	}
	return m.change("rename", dirOp{name: newname, was: oldname, node: n})
}

func (m *Mem) MkdirAll(dir string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !fs.ValidPath(dir) {
		return pathError("mkdir", dir, fs.ErrInvalid)
	}
	for i := range len(dir) + 1 {
		if i < len(dir) && dir[i] != '/' {
			continue
		}
		switch n := m.seen[dir[:i]]; {
		case n == nil:
			if err := m.change("mkdir", dirOp{name: dir[:i], node: &memNode{dir: true}}); err != nil {
				return err
			}
		case !n.dir:
			return pathError("mkdir", dir[:i], syscall.ENOTDIR)
		}
	}
	return nil
}

func (m *Mem) List(dir string) ([]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.find("list", dir)
	if err != nil {
		return nil, err
	}
	if !n.dir {
		return nil, pathError("list", dir, syscall.ENOTDIR)
	}
	return m.list(dir), nil
}

func (m *Mem) list(dir string) []string {
	var names []string
	for name := range m.seen {
		if name != "." && path.Dir(name) == dir {
			names = append(names, path.Base(name))
		}
	}
	slices.Sort(names)
	return names
}

func (m *Mem) SyncDir(dir string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.find("syncdir", dir)
	if err != nil {
		return err
	}
	if !n.dir {
		return pathError("syncdir", dir, syscall.ENOTDIR)
	}
	kept := m.pending[:0]
	for _, op := range m.pending {
		if path.Dir(op.name) == dir {
			applyDirOp(m.durable, op)
		} else {
			kept = append(kept, op)
		}
	}
	clear(m.pending[len(kept):])
	m.pending = kept
	return nil
}

func (m *Mem) Lock(name string) (func() error, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !fs.ValidPath(name) {
		return nil, pathError("lock", name, fs.ErrInvalid)
	}
	if m.locks[name] != 0 {
		return nil, pathError("lock", name, ErrLocked)
	}
	if m.seen[name] == nil {
		if err := m.change("lock", dirOp{name: name, node: &memNode{}}); err != nil {
			return nil, err
		}
	}
	m.lockSeq++
	mine := m.lockSeq
	m.locks[name] = mine
	return func() error {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.locks[name] == mine { // not one taken after a Kill
			delete(m.locks, name)
		}
		return nil
	}, nil
}

func (m *Mem) Free() (free, size uint64, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return uint64(max(m.capacity-m.used, 0)), uint64(m.capacity), nil
}

// Boot implements FS. Every clone has been booted anew.
func (m *Mem) Boot() (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return strconv.FormatUint(m.boot, 16), nil
}

// String draws the tree with the sizes of the files, for failed tests.
func (m *Mem) String() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(m.seen)) {
		n := m.seen[name]
		fmt.Fprintf(&b, "%s %d (durable %d, %d changes pending)\n", name, n.seen.size, n.durable.size, len(n.pending))
	}
	return b.String()
}

type memFile struct {
	m        *Mem
	n        *memNode
	name     string
	life     uint64
	failed   uint64 // of n.failed, those reported here
	closed   bool
	syncTime time.Duration
}

// enter takes the lock, for as long as the file is usable.
func (f *memFile) enter(op string) error {
	f.m.mu.Lock()
	if f.closed || f.life != f.m.life {
		f.m.mu.Unlock()
		return pathError(op, f.name, fs.ErrClosed)
	}
	return nil
}

func (f *memFile) ReadAt(b []byte, off int64) (int, error) {
	if err := f.enter("read"); err != nil {
		return 0, err
	}
	defer f.m.mu.Unlock()
	return f.read(b, off)
}

func (f *memFile) read(b []byte, off int64) (int, error) {
	if off < 0 {
		return 0, pathError("read", f.name, fs.ErrInvalid)
	}
	n := int(min(int64(len(b)), max(f.n.seen.size-off, 0)))
	f.n.seen.read(b[:n], off)
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

func (f *memFile) ReadAtCached(b []byte, off int64) (int, error) {
	if err := f.enter("read"); err != nil {
		return 0, err
	}
	defer f.m.mu.Unlock()
	if f.m.rand.Float64() < f.m.coldReads {
		return 0, ErrWouldBlock
	}
	return f.read(b, off)
}

// Reader implements File.
func (f *memFile) Reader() (Reader, error) {
	if err := f.enter("open"); err != nil {
		return nil, err
	}
	defer f.m.mu.Unlock()
	f.n.links++
	return &memReader{memFile{m: f.m, n: f.n, name: f.name}}, nil
}

// memReader is a file that outlives Kill.
type memReader struct{ f memFile }

// file returns the file as one of the present life.
func (r *memReader) file() *memFile {
	r.f.m.mu.Lock()
	defer r.f.m.mu.Unlock()
	f := r.f
	f.life = f.m.life
	return &f
}

func (r *memReader) ReadAt(b []byte, off int64) (int, error) { return r.file().ReadAt(b, off) }
func (r *memReader) ReadAtCached(b []byte, off int64) (int, error) {
	return r.file().ReadAtCached(b, off)
}
func (r *memReader) Descriptor(int64, int) int { return -1 }
func (r *memReader) Close() error              { return r.f.Close() }

// grow makes room for the file to reach size.
func (f *memFile) grow(size int64) error {
	more := size - f.n.seen.size
	if more <= 0 {
		return nil
	}
	if f.m.used+more > f.m.capacity {
		return pathError("write", f.name, ErrNoSpace)
	}
	f.m.used += more
	return nil
}

func (f *memFile) WriteAt(b []byte, off int64) (int, error) {
	if err := f.enter("write"); err != nil {
		return 0, err
	}
	defer f.m.mu.Unlock()
	if off < 0 {
		return 0, pathError("write", f.name, fs.ErrInvalid)
	}
	if len(b) == 0 {
		return 0, nil
	}
	if err := f.grow(off + int64(len(b))); err != nil {
		return 0, err
	}
	op := fileOp{off: off, n: int64(len(b))}
	if !allZero(b) {
		op.data = slices.Clone(b)
	}
	f.n.seen.write(off, op.n, op.data, f.n.durable.pages)
	f.n.pending = append(f.n.pending, op)
	return len(b), nil
}

func allZero(b []byte) bool {
	for len(b) >= memPageSize {
		if page(b[:memPageSize]) != zeroPage {
			return false
		}
		b = b[memPageSize:]
	}
	for _, x := range b {
		if x != 0 {
			return false
		}
	}
	return true
}

// Map implements File.
func (f *memFile) Map(n int) (Mapping, error) {
	if err := f.enter("mmap"); err != nil {
		return nil, err
	}
	defer f.m.mu.Unlock()
	if f.n.seen.size < int64(n) {
		return nil, pathError("mmap", f.name, fs.ErrInvalid)
	}
	m := &memMapping{f, make([]byte, n)}
	for no, p := range f.n.seen.pages {
		if at := no * memPageSize; at < int64(n) {
			copy(m.b[at:], p[:])
		}
	}
	return m, nil
}

type memMapping struct {
	f *memFile
	b []byte
}

func (m *memMapping) Bytes() []byte          { return m.b }
func (m *memMapping) Prepare(_, _ int) error { return nil }
func (m *memMapping) Close() error           { return nil }

// Write implements Mapping.
func (m *memMapping) Write(b []byte, off int) error {
	copy(m.b[off:off+len(b)], b)
	if _, err := m.f.WriteAt(b, int64(off)); err != nil {
		return err
	}
	m.f.m.mu.Lock()
	defer m.f.m.mu.Unlock()
	if len(m.f.n.pending) >= maxMapped {
		m.f.n.sync()
	}
	return nil
}

// maxMapped is after how many writes the kernel writes a file that is mapped out, though nobody asked for it.
const maxMapped = 64

// WriteThrough implements File.
func (f *memFile) WriteThrough(b []byte, off int64) (took time.Duration, err error) {
	_, err = f.WriteAt(b, off)
	return 20 * time.Microsecond, err
}

// WriteDurable implements File.
func (f *memFile) WriteDurable(b []byte, off int64) (took time.Duration, err error) {
	if _, err := f.WriteAt(b, off); err != nil || len(b) == 0 {
		return 0, err
	}
	return f.sync("write", func() { f.n.syncRange(off, off+int64(len(b))) })
}

func (f *memFile) Datasync() error {
	took, err := f.sync("fdatasync", f.n.sync)
	if took > 0 {
		f.m.mu.Lock()
		f.syncTime = took
		f.m.mu.Unlock()
	}
	return err
}

func (f *memFile) sync(op string, sync func()) (took time.Duration, err error) {
	if err := f.enter(op); err != nil {
		return 0, err
	}
	defer f.m.mu.Unlock()
	took = 50 * time.Microsecond
	if f.m.rand.Float64() < f.m.slowSyncs {
		took = f.m.slowSyncIs
	}
	if f.failed != f.n.failed { // writing back failed under another open file: told once here, too
		f.failed = f.n.failed
		return took, pathError(op, f.name, syscall.EIO)
	}
	sync()
	return took, nil
}

// failSync is what a failed fdatasync(2) does: what was unsynced stays readable, counts as clean, and never reaches the
// medium; every other open file of the node will be told once. The caller reports the error for this one.
func (f *memFile) failSync() {
	if f.enter("fdatasync") != nil {
		return
	}
	defer f.m.mu.Unlock()
	f.n.failed++
	f.failed = f.n.failed
	f.n.pending = nil
}

func (f *memFile) SyncTime() time.Duration {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	return f.syncTime
}

func (f *memFile) DropCache(off, n int64) error {
	if err := f.enter("fadvise"); err != nil {
		return err
	}
	defer f.m.mu.Unlock()
	first, end := (off+memPageSize-1)/memPageSize, (off+n)/memPageSize // whole pages only
	dirty := map[int64]bool{}
	for _, op := range f.n.pending {
		if op.resize { // what lies behind a cut is known to be gone
			end = min(end, op.n/memPageSize)
			continue
		}
		for no := op.off / memPageSize; no <= (op.off+op.n-1)/memPageSize; no++ {
			dirty[no] = true
		}
	}
	for no := range f.n.seen.pages {
		if no < first || no >= end || dirty[no] {
			continue
		}
		if p := f.n.durable.pages[no]; p == nil {
			delete(f.n.seen.pages, no)
		} else {
			f.n.seen.pages[no] = p
		}
	}
	for no, p := range f.n.durable.pages {
		if no >= first && no < end && !dirty[no] && no*memPageSize < f.n.seen.size {
			f.n.seen.pages[no] = p
		}
	}
	return nil
}

func (f *memFile) Allocate(off, n int64) error {
	if err := f.enter("fallocate"); err != nil {
		return err
	}
	defer f.m.mu.Unlock()
	if off < 0 || n <= 0 {
		return pathError("fallocate", f.name, fs.ErrInvalid)
	}
	if off+n <= f.n.seen.size {
		return nil
	}
	if err := f.grow(off + n); err != nil {
		return err
	}
	f.n.seen.size = off + n
	f.n.pending = append(f.n.pending, fileOp{resize: true, n: off + n})
	return nil
}

func (f *memFile) Truncate(size int64) error {
	if err := f.enter("truncate"); err != nil {
		return err
	}
	defer f.m.mu.Unlock()
	if size < 0 {
		return pathError("truncate", f.name, fs.ErrInvalid)
	}
	if err := f.grow(size); err != nil {
		return err
	}
	f.m.used -= max(f.n.seen.size-size, 0)
	f.n.seen.resize(size, f.n.durable.pages)
	f.n.pending = append(f.n.pending, fileOp{resize: true, n: size})
	return nil
}

func (f *memFile) Descriptor(int64, int) int { return -1 }

// WriteDescriptor implements File.
func (f *memFile) WriteDescriptor() int { return -1 }

func (f *memFile) Size() (int64, error) {
	if err := f.enter("stat"); err != nil {
		return 0, err
	}
	defer f.m.mu.Unlock()
	return f.n.seen.size, nil
}

func (f *memFile) Close() error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if f.closed {
		return pathError("close", f.name, fs.ErrClosed)
	}
	f.closed = true
	f.m.unlink(f.n)
	return nil
}

// Package vfstest is what every vfs.FS must do, as tests.
package vfstest

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/coreos/torus/buf"
	"github.com/coreos/torus/vfs"
)

// Run runs the suite. make returns an empty file system.
func Run(t *testing.T, make func(t *testing.T) vfs.FS) {
	for _, c := range []struct {
		name string
		test func(*testing.T, vfs.FS)
	}{
		{"Names", names},
		{"InvalidNames", invalidNames},
		{"Directories", directories},
		{"Rename", rename},
		{"ReadWrite", readWrite},
		{"Sizes", sizes},
		{"RandomWrites", randomWrites},
		{"Map", mapped},
		{"OpenAfterRemove", openAfterRemove},
		{"Lock", lock},
		{"Free", free},
		{"Concurrent", concurrent},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, make(t)) })
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantErr(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error %v, want %v", err, want)
	}
}

func create(t *testing.T, f vfs.FS, name string) vfs.File {
	t.Helper()
	file, err := f.Create(name)
	must(t, err)
	t.Cleanup(func() { file.Close() })
	return file
}

func wantNames(t *testing.T, f vfs.FS, dir string, want ...string) {
	t.Helper()
	got, err := f.List(dir)
	must(t, err)
	if !slices.Equal(got, want) {
		t.Fatalf("names in %q: %q, want %q", dir, got, want)
	}
}

func names(t *testing.T, f vfs.FS) {
	wantNames(t, f, ".")
	create(t, f, "b")
	create(t, f, "a")
	wantNames(t, f, ".", "a", "b")
	_, err := f.Create("a")
	wantErr(t, err, fs.ErrExist)
	_, err = f.Open("c")
	wantErr(t, err, fs.ErrNotExist)
	wantErr(t, f.Remove("c"), fs.ErrNotExist)
	must(t, f.Remove("a"))
	wantNames(t, f, ".", "b")
	must(t, f.SyncDir("."))
	create(t, f, "a")
	wantNames(t, f, ".", "a", "b")
}

func invalidNames(t *testing.T, f vfs.FS) {
	for _, name := range []string{"../x", "/x", "a/../b", "", "a//b"} {
		_, err := f.Create(name)
		wantErr(t, err, fs.ErrInvalid)
		_, err = f.Open(name)
		wantErr(t, err, fs.ErrInvalid)
		wantErr(t, f.Remove(name), fs.ErrInvalid)
		wantErr(t, f.MkdirAll(name), fs.ErrInvalid)
		_, err = f.Lock(name)
		wantErr(t, err, fs.ErrInvalid)
	}
}

func directories(t *testing.T, f vfs.FS) {
	_, err := f.Create("d/x")
	wantErr(t, err, fs.ErrNotExist)
	_, err = f.List("d")
	wantErr(t, err, fs.ErrNotExist)
	must(t, f.MkdirAll("d/e"))
	must(t, f.MkdirAll("d/e"))
	must(t, f.MkdirAll("."))
	create(t, f, "d/x")
	create(t, f, "d/e/y")
	wantNames(t, f, ".", "d")
	wantNames(t, f, "d", "e", "x")
	wantNames(t, f, "d/e", "y")
	must(t, f.SyncDir("d"))
	if err := f.MkdirAll("d/x/z"); err == nil {
		t.Fatal("a directory below a file was made")
	}
	if err := f.Remove("d"); err == nil {
		t.Fatal("a directory with something in it was removed")
	}
}

func rename(t *testing.T, f vfs.FS) {
	a, b := create(t, f, "a"), create(t, f, "b")
	_, err := a.WriteAt([]byte("aa"), 0)
	must(t, err)
	_, err = b.WriteAt([]byte("bbb"), 0)
	must(t, err)
	wantErr(t, f.Rename("c", "d"), fs.ErrNotExist)
	must(t, f.Rename("a", "b"))
	wantNames(t, f, ".", "b")
	n, err := f.Open("b")
	must(t, err)
	defer n.Close()
	wantBytes(t, n, 0, "aa")
	wantBytes(t, b, 0, "bbb") // what is open stays what it was
}

func wantBytes(t *testing.T, f vfs.File, off int64, want string) {
	t.Helper()
	b := make([]byte, len(want))
	if _, err := f.ReadAt(b, off); err != nil {
		t.Fatal(err)
	}
	if string(b) != want {
		t.Fatalf("read %q, want %q", b, want)
	}
}

func wantSize(t *testing.T, f vfs.File, want int64) {
	t.Helper()
	if n, err := f.Size(); err != nil || n != want {
		t.Fatalf("size %d, %v, want %d", n, err, want)
	}
}

func readWrite(t *testing.T, f vfs.FS) {
	file := create(t, f, "x")
	b := make([]byte, 10)
	n, err := file.ReadAt(b, 0)
	if n != 0 || err != io.EOF {
		t.Fatalf("read of an empty file: %d, %v", n, err)
	}
	if n, err := file.WriteAt([]byte("hello"), 4094); n != 5 || err != nil {
		t.Fatalf("write: %d, %v", n, err)
	}
	wantSize(t, file, 4099)
	wantBytes(t, file, 4092, "\x00\x00hello")
	n, err = file.ReadAt(b, 4094)
	if n != 5 || err != io.EOF || string(b[:n]) != "hello" {
		t.Fatalf("read over the end: %d, %v, %q", n, err, b)
	}
	// A second file of the same name sees the same bytes.
	other, err := f.Open("x")
	must(t, err)
	defer other.Close()
	wantBytes(t, other, 4094, "hello")
	must(t, file.Datasync())
	must(t, file.DropCache(0, 8192))
	wantBytes(t, file, 4094, "hello")
	// Cached reads give the same or nothing, and in the end something.
	for i := range 10_000 {
		n, err := file.ReadAtCached(b[:5], 4094)
		if err == nil {
			if n != 5 || string(b[:5]) != "hello" {
				t.Fatalf("cached read: %d, %q", n, b)
			}
			break
		}
		wantErr(t, err, vfs.ErrWouldBlock)
		if i > 100 {
			wantBytes(t, file, 4094, "hello")
		}
	}
}

func sizes(t *testing.T, f vfs.FS) {
	file := create(t, f, "x")
	must(t, file.Allocate(0, 10_000))
	wantSize(t, file, 10_000)
	wantBytes(t, file, 9_990, string(make([]byte, 10)))
	_, err := file.WriteAt([]byte("0123456789"), 4990)
	must(t, err)
	must(t, file.Allocate(0, 10_000)) // again: nothing is lost
	wantBytes(t, file, 4990, "0123456789")
	must(t, file.Truncate(4995))
	wantSize(t, file, 4995)
	must(t, file.Truncate(6000))
	wantBytes(t, file, 4990, "01234\x00\x00\x00\x00\x00")
	must(t, file.Datasync())
	must(t, file.Truncate(0))
	must(t, file.Datasync())
	wantSize(t, file, 0)
}

// randomWrites compares with a plain slice.
func randomWrites(t *testing.T, f vfs.FS) {
	rng := rand.New(rand.NewPCG(1, 2))
	file := create(t, f, "x")
	var want []byte
	for range 2000 {
		switch rng.IntN(12) {
		case 0:
			must(t, file.Datasync())
		case 1:
			n := rng.IntN(20_000)
			must(t, file.Truncate(int64(n)))
			if n <= len(want) {
				want = want[:n]
			} else {
				want = append(want, make([]byte, n-len(want))...)
			}
		case 2:
			must(t, file.DropCache(0, 20_000))
		case 3: // whole pages
			b := buf.Get(3 * 4096).Bytes()[:4096*(1+rng.IntN(3))]
			for i := range b {
				b[i] = byte(rng.Uint32())
			}
			off := 4096 * rng.IntN(4)
			_, err := file.WriteDurable(b, int64(off))
			must(t, err)
			if more := off + len(b) - len(want); more > 0 {
				want = append(want, make([]byte, more)...)
			}
			copy(want[off:], b)
		default:
			b := make([]byte, rng.IntN(9000)+1)
			if rng.IntN(4) > 0 {
				for i := range b {
					b[i] = byte(rng.Uint32())
				}
			}
			off := rng.IntN(15_000)
			_, err := file.WriteAt(b, int64(off))
			must(t, err)
			if more := off + len(b) - len(want); more > 0 {
				want = append(want, make([]byte, more)...)
			}
			copy(want[off:], b)
		}
		got := make([]byte, len(want))
		if len(got) > 0 {
			_, err := file.ReadAt(got, 0)
			must(t, err)
		}
		if !bytes.Equal(got, want) {
			t.Fatal("contents differ")
		}
		wantSize(t, file, int64(len(want)))
	}
}

// mapped: what is written to the memory is in the file, and stays.
func mapped(t *testing.T, f vfs.FS) {
	file := create(t, f, "x")
	if _, err := file.Map(8192); err == nil {
		t.Fatal("mapped more than there is")
	}
	_, err := file.WriteAt(bytes.Repeat([]byte("a"), 3*4096), 0)
	must(t, err)
	m, err := file.Map(2 * 4096)
	if errors.Is(err, errors.ErrUnsupported) {
		return // as it may be: who maps files does without where this says so
	}
	must(t, err)
	must(t, m.Prepare(4000, 4192))
	must(t, m.Write([]byte("bcd"), 4095))
	if b := m.Bytes(); len(b) != 2*4096 || string(b[4094:4099]) != "abcda" {
		t.Fatalf("%d bytes, %q", len(b), b[4094:4099])
	}
	wantBytes(t, file, 4094, "abcda")
	must(t, file.Datasync())
	must(t, m.Write([]byte("e"), 0))
	must(t, m.Close())
	must(t, file.Close())
	again, err := f.Open("x")
	must(t, err)
	defer again.Close()
	wantBytes(t, again, 0, "ea")
	wantBytes(t, again, 4094, "abcda")
	wantSize(t, again, 3*4096)
}

func openAfterRemove(t *testing.T, f vfs.FS) {
	file := create(t, f, "x")
	_, err := file.WriteAt([]byte("still"), 0)
	must(t, err)
	must(t, f.Remove("x"))
	wantBytes(t, file, 0, "still")
	must(t, file.Datasync())
}

func lock(t *testing.T, f vfs.FS) {
	unlock, err := f.Lock("lock")
	must(t, err)
	_, err = f.Lock("lock")
	wantErr(t, err, vfs.ErrLocked)
	must(t, unlock())
	unlock, err = f.Lock("lock")
	must(t, err)
	must(t, unlock())
}

func free(t *testing.T, f vfs.FS) {
	free, size, err := f.Free()
	must(t, err)
	if size == 0 || free > size {
		t.Fatalf("free %d of %d", free, size)
	}
}

func concurrent(t *testing.T, f vfs.FS) {
	file := create(t, f, "x")
	must(t, file.Allocate(0, 64<<10))
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			b, got := bytes.Repeat([]byte{byte(g + 1)}, 512), make([]byte, 512)
			for i := range 100 {
				off := int64(g*8192 + i%16*512)
				if _, err := file.WriteAt(b, off); err != nil {
					t.Error(err)
				}
				if _, err := file.ReadAt(got, off); err != nil || !bytes.Equal(got, b) {
					t.Error("read something else than was written", err)
				}
				if i%10 == 0 {
					if err := file.Datasync(); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
}

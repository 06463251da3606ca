package blockset

import (
	"errors"
	"strings"
	"testing"

	"github.com/coreos/torus"
)

func TestParse(t *testing.T) {
	for _, c := range []struct {
		in, canonical string
		crc           bool
		rep           int
		err           error
	}{
		{"crc,rep=2", "crc,rep=2", true, 2, nil},
		{"rep=3, crc", "crc,rep=3", true, 3, nil},
		{"crc", "crc", true, 0, nil},
		{"crc,base", "crc", true, 0, nil},
		{"crc,r=2,base", "crc,rep=2", true, 2, nil},
		{"base", "base", false, 0, nil},
		{"rep=8", "rep=8", false, 8, nil},
		{in: "", err: torus.ErrInvalid},
		{in: " ", err: torus.ErrInvalid},
		{in: "crc,", err: torus.ErrNotSupported},
		{in: "crc,rs=4+2", err: torus.ErrNotSupported},
		{in: "CRC", err: torus.ErrNotSupported},
		{in: "rep", err: torus.ErrInvalid},
		{in: "rep=0", err: torus.ErrInvalid},
		{in: "rep=9", err: torus.ErrInvalid},
		{in: "rep=-1", err: torus.ErrInvalid},
		{in: "rep=2,r=3", err: torus.ErrInvalid},
		{in: "crc=32", err: torus.ErrInvalid},
		{in: strings.Repeat("crc,", 100), err: torus.ErrInvalid},
	} {
		s, err := Parse(c.in)
		if !errors.Is(err, c.err) {
			t.Errorf("%q: %v, want %v", c.in, err, c.err)
			continue
		}
		if err != nil {
			continue
		}
		if s.String() != c.canonical || s.CRC() != c.crc || s.Replication() != c.rep {
			t.Errorf("%q: %q crc=%v rep=%d", c.in, s, s.CRC(), s.Replication())
		}
	}
}

func TestUnknownLayerSaysWhichExist(t *testing.T) {
	_, err := Parse("crc,rs=4+2")
	for _, want := range []string{`"rs"`, "crc, rep=N"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not say %s", err, want)
		}
	}
}

func TestNew(t *testing.T) {
	for rep, want := range map[int]string{0: "crc", 2: "crc,rep=2"} {
		if s, err := New(rep); err != nil || s.String() != want {
			t.Errorf("New(%d) = %v, %v", rep, s, err)
		}
	}
	for _, rep := range []int{-1, torus.MaxReplication + 1} {
		if _, err := New(rep); !errors.Is(err, torus.ErrInvalid) {
			t.Errorf("New(%d): %v", rep, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"crc,rep=2", "crc,base", "r=3", "rs=4+2", "", ",", "rep==2", "rep=99999999999999999999"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		s, err := Parse(in)
		if err != nil {
			if !errors.Is(err, torus.ErrInvalid) && !errors.Is(err, torus.ErrNotSupported) {
				t.Fatalf("%q: %v wraps no sentinel", in, err)
			}
			return
		}
		again, err := Parse(s.String())
		if err != nil || again != s {
			t.Fatalf("%q: %q reads back as %v, %v", in, s, again, err)
		}
		if s.Replication() < 0 || s.Replication() > torus.MaxReplication {
			t.Fatalf("%q: replication %d", in, s.Replication())
		}
	})
}

package cli

import (
	"errors"
	"math"
	"strings"
	"testing"

	"github.com/coreos/torus"
)

func TestParseSize(t *testing.T) {
	for text, want := range map[string]uint64{
		"0": 0, "4096": 4096, "1B": 1, "1K": 1024, "1k": 1024, "1KiB": 1024, "1kb": 1000, "10G": 10 << 30, "10GB": 10e9,
		"512MiB": 512 << 20, "1.5T": 3 << 39, " 20 GiB ": 20 << 30, "0.5MiB": 512 << 10, "7E": 7 << 60, "1PiB": 1 << 50,
	} {
		if got, err := ParseSize(text); err != nil || got != want {
			t.Errorf("ParseSize(%q) = %d, %v, want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", " ", "GiB", "-1", "-1GiB", "1X", "1GiBs", "1 G 5", "0x10", "1e9", "8E", "9223372036854775808",
		"99999999999999999999", "1..5G", "NaN", "inf", "1Gb1", "80%", "١"} {
		got, err := ParseSize(text)
		if !errors.Is(err, torus.ErrInvalid) {
			t.Errorf("ParseSize(%q) = %d, %v, want an error", text, got, err)
		} else if !strings.Contains(err.Error(), "\nwrite a size as") {
			t.Errorf("ParseSize(%q): no next step in %q", text, err)
		}
	}
}

func TestFormatSize(t *testing.T) {
	for _, c := range []struct {
		n    uint64
		si   bool
		want string
	}{
		{0, false, "0 B"}, {1023, false, "1023 B"}, {1024, false, "1.0 KiB"}, {1 << 30, false, "1.0 GiB"}, {3 << 29, false, "1.5 GiB"},
		{1 << 30, true, "1.1 GB"}, {1<<20 - 1, false, "1.0 MiB"}, {math.MaxUint64, false, "16.0 EiB"}, {999999, true, "1.0 MB"},
	} {
		if got := FormatSize(c.n, c.si); got != c.want {
			t.Errorf("FormatSize(%d, %v) = %q, want %q", c.n, c.si, got, c.want)
		}
	}
}

func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"1GiB", "10G", "512MiB", "4096", "1.5T", "1KB", "x", "9e9", "1 K"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		n, err := ParseSize(text)
		if err != nil {
			return
		}
		if n > math.MaxInt64 {
			t.Fatalf("ParseSize(%q) = %d, beyond what a file offset holds", text, n)
		}
		s := Size(n)
		if again, err := ParseSize(s.String()); err != nil || again != n {
			t.Fatalf("%q reads as %d, written as %q, which reads as %d, %v", text, n, s.String(), again, err)
		}
	})
}

package cli

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/coreos/torus"
)

// units are the multiples a size may be written in: K, M, G … and KiB, MiB, GiB … are powers of 1024, as
// for truncate(1) and qemu-img(1); KB, MB, GB … are powers of 1000.
const units = "KMGTPE"

// ParseSize reads a size in bytes: 1GiB, 10G, 512MiB, 1.5T, 4096.
func ParseSize(s string) (uint64, error) {
	bad := func(why string) (uint64, error) {
		return 0, fmt.Errorf("size %q: %s: %w\nwrite a size as 1GiB, 10G, 512MiB or a number of bytes", s, why, torus.ErrInvalid)
	}
	text := strings.TrimSpace(s)
	end := strings.LastIndexAny(text, "0123456789.") + 1
	number, unit := text[:end], strings.ToUpper(strings.TrimSpace(text[end:]))
	if number == "" {
		return bad("no number")
	}
	factor := 1.0
	if unit != "" && unit != "B" {
		power := strings.IndexByte(units, unit[0]) + 1
		switch {
		case power == 0:
			return bad("unknown unit")
		case unit[1:] == "" || unit[1:] == "IB":
			factor = math.Pow(1024, float64(power))
		case unit[1:] == "B":
			factor = math.Pow(1000, float64(power))
		default:
			return bad("unknown unit")
		}
	}
	if n, err := strconv.ParseUint(number, 10, 64); err == nil {
		if n > math.MaxInt64/uint64(factor) {
			return bad("too large")
		}
		return n * uint64(factor), nil
	}
	// ParseFloat would take 0x1p-2 and infinities, too.
	if strings.Trim(number, "0123456789.") != "" {
		return bad("not a number")
	}
	f, err := strconv.ParseFloat(number, 64)
	if err != nil {
		return bad("not a number")
	}
	if f *= factor; f >= math.MaxInt64 {
		return bad("too large")
	}
	return uint64(f), nil
}

// FormatSize writes a number of bytes for people, in powers of 1024 (1.5 GiB) or, if si, of 1000 (1.6 GB).
func FormatSize(n uint64, si bool) string {
	base, suffix := 1024.0, "iB"
	if si {
		base, suffix = 1000, "B"
	}
	if float64(n) < base {
		return fmt.Sprintf("%d B", n)
	}
	f, power := float64(n), 0
	for f >= base && power < len(units) {
		f, power = f/base, power+1
	}
	if shown := math.Round(f*10) / 10; shown >= base && power < len(units) { // 1023.96 KiB is 1.0 MiB
		f, power = f/base, power+1
	}
	return fmt.Sprintf("%.1f %c%s", f, units[power-1], suffix)
}

// Size is a size as a flag.
type Size uint64

func (s *Size) Set(text string) error {
	n, err := ParseSize(text)
	*s = Size(n)
	return err
}

// String is the exact value: in the largest unit that divides it.
func (s *Size) String() string {
	n, power := uint64(*s), 0
	for n != 0 && n%1024 == 0 && power < len(units) {
		n, power = n/1024, power+1
	}
	if power == 0 {
		return strconv.FormatUint(n, 10)
	}
	return fmt.Sprintf("%d%ciB", n, units[power-1])
}

// Type is the name of the value in help texts.
func (s *Size) Type() string { return "SIZE" }

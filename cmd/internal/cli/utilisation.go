package cli

import (
	"fmt"
	"strconv"

	"github.com/coreos/torus"
	"github.com/coreos/torus/file"
)

// Utilisation is a flag: the part of what a volume stores that compaction keeps alive.
type Utilisation struct {
	set  bool
	part float64
}

// UtilisationUsage is its description.
const UtilisationUsage = "compact volumes so that `PART` of what they store is alive: more takes less space and writes more; 0: do not compact"

// Set reads a number: 0, or from 0.1 to file.MaxUtilisation.
func (u *Utilisation) Set(text string) error {
	v, err := strconv.ParseFloat(text, 64)
	if err != nil || !(v == 0 || v >= 0.1 && v <= file.MaxUtilisation) {
		return fmt.Errorf("%q: %w: from 0.1 to %v, or 0", text, torus.ErrInvalid, file.MaxUtilisation)
	}
	u.set, u.part = true, v
	return nil
}

func (u *Utilisation) String() string {
	if !u.set {
		return strconv.FormatFloat(file.DefaultUtilisation, 'g', -1, 64)
	}
	return strconv.FormatFloat(u.part, 'g', -1, 64)
}

// Type is shown in usages.
func (u *Utilisation) Type() string { return "PART" }

// Value is what file.Config takes.
func (u *Utilisation) Value() float64 {
	switch {
	case !u.set:
		return 0
	case u.part == 0:
		return -1
	}
	return u.part
}

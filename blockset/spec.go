// Package blockset is the spec of how a block becomes stored fragments: a list of layers such as
// "crc,rep=2", kept with every volume. Spec is its parsed form; a new kind of layer is a row of kinds.
package blockset

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/coreos/torus"
)

// maxLen bounds the text of a spec, in bytes.
const maxLen = 256

// Spec is a parsed spec. The zero value stores blocks unverified, on as many peers as the ring says.
// Specs that mean the same are equal.
type Spec struct {
	crc bool
	rep int
}

var _ torus.Blockset = Spec{}

// New returns the spec "crc,rep=N"; "crc" if rep is 0.
func New(rep int) (Spec, error) {
	if rep == 0 {
		return Spec{crc: true}, nil
	}
	return Parse("crc,rep=" + strconv.Itoa(rep))
}

// CRC reports whether readers verify the checksums of pages.
func (s Spec) CRC() bool { return s.crc }

// Replication is the number of copies; 0 means the ring's.
func (s Spec) Replication() int { return s.rep }

// String returns the canonical form, which Parse accepts: "base" when there is no layer at all.
func (s Spec) String() string {
	var layers []string
	if s.crc {
		layers = append(layers, "crc")
	}
	if s.rep > 0 {
		layers = append(layers, "rep="+strconv.Itoa(s.rep))
	}
	if layers == nil {
		return "base"
	}
	return strings.Join(layers, ",")
}

// A kind is one kind of layer: its name and how its argument, what follows "=", changes the spec.
type kind struct {
	name  string
	usage string // for errors; empty: an old name that still works, not advertised
	apply func(s *Spec, arg string, hasArg bool) error
}

// The table of layers. A new kind is a row here and a field of Spec.
func kinds() []kind {
	return []kind{
		{"crc", "crc", func(s *Spec, _ string, hasArg bool) error {
			s.crc = true
			return noArgument(hasArg)
		}},
		{"rep", "rep=N", replication},
		// The first Torus wrote "crc,base", and "r=N" for replication.
		{"r", "", replication},
		{"base", "", func(_ *Spec, _ string, hasArg bool) error { return noArgument(hasArg) }},
	}
}

func noArgument(hasArg bool) error {
	if hasArg {
		return fmt.Errorf("takes no argument: %w", torus.ErrInvalid)
	}
	return nil
}

func replication(s *Spec, arg string, hasArg bool) error {
	n, err := strconv.ParseUint(arg, 10, 8)
	if !hasArg || err != nil || n < 1 || n > torus.MaxReplication {
		return fmt.Errorf("wants a number of copies from 1 to %d, as in rep=2: %w", torus.MaxReplication, torus.ErrInvalid)
	}
	if s.rep != 0 {
		return fmt.Errorf("is there twice: %w", torus.ErrInvalid)
	}
	s.rep = int(n)
	return nil
}

// Parse reads a spec: layers separated by commas, in any order. Errors wrap torus.ErrNotSupported for a kind
// of layer that does not exist (naming those that do), torus.ErrInvalid for anything else.
func Parse(text string) (Spec, error) {
	var s Spec
	if strings.TrimSpace(text) == "" {
		return Spec{}, fmt.Errorf("block spec is empty: %w (write it like crc,rep=2)", torus.ErrInvalid)
	}
	if len(text) > maxLen {
		return Spec{}, fmt.Errorf("block spec of %d bytes is too long (%d at most): %w", len(text), maxLen, torus.ErrInvalid)
	}
	for layer := range strings.SplitSeq(text, ",") {
		name, arg, hasArg := strings.Cut(strings.TrimSpace(layer), "=")
		k, ok := find(name)
		if !ok {
			return Spec{}, fmt.Errorf("block spec %q: no layer is called %q: %w (there are %s)", text, name, torus.ErrNotSupported, usage())
		}
		if err := k.apply(&s, arg, hasArg); err != nil {
			return Spec{}, fmt.Errorf("block spec %q: layer %q %w", text, layer, err)
		}
	}
	return s, nil
}

func find(name string) (kind, bool) {
	for _, k := range kinds() {
		if k.name == name {
			return k, true
		}
	}
	return kind{}, false
}

func usage() string {
	var u []string
	for _, k := range kinds() {
		if k.usage != "" {
			u = append(u, k.usage)
		}
	}
	return strings.Join(u, ", ")
}

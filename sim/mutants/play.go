package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// Mutant is one way to break a rule.
type Mutant struct {
	Name  string
	Rule  string // what is broken
	File  string // product source, from the root of the module
	Edits []Edit
	More  map[string][]Edit // of other files
	// Harmless says, for a mutant that nothing can catch, why it cannot do harm.
	Harmless string
	// Package and Test are what must fail; the simulator's schedules if empty.
	Package, Test string
}

// Edit replaces Old, which must be in the file exactly once.
type Edit struct{ Old, New string }

// none is the unmutated product.
func (m *Mutant) none() bool { return len(m.Edits) == 0 }

// caught is by what, and how soon.
type caught struct {
	caught        bool
	seed, checker string
	what          string
}

// A failure of the simulator names its seed and its checker.
var violation = regexp.MustCompile(`seed (\d+): (D1|D2|D3|F1|L1|W1|C1|P1|S1|LIVE|panic): (.*)`)

// play builds the tests with the mutant in and runs them until they fail.
func (m *Mutant) play(root string, seeds int) (c caught, err error) {
	dir, err := os.MkdirTemp("", "torus-mutant")
	if err != nil {
		return c, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	pkg, test := m.Package, m.Test
	if pkg == "" {
		pkg, test = "./sim", "^TestSeeds$"
	}
	bin := filepath.Join(dir, "test")
	build := []string{"test", "-c", "-o", bin}
	if !m.none() {
		overlay, err := m.overlay(root, dir)
		if err != nil {
			return c, err
		}
		build = append(build, "-overlay", overlay)
	}
	cmd := exec.Command("go", append(build, pkg)...)
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		return c, fmt.Errorf("does not build: %w\n%s", err, out)
	}
	cmd = exec.Command(bin, "-test.run", test, "-test.failfast", "-test.timeout", "30m")
	cmd.Dir = filepath.Join(root, pkg)
	cmd.Env = append(os.Environ(), fmt.Sprintf("TORUS_SEEDS=%d", seeds))
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err == nil {
		return c, nil
	}
	if !errors.As(err, &exit) {
		return c, err
	}
	c.caught = true
	if x := violation.FindSubmatch(out); x != nil {
		c.seed, c.checker, c.what = string(x[1]), string(x[2]), string(x[3])
		return c, nil
	}
	if i := bytes.Index(out, []byte("fatal error: ")); i >= 0 { // such as a stack that has no end
		c.seed, c.checker = "-", "crash"
		c.what, _, _ = strings.Cut(string(out[i:]), "\n")
		return c, nil
	}
	if m.Package != "" {
		for line := range strings.Lines(string(out)) {
			if f := strings.Fields(line); len(f) > 2 && f[0] == "---" && f[1] == "FAIL:" {
				c.seed, c.checker = "-", f[2]
				return c, nil
			}
		}
	}
	return c, fmt.Errorf("the test failed, but not by a checker:\n%s", out[max(0, len(out)-4000):])
}

// overlay writes the mutated files and the description of them for the compiler.
func (m *Mutant) overlay(root, dir string) (string, error) {
	replace := map[string]string{}
	files := map[string][]Edit{m.File: m.Edits}
	maps.Copy(files, m.More)
	for file, edits := range files {
		path := filepath.Join(root, file)
		src, err := os.ReadFile(path)
		if err != nil {
			return "", err
		}
		for _, e := range edits {
			if n := bytes.Count(src, []byte(e.Old)); n != 1 {
				return "", fmt.Errorf("%s has the text to replace %d times, not once; mend the mutant:\n%s", file, n, e.Old)
			}
			src = bytes.Replace(src, []byte(e.Old), []byte(e.New), 1)
		}
		replace[path] = filepath.Join(dir, filepath.Base(file))
		if err := os.WriteFile(replace[path], src, 0o600); err != nil {
			return "", err
		}
	}
	b, err := json.Marshal(map[string]map[string]string{"Replace": replace})
	if err != nil {
		return "", err
	}
	overlay := filepath.Join(dir, "overlay.json")
	return overlay, os.WriteFile(overlay, b, 0o600)
}

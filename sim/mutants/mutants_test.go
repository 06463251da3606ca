package main

import (
	"os"
	"path/filepath"
	"testing"
)

// Every mutant still finds its place in the product.
func TestMutantsApply(t *testing.T) {
	root, err := moduleRoot()
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, m := range mutants {
		if names[m.Name] {
			t.Errorf("two mutants are called %s", m.Name)
		}
		names[m.Name] = true
		if m.none() {
			continue
		}
		dir := t.TempDir()
		if _, err := m.overlay(root, dir); err != nil {
			t.Errorf("%s: %v", m.Name, err)
			continue
		}
		old, err1 := os.ReadFile(filepath.Join(root, m.File))
		mutated, err2 := os.ReadFile(filepath.Join(dir, filepath.Base(m.File)))
		if err1 != nil || err2 != nil || string(old) == string(mutated) {
			t.Errorf("%s changes nothing: %v %v", m.Name, err1, err2)
		}
	}
}

// A few mutants, one for each kind of checker, at a few seeds each; all of them at many: make mutants.
func TestMutantsCaught(t *testing.T) {
	root, err := moduleRoot()
	if err != nil {
		t.Fatal(err)
	}
	quick := map[string]bool{"ack-r-minus-1": true, "flush-no-sync": true, "append-unfenced": true, "ckpt-any-epoch": true}
	if testing.Short() {
		quick = map[string]bool{"flush-no-sync": true}
	}
	for _, m := range mutants {
		if !quick[m.Name] {
			continue
		}
		c, err := m.play(root, 60)
		if err != nil || !c.caught {
			t.Errorf("%s: caught %v, %v (%s)", m.Name, c.caught, err, m.Rule)
			continue
		}
		t.Logf("%s: seed %s, %s: %s", m.Name, c.seed, c.checker, c.what)
	}
}

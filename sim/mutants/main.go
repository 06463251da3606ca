// Mutants breaks the product on purpose, one rule at a time, and expects the simulator, or the store's crash tests, to notice.
// It is the proof that the checkers can fail.
//
//	go run ./sim/mutants [-seeds 1000] [-run REGEXP] [-list]
//
// Each mutant is one edit of product source, given to the compiler as an overlay: nothing is written into the tree. The
// exit status is 0 if every mutant is caught and the unmutated product is not.
package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"time"
)

func main() {
	seeds := flag.Int("seeds", 1000, "schedules played at most, until a mutant is caught")
	only := flag.String("run", "", "mutants whose names match this `regexp`")
	list := flag.Bool("list", false, "list the mutants and end")
	flag.Parse()
	names, err := regexp.Compile(*only)
	if err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(2)
	}
	if *list {
		for _, m := range mutants {
			fmt.Printf("%-28s %s\n", m.Name, m.Rule)
		}
		return
	}
	root, err := moduleRoot()
	if err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(2)
	}
	failed := 0
	fmt.Printf("%-28s %-10s %-8s %s\n", "mutant", "seed", "checker", "rule")
	for _, m := range mutants {
		if !names.MatchString(m.Name) {
			continue
		}
		began := time.Now()
		c, err := m.play(root, *seeds)
		switch {
		case err != nil:
			failed++
			fmt.Printf("%-28s ERROR      %v\n", m.Name, err)
		case m.Harmless != "" || m.none():
			if c.caught {
				failed++
				fmt.Printf("%-28s %-10s %-8s expected: nothing (%s)\n", m.Name, c.seed, c.checker, c.what)
			} else {
				fmt.Printf("%-28s %-10s %-8s %s [%.0f s]\n", m.Name, "-", "nothing", m.Rule, time.Since(began).Seconds())
			}
		case !c.caught:
			failed++
			fmt.Printf("%-28s NOT CAUGHT in %d seeds: %s\n", m.Name, *seeds, m.Rule)
		default:
			fmt.Printf("%-28s %-10s %-8s %s [%.0f s]\n", m.Name, c.seed, c.checker, m.Rule, time.Since(began).Seconds())
		}
	}
	if failed > 0 {
		fmt.Printf("%d mutants did not do as expected\n", failed)
		os.Exit(1)
	}
}

// moduleRoot is the directory of go.mod, from the working directory upwards.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", fmt.Errorf("no go.mod in the working directory or above")
		}
		dir = up
	}
}

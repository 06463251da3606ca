// Command report reads what `go test -json` writes and prints what people want to know: each package's
// result, all that failing tests said, and, as the last line, how many tests passed and failed.
// It exits with status 1 unless everything passed.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
)

// event is a line of test2json, see `go doc test2json`.
type event struct {
	Action     string
	Package    string
	ImportPath string // of build output
	Test       string
	Output     string
}

// tally is what has been seen so far.
type tally struct {
	passed, failed, skipped int
	// complaints are the lines of failed tests that a test itself wrote, to be said again at the end.
	complaints []string
	// output holds what each test, or (with an empty name) package, has said, until it is known whether to show it.
	output map[[2]string][]string
	// failedIn counts the failed tests of a package: a package that fails without one did not build, or crashed.
	failedIn map[string]int
}

func main() {
	if !report(os.Stdin, os.Stdout) {
		os.Exit(1)
	}
}

func report(in io.Reader, out io.Writer) bool {
	t := &tally{output: map[[2]string][]string{}, failedIn: map[string]int{}}
	r := bufio.NewReader(in)
	for {
		line, err := r.ReadString('\n')
		if line != "" {
			t.line(out, line)
		}
		if err != nil {
			break
		}
	}
	for _, s := range t.complaints {
		fmt.Fprint(out, s)
	}
	if t.skipped > 0 {
		fmt.Fprintf(out, "%d skipped\n", t.skipped)
	}
	fmt.Fprintf(out, "%d passed, %d failed\n", t.passed, t.failed)
	return t.failed == 0 && t.passed > 0
}

func (t *tally) line(out io.Writer, line string) {
	var e event
	if !strings.HasPrefix(line, "{") || json.Unmarshal([]byte(line), &e) != nil {
		fmt.Fprint(out, line) // of make, or of the go command
		return
	}
	key := [2]string{e.Package, e.Test}
	switch e.Action {
	case "output":
		t.output[key] = append(t.output[key], e.Output)
		if e.Test == "" && (strings.HasPrefix(e.Output, "ok ") || strings.HasPrefix(e.Output, "FAIL\t")) {
			fmt.Fprint(out, e.Output)
		}
	case "build-output":
		fmt.Fprint(out, e.Output)
	case "pass":
		delete(t.output, key)
		if e.Test != "" {
			t.passed++
		}
	case "skip":
		delete(t.output, key)
		if e.Test != "" {
			t.skipped++
		}
	case "fail":
		if e.Test != "" {
			t.failed++
			t.failedIn[e.Package]++
			t.show(out, key)
		} else if t.failedIn[e.Package] == 0 {
			t.failed++
			// Which of its tests was running is known only from what they said.
			for k := range t.output {
				if k[0] == e.Package {
					t.show(out, k)
				}
			}
		}
	}
}

// complaint matches what t.Error, and t.Log too, write.
var complaint = regexp.MustCompile(`^\s*\w+_test\.go:\d+: `)

func (t *tally) show(out io.Writer, key [2]string) {
	for _, s := range t.output[key] {
		fmt.Fprint(out, s)
		if complaint.MatchString(s) {
			t.complaints = append(t.complaints, key[1]+": "+strings.TrimLeft(s, " "))
		}
	}
	// A test says much; what it said last is most of the time why it failed.
	t.complaints = t.complaints[max(0, len(t.complaints)-40):]
	delete(t.output, key)
}

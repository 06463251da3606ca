// Package clitest runs commands in the test's process and checks their manners.
package clitest

import (
	"bytes"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/coreos/torus/cmd/internal/cli"
)

// Result is what a command left behind.
type Result struct {
	Status         int
	Stdout, Stderr string
}

// Run runs root with args and nothing on standard input.
func Run(root *cobra.Command, args ...string) Result {
	var out, err bytes.Buffer
	root.SetIn(strings.NewReader(""))
	status := cli.Run(root, args, &out, &err)
	return Result{status, out.String(), err.String()}
}

// RunBad checks that each command line fails with status 1 and one to three lines on standard error, which name the thing
// and the next step: they contain each of the strings given. Words are separated by blanks; ” is an empty one.
func RunBad(t *testing.T, root func() *cobra.Command, cases map[string][]string) {
	t.Helper()
	for line, want := range cases {
		t.Run(line, func(t *testing.T) {
			args := strings.Fields(line)
			for i := range args {
				if args[i] == "''" {
					args[i] = ""
				}
			}
			Run(root(), args...).CheckFailure(t, want...)
		})
	}
}

// CheckFailure checks the manners of a failure.
func (r Result) CheckFailure(t *testing.T, want ...string) {
	t.Helper()
	if r.Status != 1 {
		t.Errorf("status %d, want 1", r.Status)
	}
	if r.Stdout != "" {
		t.Errorf("standard output:\n%s", r.Stdout)
	}
	var lines []string
	for line := range strings.Lines(r.Stderr) {
		if !strings.HasPrefix(line, "time=") { // the log of a daemon
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	if len(lines) == 0 || len(lines) > 3 || lines[0] == "" {
		t.Errorf("%d lines, want one to three:\n%s", len(lines), r.Stderr)
	}
	for _, w := range want {
		if !strings.Contains(r.Stderr, w) {
			t.Errorf("does not say %q:\n%s", w, r.Stderr)
		}
	}
	for _, never := range []string{"Usage:", "Flags:", "panic", "goroutine "} {
		if strings.Contains(r.Stderr, never) {
			t.Errorf("says %q:\n%s", never, r.Stderr)
		}
	}
}

// CheckSuccess checks the manners of a success.
func (r Result) CheckSuccess(t *testing.T, want ...string) {
	t.Helper()
	if r.Status != 0 {
		t.Fatalf("status %d:\n%s", r.Status, r.Stderr)
	}
	for _, w := range want {
		if !strings.Contains(r.Stdout, w) {
			t.Errorf("does not say %q:\n%s", w, r.Stdout)
		}
	}
}

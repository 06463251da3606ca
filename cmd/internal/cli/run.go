// Package cli is what the commands torusd, torusctl and torusblk share: how they start and end, how
// they find etcd, how sizes are written, and how tables are printed.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/coreos/torus"
	"github.com/coreos/torus/node"
)

// maxErrorLines is how long an error on standard error may be.
const maxErrorLines = 3

// Main runs root with the arguments of the process and ends the process.
func Main(root *cobra.Command) {
	os.Exit(Run(root, os.Args[1:], os.Stdout, os.Stderr))
}

// Run runs root and returns the exit status: 0 on success, 1 on any failure. The context of the
// command ends with the first SIGTERM or SIGINT; a second one ends the process at once.
func Run(root *cobra.Command, args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	context.AfterFunc(ctx, stop) // gives the second signal its default meaning

	node.RegisterMetadata(nil)
	prepare(root)
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	if err := root.ExecuteContext(ctx); err != nil {
		PrintError(stderr, root.Name(), err)
		return 1
	}
	return 0
}

// PrintError writes err as one to three lines: what failed, on what, and what to do next.
func PrintError(w io.Writer, program string, err error) {
	msg := strings.TrimSpace(err.Error())
	if hint := hint(err); hint != "" && !strings.Contains(msg, "\n") {
		msg += "\n" + hint
	}
	lines := strings.FieldsFunc(msg, func(r rune) bool { return r == '\n' || r == '\r' })
	if len(lines) > maxErrorLines {
		lines = lines[:maxErrorLines]
	}
	for i, line := range lines {
		if i == 0 {
			fmt.Fprintf(w, "%s: %s\n", program, strings.TrimSpace(line))
		} else {
			fmt.Fprintf(w, "  %s\n", strings.TrimSpace(line))
		}
	}
}

// hint is the next step for errors that do not bring their own.
func hint(err error) string {
	var e *torus.Error
	switch {
	case errors.As(err, &e) && e.Hint != "":
		return ""
	case errors.Is(err, torus.ErrNonSequentialRing), errors.Is(err, torus.ErrCompareFailed):
		return "look at the present state and try again"
	}
	return ""
}

// prepare gives every command of the tree the manners of the house: errors are returned, not printed with a
// usage page, and a verb that is missing or unknown is an error.
func prepare(root *cobra.Command) {
	root.SilenceUsage, root.SilenceErrors = true, true
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return Usage(cmd, err.Error())
	})
	if root.HasSubCommands() {
		root.AddCommand(completionCommand())
		root.SetHelpCommand(helpCommand())
	}
	walk(root, func(cmd *cobra.Command) {
		cmd.DisableFlagsInUseLine = true
		cmd.SuggestionsMinimumDistance = 2
		if cmd.Run == nil && cmd.RunE == nil {
			cmd.Args, cmd.RunE = cobra.ArbitraryArgs, missingVerb
		}
	})
}

func walk(cmd *cobra.Command, fn func(*cobra.Command)) {
	fn(cmd)
	for _, sub := range cmd.Commands() {
		walk(sub, fn)
	}
}

// missingVerb is what a command does that only groups others.
func missingVerb(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		var verbs []string
		for _, sub := range cmd.Commands() {
			if sub.IsAvailableCommand() && sub.Name() != "completion" {
				verbs = append(verbs, sub.Name())
			}
		}
		return Usage(cmd, "what to do is missing, one of: "+strings.Join(verbs, ", "))
	}
	return unknownVerb(cmd, args[0])
}

func unknownVerb(cmd *cobra.Command, verb string) error {
	msg := fmt.Sprintf("unknown command %q", verb)
	if near := cmd.SuggestionsFor(verb); len(near) > 0 {
		msg += fmt.Sprintf(", did you mean %q?", near[0])
	}
	return Usage(cmd, msg)
}

// Usage makes the error for a command line that cannot be understood; it names the command whose help helps.
func Usage(cmd *cobra.Command, msg string) error {
	return fmt.Errorf("%s\nsee `%s --help`", msg, cmd.CommandPath())
}

// Args accepts exactly the arguments named, as in Args("NAME", "SIZE"). A name that ends in "?" is
// optional, one that ends in "..." takes any number, none included; only the last may.
func Args(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		for i, name := range names {
			if strings.HasSuffix(name, "...") {
				return nil
			}
			if i >= len(args) {
				if strings.HasSuffix(name, "?") {
					return nil
				}
				return fmt.Errorf("%s is missing\nusage: %s", name, cmd.UseLine())
			}
			if args[i] == "" {
				return fmt.Errorf("%s is empty\nusage: %s", strings.TrimSuffix(name, "?"), cmd.UseLine())
			}
		}
		if len(args) > len(names) {
			if cmd.HasSubCommands() {
				return unknownVerb(cmd, args[len(names)])
			}
			return fmt.Errorf("unexpected argument %q\nusage: %s", args[len(names)], cmd.UseLine())
		}
		return nil
	}
}

func helpCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "help [COMMAND]...",
		Short: "Help about any command",
		RunE: func(cmd *cobra.Command, args []string) error {
			about, rest, err := cmd.Root().Find(args)
			if err != nil || len(rest) > 0 {
				return Usage(cmd.Root(), fmt.Sprintf("no help on %q", strings.Join(args, " ")))
			}
			return about.Help()
		},
	}
}

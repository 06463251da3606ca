package cli

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"
)

// WriteCompletion writes the completion script of root for a shell: bash, zsh, fish or powershell.
func WriteCompletion(root *cobra.Command, w io.Writer, shell string) error {
	switch shell {
	case "bash":
		return root.GenBashCompletionV2(w, true)
	case "zsh":
		return root.GenZshCompletion(w)
	case "fish":
		return root.GenFishCompletion(w, true)
	case "powershell":
		return root.GenPowerShellCompletionWithDesc(w)
	}
	return fmt.Errorf("no completion for shell %q\nknown are bash, zsh, fish and powershell", shell)
}

func completionCommand() *cobra.Command {
	return &cobra.Command{
		Use:       "completion [bash|zsh|fish|powershell]",
		Short:     "Print a shell completion script (bash unless another is named)",
		Args:      Args("SHELL?"),
		ValidArgs: []string{"bash", "zsh", "fish", "powershell"},
		RunE: func(cmd *cobra.Command, args []string) error {
			shell := "bash"
			if len(args) > 0 {
				shell = args[0]
			}
			return WriteCompletion(cmd.Root(), cmd.OutOrStdout(), shell)
		},
	}
}

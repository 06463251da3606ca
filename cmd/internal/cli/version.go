package cli

import (
	"fmt"
	"runtime"

	"github.com/spf13/cobra"

	"github.com/coreos/torus"
)

// Version is the line that names a program and its version.
func Version(program string) string {
	return fmt.Sprintf("%s %s (%s, %s/%s)", program, torus.Version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}

// VersionCommand prints the version.
func VersionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  Args(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), Version(cmd.Root().Name()))
			return err
		},
	}
}

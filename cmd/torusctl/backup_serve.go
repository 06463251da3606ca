package main

import (
	"errors"
	"fmt"
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/coreos/torus/backup"
	"github.com/coreos/torus/cmd/internal/cli"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/loop"
	"github.com/coreos/torus/node"
)

func backupServeCommand(c *ctl) *cobra.Command {
	var listen string
	cmd := &cobra.Command{
		Use:   "serve REPOSITORY",
		Short: "Serve backups over NBD, to read, where they are",
		Long: `Serve the backups of a repository over NBD, to read, where they are: as VOLUME@ID, and the newest of each volume as VOLUME. No cluster is needed. Every
page is checked before it is sent.`,
		Args: cli.Args("REPOSITORY"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			return c.withRepository(ctx, args[0], false, func(r *backup.Repository) error {
				log := cli.NewLogger(cmd.ErrOrStderr(), slog.LevelInfo)
				var dir *backup.Directory
				e, err := node.StartExport("--listen", listen, func(l loop.Loop) device.Directory {
					dir = backup.NewDirectory(r, l, log)
					return dir
				}, log)
				if err != nil {
					return err
				}
				if _, err := fmt.Fprintf(cmd.OutOrStdout(), "serving the backups of %s over NBD at %s\n", r, e.Addr()); err != nil {
					return errors.Join(err, e.Close())
				}
				<-ctx.Done()
				dir.Stop()
				return e.Close()
			})
		},
	}
	cmd.Flags().StringVarP(&listen, "listen", "l", "localhost:10809", "where to listen, `[HOST]:PORT|unix:PATH`")
	return cmd
}

package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/coreos/torus/cmd/internal/cli"
	"github.com/coreos/torus/node"
)

func nbdserveCommand(b *blk) *cobra.Command {
	var listen string
	cmd := &cobra.Command{
		Use:   "nbdserve [-l [HOST]:PORT|unix:PATH] [VOLUME...]",
		Short: "Serve volumes over NBD: all, or those named",
		Long: `Serve volumes over NBD: all of the cluster, or those named. A volume is attached when its first client
connects, and released when the last one has gone. Whoever reaches the address can read and write the volumes,
so it is localhost unless -l says otherwise.`,
		RunE: func(cmd *cobra.Command, volumes []string) error {
			return b.serve(cmd, "torusblk nbdserve", listen, volumes, nil)
		},
	}
	cmd.Flags().StringVarP(&listen, "listen", "l", "localhost:10809", "where to listen, `[HOST]:PORT|unix:PATH`; 0.0.0.0:10809 for other machines")
	return cmd
}

// serve serves volumes until the command is told to stop, or use, if there is one, returns.
func (b *blk) serve(cmd *cobra.Command, what, listen string, volumes []string, use func(context.Context, *node.Volumes) error) error {
	where, err := b.etcd.Resolve()
	if err != nil {
		return err
	}
	err = node.RunFrontend(cmd.Context(), node.FrontendConfig{
		Etcd: where, EtcdWait: b.etcdWait, NBD: listen, Volumes: volumes, What: what, Force: b.force,
		CacheSize: uint64(b.cache), Utilisation: b.compact.Value(), HTTP: b.http, Log: cli.NewLogger(cmd.ErrOrStderr(), cli.LogLevel(b.debug)),
	}, use)
	return where.Explain(err)
}

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/coreos/torus"
	"github.com/coreos/torus/cmd/internal/cli"
	"github.com/coreos/torus/node"
)

func wipeCommand(c *ctl) *cobra.Command {
	var sure bool
	cmd := &cobra.Command{
		Use:   "wipe [--yes-i-am-sure]",
		Short: "Forget the cluster: removes all its metadata, and with it every volume",
		Long: `Remove all metadata of the cluster from etcd. Nothing of its volumes can be read afterwards. Stop
the peers first, and remove their data directories: they will serve no other cluster.`,
		Args: cli.Args(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !sure {
				if err := confirmWipe(c, cmd); err != nil {
					return err
				}
			}
			return c.withEtcd(cmd.Context(), func(ctx context.Context, where node.Etcd) error {
				if err := where.Wipe(ctx); err != nil {
					return err
				}
				_, err := fmt.Fprintln(cmd.OutOrStdout(), "the cluster's metadata is gone")
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&sure, "yes-i-am-sure", false, "do not ask")
	return cmd
}

var errNotConfirmed = errors.New("not confirmed: nothing was removed\ntype yes when asked, or give --yes-i-am-sure")

// confirmWipe says what would be lost and asks.
func confirmWipe(c *ctl, cmd *cobra.Command) error {
	err := c.withMDS(cmd.Context(), func(ctx context.Context, mds torus.MetadataService) error {
		global, err := mds.GlobalMetadata(ctx)
		if err != nil {
			return err
		}
		volumes, err := mds.Volumes(ctx)
		if err != nil {
			return err
		}
		peers, err := mds.Peers(ctx)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(cmd.ErrOrStderr(), "cluster %s with %d volumes on %d peers will be lost for good; type yes to go on: ",
			global.ClusterID, len(volumes), len(peers))
		return err
	})
	if err != nil {
		return err
	}
	answer, _ := bufio.NewReader(cmd.InOrStdin()).ReadString('\n')
	if strings.TrimSpace(answer) != "yes" {
		fmt.Fprintln(cmd.ErrOrStderr())
		return errNotConfirmed
	}
	return nil
}

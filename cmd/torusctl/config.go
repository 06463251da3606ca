package main

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"

	"github.com/spf13/cobra"

	"github.com/coreos/torus/cmd/internal/cli"
	"github.com/coreos/torus/node"
)

func configCommand(c *ctl) *cobra.Command {
	var view bool
	cmd := &cobra.Command{
		Use:   "config [-C HOST:2379] [--profile NAME] [--view]",
		Short: "Keep where etcd is in $HOME/.torus/config.json, so that -C need not be typed",
		Args:  cli.Args(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			path, err := c.etcd.ConfigPath()
			if err != nil {
				return err
			}
			config, err := cli.ReadConfig(path)
			if view {
				if err != nil {
					return err
				}
				return c.out.Print(cmd.OutOrStdout(), config, configTable(config))
			}
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			if _, err := node.ParseEndpoints(c.etcd.Endpoints); err != nil {
				return err
			}
			if config.Etcd == nil {
				config.Etcd = map[string]cli.Profile{}
			}
			config.Etcd[c.etcd.Profile] = cli.Profile{
				Endpoints: c.etcd.Endpoints, CAFile: c.etcd.CAFile, CertFile: c.etcd.CertFile, KeyFile: c.etcd.KeyFile,
			}
			if err := config.Write(path); err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "profile %q in %s: etcd at %s\n", c.etcd.Profile, path, c.etcd.Endpoints)
			return err
		},
	}
	cmd.Flags().BoolVar(&view, "view", false, "print the config file instead of writing it")
	return cmd
}

func configTable(config cli.ConfigFile) cli.Table {
	t := cli.Table{Columns: []string{"profile", "etcd", "ca_file", "cert_file", "key_file"}}
	for _, name := range slices.Sorted(maps.Keys(config.Etcd)) {
		p := config.Etcd[name]
		t.Rows = append(t.Rows, []any{name, p.Endpoints, p.CAFile, p.CertFile, p.KeyFile})
	}
	return t
}

package main

import "github.com/spf13/cobra"

func ringCommand(c *ctl) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ring",
		Short: "Show and change the ring, which says where blocks live",
	}
	cmd.AddCommand(ringGetCommand(c), ringSetReplicationCommand(c))
	return cmd
}

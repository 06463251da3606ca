package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/coreos/torus"
	"github.com/coreos/torus/backup"
	"github.com/coreos/torus/cmd/internal/cli"
)

func backupPruneCommand(c *ctl) *cobra.Command {
	var cfg backup.PruneConfig
	var within string
	cmd := &cobra.Command{
		Use:   "prune REPOSITORY [VOLUME]",
		Short: "Remove backups that no rule keeps, and what nobody needs any more",
		Long: `Remove the backups of a volume, or of all, that no rule keeps, and everything that none of the others needs: also what an interrupted backup has left.
Without a rule no backup is removed. The rules add up: --keep 7 --keep-daily 30 keeps the seven newest and one of each of the last thirty days that have any.`,
		Args: cli.Args("REPOSITORY", "VOLUME?"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			k := &cfg.Keep
			if k.Last < 0 || k.Hourly < 0 || k.Daily < 0 || k.Weekly < 0 || k.Monthly < 0 {
				return fmt.Errorf("a number of backups to keep is negative: %w", torus.ErrInvalid)
			}
			k.Only = cmd.Flags().Changed("keep")
			if within != "" {
				var err error
				if k.Within, err = parseDuration(within); err != nil {
					return err
				}
			}
			return c.withRepository(ctx, args[0], false, func(r *backup.Repository) error {
				if len(args) > 1 {
					cfg.Volume = args[1]
					if err := r.Exists(ctx, cfg.Volume); err != nil {
						return err
					}
				}
				if cfg.Backup != "" {
					b, err := r.Find(ctx, cfg.Backup)
					if err != nil {
						return err
					}
					if !strings.Contains(cfg.Backup, "@") {
						return fmt.Errorf("--backup %s names a volume: %w\nwrite it as VOLUME@ID; the newest is %s", cfg.Backup, torus.ErrInvalid, b.Name())
					}
					cfg.Backup = b.Name()
				}
				p, err := r.Prune(ctx, cfg)
				if err != nil {
					return err
				}
				return printPruned(c, cmd, p, cfg.DryRun)
			})
		},
	}
	f := cmd.Flags()
	f.IntVar(&cfg.Keep.Last, "keep", 0, "so many of the newest; 0 removes all that no other rule keeps")
	f.IntVar(&cfg.Keep.Hourly, "keep-hourly", 0, "the newest of each of the last `N` hours that have one")
	f.IntVar(&cfg.Keep.Daily, "keep-daily", 0, "of each of the last `N` days")
	f.IntVar(&cfg.Keep.Weekly, "keep-weekly", 0, "of each of the last `N` weeks")
	f.IntVar(&cfg.Keep.Monthly, "keep-monthly", 0, "of each of the last `N` months")
	f.StringVar(&within, "keep-within", "", "all within this time before the newest, as 24h or 7d")
	f.StringVar(&cfg.Backup, "backup", "", "remove this one, `VOLUME@ID`, whatever the rules say")
	f.BoolVar(&cfg.Damaged, "damaged", false, "remove backups that cannot be read as well")
	f.BoolVarP(&cfg.DryRun, "dry-run", "n", false, "say what would go, and remove nothing")
	return cmd
}

func printPruned(c *ctl, cmd *cobra.Command, p *backup.Pruned, dry bool) error {
	out := struct {
		Kept    []string `json:"kept"`
		Removed []string `json:"removed"`
		Objects int      `json:"objects"`
		Bytes   uint64   `json:"bytes"`
	}{[]string{}, []string{}, p.Objects, p.Bytes}
	var t cli.Table
	t.Columns = []string{"backup", "fate"}
	for _, b := range p.Kept {
		out.Kept = append(out.Kept, b.Name())
		t.Rows = append(t.Rows, []any{b.Name(), "kept"})
	}
	for _, b := range p.Removed {
		out.Removed = append(out.Removed, b.Name())
		t.Rows = append(t.Rows, []any{b.Name(), "removed"})
	}
	if err := c.out.Print(cmd.OutOrStdout(), out, t); err != nil || c.out.Format != "table" {
		return err
	}
	verb := "removed"
	if dry {
		verb = "would be removed"
	}
	_, err := fmt.Fprintf(cmd.OutOrStdout(), "%d of %d backups and %s in %d objects %s\n", len(p.Removed), len(p.Removed)+len(p.Kept), cli.FormatSize(p.Bytes, false), p.Objects, verb)
	return err
}

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	_ "gocloud.dev/blob/azureblob" // azblob://
	_ "gocloud.dev/blob/gcsblob"   // gs://
	_ "gocloud.dev/blob/s3blob"    // s3://

	"github.com/coreos/torus"
	"github.com/coreos/torus/backup"
	"github.com/coreos/torus/block"
	"github.com/coreos/torus/cmd/internal/cli"
)

func backupCommand(c *ctl) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "backup",
		Short: "Keep copies of volumes in a directory or an object store",
		Long: `Keep copies of volumes in a repository: a directory, or a bucket of an object store. Each backup is whole, and moves only what has changed since the
one before it. What is read back is checked; restore, list, verify, prune and serve need no cluster.

A REPOSITORY is a DIRECTORY, s3://BUCKET, gs://BUCKET or azblob://CONTAINER; ?prefix=DIR/ names a part of a bucket. Credentials are taken from where the
tools of the store take them, and S3 options are those of gocloud.dev/blob/s3blob: s3://b?region=eu-west-1, or for a store of your own
's3://b?endpoint=https://HOST:PORT&use_path_style=true&region=any'.

A BACKUP is named VOLUME@ID, of which the beginning of the ID is enough if there is only one; VOLUME is its newest.`,
	}
	cmd.AddCommand(backupCreateCommand(c), backupListCommand(c), backupRestoreCommand(c), backupVerifyCommand(c), backupPruneCommand(c), backupServeCommand(c))
	return cmd
}

// withRepository opens a repository and calls fn.
func (c *ctl) withRepository(ctx context.Context, where string, create bool, fn func(*backup.Repository) error) error {
	r, err := backup.Open(ctx, where, create)
	if err != nil {
		return err
	}
	return errors.Join(fn(r), r.Close())
}

// backupJSON is a backup as -o json prints it. The keys are an interface: scripts read them.
type backupJSON struct {
	Name        string    `json:"name"`
	Volume      string    `json:"volume"`
	ID          string    `json:"id"`
	Snapshot    string    `json:"snapshot,omitempty"`
	Time        time.Time `json:"time"` // what it shows
	Created     time.Time `json:"created"`
	SizeBytes   uint64    `json:"size_bytes"`
	DataBytes   uint64    `json:"data_bytes"`
	ReadBytes   uint64    `json:"read_bytes"`
	NewBytes    uint64    `json:"new_bytes"`
	StoredBytes uint64    `json:"stored_bytes"`
	Base        string    `json:"base,omitempty"`
}

func describeBackup(b *backup.Backup) backupJSON {
	return backupJSON{
		Name: b.Name(), Volume: b.Volume, ID: b.ID, Snapshot: b.Snapshot, Time: b.Moment, Created: b.Created, SizeBytes: b.Size, DataBytes: b.DataBytes,
		ReadBytes: b.ReadBytes, NewBytes: b.NewBytes, StoredBytes: b.StoredBytes, Base: b.Base,
	}
}

func printBackups(c *ctl, cmd *cobra.Command, v any, l []backupJSON) error {
	t := cli.Table{Columns: []string{"name", "time", "size_bytes", "data_bytes", "new_bytes", "stored_bytes"}}
	for _, b := range l {
		t.Rows = append(t.Rows, []any{b.Name, b.Time.Format(time.RFC3339), cli.Bytes(b.SizeBytes), cli.Bytes(b.DataBytes), cli.Bytes(b.NewBytes), cli.Bytes(b.StoredBytes)})
	}
	return c.out.Print(cmd.OutOrStdout(), v, t)
}

func backupCreateCommand(c *ctl) *cobra.Command {
	var full, always bool
	cmd := &cobra.Command{
		Use:   "create VOLUME[@SNAPSHOT] REPOSITORY",
		Short: "Add a backup of a volume, or of a snapshot of it, to a repository",
		Long: `Add a backup of a volume, or of a snapshot of it, to a repository, which is made with the first one. The volume may be in use: what is kept is what it
is when the backup begins, by a snapshot that goes with it. Only pages that lie elsewhere than in the newest backup of the volume are read, and only those
that differ are moved. One that is interrupted leaves nothing but space to be pruned.`,
		Args: cli.Args("VOLUME", "REPOSITORY"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.withCluster(cmd.Context(), func(ctx context.Context, s *session) error {
				return c.withRepository(ctx, args[1], true, func(r *backup.Repository) error {
					b, err := createBackup(ctx, cmd, s, r, args[0], full, always)
					if err != nil {
						if errors.Is(err, context.Canceled) {
							err = errors.New("interrupted")
						}
						return volumeError("back up", args[0], err)
					}
					d := describeBackup(b)
					if c.out.Format != "table" {
						return printBackups(c, cmd, d, []backupJSON{d})
					}
					_, err = fmt.Fprintf(cmd.OutOrStdout(), "backup %s: %s, of which %s is new and takes %s\n", d.Name,
						cli.FormatSize(d.DataBytes, false), cli.FormatSize(d.NewBytes, false), cli.FormatSize(d.StoredBytes, false))
					return err
				})
			})
		},
	}
	cmd.Flags().BoolVar(&full, "full", false, "move everything, whatever the repository has: after `backup verify` has found damage")
	cmd.Flags().BoolVarP(&always, "progress", "p", false, "show progress, though standard error is no terminal")
	return cmd
}

func createBackup(ctx context.Context, cmd *cobra.Command, s *session, r *backup.Repository, name string, full, always bool) (b *backup.Backup, err error) {
	cfg := backup.CreateConfig{Cluster: s.global.ClusterID, Full: full, Log: s.log}
	cfg.Volume, cfg.Snapshot = block.SplitName(name)
	snap := cfg.Snapshot
	if snap == "" {
		snap = temporaryName("backup")
		if _, err := s.snapshot(ctx, cfg.Volume, snap); err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, s.drop(ctx, cfg.Volume, snap)) }()
	}
	v, pin, err := block.Snapshot(ctx, s, cfg.Volume, snap)
	if err != nil {
		return nil, err
	}
	cfg.VolumeID, cfg.Moment = torus.VolumeID(v.Id), time.UnixMicro(int64(pin.At.GetTimeUs()))
	p, err := s.peers(ctx)
	if err != nil {
		return nil, err
	}
	disk, err := p.Open(ctx, cfg.Volume+"@"+snap)
	if err != nil {
		return nil, err
	}
	defer disk.Close()
	bar := newProgress(cmd.ErrOrStderr(), always, 0, disk.Size())
	cfg.Progress = bar.at
	if b, err = r.Create(ctx, disk, cfg); err == nil {
		bar.end(b.Size, b.NewBytes)
	}
	return b, err
}

func backupListCommand(c *ctl) *cobra.Command {
	return &cobra.Command{
		Use:   "list REPOSITORY [VOLUME]",
		Short: "Show the backups there are",
		Args:  cli.Args("REPOSITORY", "VOLUME?"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			return c.withRepository(ctx, args[0], false, func(r *backup.Repository) error {
				vol := ""
				if len(args) > 1 {
					vol = args[1]
					if err := r.Exists(ctx, vol); err != nil {
						return err
					}
				}
				l, bad, err := r.List(ctx, vol)
				if err != nil {
					return err
				}
				d := []backupJSON{}
				for _, b := range l {
					d = append(d, describeBackup(b))
				}
				if err := printBackups(c, cmd, d, d); err != nil {
					return err
				}
				for _, x := range bad {
					err = errors.Join(err, x.Err)
				}
				return err
			})
		},
	}
}

func backupVerifyCommand(c *ctl) *cobra.Command {
	var always bool
	cmd := &cobra.Command{
		Use:   "verify REPOSITORY [BACKUP]",
		Short: "Read what backups need, all or one, and check every page",
		Long: `Read what backups need, all of them or one, and check every page. What is damaged is named, with the backups that need it; a
restore of these fails rather than to restore something else. ` + "`torusctl backup create --full`" + ` makes a backup that shares nothing with the damaged ones.`,
		Args: cli.Args("REPOSITORY", "BACKUP?"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			return c.withRepository(ctx, args[0], false, func(r *backup.Repository) error {
				var which []*backup.Backup
				if len(args) > 1 {
					b, err := r.Find(ctx, args[1])
					if err != nil {
						return err
					}
					which = append(which, b)
				}
				var bar *progress
				v, err := r.Verify(ctx, which, func(done, total uint64) {
					if bar == nil {
						bar = newProgress(cmd.ErrOrStderr(), always, 0, total)
					}
					bar.at(done, done)
				})
				if err != nil {
					return err
				}
				return printVerified(c, cmd, v)
			})
		},
	}
	cmd.Flags().BoolVarP(&always, "progress", "p", false, "show progress, though standard error is no terminal")
	return cmd
}

// damageJSON is a damaged object as -o json prints it.
type damageJSON struct {
	Object  string   `json:"object"`
	Problem string   `json:"problem"`
	Pages   uint64   `json:"pages"`
	Backups []string `json:"backups"`
}

func printVerified(c *ctl, cmd *cobra.Command, v *backup.Verified) error {
	out := struct {
		Backups  int          `json:"backups"`
		Sections int          `json:"sections"`
		Pages    uint64       `json:"pages"`
		Damaged  []damageJSON `json:"damaged"`
	}{v.Backups, v.Sections, v.Pages, []damageJSON{}}
	t := cli.Table{Columns: []string{"damaged object", "pages", "needed by", "problem"}}
	for _, d := range v.Damaged {
		x := damageJSON{Object: d.Object, Problem: d.Err.Error(), Pages: d.Pages, Backups: d.Of}
		out.Damaged = append(out.Damaged, x)
		by := fmt.Sprint(len(d.Of), " backups")
		if len(d.Of) == 1 {
			by = d.Of[0]
		}
		t.Rows = append(t.Rows, []any{d.Object, d.Pages, by, x.Problem})
	}
	if c.out.Format != "table" || len(v.Damaged) > 0 {
		if err := c.out.Print(cmd.OutOrStdout(), out, t); err != nil {
			return err
		}
	} else if _, err := fmt.Fprintf(cmd.OutOrStdout(), "%d backups, %s of pages: all as they were written\n", v.Backups, cli.FormatSize(v.Pages*torus.PageSize, false)); err != nil {
		return err
	}
	return v.Error()
}

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/coreos/torus/cmd/internal/cli"
	"github.com/coreos/torus/nbd"
	"github.com/coreos/torus/node"
)

const (
	attachTimeout = time.Minute // an attach may have to wait for a dead holder's lease, and for peers
	pollEvery     = time.Second
	// reconnectWithin is how long the kernel holds requests back when its connection breaks.
	reconnectWithin = 30 * time.Second
)

func nbdCommand(b *blk) *cobra.Command {
	var detach string
	var connections int
	cmd := &cobra.Command{
		Use:   "nbd VOLUME [/dev/nbdN] | nbd --detach /dev/nbdN",
		Short: "Make a volume a block device of this machine's kernel",
		Long: `Make a volume a block device of this machine's kernel: the one named, or any that is free. The command runs for as
long as the device does. It ends, with the volume flushed and released, on SIGTERM or when the device is detached
(torusblk nbd --detach /dev/nbdN). Unmount first.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if detach != "" {
				return cli.Args()(cmd, args)
			}
			return cli.Args("VOLUME", "DEVICE?")(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if detach != "" {
				return nbd.DetachKernel(cmd.Context(), detach)
			}
			device := ""
			if len(args) > 1 {
				device = args[1]
			}
			return b.attach(cmd, args[0], device, connections)
		},
	}
	cmd.Flags().StringVarP(&detach, "detach", "d", "", "disconnect `/dev/nbdN` instead")
	cmd.Flags().IntVar(&connections, "connections", 1, "connections between the kernel and this process, each with a queue of its own")
	return cmd
}

// attach serves the volume on a socket that nobody else can reach, and hands a connection to it to the kernel.
func (b *blk) attach(cmd *cobra.Command, volume, device string, connections int) error {
	dir, err := os.MkdirTemp("", "torusblk")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "nbd.sock")
	return b.serve(cmd, "torusblk nbd", "unix:"+socket, []string{volume}, func(ctx context.Context, v *node.Volumes) error {
		attaching, cancel := context.WithTimeout(ctx, attachTimeout)
		defer cancel()
		path, err := nbd.AttachKernel(attaching, device, func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}, nbd.KernelOptions{Export: volume, Connections: connections, DeadTimeout: reconnectWithin})
		if err != nil {
			return err
		}
		// The kernel has its connections and needs no name for more; so nothing is left behind if this process is killed.
		if err := os.RemoveAll(dir); err != nil {
			return errors.Join(err, release(path))
		}
		if _, err := fmt.Fprintln(cmd.OutOrStdout(), path); err != nil {
			return errors.Join(err, release(path))
		}
		size, err := sizeOf(ctx, v, volume)
		if err != nil {
			return errors.Join(err, release(path))
		}
		poll := time.NewTicker(pollEvery)
		defer poll.Stop()
		for {
			select {
			case <-ctx.Done():
				return release(path)
			case <-poll.C:
				if v.Sessions() == 0 { // somebody has detached it
					return nil
				}
				now, err := sizeOf(ctx, v, volume)
				if err != nil || now == size {
					continue // the device goes on with the size that it has
				}
				if err := nbd.ResizeKernel(ctx, path, now); err != nil {
					fmt.Fprintln(cmd.ErrOrStderr(), err)
				}
				size = now
			}
		}
	})
}

// sizeOf is the size of the volume in bytes as it is served now.
func sizeOf(ctx context.Context, v *node.Volumes, volume string) (uint64, error) {
	i, err := v.Stat(ctx, volume)
	return i.Size, err
}

// release writes back what the kernel holds of the device and disconnects it.
func release(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err == nil {
		err = errors.Join(f.Sync(), f.Close())
	}
	return errors.Join(err, nbd.DetachKernel(context.Background(), path))
}

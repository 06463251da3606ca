package node

import (
	"context"

	"github.com/coreos/torus/block"
)

// Fsck checks a volume, or a snapshot (VOL@SNAP), without attaching it; see block.Directory.Fsck. It ends soon after ctx, with what was found until then.
func (c *Client) Fsck(ctx context.Context, name string, cfg block.FsckConfig) (*block.FsckResult, error) {
	cfg.Stop = ctx.Err
	return await(context.WithoutCancel(ctx), c, func(done func(*block.FsckResult, error)) { c.dir.Fsck(name, cfg, done) })
}

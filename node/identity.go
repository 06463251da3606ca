package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"strings"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/storage"
)

// takeIdentity returns whose data the directory holds; an empty one becomes that of a new peer of the cluster.
func takeIdentity(dir *dataDir, global torus.GlobalMetadata) (storage.Identity, error) {
	id, err := storage.ReadIdentity(dir.fs)
	if errors.Is(err, fs.ErrNotExist) {
		id = storage.Identity{Peer: torus.NewPeerID(), ClusterID: global.ClusterID, BlockSize: global.BlockSize}
		err = storage.Create(dir.fs, id)
	}
	if err != nil {
		return id, fmt.Errorf("data dir %s: %w", dir.name, err)
	}
	if id.ClusterID != global.ClusterID {
		return id, &torus.Error{Op: "use", Obj: "data dir " + dir.name,
			Err:  fmt.Errorf("%w: its data is of cluster %s, etcd says %s", torus.ErrWrongCluster, id.ClusterID, global.ClusterID),
			Hint: "give the right --etcd, or another --data-dir; if the data is not needed, remove the directory"}
	}
	if id.BlockSize != global.BlockSize {
		return id, &torus.Error{Op: "use", Obj: "data dir " + dir.name,
			Err:  fmt.Errorf("%w: its blocks have %d bytes, the cluster's %d", torus.ErrWrongCluster, id.BlockSize, global.BlockSize),
			Hint: "give another --data-dir; if the data is not needed, remove the directory"}
	}
	return id, nil
}

const (
	twinDialTimeout = time.Second
	twinPatience    = leaseTTL + 2*time.Second
)

// refuseTwin fails while another process lives that has the same identity: the data dir was copied, and of two peers that are
// one only one holds what was acknowledged. A predecessor that died counts as alive until its lease has run out;
// that its address does not answer any more tells them apart at once.
func refuseTwin(ctx context.Context, mds torus.MetadataService, id torus.PeerID, dirName string) error {
	giveUp := time.Now().Add(twinPatience)
	for {
		peers, err := mds.Peers(ctx)
		if err != nil {
			return err
		}
		address := ""
		for _, p := range peers {
			if p.Uuid == id.String() && p.Alive {
				address = p.Address
			}
		}
		if address == "" || !answers(ctx, address) {
			return nil
		}
		if time.Now().After(giveUp) {
			return &torus.Error{Op: "use", Obj: "data dir " + dirName,
				Err:  fmt.Errorf("peer %s runs already, at %s: %w", id, address, torus.ErrLocked),
				Hint: "a copied data dir cannot be used: stop the other peer, or give another --data-dir"}
		}
		select {
		case <-time.After(retryEvery):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func answers(ctx context.Context, address string) bool {
	d := net.Dialer{Timeout: twinDialTimeout}
	c, err := d.DialContext(ctx, "tcp", strings.TrimPrefix(address, addressScheme))
	if err != nil {
		return false
	}
	c.Close()
	return true
}

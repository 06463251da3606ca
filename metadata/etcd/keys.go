package etcd

import (
	"fmt"
	"strconv"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/coreos/torus"
)

// DefaultPrefix is where a cluster's keys are. The version in it is that of the layout of keys; what they hold has
// a version of its own (models.Global.format).
const DefaultPrefix = "/torus/v2/"

// keys names every key there is (docs/format/etcd-keys.md).
type keys struct{ prefix string }

// all is the range of all keys.
func (k keys) all() (from, end string) { return k.prefix, clientv3.GetPrefixRangeEnd(k.prefix) }

// global holds a models.Global. Whether there is a cluster is whether there is this key.
func (k keys) global() string { return k.prefix + "meta/global" }

// ring holds the current models.Ring.
func (k keys) ring() string { return k.prefix + "meta/the-one-ring" }

// ringAt holds the same for each version there has been.
func (k keys) ringAt(version uint64) string { return fmt.Sprintf("%smeta/rings/%d", k.prefix, version) }

// volumeMinter holds the last VolumeID handed out, decimal.
func (k keys) volumeMinter() string { return k.prefix + "meta/volumeminter" }

// node exists, under the peer's lease, while the peer is alive; it holds its address.
func (k keys) node(uuid string) string { return k.prefix + "nodes/" + uuid }

// peer holds a models.Peer.
func (k keys) peer(uuid string) string { return k.prefix + "peers/" + uuid }

// nodesAndPeers is the range of both, which has nothing else in it: one read or one watch sees them at one revision.
func (k keys) nodesAndPeers() (from, end string) {
	return k.prefix + "nodes/", clientv3.GetPrefixRangeEnd(k.prefix + "peers/")
}

// peerKey tells what a key of nodesAndPeers is.
func (k keys) peerKey(key string) (uuid string, node bool) {
	if uuid, ok := strings.CutPrefix(key, k.prefix+"nodes/"); ok {
		return uuid, true
	}
	return strings.TrimPrefix(key, k.prefix+"peers/"), false
}

// volume holds a models.Volume.
func (k keys) volume(name string) string { return k.prefix + "volumes/" + name }

func (k keys) volumes() (from, end string) {
	p := k.prefix + "volumes/"
	return p, clientv3.GetPrefixRangeEnd(p)
}

// volumeID holds the volume's name, a space, and a mark of the request that created it.
func (k keys) volumeID(id torus.VolumeID) string {
	return fmt.Sprintf("%svolumeid/%010x", k.prefix, uint64(id))
}

// volumeMeta is the range of a volume's own keys.
func (k keys) volumeMeta(id torus.VolumeID) (from, end string) {
	p := fmt.Sprintf("%svolumemeta/%010x/", k.prefix, uint64(id))
	return p, clientv3.GetPrefixRangeEnd(p)
}

// state holds a models.VolumeState: epoch, head and open window, replaced together.
func (k keys) state(id torus.VolumeID) string {
	return fmt.Sprintf("%svolumemeta/%010x/state", k.prefix, uint64(id))
}

// statesAfter is the range of the keys of all volumes with higher ids: their states, and their locks.
func (k keys) statesAfter(id torus.VolumeID) (from, end string) {
	return k.state(id) + "\x00", clientv3.GetPrefixRangeEnd(k.prefix + "volumemeta/")
}

// stateOf tells whose state a key of that range is; false if it is not a state.
func (k keys) stateOf(key string) (torus.VolumeID, bool) {
	id, ok := strings.CutSuffix(strings.TrimPrefix(key, k.prefix+"volumemeta/"), "/state")
	n, err := strconv.ParseUint(id, 16, 64)
	return torus.VolumeID(n), ok && err == nil
}

// lock holds a models.Holder under the holder's lease.
func (k keys) lock(id torus.VolumeID) string {
	return fmt.Sprintf("%svolumemeta/%010x/lock", k.prefix, uint64(id))
}

package torus

import (
	"context"
	"time"

	"github.com/coreos/torus/models"
)

// GlobalMetadata is what holds for the whole cluster and never changes after init.
type GlobalMetadata struct {
	ClusterID        string // a UUID; peers and clients of different clusters refuse each other
	BlockSize        uint64 // bytes
	DefaultBlockSpec string // blockset spec of volumes that name none, such as "crc,rep=2"
}

// LeaseID names a lease of the MDS. Leases say who is alive; safety never rests on them.
type LeaseID int64

// MetadataKind names an implementation of the MetadataService.
type MetadataKind string

// The kinds of metadata services.
const (
	MetadataEtcd MetadataKind = "etcd"
	MetadataTemp MetadataKind = "temp"
)

// VolumeState is the log's state of one volume in the MDS: one key, so that one revision covers
// epoch, head and open window alike. Every transaction compares that revision: a late
// duplicate of an earlier transaction fails (model rule 5).
type VolumeState struct {
	*models.VolumeState
	Revision int64
}

// VolumeStates is a page of the states of all volumes, as they were at one moment.
type VolumeStates struct {
	ClusterID string        // of the cluster whose volumes these are
	LastID    VolumeID      // the highest id that has been handed out, whether or not there is such a volume still
	List      []ListedState // ascending by id
	More      bool          // there are volumes beyond the last of List
}

// ListedState is the state of one of them.
type ListedState struct {
	ID VolumeID
	VolumeState
	Err error // instead, of a state that is damaged: the volume exists, and that is all that is known
}

// MetadataService is the MDS: a small, consistent store. It is never on the path of a read, write or
// flush. All methods may be called from any goroutine and block until ctx ends; when the service cannot
// be reached they return an error wrapping ErrMetadataUnavailable, and whether the change was
// made is then unknown. Messages returned belong to the caller.
type MetadataService interface {
	Kind() MetadataKind
	// GlobalMetadata returns ErrNoGlobalMetadata before init.
	GlobalMetadata(ctx context.Context) (GlobalMetadata, error)

	GrantLease(ctx context.Context, ttl time.Duration) (LeaseID, error)
	// RenewLease keeps a lease for another of its TTLs; ErrLeaseNotFound once it has expired.
	RenewLease(ctx context.Context, id LeaseID) error
	// RevokeLease ends a lease and removes what was put under it. An expired one is not an error.
	RevokeLease(ctx context.Context, id LeaseID) error

	// PutPeer records a peer for good and marks it alive for as long as the lease lives (lease 0: recorded only).
	PutPeer(ctx context.Context, lease LeaseID, p *models.Peer) error
	// DeletePeer forgets a peer. ErrNotExist if there is none.
	DeletePeer(ctx context.Context, id PeerID) error
	// Peers lists all recorded peers, sorted by UUID, Alive filled in from the leases.
	Peers(ctx context.Context) ([]*models.Peer, error)
	// WatchPeers calls fn with the full list now and after every change (several may be one call), one call at a
	// time, until ctx ends; it then returns ctx's error. It survives reconnections by itself.
	WatchPeers(ctx context.Context, fn func([]*models.Peer)) error

	// Ring returns the current ring in its stored form (a models.Ring); ErrNotExist before there is one.
	Ring(ctx context.Context) ([]byte, error)
	// RingAt returns the ring of an earlier version; ErrNotExist if it was never set.
	RingAt(ctx context.Context, version uint64) ([]byte, error)
	// SetRing publishes ring, whose version must be the current one plus one: ErrNonSequentialRing otherwise.
	// Earlier versions stay readable by RingAt.
	SetRing(ctx context.Context, version uint64, ring []byte) error
	// WatchRing is to Ring what WatchPeers is to Peers.
	WatchRing(ctx context.Context, fn func(ring []byte)) error

	// CreateVolume gives v a fresh id, higher than all before, and records it, together with an empty VolumeState. ErrExists if the name is taken.
	CreateVolume(ctx context.Context, v *models.Volume) error
	// Volume returns a volume by its name; ErrNotExist.
	Volume(ctx context.Context, name string) (*models.Volume, error)
	// Volumes lists all volumes sorted by name.
	Volumes(ctx context.Context) ([]*models.Volume, error)
	// UpdateVolume changes a volume's record, its name included; the id stays. change may be called several times. ErrNotExist, ErrExists if
	// the new name is taken, or what change returned. Names that begin with a dot are for volumes that are deleted and kept for their clones.
	UpdateVolume(ctx context.Context, name string, change func(*models.Volume) error) error
	// DeleteVolume removes a volume; ErrNotExist, or ErrLocked (naming the holder) while it is attached.
	DeleteVolume(ctx context.Context, name string) error

	// VolumeState reads the state of a volume; ErrNotExist.
	VolumeState(ctx context.Context, id VolumeID) (VolumeState, error)
	// VolumeStates reads the states of all volumes with ids above after, in their order, limit at most (limit must be positive). No
	// volume is left out that existed when it was called and still does. It is one request.
	VolumeStates(ctx context.Context, after VolumeID, limit int) (VolumeStates, error)
	// Holder returns who has the volume attached; nil if nobody has.
	Holder(ctx context.Context, id VolumeID) (*models.Holder, error)
	// Attach is step 1 of an attach, in one transaction: epoch+1, and the holder recorded under lease.
	// Returned is the state with the new epoch and the head and window as they were. While another
	// holder's lease lives it fails with an error wrapping ErrLocked that names the holder, unless force.
	Attach(ctx context.Context, id VolumeID, lease LeaseID, h *models.Holder, force bool) (VolumeState, error)
	// Commit replaces the state if nothing has changed since from was read: head, window and all. The epoch
	// must stay. ErrCompareFailed otherwise: read again to learn by whom one was fenced.
	Commit(ctx context.Context, id VolumeID, from VolumeState, to *models.VolumeState) (VolumeState, error)
	// Amend replaces what is not the attached writer's, if nothing has changed since from was read: pins, asks, how long to retain. Epoch,
	// head, window and the transaction's number must stay: ErrInvalid. ErrCompareFailed: read again, and decide again.
	Amend(ctx context.Context, id VolumeID, from VolumeState, to *models.VolumeState) (VolumeState, error)
	// Relock records the holder again after its lease was lost, if the epoch is still the one given
	// and nobody else holds the volume: ErrFenced, ErrLocked.
	Relock(ctx context.Context, id VolumeID, epoch uint64, lease LeaseID, h *models.Holder) error
	// Unlock ends the holding of epoch; nothing happens if somebody else holds the volume by now.
	Unlock(ctx context.Context, id VolumeID, epoch uint64) error
	// WatchVolume calls fn with the state now and after changes (several may be one call) until ctx ends.
	WatchVolume(ctx context.Context, id VolumeID, fn func(VolumeState)) error

	Close() error
}

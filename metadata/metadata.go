// Package metadata holds what the implementations of torus.MetadataService share, so that they
// refuse the same things in the same words: metadata/etcd is the real one, metadata/temp lives in memory, for
// tests and the simulator. Both pass metadata/metadatatest. metadata/embed is an etcd server in this process.
package metadata

import (
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	"github.com/coreos/torus"
	"github.com/coreos/torus/models"
)

// Format is the version of everything stored in the MDS and in INodes together (models.Global.format).
const Format = 1

// MaxVolumeName bounds the name of a volume, in bytes.
const MaxVolumeName = 255

// CheckVolumeName returns an error wrapping torus.ErrInvalid unless name can be a volume's. '@' and '/' are
// left out as they mean snapshots and paths, white space and commas as lists are made of them.
func CheckVolumeName(name string) error {
	bad := ""
	switch {
	case name == "":
		bad = "is empty"
	case len(name) > MaxVolumeName:
		bad = fmt.Sprintf("is longer than %d bytes", MaxVolumeName)
	case !utf8.ValidString(name):
		bad = "is not UTF-8"
	case name[0] == '-' || name[0] == '.':
		bad = "starts with '-' or '.'"
	case strings.ContainsAny(name, "@/,\\") || strings.ContainsFunc(name, func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsPrint(r) }):
		bad = "has a character other than letters, digits and marks (no white space, @ / , \\)"
	}
	if bad == "" {
		return nil
	}
	return &torus.Error{Op: "volume name", Obj: fmt.Sprintf("%.300q", name), Err: fmt.Errorf("%w: it %s", torus.ErrInvalid, bad)}
}

// CheckGlobal returns an error wrapping torus.ErrInvalid unless g can be a cluster's.
func CheckGlobal(g torus.GlobalMetadata) error {
	switch {
	case g.ClusterID == "":
		return fmt.Errorf("a cluster needs an id: %w", torus.ErrInvalid)
	case g.BlockSize == 0 || g.BlockSize%torus.PageSize != 0 || g.BlockSize > torus.MaxBlockSize:
		return fmt.Errorf("block size %d: %w (a multiple of %d, %d at most)", g.BlockSize, torus.ErrInvalid, torus.PageSize, torus.MaxBlockSize)
	}
	return nil
}

// Locked is the error of one who finds a volume attached by h.
func Locked(op, volume string, h *models.Holder) error {
	who := "somebody unknown"
	if h != nil {
		who = fmt.Sprintf("%s on %s (pid %d, epoch %d", h.What, h.Host, h.Pid, h.Epoch)
		if h.SinceUnixMs > 0 {
			who += ", since " + time.UnixMilli(h.SinceUnixMs).UTC().Format(time.RFC3339)
		}
		who += ")"
	}
	return &torus.Error{
		Op: op, Obj: volume,
		Err:  fmt.Errorf("%w: attached by %s", torus.ErrLocked, who),
		Hint: "Detach it there. If that machine is dead its lease ends in seconds; --force takes the volume over at once.",
	}
}

// Fenced is the error of one who acts under an epoch that is over.
func Fenced(op, volume string, epoch, now uint64) error {
	return &torus.Error{Op: op, Obj: volume, Err: fmt.Errorf("%w: epoch %d, by now it is %d", torus.ErrFenced, epoch, now)}
}

// CompareFailed is the error of a Commit that came too late.
func CompareFailed(volume string, from, now torus.VolumeState) error {
	why := fmt.Sprintf("epoch %d is at transaction %d, not %d", now.GetEpoch(), now.GetTxn(), from.GetTxn())
	if now.GetEpoch() != from.GetEpoch() {
		why = fmt.Sprintf("epoch %d is over, by now it is %d", from.GetEpoch(), now.GetEpoch())
	}
	return &torus.Error{Op: "Commit", Obj: volume, Err: fmt.Errorf("%w (%s)", torus.ErrCompareFailed, why)}
}

// NextState is what Commit(from, to) stores: to, with the number of this transaction.
func NextState(from torus.VolumeState, to *models.VolumeState) (*models.VolumeState, error) {
	if to.GetEpoch() != from.GetEpoch() {
		return nil, fmt.Errorf("commit under epoch %d of a state of epoch %d: %w", from.GetEpoch(), to.GetEpoch(), torus.ErrInvalid)
	}
	s := proto.CloneOf(to)
	s.Txn = from.GetTxn() + 1
	return s, nil
}

// CheckUpdate says whether UpdateVolume may make to of from.
func CheckUpdate(from, to *models.Volume) error {
	if to.GetId() != from.GetId() || to.GetType() != from.GetType() {
		return &torus.Error{Op: "UpdateVolume", Obj: "volume " + from.GetName(), Err: fmt.Errorf("id and type of a volume stay: %w", torus.ErrInvalid)}
	}
	if strings.HasPrefix(to.GetName(), ".") {
		return CheckVolumeName(strings.TrimPrefix(to.GetName(), "."))
	}
	return CheckVolumeName(to.GetName())
}

// AmendedState is what Amend(from, to) stores: to, if it leaves alone what is the writer's.
func AmendedState(from torus.VolumeState, to *models.VolumeState) (*models.VolumeState, error) {
	if to.GetEpoch() != from.GetEpoch() || to.GetTxn() != from.GetTxn() || !proto.Equal(to.GetHead(), from.GetHead()) || !proto.Equal(to.GetOpen(), from.GetOpen()) {
		return nil, fmt.Errorf("an amendment that changes epoch, head or window: %w", torus.ErrInvalid)
	}
	return proto.CloneOf(to), nil
}

// HolderAt returns a copy of h that holds under epoch; h may be nil.
func HolderAt(h *models.Holder, epoch uint64) *models.Holder {
	c := &models.Holder{}
	if h != nil {
		c = proto.CloneOf(h)
	}
	c.Epoch = epoch
	return c
}

// Fate is what became of a Commit whose answer was lost.
type Fate int

// The fates of a Commit.
const (
	Pending Fate = iota // not made so far; it may yet be, unless something else changes the state first
	Made                // it was made
	Void                // it was not, and cannot be any more
	Unclear             // others have committed since; whether it was made before that cannot be seen any more
)

// Settle tells the fate of Commit(from, to) by the state read afterwards. Attaches change the epoch only, amendments neither
// that nor the head and the window, commits count Txn, and of all commits from the same state only one is made; that is enough to tell.
func Settle(from torus.VolumeState, to *models.VolumeState, now torus.VolumeState) Fate {
	switch {
	case now.Revision == from.Revision:
		return Pending
	case now.GetTxn() == from.GetTxn():
		return Void
	case now.GetTxn() > from.GetTxn()+1:
		return Unclear
	case proto.Equal(now.GetHead(), to.GetHead()) && proto.Equal(now.GetOpen(), to.GetOpen()):
		return Made
	}
	return Void
}

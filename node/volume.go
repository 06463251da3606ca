package node

import (
	"context"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/coreos/torus"
	"github.com/coreos/torus/blockset"
	"github.com/coreos/torus/models"
)

// maxVolumeName bounds a volume's name in bytes: an NBD export name, and a key in etcd.
const maxVolumeName = 255

// CheckVolumeName refuses names that could not be told from a snapshot (VOL@SNAP), a path, or noise.
func CheckVolumeName(name string) error {
	bad := func(why string) error {
		return fmt.Errorf("the name %q %s: %w\nuse letters, digits, dots, dashes and underscores", name, why, torus.ErrInvalid)
	}
	switch {
	case name == "":
		return bad("is empty")
	case len(name) > maxVolumeName:
		return fmt.Errorf("the name of %d bytes is too long: %w\n%d bytes at most", len(name), torus.ErrInvalid, maxVolumeName)
	case !utf8.ValidString(name):
		return bad("is not UTF-8")
	case name == "." || name == ".." || name[0] == '-':
		return bad("cannot be used")
	case strings.ContainsAny(name, "@/\\"):
		return bad("has a character that is kept for other uses (@ / \\)")
	}
	for _, r := range name {
		if unicode.IsSpace(r) || !unicode.IsPrint(r) {
			return bad("has a blank or a character that cannot be printed")
		}
	}
	return nil
}

// MaxVolumeSize is the largest size of a volume in bytes: 64 TiB.
const MaxVolumeSize = 64 << 40

// CreateBlockVolume records a new block volume. An empty spec means the cluster's. ErrExists, ErrInvalid.
func CreateBlockVolume(ctx context.Context, mds torus.MetadataService, name string, size uint64, spec string) (*models.Volume, error) {
	if err := CheckVolumeName(name); err != nil {
		return nil, err
	}
	switch {
	case size == 0:
		return nil, fmt.Errorf("size 0: %w\ngive a size as 1GiB, 10G, 512MiB or bytes", torus.ErrInvalid)
	case size > MaxVolumeSize:
		return nil, fmt.Errorf("size of %d bytes is too large: %w\n64TiB at most", size, torus.ErrInvalid)
	case size%torus.PageSize != 0:
		return nil, fmt.Errorf("size of %d bytes is not a multiple of %d: %w\nthe next one is %d",
			size, torus.PageSize, torus.ErrInvalid, (size/torus.PageSize+1)*torus.PageSize)
	}
	if spec == "" {
		global, err := mds.GlobalMetadata(ctx)
		if err != nil {
			return nil, err
		}
		spec = global.DefaultBlockSpec
	}
	parsed, err := blockset.Parse(spec)
	if err != nil {
		return nil, err
	}
	v := &models.Volume{
		Name: name, Type: "block", SizeBytes: size, BlockSpec: parsed.String(), CreatedUnixMs: time.Now().UnixMilli(),
	}
	if err := mds.CreateVolume(ctx, v); err != nil {
		return nil, err
	}
	return v, nil
}

// Package block is the first type of volume: a block device. A Directory finds volumes by name, attaches one when its first
// user opens it and releases it when the last has gone; front ends see device.Device and device.Directory only.
package block

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/coreos/torus"
	"github.com/coreos/torus/blockset"
	"github.com/coreos/torus/device"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/models"
)

// VolumeType is the type of volume this package serves.
const VolumeType = "block"

// Create records a new volume of size bytes. spec is its blockset, "" for the cluster's default.
// Errors: torus.ErrInvalid, torus.ErrExists.
func Create(ctx context.Context, mds torus.MetadataService, name string, size uint64, spec string) (*models.Volume, error) {
	fail := func(err error, hint string) error {
		return &torus.Error{Op: "create", Obj: "volume " + name, Err: err, Hint: hint}
	}
	if err := CheckName(name); err != nil {
		return nil, fail(err, "Use letters, digits and . _ - (at most 128, beginning with a letter or digit).")
	}
	switch {
	case size == 0:
		return nil, fail(fmt.Errorf("a size of 0: %w", torus.ErrInvalid), "Give a size such as 10GiB.")
	case size%512 != 0:
		return nil, fail(fmt.Errorf("%d bytes is not a multiple of 512: %w", size, torus.ErrInvalid), "Round it to a whole sector.")
	}
	gmd, err := mds.GlobalMetadata(ctx)
	if err != nil {
		return nil, fail(err, "")
	}
	if most := file.MaxSize(gmd.BlockSize); size > most {
		return nil, fail(fmt.Errorf("%d bytes is more than a volume can have (%d GiB, with blocks of %d KiB): %w", size, most>>30, gmd.BlockSize>>10, torus.ErrInvalid), "Make several smaller volumes.")
	}
	if spec == "" {
		spec = gmd.DefaultBlockSpec
	}
	if _, err := blockset.Parse(spec); err != nil {
		return nil, fail(err, "")
	}
	v := &models.Volume{Name: name, Type: VolumeType, SizeBytes: size, BlockSpec: spec, CreatedUnixMs: time.Now().UnixMilli()}
	if err := mds.CreateVolume(ctx, v); err != nil {
		hint := ""
		if errors.Is(err, torus.ErrExists) {
			hint = "Choose another name, or delete it first: torusctl volume delete " + name
		}
		return nil, fail(err, hint)
	}
	return v, nil
}

// CheckName says whether a volume may have this name: ErrInvalid. "@" separates a snapshot's name, "/" a path.
func CheckName(name string) error {
	if name == "" || len(name) > 128 {
		return fmt.Errorf("a name of %d characters: %w", len(name), torus.ErrInvalid)
	}
	for i, c := range []byte(name) {
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !letter && (i == 0 || c != '.' && c != '_' && c != '-') {
			return fmt.Errorf("%q in a name: %w", c, torus.ErrInvalid)
		}
	}
	return nil
}

// Volume is an attached block volume: a device.Device.
type Volume struct {
	info *models.Volume
	f    *file.File
}

var _ device.Device = (*Volume)(nil)

// Size is the size in bytes.
func (v *Volume) Size() uint64 { return v.f.Size() }

// ReadOnly is false.
func (v *Volume) ReadOnly() bool { return false }

// Info is the volume as the MDS knows it.
func (v *Volume) Info() *models.Volume { return v.info }

// File is the file under the volume.
func (v *Volume) File() *file.File { return v.f }

// Submit starts a request.
func (v *Volume) Submit(r *device.Request) { v.f.Submit(r) }

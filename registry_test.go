package torus_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/coreos/torus"
)

func TestUnknownMetadataServiceListsWhatIsRegistered(t *testing.T) {
	ctx := context.Background()
	_, err := torus.CreateMetadataService(ctx, "nowhere", torus.Config{})
	if !errors.Is(err, torus.ErrNotSupported) || !strings.Contains(err.Error(), "registered: none") {
		t.Fatalf("nothing registered: %v", err)
	}
	called := ""
	torus.RegisterMetadataService("b", func(context.Context, torus.Config) (torus.MetadataService, error) { called = "b"; return nil, nil })
	torus.RegisterMetadataService("a", func(context.Context, torus.Config) (torus.MetadataService, error) { called = "a"; return nil, nil })
	torus.RegisterMetadataInit("a", func(context.Context, torus.Config, torus.GlobalMetadata, torus.Ring) error {
		called = "init"
		return nil
	})
	torus.RegisterMetadataWipe("a", func(context.Context, torus.Config) error { called = "wipe"; return nil })
	torus.RegisterSetRing("a", func(context.Context, torus.Config, torus.Ring) error { called = "ring"; return nil })

	_, err = torus.CreateMetadataService(ctx, "nowhere", torus.Config{})
	if !errors.Is(err, torus.ErrNotSupported) || !strings.Contains(err.Error(), "registered: a, b") {
		t.Fatalf("two registered: %v", err)
	}
	for want, f := range map[string]func() error{
		"a":    func() error { _, err := torus.CreateMetadataService(ctx, "a", torus.Config{}); return err },
		"b":    func() error { _, err := torus.CreateMetadataService(ctx, "b", torus.Config{}); return err },
		"init": func() error { return torus.InitMDS(ctx, "a", torus.Config{}, torus.GlobalMetadata{}, nil) },
		"wipe": func() error { return torus.WipeMDS(ctx, "a", torus.Config{}) },
		"ring": func() error { return torus.SetRing(ctx, "a", torus.Config{}, nil) },
	} {
		if err := f(); err != nil || called != want {
			t.Fatalf("%s: called %q, %v", want, called, err)
		}
	}
	if err := torus.WipeMDS(ctx, "b", torus.Config{}); !errors.Is(err, torus.ErrNotSupported) {
		t.Fatalf("wipe of b: %v", err)
	}
}

package main

import (
	"encoding/csv"
	"strings"
	"testing"
	"time"

	"github.com/coreos/torus/models"
)

func TestVolumes(t *testing.T) {
	c := initCluster(t)
	var none []volumeJSON
	c.json(t, &none, "volume", "list")
	if none == nil || len(none) != 0 {
		t.Errorf("no volumes: %v, want an empty list", none)
	}
	c.run("volume", "create-block", "v1", "1GiB").CheckSuccess(t, "v1", "1.0 GiB")
	c.run("block", "create", "v2", "10G", "--block-spec", "crc,rep=3").CheckSuccess(t, "10.0 GiB")
	var created volumeJSON
	c.json(t, &created, "volume", "create-block", "v3", "512MiB")
	if created.Name != "v3" || created.SizeBytes != 512<<20 || created.Status != "available" {
		t.Errorf("%+v", created)
	}

	// What is refused, and why.
	c.run("volume", "create-block", "v1", "1GiB").CheckFailure(t, "volume v1", "already exists", "torusctl volume delete v1")
	c.run("volume", "create-block", "v", "0").CheckFailure(t, "volume v", "size")
	c.run("volume", "create-block", "v", "1000").CheckFailure(t, "volume v", "multiple of 512")
	c.run("volume", "create-block", "v", "1000TiB").CheckFailure(t, "volume v", "GiB, with blocks of")
	c.run("volume", "create-block", "v@s", "1GiB").CheckFailure(t, "v@s", "letters")
	c.run("volume", "create-block", "v", "1GiB", "--block-spec", "raid").CheckFailure(t, "raid", "rep=N")
	c.run("volume", "info", "v").CheckFailure(t, "volume v", "does not exist", "torusctl volume list")
	c.run("volume", "delete", "v").CheckFailure(t, "volume v", "does not exist", "torusctl volume list")

	// An attached volume shows who has it, and cannot be deleted.
	id, state := c.attach(t, "v2")
	next := &models.VolumeState{Epoch: state.Epoch, Head: &models.Head{
		Epoch: state.Epoch, Number: 1, LiveBytes: 5 << 20, StoredBytes: 8 << 20, CommittedUnixMs: time.Now().UnixMilli(),
	}}
	if _, err := c.mds.Commit(t.Context(), id, state, next); err != nil {
		t.Fatal(err)
	}
	c.run("volume", "delete", "v2").CheckFailure(t, "volume v2", "h1", "torusctl volume info v2")
	var v volumeJSON
	c.json(t, &v, "volume", "info", "v2")
	if v.Name != "v2" || v.Type != "block" || v.SizeBytes != 10<<30 || v.LiveBytes != 5<<20 || v.StoredBytesPerReplica != 8<<20 ||
		v.StoredBytes != 3*(8<<20) || v.Status != "attached" || v.AttachedTo != "h1 pid 7 (torusblk nbdserve)" || v.BlockSpec != "crc,rep=3" {
		t.Errorf("%+v", v)
	}
	c.run("volume", "info", "v2").CheckSuccess(t, "stored per replica", "8.0 MiB", "h1 pid 7")

	// The keys are an interface.
	var raw []map[string]any
	c.json(t, &raw, "volume", "list")
	if len(raw) != 3 {
		t.Fatal(raw)
	}
	for _, key := range []string{"name", "id", "type", "size_bytes", "live_bytes", "stored_bytes", "stored_bytes_per_replica", "status", "attached_to"} {
		if _, ok := raw[0][key]; !ok {
			t.Errorf("no key %q: %v", key, raw[0])
		}
	}
	c.run("volume", "list").CheckSuccess(t, "NAME", "10.0 GiB", "attached")
	c.run("volume", "list", "--si").CheckSuccess(t, "10.7 GB")
	rows, err := csv.NewReader(strings.NewReader(c.run("volume", "list", "--csv").Stdout)).ReadAll()
	if err != nil || len(rows) != 4 || rows[0][0] != "name" || rows[1][3] != "1073741824" {
		t.Errorf("%v, %v", rows, err)
	}

	c.run("volume", "delete", "v1").CheckSuccess(t, "v1")
	c.run("volume", "info", "v1").CheckFailure(t, "does not exist")
}

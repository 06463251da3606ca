package etcd

import (
	"fmt"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/coreos/torus"
	"github.com/coreos/torus/models"
	"github.com/coreos/torus/ring"
)

// The layout is a format: what is in etcd is what docs/format/etcd-keys.md says, and nothing else.
func TestKeys(t *testing.T) {
	cfg := Config{Endpoints: []string{server(t).Endpoint()}} // the default prefix
	ctx := t.Context()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	first, err := ring.NewEmpty(1, 2)
	must(err)
	must(Init(ctx, cfg, gmd, first))
	c := connect(t, cfg)
	must(c.SetRing(ctx, 2, []byte("two")))
	lease, err := c.GrantLease(ctx, time.Minute)
	must(err)
	must(c.PutPeer(ctx, lease, &models.Peer{Uuid: "AAAAAAAA-0000-4000-8000-00000000000B", Address: "tdp://h:1"}))
	gone := &models.Volume{Name: "gone"}
	must(c.CreateVolume(ctx, gone))
	must(c.DeleteVolume(ctx, "gone"))
	v := &models.Volume{Name: "demo"}
	must(c.CreateVolume(ctx, v))
	_, err = c.Attach(ctx, torus.VolumeID(v.Id), lease, &models.Holder{Host: "h"}, false)
	must(err)

	want := `/torus/v2/meta/global
/torus/v2/meta/rings/1
/torus/v2/meta/rings/2
/torus/v2/meta/the-one-ring
/torus/v2/meta/volumeminter 2
/torus/v2/nodes/aaaaaaaa-0000-4000-8000-00000000000b leased tdp://h:1
/torus/v2/peers/aaaaaaaa-0000-4000-8000-00000000000b
/torus/v2/volumeid/0000000002 demo
/torus/v2/volumemeta/0000000002/lock leased
/torus/v2/volumemeta/0000000002/state
/torus/v2/volumes/demo
`
	resp, err := c.etcd.Get(ctx, "", clientv3.WithFromKey())
	must(err)
	var got strings.Builder
	for _, kv := range resp.Kvs {
		fmt.Fprint(&got, string(kv.Key))
		if kv.Lease != 0 {
			got.WriteString(" leased")
		}
		if k := string(kv.Key); strings.Contains(k, "nodes/") || strings.Contains(k, "minter") {
			got.WriteString(" " + string(kv.Value))
		} else if strings.Contains(k, "volumeid/") {
			name, mark, ok := strings.Cut(string(kv.Value), " ")
			if !ok || len(mark) < 20 {
				t.Errorf("mark %q", mark)
			}
			got.WriteString(" " + name)
		}
		got.WriteString("\n")
	}
	if got.String() != want {
		t.Errorf("got\n%swant\n%s", got.String(), want)
	}

	// A heartbeat writes one key.
	before := resp.Header.Revision
	must(c.PutPeer(ctx, lease, &models.Peer{Uuid: "aaaaaaaa-0000-4000-8000-00000000000b"}))
	resp, err = c.etcd.Get(ctx, c.keys.node("aaaaaaaa-0000-4000-8000-00000000000b"))
	must(err)
	if resp.Kvs[0].ModRevision > before {
		t.Error("a heartbeat wrote the sign of life again")
	}
	// What is not under the prefix is not ours to wipe.
	_, err = c.etcd.Put(ctx, "/torus/v1/x", "somebody else's")
	must(err)
	must(Wipe(ctx, cfg))
	resp, err = c.etcd.Get(ctx, "", clientv3.WithFromKey())
	must(err)
	if len(resp.Kvs) != 1 {
		t.Errorf("left after a wipe: %v", resp.Kvs)
	}
}

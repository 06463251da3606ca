package node

import (
	"errors"
	"slices"
	"testing"

	"github.com/coreos/torus"
)

func TestParseEndpoints(t *testing.T) {
	for text, want := range map[string][]string{
		"127.0.0.1:2379":                      {"127.0.0.1:2379"},
		"etcd":                                {"etcd:2379"},
		"http://a:2379/, https://b:2380":      {"http://a:2379", "https://b:2380"},
		"[::1]:2379":                          {"[::1]:2379"},
		"a.example.org:1,b.example.org:65535": {"a.example.org:1", "b.example.org:65535"},
	} {
		if got, err := ParseEndpoints(text); err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %v, %v, want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"", ",", "a,", ":2379", "a:0", "a:65536", "a:b:c", "ftp://a:1", "http://", "a:-1", "user@a:1", "a/b:1", "a b:1"} {
		if got, err := ParseEndpoints(text); !errors.Is(err, torus.ErrInvalid) {
			t.Errorf("%q: %v, %v, want an error", text, got, err)
		}
	}
}

func FuzzParseEndpoints(f *testing.F) {
	for _, s := range []string{"127.0.0.1:2379", "a,b", "http://x:1", "[::1]", "[", ":", "https://[::1]:2"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		list, err := ParseEndpoints(text)
		if err != nil {
			return
		}
		// What was understood is written in a way that is understood again, to the same.
		again, err := ParseEndpoints(Etcd{Endpoints: list}.String())
		if err != nil || !slices.Equal(again, list) {
			t.Fatalf("%q reads as %q, which reads as %q, %v", text, list, again, err)
		}
	})
}

func TestCopies(t *testing.T) {
	for spec, want := range map[string]int{"crc,rep=3": 3, "crc": 2, "": 2, "nonsense": 2} {
		if got := Copies(spec, 2); got != want {
			t.Errorf("%q: %d, want %d", spec, got, want)
		}
	}
	if got := Copies("crc", 0); got != 1 {
		t.Errorf("no ring: %d", got)
	}
}

package node

import (
	"errors"
	"strings"
	"testing"

	"github.com/coreos/torus"
)

func TestPeerAddress(t *testing.T) {
	for text, want := range map[string]string{"tdp://10.0.0.1:40000": "10.0.0.1", "tdp://[::1]:0": "::1", "tdp://host:1/": "host"} {
		if host, _, err := parsePeerAddress(text); err != nil || host != want {
			t.Errorf("%q: %q, %v", text, host, err)
		}
	}
	// Nobody could find a peer that says it is at 0.0.0.0.
	for _, text := range []string{"", "10.0.0.1:40000", "http://10.0.0.1:40000", "tdp://", "tdp://:40000", "tdp://0.0.0.0:40000", "tdp://[::]:1",
		"tdp://h", "tdp://h:port", "tdp://h:65536", "tdp://h:1:2"} {
		if _, _, err := parsePeerAddress(text); !errors.Is(err, torus.ErrInvalid) || !strings.Contains(err.Error(), "tdp://IP:PORT") {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestListenAddress(t *testing.T) {
	for text, want := range map[string]string{
		"localhost:10809": "tcp://localhost:10809", ":0": "tcp://:0", "unix:/run/x.sock": "unix:/run/x.sock", "unix:x": "unix:x", "tcp://h:1": "tcp://h:1",
	} {
		if got, err := listenAddress("--nbd", text); err != nil || got != want {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "unix:", "10809", "h:port", "h:70000"} {
		if _, err := listenAddress("--nbd", text); !errors.Is(err, torus.ErrInvalid) || !strings.Contains(err.Error(), "--nbd") {
			t.Errorf("%q: %v", text, err)
		}
	}
}

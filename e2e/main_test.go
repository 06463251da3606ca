package e2e

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// suite is what the tests share: the binaries, a directory for everything, and one cluster.
type suite struct {
	dir  string
	keep bool

	cluster *cluster // made by the first test that asks; see sharedCluster
}

var shared suite

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if err := shared.start(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer shared.stop()
	return m.Run()
}

func (s *suite) start() error {
	s.dir = os.Getenv("TORUS_E2E_KEEP")
	s.keep = s.dir != ""
	if s.keep {
		if err := os.MkdirAll(s.dir, 0o755); err != nil {
			return err
		}
	} else {
		dir, err := os.MkdirTemp("", "torus-e2e")
		if err != nil {
			return err
		}
		s.dir = dir
	}
	return nil
}

func (s *suite) stop() {
	killAll()
	if !s.keep {
		os.RemoveAll(s.dir) //nolint:errcheck // a temporary directory
	}
}

// binaries builds the programs, once, and returns where they are.
var binaries = sync.OnceValues(func() (string, error) {
	dir := filepath.Join(shared.dir, "bin")
	flags := strings.Fields(os.Getenv("TORUS_E2E_BUILDFLAGS"))
	for output, pkgs := range map[string][]string{
		dir + "/":                  {"github.com/coreos/torus/cmd/torusd", "github.com/coreos/torus/cmd/torusctl", "github.com/coreos/torus/cmd/torusblk"},
		filepath.Join(dir, "etcd"): {"go.etcd.io/etcd/server/v3"},
	} {
		args := append([]string{"build", "-o", output}, flags...)
		if out, err := exec.Command("go", append(args, pkgs...)...).CombinedOutput(); err != nil {
			return "", fmt.Errorf("go build %s: %w\n%s", strings.Join(pkgs, " "), err, out)
		}
	}
	return dir, nil
})

// program is the path of one of the programs.
func program(t testing.TB, name string) string {
	t.Helper()
	dir, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, name)
}

// tempDir is a directory of this test, short enough for the path of a unix socket.
func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp(shared.dir, strings.TrimPrefix(strings.Map(func(r rune) rune {
		if r == '/' {
			return '-'
		}
		return r
	}, t.Name()), "Test"))
	if err != nil {
		t.Fatal(err)
	}
	if !shared.keep {
		t.Cleanup(func() { os.RemoveAll(dir) }) //nolint:errcheck // a temporary directory
	}
	return dir
}

// soaking says whether the faults are to be repeated as often as it takes to believe the figures (make soak).
func soaking() bool { return os.Getenv("TORUS_E2E_SOAK") != "" }

// rounds is how often a fault is repeated: short, or soak in a long run.
func rounds(t testing.TB, short, soak int) int {
	t.Helper()
	n, percent := short, 100
	if soaking() {
		n = soak
	}
	if text := os.Getenv("TORUS_E2E_ROUNDS"); text != "" {
		p, err := strconv.Atoi(text)
		if err != nil || p < 1 {
			t.Fatalf("TORUS_E2E_ROUNDS=%q is not a percentage", text)
		}
		percent = p
	}
	return max(1, n*percent/100)
}

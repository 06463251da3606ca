package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"github.com/coreos/torus"
	"github.com/coreos/torus/node"
)

// DefaultEtcd is where etcd is unless a flag or the config file says otherwise.
const DefaultEtcd = "127.0.0.1:2379"

// DefaultProfile is the profile of the config file that is used unless another is named.
const DefaultProfile = "default"

// Etcd are the flags that say how to reach etcd. What is not given on the command line comes from
// the profile of the config file, and then from the defaults.
type Etcd struct {
	Endpoints string
	CertFile  string
	KeyFile   string
	CAFile    string
	Config    string
	Profile   string

	flags *pflag.FlagSet
}

// AddFlags defines the flags.
func (e *Etcd) AddFlags(flags *pflag.FlagSet) {
	e.flags = flags
	flags.StringVarP(&e.Endpoints, "etcd", "C", DefaultEtcd, "`HOST:PORT` of etcd, several with commas between")
	flags.StringVar(&e.CertFile, "etcd-cert-file", "", "certificate for client authentication at etcd (PEM `FILE`)")
	flags.StringVar(&e.KeyFile, "etcd-key-file", "", "key of that certificate (PEM `FILE`)")
	flags.StringVar(&e.CAFile, "etcd-ca-file", "", "certificate authority of etcd (PEM `FILE`)")
	flags.StringVar(&e.Config, "config", "", "config `FILE` (default $HOME/.torus/config.json)")
	flags.StringVar(&e.Profile, "profile", DefaultProfile, "`NAME` of the profile in the config file")
}

// Resolve puts together flags, config file and defaults.
func (e *Etcd) Resolve() (node.Etcd, error) {
	path, err := e.ConfigPath()
	var config ConfigFile
	if err == nil {
		config, err = ReadConfig(path)
	}
	// Only a config file that was asked for must be there.
	optional := !e.flags.Changed("config") && !e.flags.Changed("profile")
	if err != nil && !(optional && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, errNoHome))) {
		return node.Etcd{}, err
	}
	profile, ok := config.Etcd[e.Profile]
	if !ok && e.flags.Changed("profile") && !e.flags.Changed("etcd") {
		return node.Etcd{}, fmt.Errorf("no profile %q in %s (it has: %s): %w\nwrite it with `torusctl config --profile %s -C HOST:2379`",
			e.Profile, path, names(config), torus.ErrNotExist, e.Profile)
	}
	pick := func(flag, given, stored string) string {
		if stored != "" && !e.flags.Changed(flag) {
			return stored
		}
		return given
	}
	out := node.Etcd{
		CertFile: pick("etcd-cert-file", e.CertFile, profile.CertFile),
		KeyFile:  pick("etcd-key-file", e.KeyFile, profile.KeyFile),
		CAFile:   pick("etcd-ca-file", e.CAFile, profile.CAFile),
	}
	out.Endpoints, err = node.ParseEndpoints(pick("etcd", e.Endpoints, profile.Endpoints))
	return out, err
}

// ConfigPath is the config file's path.
func (e *Etcd) ConfigPath() (string, error) {
	if e.Config != "" {
		return e.Config, nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", errNoHome
	}
	return filepath.Join(home, ".torus", "config.json"), nil
}

var errNoHome = errors.New("no config file: $HOME is not set\nname one with --config FILE")

func names(c ConfigFile) string {
	if len(c.Etcd) == 0 {
		return "none"
	}
	return strings.Join(slices.Sorted(maps.Keys(c.Etcd)), ", ")
}

// ConfigFile is the contents of $HOME/.torus/config.json.
type ConfigFile struct {
	Etcd map[string]Profile `json:"etcd_config"`
}

// Profile says how to reach one cluster's etcd.
type Profile struct {
	Endpoints string `json:"etcd,omitempty"`
	CAFile    string `json:"etcd-ca-file,omitempty"`
	CertFile  string `json:"etcd-cert-file,omitempty"`
	KeyFile   string `json:"etcd-key-file,omitempty"`
}

// ReadConfig reads a config file; fs.ErrNotExist if there is none.
func ReadConfig(path string) (ConfigFile, error) {
	var c ConfigFile
	b, err := os.ReadFile(path)
	if err != nil {
		return c, fmt.Errorf("config file: %w\nwrite one with `torusctl config`", err)
	}
	if len(b) == 0 {
		return c, nil
	}
	if err := json.Unmarshal(b, &c); err != nil {
		return c, fmt.Errorf("config file %s: %w\nmend it, or write it anew with `torusctl config`", path, err)
	}
	return c, nil
}

// Write stores the config file, readable by its owner only.
func (c ConfigFile) Write(path string) error {
	b, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("config file: %w", err)
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("config file: %w", err)
	}
	return os.Rename(tmp, path)
}

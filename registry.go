package torus

import (
	"context"
	"fmt"
	"log/slog"
	"sort"
	"strings"
	"sync"
	"time"
)

// Version is the version of this program, set at link time:
// -ldflags "-X github.com/coreos/torus.Version=v2.0.0".
var Version = "dev"

// MaxReplication is the largest number of copies of a block that a spec or a ring may ask for.
const MaxReplication = 8

// Config is what it takes to reach a metadata service. Zero durations mean the implementation's defaults.
type Config struct {
	// MetadataAddress is where the service is: HOST:PORT or URL, several separated by commas.
	MetadataAddress string
	// TLS files in PEM. The CA alone verifies the server; certificate and key, both or neither, identify this client.
	CAFile, CertFile, KeyFile string
	// DialTimeout bounds the first connection, RequestTimeout each call whose context has no earlier deadline.
	DialTimeout, RequestTimeout time.Duration
	// Log receives what happens outside any call, such as lost and regained connections. Nil discards it.
	Log *slog.Logger
}

// Server is a node's wired parts, as package node hands them to programs that embed Torus.
type Server struct {
	Config Config
	MDS    MetadataService
	Blocks Store // nil in a client, which stores nothing
}

// Blockset says how a block becomes stored fragments. It is the meaning of a volume's spec, such as
// "crc,rep=2", and immutable; package blockset parses it.
type Blockset interface {
	// String returns the spec in its canonical form.
	String() string
	// Replication is the number of whole copies of a block; 0 means what the ring says.
	Replication() int
	// CRC reports whether readers verify the checksums of pages.
	CRC() bool
}

// The functions by which a kind of metadata service is known.
type (
	// CreateMetadataServiceFunc connects to a metadata service.
	CreateMetadataServiceFunc func(ctx context.Context, cfg Config) (MetadataService, error)
	// InitMDSFunc writes the global metadata and, unless it is nil, the first ring; ErrExists if there is a cluster.
	InitMDSFunc func(ctx context.Context, cfg Config, gmd GlobalMetadata, ring Ring) error
	// WipeMDSFunc forgets the cluster: all of its keys.
	WipeMDSFunc func(ctx context.Context, cfg Config) error
	// SetRingFunc publishes a ring; see MetadataService.SetRing.
	SetRingFunc func(ctx context.Context, cfg Config, ring Ring) error
)

// A registry maps the names of metadata services to functions.
type registry[F any] struct {
	mu sync.Mutex
	m  map[string]F
}

func (r *registry[F]) set(name string, f F) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.m == nil {
		r.m = make(map[string]F)
	}
	r.m[name] = f
}

func (r *registry[F]) get(name string) (F, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f, ok := r.m[name]
	if ok {
		return f, nil
	}
	known := make([]string, 0, len(r.m))
	for n := range r.m {
		known = append(known, n)
	}
	sort.Strings(known)
	list := strings.Join(known, ", ")
	if list == "" {
		list = "none"
	}
	return f, fmt.Errorf("metadata service %q: %w (registered: %s)", name, ErrNotSupported, list)
}

// The documented registration functions have no receiver, hence these variables: the one place in
// Torus with state of a package. Nothing is in them until a program's main, or package node, calls Register….
var (
	metadataServices registry[CreateMetadataServiceFunc]
	metadataInits    registry[InitMDSFunc]
	metadataWipes    registry[WipeMDSFunc]
	ringSetters      registry[SetRingFunc]
)

// RegisterMetadataService makes a kind of metadata service known to CreateMetadataService. The last call for a name wins.
func RegisterMetadataService(name string, f CreateMetadataServiceFunc) { metadataServices.set(name, f) }

// RegisterMetadataInit makes a kind of metadata service known to InitMDS.
func RegisterMetadataInit(name string, f InitMDSFunc) { metadataInits.set(name, f) }

// RegisterMetadataWipe makes a kind of metadata service known to WipeMDS.
func RegisterMetadataWipe(name string, f WipeMDSFunc) { metadataWipes.set(name, f) }

// RegisterSetRing makes a kind of metadata service known to SetRing.
func RegisterSetRing(name string, f SetRingFunc) { ringSetters.set(name, f) }

// CreateMetadataService connects to the metadata service of the given kind; ErrNotSupported, listing what
// is registered, if there is no such kind.
func CreateMetadataService(ctx context.Context, name string, cfg Config) (MetadataService, error) {
	f, err := metadataServices.get(name)
	if err != nil {
		return nil, err
	}
	return f(ctx, cfg)
}

// InitMDS makes a new cluster. ring may be nil.
func InitMDS(ctx context.Context, name string, cfg Config, gmd GlobalMetadata, ring Ring) error {
	f, err := metadataInits.get(name)
	if err != nil {
		return err
	}
	return f(ctx, cfg, gmd, ring)
}

// WipeMDS forgets the cluster.
func WipeMDS(ctx context.Context, name string, cfg Config) error {
	f, err := metadataWipes.get(name)
	if err != nil {
		return err
	}
	return f(ctx, cfg)
}

// SetRing publishes a ring.
func SetRing(ctx context.Context, name string, cfg Config, ring Ring) error {
	f, err := ringSetters.get(name)
	if err != nil {
		return err
	}
	return f(ctx, cfg, ring)
}

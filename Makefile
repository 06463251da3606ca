# Two commands set a fresh machine up: make setup, make build. CI runs the same ones (.ci/run).

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
PACKAGES = $(shell go list ./... ./.ci/report | grep -v '/e2e$$')
LDFLAGS  = -X github.com/coreos/torus.Version=$(VERSION)
COMMANDS = torusd torusctl torusblk

GOLANGCI_LINT_VERSION = v2.15.0
GOLANGCI_LINT         = bin/golangci-lint-$(GOLANGCI_LINT_VERSION)

# Debian's kernel, which the virtual machines of the tests boot: unpacked, not installed.
GUEST_KERNEL = bin/guest-kernel

# What the tests and the README call besides Go.
TOOLS = fio nbdkit libnbd-bin qemu-utils qemu-block-extra nbd-client fuse3 xfsprogs e2fsprogs iproute2 iptables postgresql sqlite3 qemu-system-x86 busybox-static

.PHONY: build run test race lint sim mutants crash fuzz bench bench-compare bench-scale bench-choices bench-go e2e soak setup clean

build:
	mkdir -p bin
	go build -trimpath -ldflags '$(LDFLAGS)' -o bin/ $(addprefix ./cmd/,$(COMMANDS))

# A cluster of three peers on this machine, with a volume to try.
run: build
	bin/torusd dev

test: build
	go test $(TESTFLAGS) -timeout 10m $(PACKAGES)

race:
	go test $(TESTFLAGS) -race -timeout 20m $(PACKAGES)

lint: $(GOLANGCI_LINT)
	test -z "$$(gofmt -l . | tee /dev/stderr)"
	go vet ./...
	$(GOLANGCI_LINT) run ./...

$(GOLANGCI_LINT):
	GOBIN=$(CURDIR)/bin go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_LINT_VERSION)
	mv bin/golangci-lint $@

# A volume against the raw file and QEMU's NBD server, on the disk of --dir: make bench BENCHFLAGS='--help' (docs/performance.md).
TOOLS += qemu-system-common
bench: build
	go build -o bin/bench ./bench
	bin/bench $(BENCHFLAGS)

# The same, and an earlier commit beside it: make bench-compare OLD=v0.2.0
bench-compare: build
	@test -n "$(OLD)" || { echo 'compared with what? make bench-compare OLD=COMMIT' >&2; exit 2; }
	go build -o bin/bench ./bench
	bin/bench --old-ref '$(OLD)' $(BENCHFLAGS)

# What it costs as work grows, and what was chosen between: make bench-scale BENCHFLAGS='--sections idle' (docs/scale.md).
bench-scale bench-choices: build
	go build -o bin/bench ./bench
	bin/bench $(subst bench-,,$@) $(BENCHFLAGS)

# Go benchmarks, with allocations.
bench-go:
	go test -run '^$$' -bench . -benchmem $(PACKAGES)

# Simulated clusters: one seed again with TORUS_SEED=n go test ./sim -run TestSeeds -v
SEEDS ?= 1000
sim:
	TORUS_SEEDS=$(SEEDS) go test $(TESTFLAGS) -count 1 -timeout 120m -v -run TestSeeds ./sim

# The product broken on purpose, rule by rule; each must be caught (docs/testing.md). Some: make mutants MUTANTFLAGS='-run fence'
mutants:
	go run ./sim/mutants $(MUTANTFLAGS)

# Stores cut off from power at every point of every small workload, and 1,000 long ones.
crash:
	TORUS_CRASH=all go test $(TESTFLAGS) -count 1 -timeout 120m -v -run TestCrash ./storage

# Whoever reads what others have sent or stored, fuzzed one after the other: an hour and a half.
FUZZTIME ?= 5m
fuzz:
	set -e; for p in $(PACKAGES); do for f in $$(go test -list '^Fuzz' $$p | grep ^Fuzz); do \
		echo "== $$p $$f"; go test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) $$p; done; done

# Clusters of real processes under real clients.
e2e: build $(GUEST_KERNEL)
	go test $(TESTFLAGS) -count 1 -timeout 60m ./e2e

# The same with every fault repeated as often as docs/testing.md says; hours. Only some: make soak SOAKFLAGS='-run TestPeerLoss'
soak: build $(GUEST_KERNEL)
	TORUS_E2E_SOAK=1 go test $(TESTFLAGS) -count 1 -timeout 12h -v $(SOAKFLAGS) ./e2e

setup:
	apt-get update -q
	DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $(TOOLS)
	$(MAKE) $(GUEST_KERNEL)

$(GUEST_KERNEL):
	rm -rf $@.new && mkdir -p $@.new
	cd $@.new && apt-get download -q "$$(apt-cache depends linux-image-amd64 | sed -n 's/.*Depends: \(linux-image-.*\)/\1/p')" && dpkg-deb -x *.deb . && rm *.deb
	mv $@.new $@

clean:
	rm -rf bin

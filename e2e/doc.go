// Package e2e tests Torus as its users meet it: the real binaries, a real etcd, the NBD clients and file systems that
// people use, and processes that are killed, stopped and started again.
//
// It needs root (loop devices, mounts, network namespaces) and the tools that `make setup` installs; a test fails if one is missing.
// "Killed" is SIGKILL of a process: its memory is lost and the page cache stays. Only TestPowerLoss cuts power, of a virtual
// machine. docs/testing.md says what is shown by what.
//
// Knobs, all optional environment variables: TORUS_E2E_SOAK=1 repeats the faults as often as figures need (make soak);
// TORUS_E2E_ROUNDS multiplies how often, in percent (100); TORUS_E2E_KEEP names a directory in which data and logs are left; TORUS_E2E_BUILDFLAGS go to go build
// ("-race").
package e2e

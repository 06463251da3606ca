package node

import (
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"syscall"

	"github.com/coreos/torus"
)

// addressScheme is how the address of a peer begins: it speaks TDP.
const addressScheme = "tdp://"

// parsePeerAddress checks tdp://HOST:PORT and returns it as the transport takes it.
func parsePeerAddress(address string) (host string, port uint16, err error) {
	bad := func(why string) (string, uint16, error) {
		return "", 0, fmt.Errorf("--peer-address %q: %s: %w\nwrite it as tdp://IP:PORT, with an IP that clients and other peers reach", address, why, torus.ErrInvalid)
	}
	rest, ok := strings.CutPrefix(address, addressScheme)
	if !ok {
		return bad("does not begin with tdp://")
	}
	host, text, err := net.SplitHostPort(strings.TrimSuffix(rest, "/"))
	if err != nil {
		return bad("not IP:PORT")
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return bad("bad port")
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		return bad("every machine has that address, so nobody would find this one")
	}
	return host, uint16(n), nil
}

// listenAddress is where an NBD server listens: [HOST]:PORT or unix:PATH, in the transport's form.
func listenAddress(flag, address string) (string, error) {
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		if path == "" {
			return "", fmt.Errorf("%s %q: no path: %w\nwrite it as unix:/run/torus.sock", flag, address, torus.ErrInvalid)
		}
		return "unix:" + path, nil
	}
	host, port, err := net.SplitHostPort(strings.TrimPrefix(address, "tcp://"))
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return "", fmt.Errorf("%s %q: not HOST:PORT: %w\nwrite it as localhost:10809 or unix:/run/torus.sock", flag, address, torus.ErrInvalid)
	}
	return "tcp://" + net.JoinHostPort(host, port), nil
}

// listenError says what to do about an address that cannot be listened on.
func listenError(flag, address string, err error) error {
	e := &torus.Error{Op: "listen on", Obj: address, Err: err, Hint: "give another address with " + flag}
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		e.Hint = "another process has it: stop that one, or give another address with " + flag
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		e.Hint = "this machine has no such address: give one of its own with " + flag
	case errors.Is(err, syscall.EACCES):
		e.Hint = "that takes more rights: give a port above 1023, or a path of yours, with " + flag
	}
	return e
}

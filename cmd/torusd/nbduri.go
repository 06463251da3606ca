package main

import (
	"net"
	"net/url"
	"strings"
)

// hostPort splits an address of a TCP listener as it can be dialled from this machine.
func hostPort(address string) (host, port string) {
	host, port, err := net.SplitHostPort(strings.TrimPrefix(address, "tcp://"))
	if err != nil {
		return address, ""
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "localhost"
	}
	return host, port
}

// nbdURI names an export in the standard form (doc/uri.md of the NBD project).
func nbdURI(address, export string) string {
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		u := url.URL{Scheme: "nbd+unix", Path: "/" + export, RawQuery: url.Values{"socket": {path}}.Encode()}
		return "nbd+unix:///" + strings.TrimPrefix(u.EscapedPath(), "/") + "?" + u.RawQuery
	}
	host, port := hostPort(address)
	u := url.URL{Scheme: "nbd", Host: net.JoinHostPort(host, port), Path: "/" + export}
	return u.String()
}

package main

import "testing"

func TestNBDURI(t *testing.T) {
	for _, c := range [][3]string{
		{"127.0.0.1:10809", "demo", "nbd://127.0.0.1:10809/demo"},
		{"0.0.0.0:1", "demo", "nbd://localhost:1/demo"},
		{"[::]:1", "a b", "nbd://localhost:1/a%20b"},
		{"unix:/run/t.sock", "demo", "nbd+unix:///demo?socket=%2Frun%2Ft.sock"},
	} {
		if got := nbdURI(c[0], c[1]); got != c[2] {
			t.Errorf("%s %s: %s, want %s", c[0], c[1], got, c[2])
		}
	}
}

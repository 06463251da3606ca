package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/coreos/torus"
)

// parsePast reads a time in the past: RFC 3339, or for how long it has been, as -5m.
func parsePast(text string, now time.Time) (time.Time, error) {
	fail := func(why string) (time.Time, error) {
		return time.Time{}, fmt.Errorf("time %q: %s: %w\nwrite it as 2006-01-02T15:04:05Z, or as -5m for five minutes ago", text, why, torus.ErrInvalid)
	}
	var at time.Time
	if ago, ok := strings.CutPrefix(text, "-"); ok {
		d, err := parseDuration(ago)
		if err != nil {
			return fail("not a length of time")
		}
		at = now.Add(-d)
	} else {
		t, err := time.Parse(time.RFC3339Nano, text)
		if err != nil {
			return fail("neither RFC 3339 nor a length of time")
		}
		at = t
	}
	if at.After(now) {
		return fail("lies in the future")
	}
	return at, nil
}

// parseDuration reads a length of time as 90s, 24h, 7d or 0.
func parseDuration(text string) (time.Duration, error) {
	fail := func() (time.Duration, error) {
		return 0, fmt.Errorf("length of time %q: %w\nwrite it as 30m, 24h or 7d", text, torus.ErrInvalid)
	}
	unit := time.Duration(1)
	if days, ok := strings.CutSuffix(text, "d"); ok {
		text, unit = days+"h", 24
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < 0 || d > (1<<62)/unit {
		return fail()
	}
	return d * unit, nil
}

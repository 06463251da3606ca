package cli

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/coreos/torus"
)

// ParseLabels reads labels written as zone=a; each key once.
func ParseLabels(pairs []string) (map[string]string, error) {
	labels := make(map[string]string, len(pairs))
	for _, pair := range pairs {
		key, value, ok := strings.Cut(pair, "=")
		if !ok || key == "" || value == "" || strings.ContainsAny(pair, " \t\n,") {
			return nil, fmt.Errorf("label %q: %w\nwrite a label as --label zone=a", pair, torus.ErrInvalid)
		}
		if _, twice := labels[key]; twice {
			return nil, fmt.Errorf("label %q is given twice: %w\ngive each key once", key, torus.ErrInvalid)
		}
		labels[key] = value
	}
	return labels, nil
}

// FormatLabels writes labels as rack=r1,zone=a.
func FormatLabels(labels map[string]string) string {
	var b strings.Builder
	for _, key := range slices.Sorted(maps.Keys(labels)) {
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		b.WriteString(key + "=" + labels[key])
	}
	return b.String()
}

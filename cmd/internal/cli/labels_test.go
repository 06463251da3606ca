package cli

import (
	"maps"
	"testing"
)

func TestLabels(t *testing.T) {
	labels, err := ParseLabels([]string{"zone=a", "rack=r1=x"})
	if err != nil || !maps.Equal(labels, map[string]string{"zone": "a", "rack": "r1=x"}) {
		t.Errorf("%v, %v", labels, err)
	}
	if s := FormatLabels(labels); s != "rack=r1=x,zone=a" {
		t.Error(s)
	}
	for _, bad := range []string{"", "zone", "=a", "zone=", "a b=c", "a=b,c=d"} {
		if labels, err := ParseLabels([]string{bad}); err == nil {
			t.Errorf("%q was taken for %v", bad, labels)
		}
	}
}

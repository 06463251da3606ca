package cli

import (
	"strings"
	"testing"
	"time"
)

// People get sizes and ages, programs exact bytes and RFC 3339.
func TestOutput(t *testing.T) {
	at := time.Now().Add(-90 * time.Minute)
	table := Table{Columns: []string{"name", "size_bytes", "updated", "member", "labels", "seen"}, Rows: [][]any{
		{"a,b", Bytes(3 << 29), at, true, map[string]string{"zone": "a"}, time.Time{}},
	}}
	print := func(o Output) string {
		var b strings.Builder
		if err := o.Print(&b, map[string]any{"size_bytes": 3 << 29, "text": "<a>"}, table); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	for _, c := range []struct {
		o    Output
		want string
	}{
		{Output{Format: "table"}, "NAME  SIZE     UPDATED  MEMBER  LABELS  SEEN\na,b   1.5 GiB  1h ago   yes     zone=a  -\n"},
		{Output{Format: "table", SI: true}, "1.6 GB"},
		{Output{Format: "csv"}, "name,size_bytes,updated,member,labels,seen\n\"a,b\",1610612736," + at.UTC().Format(time.RFC3339) + ",true,zone=a,\n"},
		{Output{Format: "table", csv: true}, "1610612736"},
		{Output{Format: "json"}, "{\n  \"size_bytes\": 1610612736,\n  \"text\": \"<a>\"\n}\n"},
	} {
		if got := print(c.o); !strings.Contains(got, c.want) {
			t.Errorf("%+v:\n%s\nwant\n%s", c.o, got, c.want)
		}
	}
}

package main

import (
	"strings"
	"testing"
)

// A report that calls a failure a success would make every other test worthless.
func TestReport(t *testing.T) {
	const pass = `{"Action":"pass","Package":"p","Test":"TestA"}` + "\n"
	for name, c := range map[string]struct {
		in, last string
		good     bool
	}{
		"nothing":     {"", "0 passed, 0 failed", false},
		"passes":      {pass + pass + `{"Action":"pass","Package":"p"}`, "2 passed, 0 failed", true},
		"fails":       {pass + `{"Action":"fail","Package":"p","Test":"TestB"}` + "\n" + `{"Action":"fail","Package":"p"}`, "1 passed, 1 failed", false},
		"build fails": {pass + `{"Action":"fail","Package":"q"}`, "1 passed, 1 failed", false},
		"text about failing is no failure": {
			pass + `{"Action":"output","Package":"p","Output":"{\"Action\":\"fail\"}\n"}` + "\nmake: done\n", "1 passed, 0 failed", true},
	} {
		var out strings.Builder
		good := report(strings.NewReader(c.in), &out)
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		if last := lines[len(lines)-1]; good != c.good || last != c.last {
			t.Errorf("%s: %v, %q, want %v, %q", name, good, last, c.good, c.last)
		}
	}
}

// What a test said is shown when it fails, and only then.
func TestReportShowsFailures(t *testing.T) {
	var out strings.Builder
	report(strings.NewReader(`{"Action":"output","Package":"p","Test":"TestA","Output":"good news\n"}
{"Action":"pass","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Test":"TestB","Output":"bad news\n"}
{"Action":"output","Package":"p","Test":"TestB","Output":"    b_test.go:12: worse\n"}
{"Action":"output","Package":"p","Test":"TestB","Output":"the log of a server\n"}
{"Action":"fail","Package":"p","Test":"TestB"}
`), &out)
	if s := out.String(); !strings.Contains(s, "bad news") || strings.Contains(s, "good news") {
		t.Errorf("report:\n%s", s)
	}
	if s := out.String(); !strings.HasSuffix(s, "\nTestB: b_test.go:12: worse\n1 passed, 1 failed\n") {
		t.Errorf("the complaint is not said again at the end:\n%s", s)
	}
}

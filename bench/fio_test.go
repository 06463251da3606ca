package main

import (
	"reflect"
	"slices"
	"strings"
	"testing"
)

// What fio 3.33 prints, shortened to what is read and one thing that is not.
const fioOutput = `fio: connected to NBD server
{
  "fio version" : "fio-3.33",
  "jobs" : [
    {
      "jobname" : "a", "error" : 0,
      "read" : { "io_bytes" : 65536, "total_ios" : 1, "runtime" : 1999,
        "lat_ns" : { "min" : 3, "bins" : { "1000" : 1 } } },
      "write" : { "io_bytes" : 196608, "total_ios" : 3, "runtime" : 2000,
        "lat_ns" : { "bins" : { "2000" : 2, "9000" : 1 } } },
      "trim" : { "io_bytes" : 0, "total_ios" : 0, "runtime" : 0, "lat_ns" : { "min" : 0 } },
      "sync" : { "total_ios" : 2, "lat_ns" : { "bins" : { "70000" : 2 } } }
    }
  ]
}
fio: good-bye
`

func TestParseFio(t *testing.T) {
	r, err := parseFio([]byte(fioOutput))
	if err != nil {
		t.Fatal(err)
	}
	if r.ops != 4 || r.bytes != 4*65536 || r.seconds != 2 {
		t.Errorf("%+v", r)
	}
	if p := r.latency.percentiles(); p != (percentiles{2, 9, 9}) {
		t.Errorf("latency: %+v", p)
	}
	if p := r.flush.percentiles(); p != (percentiles{70, 70, 70}) {
		t.Errorf("flush: %+v", p)
	}
	for _, c := range []struct{ old, new, want string }{
		{`"error" : 0`, `"error" : 28`, "I/O error 28"},
		{`"total_ios"`, `"x"`, "--seconds"},
		{`"1000" :`, `"soon" :`, "soon"},
		{`"jobs"`, `"xobs"`, "0 jobs"},
		{`{`, `[`, "output of fio"},
	} {
		if _, err := parseFio([]byte(strings.ReplaceAll(fioOutput, c.old, c.new))); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s for %s: %v, want something of %q", c.new, c.old, err, c.want)
		}
	}
	if _, err := parseFio(nil); err == nil {
		t.Error("nothing was taken for a result")
	}
}

// Bulk writes beside what is measured are in no figure but their own, and what goes wrong with them counts as well.
func TestParseFioBulk(t *testing.T) {
	const bulk = `, { "jobname" : "bulk", "error" : 0,
      "read" : { "io_bytes" : 0, "total_ios" : 0, "runtime" : 0, "lat_ns" : { "min" : 0 } },
      "write" : { "io_bytes" : 31457280, "total_ios" : 30, "runtime" : 3000, "lat_ns" : { "bins" : { "5" : 30 } } },
      "sync" : { "total_ios" : 1, "lat_ns" : { "bins" : { "5" : 1 } } } }
  ]`
	two := strings.Replace(fioOutput, "\n  ]", bulk, 1)
	r, err := parseFio([]byte(two))
	if err != nil {
		t.Fatal(err)
	}
	if r.bulk != 10<<20 {
		t.Errorf("bulk: %v bytes a second", r.bulk)
	}
	alone, err := parseFio([]byte(fioOutput))
	if err != nil {
		t.Fatal(err)
	}
	if r.bulk = 0; !reflect.DeepEqual(r, alone) {
		t.Errorf("%+v, without bulk %+v", r, alone)
	}
	for _, c := range []struct{ old, new, want string }{
		{`"bulk", "error" : 0`, `"bulk", "error" : 5`, "I/O error 5"},
		{`"total_ios" : 30`, `"total_ios" : 0`, "--seconds"},
		{`"bulk"`, `"b"`, "2 jobs"},
		{`"a"`, `"bulk"`, "0 jobs"},
	} {
		if _, err := parseFio([]byte(strings.Replace(two, c.old, c.new, 1))); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s for %s: %v, want something of %q", c.new, c.old, err, c.want)
		}
	}
}

func TestFioArgs(t *testing.T) {
	for _, c := range cells() {
		if c.bulk {
			continue // below
		}
		name := strings.TrimPrefix(c.Name, "worn-")
		args := c.fioArgs([]string{"--filename=x"}, 1<<30, 5, 3)
		for flag, want := range map[string]bool{
			"--filename=x": true, "--size=1073741824": true, "--runtime=5": true, "--time_based": !strings.HasPrefix(name, "read"), "--norandommap": !strings.HasPrefix(name, "read"), "--randseed=3": true,
			"--fsync=1": name == "write-4k-fsync", "--rwmixread=75": name == "mixed-64k-64",
			"--bs=4096": strings.Contains(name, "4k-") && !strings.Contains(name, "64k"), "--bs=65536": name == "mixed-64k-64",
			"--bs=1048576": strings.Contains(name, "-1m-"), "--iodepth=32": strings.HasSuffix(name, "-32"),
		} {
			if slices.Contains(args, flag) != want {
				t.Errorf("%s: %s is %v in %q", c.Name, flag, !want, args)
			}
		}
		if c.reads() != !strings.HasPrefix(name, "write") {
			t.Errorf("%s: reads is %v", c.Name, c.reads())
		}
	}
}

// Each of the two jobs has a half of the volume, and a group, that is figures, of its own.
func TestFioArgsBulk(t *testing.T) {
	c := cellNamed("flush-beside-bulk")
	want := "--name=flush-beside-bulk --rw=randwrite --bs=4096 --iodepth=1 --size=536870912 --runtime=5 --randseed=3 --filename=x --time_based --norandommap --fsync=1 --offset=536870912 " +
		"--name=bulk --rw=write --bs=1048576 --iodepth=8 --size=536870912 --runtime=5 --randseed=3 --filename=x --time_based --norandommap --new_group"
	if got := strings.Join(c.fioArgs([]string{"--filename=x"}, 1<<30, 5, 3), " "); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if c.reads() {
		t.Error("it reads")
	}
}

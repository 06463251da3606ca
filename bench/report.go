package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// report is what came out, as it is saved.
type report struct {
	Machine     machine                      `json:"machine"`
	Rounds      int                          `json:"rounds"`
	Seconds     int                          `json:"seconds"`
	SizeBytes   uint64                       `json:"size_bytes"`
	Contestants []string                     `json:"contestants"`
	Cells       []cellReport                 `json:"cells"`
	Memory      map[string]map[string]memory `json:"memory"` // by contestant and process
}

type cellReport struct {
	cell
	Contestants map[string]figures `json:"contestants"`
}

// figures are those of a contestant in a cell. Ratios are of rates; missing ones are null.
type figures struct {
	Median  sample   `json:"median"`
	VsRaw   *float64 `json:"vs_raw"`
	VsQemu  *float64 `json:"vs_qemu"`
	VsOld   *float64 `json:"vs_old"`
	Samples []sample `json:"rounds"`
}

type machine struct {
	Time    string            `json:"time"`
	Kernel  string            `json:"kernel"`
	CPU     string            `json:"cpu"`
	CPUs    int               `json:"cpus"`
	Memory  uint64            `json:"memory_bytes"`
	Load    string            `json:"load_average"` // as the run ended
	Version map[string]string `json:"versions"`
}

func (b *bench) report() *report {
	r := &report{
		Machine: b.describe(), Rounds: b.rounds, Seconds: b.seconds, SizeBytes: uint64(b.size), Contestants: b.options.contestants, Memory: b.memory,
	}
	for _, c := range b.cells {
		measured := b.samples[c.Name]
		if len(measured) == 0 {
			continue
		}
		cr := cellReport{cell: c, Contestants: map[string]figures{}}
		for name, l := range measured {
			to := func(other string) *float64 {
				if x := ratio(c, l, measured[other]); other != name && !math.IsNaN(x) && !math.IsInf(x, 0) {
					return &x
				}
				return nil
			}
			cr.Contestants[name] = figures{Median: medianSample(l), VsRaw: to("raw"), VsQemu: to("qemu"), VsOld: to("old"), Samples: l}
		}
		r.Cells = append(r.Cells, cr)
	}
	return r
}

func (r *report) empty() bool { return len(r.Cells) == 0 }

// save writes the report to a file.
func (r *report) save(path string) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}

// markdown is the report as tables.
func (r *report) markdown() string {
	var b strings.Builder
	m := r.Machine
	fmt.Fprintf(&b, "%s; %d × %s, %d GiB; Linux %s; load average at the end %s\n", m.Time, m.CPUs, m.CPU, m.Memory>>30, m.Kernel, m.Load)
	for _, name := range slices.Sorted(maps.Keys(m.Version)) {
		fmt.Fprintf(&b, "%s: %s\n", name, m.Version[name])
	}
	fmt.Fprintf(&b, "\n%v volume; medians of %d interleaved round%s of %d s\n", byteSize(r.SizeBytes), r.Rounds, plural(r.Rounds), r.Seconds)
	r.rates(&b)
	r.latencies(&b)
	r.cpu(&b)
	r.memories(&b)
	return b.String()
}

// row writes a line of a table; a table's first line gets its rule.
func row(b *strings.Builder, first bool, fields ...string) {
	fmt.Fprintf(b, "| %s |\n", strings.Join(fields, " | "))
	if first {
		b.WriteString("|---" + strings.Repeat("|--:", len(fields)-1) + "|\n")
	}
}

const none = "–"

func (r *report) rates(b *strings.Builder) {
	fmt.Fprint(b, "\n### Rates\n\nIOPS, or MB/s (10⁶ bytes) where it says so. Ratios are medians of the rounds' ratios.\n\n")
	head := []string{"cell"}
	head = append(head, r.Contestants...)
	type pair struct {
		of, to string
		get    func(figures) *float64
	}
	var pairs []pair
	for _, of := range r.Contestants {
		for _, p := range []pair{
			{of, "raw", func(f figures) *float64 { return f.VsRaw }},
			{of, "qemu", func(f figures) *float64 { return f.VsQemu }},
			{of, "old", func(f figures) *float64 { return f.VsOld }},
		} {
			torus := of == "torus" || of == "old" && p.to != "old"
			if slices.Contains(r.Contestants, p.to) && (torus || of == "qemu" && p.to == "raw") {
				pairs = append(pairs, p)
				head = append(head, p.of+" / "+p.to)
			}
		}
	}
	row(b, true, head...)
	for _, c := range r.Cells {
		line := []string{c.Title}
		for _, name := range r.Contestants {
			f, ok := c.Contestants[name]
			switch {
			case !ok:
				line = append(line, none)
			case c.bandwidth:
				line = append(line, thousands(c.rate(f.Median))+" MB/s")
			default:
				line = append(line, thousands(c.rate(f.Median)))
			}
		}
		for _, p := range pairs {
			if x := p.get(c.Contestants[p.of]); x != nil {
				line = append(line, fmt.Sprintf("%.2f", *x))
			} else {
				line = append(line, none)
			}
		}
		row(b, false, line...)
		if c.bulk {
			line := []string{c.Title + ": the 1 MiB writes"}
			for _, name := range r.Contestants {
				if f, ok := c.Contestants[name]; ok {
					line = append(line, thousands(f.Median.BulkMBPerSecond)+" MB/s")
				} else {
					line = append(line, none)
				}
			}
			row(b, false, append(line, slices.Repeat([]string{none}, len(pairs))...)...)
		}
	}
}

func (r *report) latencies(b *strings.Builder) {
	fmt.Fprint(b, "\n### Latency\n\np50 / p99 / p99.9 in µs, from submission to completion, as the client sees it.\n\n")
	row(b, true, append([]string{"cell"}, r.Contestants...)...)
	for _, c := range r.Cells {
		line := func(title string, get func(sample) percentiles) {
			fields := []string{title}
			for _, name := range r.Contestants {
				f, ok := c.Contestants[name]
				if !ok {
					fields = append(fields, none)
					continue
				}
				p := get(f.Median)
				fields = append(fields, thousands(p.P50)+" / "+thousands(p.P99)+" / "+thousands(p.P999))
			}
			row(b, false, fields...)
		}
		if !c.fsync {
			line(c.Title, func(s sample) percentiles { return s.LatencyUs })
			continue
		}
		line(c.Title+": the write", func(s sample) percentiles { return s.LatencyUs })
		line(c.Title+": the flush", func(s sample) percentiles { return s.FlushUs })
	}
}

func (r *report) cpu(b *strings.Builder) {
	if len(r.servers()) == 0 {
		return
	}
	fmt.Fprint(b, "\n### CPU\n\nCPU seconds (user and system) of the servers for 10,000 operations; context switches of all of them for one.\n\n")
	head := []string{"cell"}
	for _, s := range r.servers() {
		head = append(head, s.contestant+": all")
		if len(s.processes) > 1 {
			head = append(head, s.processes...)
		}
		head = append(head, "switches / op")
	}
	row(b, true, head...)
	for _, c := range r.Cells {
		line := []string{c.Title}
		for _, s := range r.servers() {
			f, ok := c.Contestants[s.contestant]
			number := func(x float64) {
				if ok && !c.bulk { // what bulk writes cost is no cost of the operations that are counted
					line = append(line, significant(x))
				} else {
					line = append(line, none)
				}
			}
			number(f.Median.CPUPer10k)
			if len(s.processes) > 1 {
				for _, p := range s.processes {
					number(f.Median.ProcessCPUPer10k[p])
				}
			}
			number(f.Median.SwitchesPerOp)
		}
		row(b, false, line...)
	}
}

func (r *report) memories(b *strings.Builder) {
	if len(r.Memory) == 0 || len(r.servers()) == 0 {
		return
	}
	fmt.Fprint(b, "\n### Memory\n\nMiB at the end: resident; the same with what several processes have counted in parts; and of that what is no file of a disk. At rest: resident, some seconds later.\n\n")
	row(b, true, "process", "resident", "in parts", "own", "at rest")
	for _, s := range r.servers() {
		var all memory
		for _, p := range s.processes {
			m := r.Memory[s.contestant][p]
			all.RSS += m.RSS
			all.PSS += m.PSS
			all.Own += m.Own
			all.Rest += m.Rest
			row(b, false, s.contestant+": "+p, mib(m.RSS), mib(m.PSS), mib(m.Own), mib(m.Rest))
		}
		if len(s.processes) > 1 {
			row(b, false, s.contestant+": all", mib(all.RSS), mib(all.PSS), mib(all.Own), mib(all.Rest))
		}
	}
}

// serverList is a contestant's servers, in the order of the tables.
type serverList struct {
	contestant string
	processes  []string
}

// servers are those that used CPU in some cell.
func (r *report) servers() (out []serverList) {
	for _, name := range r.Contestants {
		for _, c := range r.Cells {
			if f := c.Contestants[name].Median.ProcessCPUPer10k; len(f) > 0 {
				out = append(out, serverList{name, slices.Sorted(maps.Keys(f))})
				break
			}
		}
	}
	return out
}

func plural(n int) string {
	if n == 1 {
		return ""
	}
	return "s"
}

func mib(bytes uint64) string { return fmt.Sprintf("%.0f", float64(bytes)/(1<<20)) }

// significant shows two digits of small numbers.
func significant(x float64) string {
	switch {
	case x >= 10:
		return fmt.Sprintf("%.0f", x)
	case x >= 1:
		return fmt.Sprintf("%.1f", x)
	}
	return fmt.Sprintf("%.2f", x)
}

// thousands rounds and groups the digits: 12,345.
func thousands(x float64) string {
	s := fmt.Sprintf("%.0f", x)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// describe says what was measured, and on what.
func (b *bench) describe() machine {
	m := machine{Time: time.Now().UTC().Format(time.RFC3339), CPUs: runtime.NumCPU(), CPU: "CPU", Version: map[string]string{}}
	read := func(path string) string {
		text, err := os.ReadFile(path)
		if err != nil {
			return "" // only for information
		}
		return strings.TrimSpace(string(text))
	}
	m.Kernel = read("/proc/sys/kernel/osrelease")
	if f := strings.Fields(read("/proc/loadavg")); len(f) >= 3 {
		m.Load = strings.Join(f[:3], " ")
	}
	for line := range strings.Lines(read("/proc/cpuinfo")) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			m.CPU = strings.TrimSpace(value)
			break
		}
	}
	var info syscall.Sysinfo_t
	if syscall.Sysinfo(&info) == nil {
		m.Memory = info.Totalram * uint64(info.Unit)
	}
	programs := map[string]string{"fio": "fio"}
	for _, c := range b.options.contestants {
		switch c {
		case "qemu":
			programs[c] = "qemu-storage-daemon"
		case "torus":
			programs[c] = filepath.Join(b.bin, "torusd")
		case "old":
			programs[c] = filepath.Join(b.old, "torusd")
		}
	}
	for name, program := range programs {
		out, err := exec.Command(program, "--version").Output() //nolint:noctx // it prints a line
		if err != nil {
			continue
		}
		line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
		m.Version[name] = line
	}
	if b.oldRef != "" {
		m.Version["old"] = strings.TrimSpace(b.oldRef + " " + m.Version["old"])
	}
	return m
}

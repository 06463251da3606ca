package cli

import (
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/pflag"
)

// Output says how results are printed.
type Output struct {
	Format string // table, json or csv
	SI     bool   // sizes in powers of 1000
	csv    bool
}

// AddFlags defines -o for a command and all below it.
func (o *Output) AddFlags(flags *pflag.FlagSet) {
	flags.StringVarP(&o.Format, "output", "o", "table", "how to print: table, json or csv (sizes in bytes in the latter two)")
}

// AddListFlags defines what lists took before there was -o.
func (o *Output) AddListFlags(flags *pflag.FlagSet) {
	flags.BoolVar(&o.csv, "csv", false, "the same as -o csv")
	flags.BoolVar(&o.SI, "si", false, "sizes in powers of 1000")
}

// Check refuses an unknown format.
func (o *Output) Check() error {
	switch o.Format {
	case "table", "json", "csv":
		return nil
	}
	return fmt.Errorf("unknown output format %q\n-o takes table, json or csv", o.Format)
}

// Bytes is a cell with a number of bytes.
type Bytes uint64

// Table is a result for people and for csv. Columns are named as in JSON.
type Table struct {
	Columns []string // for people only: none if the rows are names with their values
	Rows    [][]any  // string, bool, integers, Bytes, time.Time (zero: never), map[string]string
}

// Print writes v as JSON, or t.
func (o *Output) Print(w io.Writer, v any, t Table) error {
	format := o.Format
	if o.csv {
		format = "csv"
	}
	switch format {
	case "json":
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		e.SetEscapeHTML(false)
		return e.Encode(v)
	case "csv":
		c := csv.NewWriter(w)
		if err := c.Write(t.Columns); err != nil {
			return err
		}
		for _, row := range t.Rows {
			if err := c.Write(o.cells(row, true)); err != nil {
				return err
			}
		}
		c.Flush()
		return c.Error()
	}
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	if len(t.Columns) > 0 {
		head := make([]string, len(t.Columns))
		for i, c := range t.Columns {
			head[i] = strings.ToUpper(strings.ReplaceAll(strings.ReplaceAll(c, "_bytes", ""), "_", " "))
		}
		fmt.Fprintln(tw, strings.Join(head, "\t"))
	}
	for _, row := range t.Rows {
		fmt.Fprintln(tw, strings.Join(o.cells(row, false), "\t"))
	}
	return tw.Flush()
}

func (o *Output) cells(row []any, exact bool) []string {
	out := make([]string, len(row))
	for i, v := range row {
		out[i] = o.cell(v, exact)
		if out[i] == "" && !exact {
			out[i] = "-"
		}
	}
	return out
}

func (o *Output) cell(v any, exact bool) string {
	switch v := v.(type) {
	case Bytes:
		if exact {
			return strconv.FormatUint(uint64(v), 10)
		}
		return FormatSize(uint64(v), o.SI)
	case time.Time:
		switch {
		case v.IsZero():
			return ""
		case exact:
			return v.UTC().Format(time.RFC3339)
		}
		return ago(time.Since(v))
	case bool:
		if exact {
			return strconv.FormatBool(v)
		}
		if v {
			return "yes"
		}
		return "no"
	case map[string]string:
		return FormatLabels(v)
	}
	return fmt.Sprint(v)
}

func ago(d time.Duration) string {
	switch d = max(d, 0); {
	case d < time.Minute:
		return fmt.Sprintf("%ds ago", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm ago", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh ago", d/time.Hour)
	}
	return fmt.Sprintf("%dd ago", d/(24*time.Hour))
}

package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coreos/torus/cmd/internal/cli"
)

// progress shows how far long work has got, on one line that is written again and again. nil shows nothing.
type progress struct {
	w     io.Writer
	total uint64 // bytes; 0: unknown
	began time.Time
	first uint64 // where this run began
	shown time.Time
	width int
}

const (
	showEvery = 200 * time.Millisecond
	barWidth  = 30
)

// newProgress shows progress on w if that is a terminal, or always. total is where the work ends and first where it begins, in bytes.
func newProgress(w io.Writer, always bool, first, total uint64) *progress {
	if f, ok := w.(*os.File); !always && (!ok || !isTerminal(f)) {
		return nil
	}
	return &progress{w: w, total: total, first: first, began: time.Now()}
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// at says where the work is, in bytes, and how many of them had to be moved.
func (p *progress) at(now, moved uint64) {
	if p == nil || time.Since(p.shown) < showEvery {
		return
	}
	p.shown = time.Now()
	p.show(now, moved)
}

func (p *progress) show(now, moved uint64) {
	took := time.Since(p.began).Seconds()
	line := ""
	if p.total > 0 {
		full := int(float64(now) / float64(p.total) * barWidth)
		line = fmt.Sprintf("[%s%s] %3d%%  ", strings.Repeat("#", full), strings.Repeat(".", barWidth-full), int(float64(now)/float64(p.total)*100))
	}
	line += fmt.Sprintf("%s, %s/s", cli.FormatSize(moved, false), cli.FormatSize(uint64(float64(moved)/max(took, 0.001)), false))
	if left := p.total - min(now, p.total); left > 0 && now > p.first {
		line += fmt.Sprintf(", %v left", (time.Duration(took / float64(now-p.first) * float64(left) * float64(time.Second))).Round(time.Second))
	}
	fmt.Fprintf(p.w, "\r%-*s", p.width, line)
	p.width = len(line)
}

// end ends the line.
func (p *progress) end(now, moved uint64) {
	if p != nil {
		p.show(now, moved)
		fmt.Fprintln(p.w)
	}
}

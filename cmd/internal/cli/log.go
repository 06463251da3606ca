package cli

import (
	"io"
	"log/slog"
)

// NewLogger returns a logger that writes text to w: everything if debug, else what an operator should see.
func NewLogger(w io.Writer, debug bool) *slog.Logger {
	level := slog.LevelInfo
	if debug {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level}))
}

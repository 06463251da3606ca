package cli

import (
	"io"
	"log/slog"
)

// NewLogger returns a logger that writes text to w, from level on.
func NewLogger(w io.Writer, level slog.Level) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level}))
}

// LogLevel is what a daemon logs: all that an operator should see, or with --debug everything.
func LogLevel(debug bool) slog.Level {
	if debug {
		return slog.LevelDebug
	}
	return slog.LevelInfo
}

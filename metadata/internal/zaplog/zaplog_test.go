package zaplog

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

func TestPassesOn(t *testing.T) {
	var out bytes.Buffer
	l := New(slog.New(slog.NewTextHandler(&out, nil)), zapcore.WarnLevel).With(zap.String("member", "m1"))
	l.Info("not this")
	l.Warn("this", zap.Int("n", 3), zap.Strings("list", []string{"a", "b"}))
	got := out.String()
	for _, want := range []string{"level=WARN", "msg=this", "member=m1", "n=3", "list=\"[a b]\""} {
		if !strings.Contains(got, want) {
			t.Errorf("%q has no %s", got, want)
		}
	}
	if strings.Contains(got, "not this") {
		t.Errorf("%q passed a level below", got)
	}
	New(nil, zapcore.DebugLevel).Error("nowhere")
}

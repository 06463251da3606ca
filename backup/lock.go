package backup

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"gocloud.dev/blob"

	"github.com/coreos/torus"
)

const (
	lockEvery = time.Minute      // a lock is written again so often
	lockStale = 15 * time.Minute // one that was not for so long is a dead one's

	sharedLock    = "shared-"    // of whoever adds
	exclusiveLock = "exclusive-" // of whoever removes
)

// holder is what a lock holds.
type holder struct {
	What  string    `json:"what"`
	Host  string    `json:"host"`
	PID   int       `json:"pid"`
	Since time.Time `json:"since"`

	Kernel  string `json:"kernel,omitempty"`  // by which boot of it, and in which PID namespace
	Started string `json:"started,omitempty"` // when, by that kernel
}

// self is this process.
func self(what string) holder {
	h := holder{What: what, Host: "unknown", PID: os.Getpid(), Since: time.Now().UTC().Round(time.Second)}
	if host, err := os.Hostname(); err == nil {
		h.Host = host
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	space, serr := os.Readlink("/proc/self/ns/pid")
	if err == nil && serr == nil {
		h.Kernel, h.Started = strings.TrimSpace(string(boot))+" "+space, started(h.PID)
	}
	return h
}

// started is when a process was, in the kernel's ticks (proc(5), stat, field 22); empty: there is none, or nobody can tell.
func started(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	_, rest, _ := strings.Cut(string(b), ") ") // a name may have blanks
	if f := strings.Fields(rest); len(f) > 19 {
		return f[19]
	}
	return ""
}

// dead reports whether h is certainly no more: it ran beside us, and its place is empty or somebody else's.
func (h holder) dead() bool {
	us := self("")
	return h.Kernel != "" && h.Kernel == us.Kernel && h.Started != "" && us.Started != "" && started(h.PID) != h.Started
}

// lock keeps those who add to the repository apart from those who remove: each writes its lock first and looks for others then, so that of two
// at least one sees the other. Ages are told by the store's own clock. The context ends when the lock is lost, or released.
func (r *Repository) lock(ctx context.Context, what string, exclusive bool) (context.Context, func(), error) {
	kind := sharedLock
	if exclusive {
		kind = exclusiveLock
	}
	key := locksDir + kind + randomID()
	b, err := json.Marshal(self(what))
	if err != nil {
		return nil, nil, err
	}
	if err := r.put(ctx, key, b); err != nil {
		return nil, nil, err
	}
	unlock := func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		r.bucket.Delete(ctx, key) //nolint:errcheck // it ends by itself
	}
	if err := r.others(ctx, key, exclusive); err != nil {
		unlock()
		return nil, nil, err
	}
	held, lose := context.WithCancelCause(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		written := time.Now()
		for {
			select {
			case <-held.Done():
				return
			case <-time.After(lockEvery):
			}
			switch err := r.put(held, key, b); {
			case err == nil:
				written = time.Now()
			case time.Since(written) > lockStale/2:
				lose(fmt.Errorf("the lock of the repository could not be renewed: %w", err))
			}
		}
	}()
	return held, func() {
		lose(nil)
		<-ended
		unlock()
	}, nil
}

// others fails if somebody else holds a lock that does not go together with ours.
func (r *Repository) others(ctx context.Context, ours string, exclusive bool) error {
	var all []*blob.ListObject
	var now time.Time
	err := r.each(ctx, locksDir, func(o *blob.ListObject) error {
		if o.Key == ours {
			now = o.ModTime
		} else {
			all = append(all, o)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if now.IsZero() {
		return fmt.Errorf("repository %s: what was written, %s, is not listed: %w", r.where, ours, torus.ErrInvalid)
	}
	for _, o := range all {
		if !exclusive && strings.HasPrefix(o.Key, locksDir+sharedLock) {
			continue
		}
		var h holder
		if b, err := r.get(ctx, o.Key); err == nil {
			json.Unmarshal(b, &h) //nolint:errcheck // then nobody knows whose it is
		} else if errors.Is(err, torus.ErrNotExist) {
			continue // released meanwhile
		}
		if now.Sub(o.ModTime) > lockStale || h.dead() {
			if exclusive {
				r.bucket.Delete(ctx, o.Key) //nolint:errcheck // the next one does
			}
			continue
		}
		return fmt.Errorf("repository %s is in use by %s (process %d on %s, since %s): %w\ntry again when it has ended; if it has died, its lock ends %v after it",
			r.where, h.What, h.PID, h.Host, h.Since.Format(time.RFC3339), torus.ErrLocked, lockStale)
	}
	return nil
}

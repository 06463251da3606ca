package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/coreos/torus"
)

const (
	retryEvery  = 500 * time.Millisecond
	remindEvery = 30 * time.Second
	callTimeout = 5 * time.Second // of one attempt
)

// WaitConnect connects to the MDS, trying again for at most limit while it cannot be reached.
func (e Etcd) WaitConnect(ctx context.Context, limit time.Duration, log *slog.Logger) (torus.MetadataService, error) {
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for first := true; ; first = false {
		attempt, cancelAttempt := context.WithTimeout(limited, callTimeout)
		mds, err := e.Connect(attempt)
		if err == nil {
			// A connection is no proof that anybody answers.
			if _, err = mds.GlobalMetadata(attempt); err == nil || errors.Is(err, torus.ErrNoGlobalMetadata) {
				cancelAttempt()
				return mds, nil
			}
			mds.Close()
		}
		cancelAttempt()
		if !errors.Is(err, torus.ErrMetadataUnavailable) && !errors.Is(err, context.DeadlineExceeded) {
			return nil, err
		}
		if first {
			log.Warn("etcd does not answer, trying again", "etcd", e.String(), "for", limit, "err", cause(err))
		}
		select {
		case <-time.After(retryEvery):
			continue
		case <-limited.Done():
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, e.Explain(fmt.Errorf("no answer for %v: %w", limit, cause(err)))
	}
}

// WaitInit returns the cluster's metadata, waiting for as long as it takes until it is initialised.
func WaitInit(ctx context.Context, mds torus.MetadataService, log *slog.Logger) (torus.GlobalMetadata, error) {
	var reminded time.Time
	for {
		attempt, cancel := context.WithTimeout(ctx, callTimeout)
		global, err := mds.GlobalMetadata(attempt)
		cancel()
		switch {
		case err == nil:
			return global, nil
		case ctx.Err() != nil:
			return global, ctx.Err()
		case errors.Is(err, torus.ErrNoGlobalMetadata), errors.Is(err, torus.ErrMetadataUnavailable):
			if time.Since(reminded) >= remindEvery {
				reminded = time.Now()
				log.Info("waiting until the cluster is initialised: run `torusctl init`", "reason", cause(err))
			}
		default:
			return global, err
		}
		select {
		case <-time.After(retryEvery):
		case <-ctx.Done():
			return global, ctx.Err()
		}
	}
}

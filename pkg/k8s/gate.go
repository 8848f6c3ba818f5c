// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"log/slog"
	"sync"
	"time"
)

// gate knows whether API servers can be reached.
type gate struct {
	log *slog.Logger

	mu    sync.Mutex
	since time.Time // zero: reachable, or not tried yet
	err   error
	back  chan struct{}
}

// failed notes an attempt that reached nobody. The channel is closed when another attempt has more luck.
func (g *gate) failed(err error) <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.since.IsZero() {
		g.since, g.back = time.Now(), make(chan struct{})
		g.log.Error("API server cannot be reached; what is known stays in force", "err", err)
	}
	g.err = err
	return g.back
}

// reached notes an answer.
func (g *gate) reached() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.since.IsZero() {
		return
	}
	g.log.Info("API server is reached again", "after", time.Since(g.since).Round(time.Millisecond))
	close(g.back)
	g.since, g.err = time.Time{}, nil
}

// state returns since when nobody can be reached, and why; the zero time while somebody can.
func (g *gate) state() (time.Time, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.since, g.err
}

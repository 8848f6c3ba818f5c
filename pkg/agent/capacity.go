// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"log/slog"
	"time"
)

// A map is reported from nearlyFull percent of its size on, until it is below emptyAgain: a level that goes up and down by a few entries
// is one condition.
const (
	nearlyFull = 90
	emptyAgain = 85
)

// Level is the condition of a map that has little room left. What it holds is in force; what comes next may not be.
type Level struct {
	Map     string `json:"map"`
	Entries int    `json:"entries"`
	Max     uint32 `json:"max"`
	// Cure says what a person can do.
	Cure  string    `json:"cure"`
	Since time.Time `json:"since"`
}

// sizeCure says how a map gets more room.
func sizeCure(name string) string {
	return fmt.Sprintf("the map's size is --map-size %s=N; it takes effect when the maps are made anew", name)
}

// levels remembers which maps are nearly full. It belongs to one goroutine.
type levels struct {
	log   *slog.Logger
	since map[string]time.Time
}

func newLevels(log *slog.Logger) *levels {
	return &levels{log: log, since: map[string]time.Time{}}
}

// check returns the conditions of the maps, in their order, and logs those that begin or end. A map of unknown size has none.
func (l *levels) check(maps []MapStatus, now time.Time) []Level {
	var out []Level
	for _, m := range maps {
		if m.Max == 0 {
			continue
		}
		percent := m.Entries * 100 / int(m.Max)
		since, known := l.since[m.Map]
		switch {
		case !known && percent < nearlyFull:
			continue
		case known && percent < emptyAgain:
			l.log.Info("map has room again", "map", m.Map, "entries", m.Entries, "max", m.Max, "after", now.Sub(since))
			delete(l.since, m.Map)
			continue
		case !known:
			since = now
			l.since[m.Map] = now
			l.log.Warn("map is nearly full", "map", m.Map, "entries", m.Entries, "max", m.Max, "cure", sizeCure(m.Map))
		}
		out = append(out, Level{Map: m.Map, Entries: m.Entries, Max: m.Max, Cure: sizeCure(m.Map), Since: since})
	}
	return out
}

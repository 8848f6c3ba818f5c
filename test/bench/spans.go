// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"regexp"
	"time"
)

// spans collects how long named parts of something took, in the order in which they first came.
type spans struct {
	names []string
	took  map[string][]float64 // milliseconds
}

func newSpans() *spans { return &spans{took: map[string][]float64{}} }

func (s *spans) add(name string, d time.Duration) {
	if _, known := s.took[name]; !known {
		s.names = append(s.names, name)
	}
	s.took[name] = append(s.took[name], milliseconds(d))
}

var stepDone = regexp.MustCompile(`msg="step done".* step="?([^"=]+?)"? took=(\S+)`)

// read adds the steps that a plugin's log tells of, and returns the time of all of them.
func (s *spans) read(log string) (sum time.Duration, err error) {
	found := stepDone.FindAllStringSubmatch(log, -1)
	if len(found) == 0 {
		return 0, fmt.Errorf("the plugin logged no steps:\n%s", log)
	}
	for _, m := range found {
		took, err := time.ParseDuration(m[2])
		if err != nil {
			return 0, fmt.Errorf("step %q: %w", m[1], err)
		}
		s.add(m[1], took)
		sum += took
	}
	return sum, nil
}

func (s *spans) table(title string) table {
	t := table{title: title, head: []string{"step", "ms", "range"}}
	for _, name := range s.names {
		took := s.took[name]
		t.rows = append(t.rows, []string{
			name, fmt.Sprintf("%.2f", median(took)), fmt.Sprintf("%.2f–%.2f", percentile(took, 0), percentile(took, 100)),
		})
	}
	return t
}

// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"sync"
	"time"
)

// heartbeat is how often a section says that it goes on.
const heartbeat = 15 * time.Second

// progress tells a person on standard error how far a run is: at both ends of every section and, in between, every heartbeat. A nil one says
// nothing.
type progress struct {
	out     io.Writer
	started time.Time
	left    time.Duration // what the sections that have not begun should take

	mu   sync.Mutex
	step string // of the section that runs
}

func newProgress(out io.Writer, expected time.Duration) *progress {
	return &progress{out: out, started: time.Now(), left: expected}
}

// section says that one begins, and returns what is to be called when it ends.
func (p *progress) section(number, of int, name string, expected time.Duration) (end func(error)) {
	begun := time.Now()
	fmt.Fprintf(p.out, "bench: %s, %d of %d, takes about %s; %s so far, about %s to go\n",
		name, number, of, seconds(expected), seconds(time.Since(p.started)), seconds(p.left))
	p.left -= expected
	p.at("")
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for tick := time.NewTicker(heartbeat); ; {
			select {
			case <-stop:
				tick.Stop()
				return
			case <-tick.C:
				fmt.Fprintf(p.out, "bench: %s, %s%s\n", name, seconds(time.Since(begun)), p.where())
			}
		}
	}()
	return func(err error) {
		close(stop)
		<-stopped
		if err != nil {
			fmt.Fprintf(p.out, "bench: %s failed after %s: %v\n", name, seconds(time.Since(begun)), err)
			return
		}
		fmt.Fprintf(p.out, "bench: %s took %s\n", name, seconds(time.Since(begun)))
	}
}

// at notes what the section is doing, for the next heartbeat.
func (p *progress) at(format string, args ...any) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.step = ""
	if format != "" {
		p.step = ": " + fmt.Sprintf(format, args...)
	}
}

func (p *progress) where() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.step
}

func seconds(d time.Duration) time.Duration { return d.Round(time.Second) }

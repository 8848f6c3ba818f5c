// SPDX-License-Identifier: Apache-2.0

//go:build cluster

package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"
)

// expectation says whether somebody gets an answer somewhere.
type expectation struct {
	from    place
	network string
	to      netip.AddrPort
	allowed bool
}

func (e expectation) String() string {
	return fmt.Sprintf("%s to %s over %s", e.from.name, e.to, e.network)
}

// check returns an error unless it is as expected.
func (e expectation) check() error {
	within := silenceTime
	if e.allowed {
		within = answerTime
	}
	answer, err := e.from.ask(e.network, e.to, "hostname", within)
	switch {
	case e.allowed && err != nil:
		return fmt.Errorf("%v: want an answer: %w", e, err)
	case !e.allowed && err == nil:
		return fmt.Errorf("%v: %q answers, want silence", e, answer)
	case !e.allowed && !silent(err):
		return fmt.Errorf("%v: want silence: %w", e, err)
	}
	return nil
}

// judge waits until all expectations hold at once, in two rounds one after the other.
func judge(t testing.TB, situation string, expectations ...expectation) {
	t.Helper()
	round := func() error {
		faults := make([]string, len(expectations))
		var wg sync.WaitGroup
		for i, e := range expectations {
			wg.Go(func() {
				if err := e.check(); err != nil {
					faults[i] = "\n  " + err.Error()
				}
			})
		}
		wg.Wait()
		if all := strings.Join(faults, ""); all != "" {
			return fmt.Errorf("%s", all)
		}
		return nil
	}
	eventually(t, situation, 30*time.Second, round)
	if err := round(); err != nil {
		t.Fatalf("%s: held once, but not again: %v", situation, err)
	}
}

// table makes the expectations about all who ask one pod or service: only those whose names are listed are allowed, over TCP and UDP and in
// every family. port returns the port for each protocol.
func table(from []place, to place, port func(network string) uint16, allowed ...string) []expectation {
	var all []expectation
	for _, f := range families() {
		for _, network := range networks {
			for _, p := range from {
				e := expectation{from: p, network: network, to: f.at(to, port(network))}
				for _, name := range allowed {
					e.allowed = e.allowed || name == p.name
				}
				all = append(all, e)
			}
		}
	}
	return all
}

// over keeps the expectations about one protocol.
func over(network string, all []expectation) []expectation {
	var kept []expectation
	for _, e := range all {
		if e.network == network {
			kept = append(kept, e)
		}
	}
	return kept
}

func port80(string) uint16 { return 80 }

// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"

	"github.com/margay-cni/margay/pkg/flow"
	"github.com/margay-cni/margay/pkg/health"
	"github.com/margay-cni/margay/pkg/metrics"
)

// Serve is what the agent answers over TCP. The zero value opens nothing but the health checks of services that ask for them.
type Serve struct {
	// Healthz is where /healthz and /livez are, HOST:PORT, and Metrics where /metrics, /proxyMode and /configz are; empty: nowhere.
	Healthz, Metrics string
	// Profiling adds /debug/pprof/ to Metrics.
	Profiling bool
	// Flags are shown by /configz.
	Flags any
	// Programs is the build of the BPF programs, shown by the metrics.
	Programs string
	// Drops reads the drop counters; may be nil.
	Drops func() ([]flow.Drops, error)
	// Events gets warnings about services; may be nil.
	Events health.Recorder
}

// Default addresses of Serve: kube-proxy's, which probes and dashboards know.
const (
	DefaultHealthz = "0.0.0.0:10256"
	DefaultMetrics = "127.0.0.1:10249"
)

// Validate names the addresses that are none.
func (s *Serve) Validate() error {
	var errs []error
	for _, a := range []struct{ what, address string }{{"healthz", s.Healthz}, {"metrics", s.Metrics}} {
		if a.address == "" {
			continue
		}
		if err := checkAddress(a.address); err != nil {
			errs = append(errs, fmt.Errorf("%s address %q: %w", a.what, a.address, err))
		}
	}
	return errors.Join(errs...)
}

// checkAddress accepts a literal address, or none, and a port.
func checkAddress(address string) error {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return err
	}
	if _, err := netip.ParseAddr(host); err != nil && host != "" {
		return fmt.Errorf("%q is no IP address", host)
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return fmt.Errorf("%q is no port", port)
	}
	return nil
}

// readDrops turns the drop counters into those of the metrics; nil if there are none.
func (c *Config) readDrops() func() ([]metrics.Drops, error) {
	if c.Serve.Drops == nil {
		return nil
	}
	return func() ([]metrics.Drops, error) {
		drops, err := c.Serve.Drops()
		out := make([]metrics.Drops, 0, len(drops))
		for _, d := range drops {
			out = append(out, metrics.Drops{Reason: d.Reason, Direction: d.Direction, Packets: d.Packets})
		}
		return out, err
	}
}

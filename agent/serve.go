// SPDX-License-Identifier: Apache-2.0

package main

import (
	"flag"
	"fmt"

	"github.com/margay-cni/margay/pkg/agent"
	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/flow"
)

// defaultNodePortRange is the API server's --service-node-port-range.
var defaultNodePortRange = datapath.PortRange{First: 30000, Last: 32767}

// serveFlags are the flags about what the agent answers over TCP, and about ports that it keeps free.
func serveFlags(f *flag.FlagSet, o *options) {
	o.nodePortRange = defaultNodePortRange
	f.StringVar(&o.serve.Healthz, "healthz-bind-address", agent.DefaultHealthz, "address and port of /healthz and /livez; empty: none")
	f.StringVar(&o.serve.Metrics, "metrics-bind-address", agent.DefaultMetrics, "address and port of /metrics, /proxyMode and /configz; empty: none")
	f.BoolVar(&o.serve.Profiling, "profiling", false, "serve /debug/pprof/ at the address of the metrics, too")
	f.Func("service-node-port-range", fmt.Sprintf("ports that the node's own connections must not use, FIRST-LAST, as the API server has it (default %v)", defaultNodePortRange),
		func(s string) (err error) {
			o.nodePortRange, err = datapath.ParsePortRange(s)
			return err
		})
	o.flags = f
}

// served completes what the flags say with what there is to serve.
func served(o options, d *datapath.Datapath) agent.Serve {
	s := o.serve
	s.Programs = d.Build()
	s.Drops = func() ([]flow.Drops, error) { return flow.DropTotals(d.Maps.Counters) }
	values := map[string]any{}
	o.flags.VisitAll(func(f *flag.Flag) {
		// A flag that is a function has no value to ask for.
		if _, ok := f.Value.(flag.Getter); ok {
			values[f.Name] = f.Value.String()
		}
	})
	values["map-size"] = o.datapath.Sizes
	values["service-node-port-range"] = o.nodePortRange.String()
	values["reach"] = o.reach
	s.Flags = map[string]any{"margay-agent": values}
	return s
}

// SPDX-License-Identifier: Apache-2.0

package clustertest

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/flow"
)

// Datapath opens a node's pinned maps and programs until the test ends. The node must have had an agent or a pod.
func (c *Cluster) Datapath(n *Node) *datapath.Datapath {
	c.t.Helper()
	d, err := datapath.Open(n.Config)
	c.must(err)
	c.t.Cleanup(func() { d.Close() })
	return d
}

// Drops returns the packets that a node has dropped by reason, in both directions, reasons without drops left out.
func (c *Cluster) Drops(n *Node) map[string]uint64 {
	c.t.Helper()
	out := map[string]uint64{}
	c.withMaps(n, func(m *datapath.Maps) error {
		totals, err := flow.DropTotals(m.Counters)
		for _, d := range totals {
			if d.Packets > 0 {
				out[d.Reason] += d.Packets
			}
		}
		return err
	})
	return out
}

// Flows returns the flows in a node's table, both directions of each as one.
func (c *Cluster) Flows(n *Node) (flows []flow.Flow) {
	c.t.Helper()
	c.withMaps(n, func(m *datapath.Maps) (err error) {
		names, err := flow.LoadNames(n.Config.Run)
		if err == nil {
			flows, _, err = flow.List(m.Flows, flow.Query{}, names)
		}
		return err
	})
	return flows
}

// FlowEntries counts the entries of a node's flow table: two for a whole flow.
func (c *Cluster) FlowEntries(n *Node) (entries int) {
	c.t.Helper()
	c.withMaps(n, func(m *datapath.Maps) error {
		return flow.Entries(m.Flows, func(bpf.FlowKey, bpf.Flow) bool {
			entries++
			return true
		})
	})
	return entries
}

// SweepAhead removes the flows from a node's table that its agent would remove by then, if no further packet came.
func (c *Cluster) SweepAhead(n *Node, ahead time.Duration) {
	c.t.Helper()
	var now unix.Timespec
	c.must(unix.ClockGettime(unix.CLOCK_MONOTONIC, &now))
	d, err := datapath.Open(n.Config)
	c.must(err)
	defer d.Close()
	_, _, err = d.SweepFlowsAt(uint32(now.Sec + int64(ahead/time.Second)))
	c.must(err)
}

// withMaps opens a node's maps for as long as f runs.
func (c *Cluster) withMaps(n *Node, f func(*datapath.Maps) error) {
	c.t.Helper()
	d, err := datapath.Open(n.Config)
	if err != nil {
		c.t.Errorf("open the maps of %s: %v", n.Name, err)
		return
	}
	defer d.Close()
	if err := f(&d.Maps); err != nil {
		c.t.Errorf("read the maps of %s: %v", n.Name, err)
	}
}

// Ctl runs margayctl on a node and returns what it printed.
func (c *Cluster) Ctl(n *Node, args ...string) string {
	c.t.Helper()
	out, err := n.Output(c.binary("margayctl"), append(args, "--bpffs", n.Config.BPFFS, "--run", n.Config.Run)...)
	if err != nil {
		c.t.Errorf("margayctl %q on %s: %v", args, n.Name, err)
	}
	return out
}

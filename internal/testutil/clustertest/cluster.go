// SPDX-License-Identifier: Apache-2.0

package clustertest

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/runtime"

	"github.com/margay-cni/margay/internal/testutil/privileged"
)

// Underlay says which families the nodes' networks have. Pods have both in any case.
type Underlay int

// Underlays.
const (
	DualStack Underlay = iota
	IPv4Only
	IPv6Only
)

// families tells which of IPv4 and IPv6 there are.
func (u Underlay) families() []bool {
	switch u {
	case IPv4Only:
		return []bool{false}
	case IPv6Only:
		return []bool{true}
	}
	return []bool{false, true}
}

// Options describe a cluster. The zero value is the standard topology of three nodes with agents.
type Options struct {
	// Nodes is how many nodes there are at the start, n1 to n<Nodes>; 0 means 3.
	Nodes int
	// Underlay is the family of the networks.
	Underlay Underlay
	// MTU of the networks and their devices, in bytes; 0 means 1500.
	MTU int
	// RoutingMode is passed to every agent as --routing-mode; empty passes nothing.
	RoutingMode string
	// AgentFlags are passed to every agent, NodeFlags after them to one node's.
	AgentFlags []string
	NodeFlags  map[string][]string
	// PodRoutes gives the router a route to each node's pod ranges by the node's address, as an underlay has that takes part in direct
	// routing: in the families that the underlay has.
	PodRoutes bool
	// ClientPodRoutes lets clients reach pods' addresses (by the router, so PodRoutes is needed as well), and answer to them. Without,
	// a packet that reaches a client with a pod's address as its source is never answered.
	ClientPodRoutes bool
	// SecondNIC names nodes that get a device eth1 on the network "second".
	SecondNIC []string
	// NoAgents leaves the agents to StartAgent.
	NoAgents bool
}

// Cluster is a running cluster.
type Cluster struct {
	t       testing.TB
	options Options
	// Router is the namespace of the networks' bridges.
	Router *Host
	// Client is the external client c1.
	Client *Host

	dir      string // of everything that has a file; short, because a socket's path may have 107 bytes only
	networks []*Network
	ports    map[string]string // by "host/device": name of the cable's end in the router
	nodes    []*Node
	lastNode int // index of the node that came last
	clients  int

	objects    map[string]runtime.Object
	generation int
}

// New makes a cluster that ends with the test. It returns when every agent has settled. It needs root.
func New(t testing.TB, o Options) *Cluster {
	t.Helper()
	privileged.Require(t)
	c := &Cluster{t: t, options: o, ports: map[string]string{}, objects: map[string]runtime.Object{}}
	if c.options.MTU == 0 {
		c.options.MTU = 1500
	}
	if c.options.Nodes == 0 {
		c.options.Nodes = 3
	}
	c.makeDir()
	c.Router = c.newHost("router")
	c.configureRouter()
	c.AddNetwork("segment1")
	c.AddNetwork("segment2")
	c.addNetwork("outside", netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8:c::/64"))
	c.Client = c.AddClient()
	c.put(namespaceObject("default"))
	for i := range c.options.Nodes {
		segment := "segment1"
		if i >= 2 {
			segment = "segment2"
		}
		c.newNode(c.Network(segment))
	}
	if len(o.SecondNIC) > 0 {
		second := c.AddNetwork("second")
		for _, name := range o.SecondNIC {
			c.AttachNode(c.Node(name), second)
		}
	}
	c.meetNeighbours()
	c.write()
	if !o.NoAgents {
		for _, n := range c.nodes {
			c.startAgent(n)
		}
		c.WaitSettled()
	}
	return c
}

// makeDir makes the directories of everything that has a file.
func (c *Cluster) makeDir() {
	c.t.Helper()
	dir, err := os.MkdirTemp("", "margay-*")
	c.must(err)
	c.dir = dir
	c.t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			c.t.Errorf("remove the cluster's files: %v", err)
		}
	})
	c.must(os.Mkdir(c.Manifests(), 0o755))
}

// Manifests returns the directory that all agents follow. The cluster's own file there is cluster.yaml; a test may add others, about
// which WaitSettled knows nothing.
func (c *Cluster) Manifests() string {
	return filepath.Join(c.dir, "manifests")
}

// Node returns a node by its name.
func (c *Cluster) Node(name string) *Node {
	c.t.Helper()
	for _, n := range c.nodes {
		if n.Name == name {
			return n
		}
	}
	c.t.Fatalf("there is no node %s", name)
	return nil
}

// Nodes returns the nodes in the order in which they came.
func (c *Cluster) Nodes() []*Node {
	return append([]*Node(nil), c.nodes...)
}

// Families returns the families of the underlay, false for IPv4 and true for IPv6, for tests to range over.
func (c *Cluster) Families() []bool {
	return c.options.Underlay.families()
}

// Eventually waits for a condition, for a bounded time that a passing test comes nowhere near, and fails the test otherwise.
func (c *Cluster) Eventually(what string, ok func() bool) {
	c.t.Helper()
	if !c.within(patience, ok) {
		c.t.Fatalf("not within %v: %s", patience, what)
	}
}

// patience bounds every wait; polling is how often conditions are looked at.
const (
	patience = 20 * time.Second
	polling  = 10 * time.Millisecond
)

func (c *Cluster) within(d time.Duration, ok func() bool) bool {
	for deadline := time.Now().Add(d); ; time.Sleep(polling) {
		if ok() {
			return true
		}
		if time.Now().After(deadline) {
			return false
		}
	}
}

func (c *Cluster) must(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}

// FamilyName is the name of a subtest for a family.
func FamilyName(v6 bool) string {
	if v6 {
		return "IPv6"
	}
	return "IPv4"
}

// last returns the address of a network whose last number is written as n: 172.16.1.12 and 2001:db8:1::12 for 12.
func last(p netip.Prefix, n int) netip.Addr {
	if p.Addr().Is4() {
		a := p.Addr().As4()
		a[3] = byte(n)
		return netip.AddrFrom4(a)
	}
	return netip.MustParseAddr(fmt.Sprintf("%s%d", p.Addr(), n)) // the network's address ends in ::
}

// SPDX-License-Identifier: Apache-2.0

// Package clustertest makes a cluster of several nodes for tests: network namespaces behind a router, in which the built plugin connects
// pods and the built agent runs as a process, told of each other by one directory of manifests. Nothing is written into maps directly;
// pkg nodetest does that for tests of the dataplane on one node.
//
//	      c1  192.0.2.100                          external client: default route by the router, but the pods' ranges are
//	      │   2001:db8:c::100                      unreachable to it unless Options.ClientPodRoutes
//	      │
//	══════╪══════════════ network "outside"        192.0.2.0/24, 2001:db8:c::/64
//	      │ .1 and ::1
//	┌─────┴──────┐
//	│   router   │  forwards IPv4 and IPv6, knows pods' ranges only with Options.PodRoutes; the networks are bridges in it
//	└─┬────────┬─┘
//	  │ .1     │ .1 and ::1
//	══╪════════╪═════════ "segment1"               172.16.1.0/24, 2001:db8:1::/64
//	  │   │    │   │
//	  │   n1   │   n2     .11, .12                 ::11, ::12
//	  │        │
//	  │  ══════╪═════════ "segment2"               172.16.2.0/24, 2001:db8:2::/64
//	  │        │   │
//	  │        │   n3     .13                      ::13
//	  │        │
//	  └─ AddNetwork: further networks              172.16.<k>.0/24, 2001:db8:<k>::/64, k from 3
//
// n3 shares no segment with n1 and n2: what is direct between those is routed, or tunnelled, to it. Further nodes (Options.Nodes,
// AddNode) stand on segment 2 too, unless told otherwise. Node i has the last number 10+i in every network, and the pod ranges
// 10.244.<i>.0/24 and fd00:244:<i>::/64, both also on an underlay of one family. Service addresses: 10.96.0.0/16 and fd00:96::/112.
//
// A node is a network namespace with a bpffs, a run directory and, where the machine has a cgroup2 hierarchy, a cgroup of its own. All
// cables are veth pairs; eth0 is a host's device on its first network. IPv6 addresses are usable at once, rp_filter is off, the router's
// ICMP errors are not rate limited, and neighbours on one network know each other when New returns; a test that wants it otherwise
// changes it inside the namespace.
//
// # Use
//
//	func TestMain(m *testing.M) { os.Exit(clustertest.Main(m)) }
//
//	func TestSomething(t *testing.T) {
//		c := clustertest.New(t, clustertest.Options{RoutingMode: "vxlan"})
//		web := c.AddPod(c.Node("n2"), "web", map[string]string{"app": "web"})
//		web.Serve(8080)
//		c.Apply(clustertest.NodePortService("web", 10, map[string]string{"app": "web"}, 80, 8080, 30080))
//		c.WaitSettled()
//		got, err := c.Client.Ask("tcp", netip.AddrPortFrom(c.Node("n1").Addr(false), 30080)) // "web 192.0.2.100"
//
// # What the agents know, and when
//
// The cluster keeps its objects in one manifest, which every change replaces whole: Node objects, the Namespace default, Pods as they are
// added, and what Apply is given. Agents take a change some 50 ms after it was written. WaitSettled waits until every running agent has
// written to its maps what the manifest says now; without it a test races with the agents. How it knows is told at its declaration.
//
// Everything ends with the test: agents, pods, namespaces, mounts, cgroups, files. When the test has failed, every node's agent log,
// drops and status are logged first. Methods report what goes wrong in the fixture itself with t.Fatal; what a test asserts about, sockets
// above all, comes back as an error. A Cluster is for one goroutine.
package clustertest

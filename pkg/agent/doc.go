// SPDX-License-Identifier: Apache-2.0

// Package agent is the pipeline of margay-agent: it turns what a source knows about the cluster, and what the endpoint records know about
// this node, into the content of the pinned maps and keeps it there.
//
// It owns the order in which the maps are written, the files that it leaves in the run directory (numbers.json, raise.json, services.json,
// rules.json, nodes.json, node.json), the attachments to the node's network devices, the overlay device, the kernel's routes to other
// nodes, the repair of what somebody else removed, when to look for what pods have left (a Collector removes it), and the local API.
// It does not own the semantics of services and policies (pkg/service, pkg/policy), the meaning of the objects (pkg/state), or how a
// map is pinned and a program attached (pkg/datapath).
//
// Concurrency: one goroutine, the pipeline, owns everything that is compiled and written. Every other goroutine hands it the newest
// value of one thing (snapshot, records, node facts) through a mailbox that holds one value, so a burst of events costs one round.
// Every goroutine ends before Run returns.
//
// The order of a round, and why:
//
//   - Nothing that comes from the source is written before its first snapshot: the kernel's state is the truth until then.
//   - The numbers of a round are in numbers.json before the first kernel write that uses them, and in raise.json the epochs that
//     the round has to raise. A kill at any instant leaves files from which the next start finishes the round.
//   - Policy: entries (denials before permissions), ipcache, pending, endpoints, then what is gone from ipcache and from the policies
//     in use, then the epochs, then the policies nobody uses. An address or a pod moves to a number only when the number means something,
//     and a flow is judged again only when the maps say the new thing.
//   - Services: the set of serving backends, the lists, the frontends, then frontends and set members that are gone, then the epochs
//     (a flow that is checked must not find the leaver in the set), then the lists nobody counts.
//   - Nodes: a node is in the map before a route or an address names it; what is gone goes after what took its place, and nodes that are gone
//     last; then the route epoch, once. Devices and kernel routes are the node watcher's: it makes what the pipeline wants, and tells what is
//     there (docs/design/0004-many-nodes.md).
//   - What no record tells of is nobody's whatever the source says: map entries of pods that are gone do not wait for its first snapshot.
//   - Every write follows the kernel's actual content, not the last round's intention: a write that failed keeps what depends on it from
//     being deleted or switched, is reported as a fault of the map, and is tried again.
package agent

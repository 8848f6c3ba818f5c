// SPDX-License-Identifier: Apache-2.0

// Package cni is the CNI plugin "margay": network configuration, the six verbs of the CNI specification (0.3.0 to 1.1.0), the rollback of
// a failed ADD, and error codes. It makes a pod's interface (or adopts the one that an earlier plugin of the chain made), attaches the
// pinned programs, and registers the pod in the endpoints map and in a record file before ADD returns.
//
// It talks to the kernel, to files under the run directory and to an IPAM plugin, and to nothing else: no agent, no API server. What the
// agent knows about a pod it has published in the pending map before the runtime calls ADD.
//
// It does not own what it puts together: devices are pkg/link's, programs and maps pkg/datapath's, records pkg/endpoint's, addresses the
// IPAM plugin's.
//
// Runtimes may never call DEL, and commands are killed: a Collector, which the agent runs, removes what then stays (docs/design/0014-gc.md).
//
// Concurrency: commands about one attachment (container ID and interface name) exclude each other by a lock file; different attachments
// run in parallel.
package cni

// SPDX-License-Identifier: Apache-2.0

// Package flow reads what the datapath has seen: the flow table as one line per flow, the drop counters, and the live events of the
// ring buffer. It turns the maps' entries into values with net/netip addresses and, where the node's files know them, the names of
// pods, services and rules.
//
// It opens and writes no map: callers hand in the opened ones (pkg/datapath). Nothing here needs the agent. A Names value is
// read-only once loaded; the readers keep no state between calls.
//
// Kernel floor: 5.8 (ring buffer); batched reading is used where the kernel has it (5.6) and replaced by single steps where not.
package flow

// SPDX-License-Identifier: Apache-2.0

// Package ipam leases pod addresses from ranges of one node. It owns the lease state under <run>/ipam/<network>/ and the meaning of the
// "ipam" section of a network configuration; it knows neither devices nor network namespaces (only whether a namespace's path still
// exists) and never talks to the cluster. Both the CNI IPAM plugin margay-ipam and, in-process, the CNI plugin margay call it.
//
// # What is promised
//
// An address is leased to at most one attachment (containerID, ifName) at a time. Add gives one address of every range set or none at
// all. An address that was released is the last one to be leased again; within releaseCooldown seconds of its release it is leased only
// when nothing else is left (never, with strictCooldown). Network and broadcast addresses, gateways and excluded addresses are never
// leased. The cost of Add and Del does not depend on how many leases are held: a full /16 and a /64 take the same few dozen reads.
// Any number of processes may call at once, and kill -9 at any instant leaves either the state before the call or the one after it.
// A reboot ends every lease: the state carries the kernel's boot id and is void under another one.
//
// # State
//
// Two files: "lock", empty, on which every call holds an exclusive flock, and "state", which is read and written in cells of 64 bytes,
// little endian. Cell 0 names the layout and never changes; a new layout (growth, edited ranges, repair) is a new file, written beside
// the old one as "state.new" and renamed over it.
//
//	cell 0      header: magic, version, boot id, fingerprint of the ranges, table sizes, CRC
//	cell 1      counters: leases, known addresses, heads of the free lists, first cell never used of each table
//	cells 2…    journal: one transaction's cells (number and content) under a CRC; a count of 0 means none
//	ranges      one cell for each range: first, last, next address never leased, queue of released addresses (head, tail), counts
//	buckets     hash table of addresses: one record number for each bucket, 0 means empty
//	addresses   one cell for each address that is leased or was: address, time of release, bucket chain, queue neighbours, lease
//	buckets     hash table of leases by (containerID, ifName)
//	leases      eight cells for each lease: chain, then under a CRC: addresses, time, netns (path, device, inode), names
//
// A call changes cells only in memory, then commits: the changed cells go into the journal in one write (from here on the call has
// happened), then to their places, then the journal's count becomes 0. Whoever takes the lock next finishes a complete journal and drops
// a torn one. Space is reserved when the file is made, so that Del never needs a free block.
//
// Lease and released-address records can be recognised by magic and CRC wherever they lie; all else is index. A call that finds the
// index damaged (which a killed process cannot cause) makes a new file from the records that are intact.
package ipam

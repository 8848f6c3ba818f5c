/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/*
 * Every map, once. Pinned under maps/<name>_v<N> by pkg/datapath; sizes here are the defaults and may be configured.
 * A changed layout is a new N (datapath.mapVersion) with a migration.
 */

#include "datagram.h"

/*
 * Flow table: tuple → what to do with its packets. Two entries per flow, one for each direction.
 * Written by the programs, deleted by sweep_flows and by LRU eviction. 131 072 entries are 29 MiB.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 131072);
	__type(key, struct flow_key);
	__type(value, struct flow);
} flows SEC(".maps");

/*
 * Pod address → interface, identity, policy. Written by the CNI plugin at ADD, its identity and policy by the agent;
 * deleted by the plugin at DEL. Lives as long as the pod.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct addr);
	__type(value, struct endpoint);
} endpoints SEC(".maps");

/*
 * Pod key hash → identity and policy to start with. Written by the agent when a pod is scheduled here, read by the plugin
 * at ADD, deleted by the agent with the pod. Never read by a program.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct pending_key);
	__type(value, struct pending);
} pending SEC(".maps");

/* Prefix → identity, for every address that a policy may name. Written and deleted by the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 131072);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct ipcache_key);
	__type(value, struct ipcache_entry);
} ipcache SEC(".maps");

/* Address of a node → enum node_addr_flags. Written and deleted by the agent; the plugin fills in this node's at Ensure. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct addr);
	__type(value, __u32);
} node_addrs SEC(".maps");

/* Index → another node. Written by the agent before whatever names the index; a node that goes leaves zeroes. 160 KiB. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, struct node);
} nodes SEC(".maps");

/* Prefix → where it is: other nodes' pod ranges, this node's own, ranges that are not masqueraded. Written and deleted by the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct route_key);
	__type(value, struct route);
} routes SEC(".maps");

/* Device → the addresses that masqueraded traffic leaves it with; 0: any device without an entry. Written and deleted by the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct egress_addrs);
} egress_addrs SEC(".maps");

/*
 * Port / 64 → bit (port % 64) is set where masquerade must not take the port: the node's reserved ports
 * (net.ipv4.ip_local_reserved_ports) and its NodePorts. Written by the agent. 8 KiB.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, __u64);
} reserved_ports SEC(".maps");

/* Frontend → service. Written and deleted by the agent; those with SERVICE_HOST_PORT by the plugin, also in the two maps that follow. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct frontend_key);
	__type(value, struct service);
} services SEC(".maps");

/* (list, slot) → backend. Written before the service that counts it, deleted after. By the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct backend_key);
	__type(value, struct backend);
} backends SEC(".maps");

/*
 * Set of (service port, address, port) that still serve, with enum service_backend_flags: a flow whose backend left it is re-selected, an
 * affinity whose backend left the list is, too. By the agent.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct service_backend);
	__type(value, __u32);
} service_backends SEC(".maps");

/*
 * (client, service port) → the backend that new connections go to. Written by the programs, where a backend is chosen; forgotten by LRU
 * eviction alone, because an entry that is too old, or leads to a backend that left, counts for nothing. 7 MiB.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct affinity_key);
	__type(value, struct affinity);
} affinity SEC(".maps");

/*
 * (list, size, chunk) → slots. Of lists whose services ask for consistent hashing. Written after the backends that it names and before the
 * services that name its size, deleted after those. By the agent. 192 bytes for each chunk in use.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct maglev_key);
	__type(value, struct maglev_chunk);
} maglev SEC(".maps");

/*
 * (service port, prefix) → 1: sources that may use its load balancer addresses. Written before the frontends that have
 * SERVICE_SOURCE_RANGES, deleted after. By the agent.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct source_range_key);
	__type(value, __u32);
} source_ranges SEC(".maps");

/* Prefix → enum service_addr: cluster addresses, and the ranges that they are from. Written after the services' frontends. By the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct service_addr_key);
	__type(value, __u32);
} service_addrs SEC(".maps");

/* Service id → epoch, raised by the agent when a backend leaves the service. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, __u32);
} service_epochs SEC(".maps");

/* (policy id, direction, peer identity, protocol, port prefix) → verdict. Written and deleted by the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct policy_key);
	__type(value, struct policy_entry);
} policy SEC(".maps");

/*
 * Host-side device index modulo the size → epoch; the first two slots are enum epoch_slots. A new value sends every flow from or to
 * the pod behind it through policy again.
 * Written by the agent when the pod's policy, or the identity of a peer that its policy may name, changes; by the plugin at ADD
 * and DEL. Two devices may share a slot: the price is a needless re-judgement.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, ENDPOINT_EPOCHS);
	__type(key, __u32);
	__type(value, __u32);
} endpoint_epochs SEC(".maps");

/* What is switched on. Written by the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct node_state);
} node_state SEC(".maps");

/*
 * Fragmented datagram → ports of its first fragment, or the fragments that wait for it. Written by the programs, deleted by LRU
 * eviction; believed for 30 seconds. 8192 entries are 1.1 MiB.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct fragment_key);
	__type(value, struct datagram);
} fragments SEC(".maps");

/* Fragments that came before the first of their datagram. A ring: the next one takes the place of the oldest. By the programs. 1.6 MiB. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, HELD_FRAGMENTS);
	__type(key, __u32);
	__type(value, struct held_fragment);
} held_fragments SEC(".maps");

/* How many fragments have ever waited: modulo HELD_FRAGMENTS the next slot of held_fragments. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} held_cursor SEC(".maps");

/* Work space of a first fragment, per CPU: larger than the stack of a program. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct fragment_scratch);
} fragment_scratch SEC(".maps");

/* reason * 2 + direction → dropped packets and bytes. Written by the programs, never reset. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 128);
	__type(key, __u32);
	__type(value, struct counter);
} counters SEC(".maps");

/* Sampled drops and verdicts, for whoever listens (margayctl drops, the agent). */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 262144);
} events SEC(".maps");

/* Identification of this CPU's next outer IPv4 header. By the programs. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} outer_ids SEC(".maps");

/* How many events this CPU has written in the current second. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct event_budget);
} event_budget SEC(".maps");

/* Work space of a new flow, per CPU: too large for the stack of a program. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct new_flow);
} scratch SEC(".maps");

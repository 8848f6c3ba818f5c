/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/* Who is behind an address, and may the two talk? Always judged after service translation. */

#include "pkt.h"

/*
 * Keys are copied to the stack: before 6.2 the verifier refuses a pointer that a global function got as its argument ("type=mem
 * expected=fp") as a map's key or value.
 */
static __always_inline struct endpoint *endpoint_of(const struct addr *a)
{
	struct addr key = *a;

	return bpf_map_lookup_elem(&endpoints, &key);
}

static __always_inline __u32 node_addr_flags_of(const struct addr *a)
{
	struct addr key = *a;
	__u32 *flags = bpf_map_lookup_elem(&node_addrs, &key);

	return flags ? *flags : 0;
}

/* Where the address is, as far as prefixes say: NULL is outside the cluster. The nodes' own addresses are in node_addrs. */
static __always_inline struct route *route_of(const struct addr *a)
{
	struct route_key key = {.prefixlen = 128, .addr = *a};

	return bpf_map_lookup_elem(&routes, &key);
}

/* The other node that has the address, or has a pod that has it; 0: none. */
static __always_inline __u32 node_of(const struct addr *a)
{
	__u32 flags = node_addr_flags_of(a);
	struct route *r;

	if (flags)
		return flags >> NODE_ADDR_INDEX_SHIFT;
	r = route_of(a);
	return r ? r->node : 0;
}

static __always_inline __u32 identity_of(const struct addr *a)
{
	struct ipcache_key key = {.prefixlen = 128, .addr = *a};
	struct ipcache_entry *e = bpf_map_lookup_elem(&ipcache, &key);

	return e ? e->identity : IDENTITY_WORLD;
}

/* This CPU's work space; NULL only for the verifier. */
static __always_inline struct new_flow *new_flow(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&scratch, &zero);
}

struct judgement {
	__u32 verdict; /* enum policy_verdict */
	__u32 rule_id;
	__u32 flags; /* enum policy_entry_flags */
};

static __always_inline struct policy_entry *policy_find(struct policy_key *key, __u32 identity)
{
	key->identity = identity;
	return bpf_map_lookup_elem(&policy, key);
}

/* The better of the peer's own entry and the wildcard's: lower rank, then deny. Two lookups, whatever the number of rules. */
static __always_inline struct judgement policy_judge(__u32 policy_id, __u32 direction, __u32 identity, const struct flow_key *key)
{
	struct judgement j = {.verdict = VERDICT_DENY};
	struct policy_entry *own, *any;
	struct policy_key pk = {
		.prefixlen = POLICY_PREFIX_PORT,
		.policy_id = policy_id,
		.direction = direction,
		.proto = key->proto,
	};

	if (key->proto != IPPROTO_ICMP && key->proto != IPPROTO_ICMPV6)
		pk.port = key->dport;
	own = policy_find(&pk, identity);
	any = policy_find(&pk, IDENTITY_ANY);
	if (!own || (any && (any->rank < own->rank || (any->rank == own->rank && any->verdict == VERDICT_DENY))))
		own = any;
	if (own) {
		j.verdict = own->verdict;
		j.rule_id = own->rule_id;
		j.flags = own->flags;
	}
	return j;
}

/*
 * 0, or minus the reason to drop. nf->rule_id names the rule that decided last, nf->direction whose it is. Of exempt traffic only a
 * ClusterNetworkPolicy can deny something.
 */
static __always_inline int policy_check(struct new_flow *nf, const struct endpoint *subject, __u32 direction, __u32 peer_identity,
					int exempt)
{
	__u32 id = subject->policy_id[direction];
	struct judgement j;

	if (id == POLICY_NONE)
		return 0;
	j = policy_judge(id, direction, peer_identity, &nf->post);
	if (exempt && !(j.flags & POLICY_ENTRY_CLUSTER))
		return 0;
	nf->rule_id = j.rule_id;
	nf->direction = direction;
	if (j.verdict == VERDICT_ALLOW)
		return 0;
	return id == POLICY_NODE_ONLY ? -DROP_POLICY_PENDING : -DROP_POLICY;
}

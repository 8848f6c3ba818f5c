/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/* Pods' traffic to outside the cluster leaves with an address of this node. docs/design/0005-masquerade.md */

#include "flow.h"
#include "policy.h"

/* Is it a place where pods are known by their own addresses: the cluster's nodes and pods, and ranges that the agent names? */
static __always_inline int knows_pods(const struct addr *a)
{
	struct route *r;

	if (node_addr_flags_of(a))
		return 1;
	r = route_of(a);
	return r && (r->node || r->flags);
}

/*
 * Under this node's address a pod's packet to the port of the overlay would be believed by whichever node has the destination, an address
 * that we know nothing of.
 */
static __always_inline int is_own_tunnel(const struct flow_key *k)
{
	struct node_state *s = node_settings();

	return k->proto == IPPROTO_UDP && s && s->overlay_ifindex && k->dport == s->overlay_port;
}

/*
 * For a new flow from a pod that leaves by the device, after policy: gives it that device's address. The port is still the pod's own.
 * What the stack forwards is not seen here: an adopted pod's traffic to the outside is the other plugin's, masquerade included.
 */
__noinline int masquerade(struct new_flow *nf, __u32 ifindex)
{
	__u32 key = ifindex;
	struct egress_addrs *e;

	if (!nf)
		return -DROP_INVALID_CONFIG;
	if (!nf->src.ifindex || !(node_flags() & NODE_MASQUERADE) || knows_pods(&nf->post.dst))
		return 0;
	if (is_own_tunnel(&nf->post))
		return -DROP_OVERLAY_SOURCE;
	e = bpf_map_lookup_elem(&egress_addrs, &key);
	if (!e) {
		key = 0;
		e = bpf_map_lookup_elem(&egress_addrs, &key);
	}
	if (!e)
		return -DROP_NO_EGRESS_ADDRESS;
	nf->post.src = addr_is_v4(&nf->post.dst) ? e->v4 : e->v6;
	if (addr_is_unspecified(&nf->post.src))
		return -DROP_NO_EGRESS_ADDRESS;
	nf->flags |= FLOW_MASQUERADE;
	return 0;
}

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/* What is special about a flow that the host's own stack opens to a service. Part of the slow path. */

#include "route.h"

/*
 * The host's stack has sent the packet to a service: by the device for that, or, because one of its own addresses is the service's, by the
 * loopback device, whose MAC is zero. The answers come in by the same one.
 */
__noinline int note_host(struct __sk_buff *skb, struct new_flow *nf)
{
	struct node_state *s = node_settings();
	struct ethhdr *eth = pkt_at(skb, 0, sizeof(*eth));

	if (!eth || !s || !nf)
		return -DROP_TRUNCATED;
	nf->flags |= FLOW_VIA_HOST;
	nf->out_ifindex[REPLY] = mac_is_zero(eth->h_source) ? LOOPBACK_IFINDEX : s->host_ifindex;
	host_end(&nf->src, eth->h_source);
	/* Some are not its own: of containers that are no pods of ours, which it forwards. */
	if (nf->out_ifindex[REPLY] == LOOPBACK_IFINDEX || (node_addr_flags_of(&nf->fwd.src) & NODE_ADDR_LOCAL))
		nf->flags |= FLOW_FROM_HOST;
	return 0;
}

/*
 * The loopback device carries connections of the host to itself, too, when their answers would be another flow's (to_loopback); by the other
 * device nothing comes but what is for a service. No backend could answer to a loopback address: there it becomes the node's own.
 */
static __always_inline int host_tuples(struct new_flow *nf)
{
	struct node_state *s = node_settings();
	__u32 key = s ? s->host_ifindex : 0;
	struct egress_addrs *e;

	if (!(nf->flags & FLOW_SERVICE))
		return nf->out_ifindex[REPLY] == LOOPBACK_IFINDEX ? 0 : -DROP_SERVICE_UNKNOWN_PORT;
	if (!addr_is_loopback(&nf->fwd.src))
		return 0;
	e = bpf_map_lookup_elem(&egress_addrs, &key);
	if (!e)
		return -DROP_NO_EGRESS_ADDRESS;
	nf->post.src = addr_is_v4(&nf->post.dst) ? e->v4 : e->v6;
	if (addr_is_unspecified(&nf->post.src))
		return -DROP_NO_EGRESS_ADDRESS;
	nf->flags |= FLOW_MASQUERADE;
	return 0;
}

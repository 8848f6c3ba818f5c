/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/* Does a packet come from where its source address lives? Asked in the slow path, of every hook. */

#include "parse.h"
#include "policy.h"

/*
 * Does the node that encapsulated the packet speak for its inner source? For its pods and itself, and, forwarding service traffic, for
 * any client that is none of the cluster's pods: those have their service traffic translated at home.
 */
static __always_inline int check_overlay_source(const struct pkt *p, const struct new_flow *nf, const struct endpoint *sender)
{
	struct route *r;

	if (!p->in_node)
		return -DROP_OVERLAY_SOURCE;
	if (sender->ifindex)
		return -DROP_SOURCE_IS_LOCAL;
	if (p->vni == VNI_PODS)
		return node_of(&p->key.src) == p->in_node ? 0 : -DROP_OVERLAY_SOURCE;
	if (nf->known)
		return 0;
	r = route_of(&p->key.src);
	return r && (r->node || (r->flags & ROUTE_LOCAL)) ? -DROP_OVERLAY_SOURCE : 0;
}

/* Pods that are reached through the overlay do not send without it. */
static __always_inline int check_bare_source(const struct pkt *p)
{
	struct route *r = route_of(&p->key.src);

	return r && (r->flags & ROUTE_OVERLAY) ? -DROP_NOT_ENCAPSULATED : 0;
}

/* From outside: nobody there has an address of this node, of its pods, or of pods that are reached through the overlay only. */
static __always_inline int check_outside_source(const struct pkt *p, const struct new_flow *nf, const struct endpoint *sender)
{
	if (sender->ifindex || addr_is_loopback(&p->key.src) || (node_addr_flags_of(&p->key.src) & NODE_ADDR_LOCAL))
		return -DROP_SOURCE_IS_LOCAL;
	/* What is the host's is not ours to judge. */
	if (!nf->src.ifindex && !nf->dst.ifindex && !(nf->flags & FLOW_SERVICE))
		return 0;
	return check_bare_source(p);
}

/* Does the packet come from where its source address lives? */
static __always_inline int check_source(struct __sk_buff *skb, const struct pkt *p, const struct new_flow *nf)
{
	const struct endpoint *sender = nf->reply ? &nf->dst : &nf->src;
	struct ethhdr *eth;

	if (p->hook == HOOK_FROM_POD) {
		eth = pkt_at(skb, 0, sizeof(*eth));
		if (!eth)
			return -DROP_TRUNCATED;
		if (sender->ifindex != skb->ifindex)
			return -DROP_SPOOFED_ADDRESS;
		return mac_equal(eth->h_source, sender->mac) ? 0 : -DROP_SPOOFED_MAC;
	}
	if (p->hook == HOOK_FROM_OVERLAY)
		return check_overlay_source(p, nf, sender);
	if (p->hook == HOOK_FROM_NETDEV)
		return check_outside_source(p, nf, sender);
	/* A pod's own packets to services never get as far as the host's stack. */
	if (p->hook == HOOK_FROM_HOST)
		return sender->ifindex ? -DROP_SPOOFED_ADDRESS : check_bare_source(p);
	/* Forwarded by the stack from a device that has no program of ours. */
	return p->hook == HOOK_TO_POD && skb->ingress_ifindex && !sender->ifindex ? check_bare_source(p) : 0;
}

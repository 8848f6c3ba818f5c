/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/* The fast path: one flow lookup, a few comparisons, the entry's action. Everything else is connect.h. */

#include "connect.h"
#include "fragment.h"

/* The outer source is the address of the node that the entry names: an array lookup, no hash. */
static __always_inline int flow_node_matches(const struct pkt *p, const struct flow *f)
{
	struct node *n;

	if (!(f->flags & FLOW_IN_OVERLAY))
		return 0;
	n = node_by_index(f->in_node);
	/* A node that has gone left zeroes. */
	return n && n->mtu && addr_equal(&n->addr, &p->outer);
}

/*
 * The entry was made for packets of this device and this MAC: whoever else sends the tuple lies. What the host's stack hands to a pod
 * needs an entry that was judged for that pod: a flow to an address that no pod had may have been judged without it.
 */
static __always_inline int flow_sender_matches(struct __sk_buff *skb, const struct pkt *p, const struct flow *f, enum hook hook)
{
	struct ethhdr *eth;

	if (hook == HOOK_TO_POD)
		return f->out_ifindex == skb->ifindex && f->action <= FLOW_TO_POD;
	if (hook == HOOK_FROM_OVERLAY)
		return flow_node_matches(p, f);
	if (hook == HOOK_TO_NETDEV)
		return (f->flags & (FLOW_IN_NODE | FLOW_VIA_HOST)) == FLOW_IN_NODE;
	if (hook == HOOK_FROM_HOST)
		return (f->flags & FLOW_VIA_HOST) && !(f->flags & (FLOW_IN_POD | FLOW_IN_OVERLAY));
	if (hook != HOOK_FROM_POD)
		return !(f->flags & (FLOW_IN_POD | FLOW_IN_NODE | FLOW_IN_OVERLAY));
	eth = pkt_at(skb, 0, sizeof(*eth));
	return eth && f->in_ifindex == skb->ifindex && mac_equal(eth->h_source, f->in_mac);
}

/* The event shows what policy judged: the tuple after translation. */
static __always_inline int denied(struct pkt *p, const struct flow *f)
{
	p->key = f->xlate;
	p->rule_id = f->rule_id;
	p->direction = f->flags & FLOW_DENIED_INGRESS ? INGRESS : EGRESS;
	return -DROP_POLICY;
}

/*
 * p->key is complete. Returns a tc action or minus a drop reason. hook is p->hook, but a constant at each call, here and in forward: the
 * compiler keeps what that hook needs. p->hook is read again each time, because functions that it does not see into know p.
 */
static __always_inline int handle_flow(struct __sk_buff *skb, struct pkt *p, enum hook hook)
{
	struct flow *f = bpf_map_lookup_elem(&flows, &p->key);

	if (unlikely(!f || pkt_opens_tcp(p) || !flow_is_current(f) || !flow_sender_matches(skb, p, f, hook) || next_hop_changed(skb, p, f)))
		return connect(skb, p, f);
	if (unlikely(f->flags & FLOW_DENIED))
		return denied(p, f);
	flow_note_packet(f, p);
	return forward(skb, p, f, hook);
}

/*
 * A fragment goes the way of its flow; a later one is judged by the first one's ports. No function of its own: in 6.1 the stack of
 * one more, below connect, would be too much.
 */
static __always_inline int handle_fragment(struct __sk_buff *skb, struct pkt *p, enum hook hook)
{
	int ret = fragment_begin(skb, p);

	if (ret != FRAGMENT_JOINED)
		return ret;
	ret = handle_flow(skb, p, hook);
	return p->frag == FRAG_FIRST ? fragment_end(skb, p, ret) : ret;
}

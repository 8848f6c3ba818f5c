/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/*
 * The next hop of a flow that leaves by a device, as the kernel's routes name it. The entry keeps it, so that a known packet needs no
 * lookup of a route; the neighbour behind it, its state and its resolution stay the kernel's. It is confirmed with the first packet in
 * every tick and used in that tick only: a changed route is followed without the agent, too. docs/design/0001-flow-table.md.
 */

#include "pkt.h"

static __always_inline void fib_addrs(struct bpf_fib_lookup *fib, const struct addr *src, const struct addr *dst)
{
	if (addr_is_v4(dst)) {
		fib->family = AF_INET;
		fib->src[0] = src->w[3];
		fib->dst[0] = dst->w[3];
	} else {
		fib->family = AF_INET6;
		__builtin_memcpy(fib->src, src->w, 16);
		__builtin_memcpy(fib->dst, dst->w, 16);
	}
}

/* The route leads out of a device. The packet at hand may be too large for it: forward compares every one with the entry's MTU. */
static __always_inline int fib_leads_out(long ret)
{
	return ret == BPF_FIB_LKUP_RET_SUCCESS || ret == BPF_FIB_LKUP_RET_NO_NEIGH || ret == BPF_FIB_LKUP_RET_FRAG_NEEDED;
}

/* The neighbour has a link-layer address. On the stack, where the verifier wants words aligned. */
static __always_inline int fib_has_mac(const struct bpf_fib_lookup *fib)
{
	const __u16 *mac = (const __u16 *)fib->dmac;

	return (mac[0] | mac[1] | mac[2]) != 0;
}

/* Has the entry room for a next hop, and use? A flow that another node's backend was chosen for has no room. */
static __always_inline int flow_has_next_hop(const struct flow *f)
{
	return f->action == FLOW_TO_NETDEV && !(f->flags & (FLOW_TO_MAC | FLOW_DENIED)) && !f->backend_port;
}

/*
 * The next hop of a lookup that leads out. Zero, and the kernel looks the route up for each packet: the neighbour is not resolved, or has no
 * link-layer address (such a device may want the route with the packet).
 */
static __always_inline void fib_next_hop(const struct bpf_fib_lookup *fib, long ret, struct addr *hop)
{
	__builtin_memset(hop, 0, sizeof(*hop));
	if (ret == BPF_FIB_LKUP_RET_NO_NEIGH || !fib_has_mac(fib))
		return;
	/* IPv4 has a gateway of the other family, too (RFC 5549). */
	if (fib->family == AF_INET)
		addr_set_v4(hop, fib->dst[0]);
	else
		addr_set_v6(hop, fib->dst);
}

/*
 * Would the slow path now write another one into the entry? Asked as there: for the opener's packets by their source, for the answers by
 * the device that they have (route_lookup and route_back, route.h). Not inlined: a frame of its own, where that is not on every packet's way.
 */
__noinline int next_hop_is_another(struct __sk_buff *skb, const struct flow_key *key, const struct flow *f)
{
	struct bpf_fib_lookup fib = {};
	struct addr hop = {};
	__u32 ifindex = skb->ifindex;
	int reply;
	long ret;

	if (!key || !f || !flow_has_next_hop(f))
		return 0;
	/* The context is read above, or clang chooses between two pointers, which the verifier refuses. */
	asm volatile("" : "+r"(ifindex));
	reply = f->flags & FLOW_REPLY;
	fib.ifindex = reply ? f->out_ifindex : ifindex;
	fib.l4_protocol = key->proto;
	fib_addrs(&fib, f->flags & (FLOW_REPLY | FLOW_VIA_HOST) ? &f->xlate.src : &key->src, &f->xlate.dst);
	ret = bpf_fib_lookup(skb, &fib, sizeof(fib), reply ? BPF_FIB_LOOKUP_OUTPUT : 0);
	if (fib_leads_out(ret) && fib.ifindex == f->out_ifindex)
		fib_next_hop(&fib, ret, &hop);
	return !addr_equal(&hop, &f->next_hop);
}

/* Asks with the entry's first packet in every tick. */
static __always_inline int next_hop_changed(struct __sk_buff *skb, const struct pkt *p, const struct flow *f)
{
	return unlikely(f->tick != (__u16)now_tick()) && next_hop_is_another(skb, &p->key, f);
}

/* The entry has one that this tick has confirmed. An ICMP error is no packet of the flow, and confirms nothing. */
static __always_inline int flow_knows_next_hop(const struct flow *f)
{
	return !f->backend_port && f->tick == (__u16)now_tick() && !addr_is_unspecified(&f->next_hop);
}

/* Sends the packet out of the entry's device. Not inlined: its frame would be one too many in 6.1. */
__noinline int next_hop_redirect(const struct flow *f)
{
	struct bpf_redir_neigh to = {};

	if (!f)
		return -DROP_INVALID_CONFIG;
	if (!flow_knows_next_hop(f))
		return bpf_redirect_neigh(f->out_ifindex, NULL, 0, 0);
	if (addr_is_v4(&f->next_hop)) {
		to.nh_family = AF_INET;
		to.ipv4_nh = f->next_hop.w[3];
	} else {
		to.nh_family = AF_INET6;
		__builtin_memcpy(to.ipv6_nh, f->next_hop.w, 16);
	}
	return bpf_redirect_neigh(f->out_ifindex, &to, sizeof(to), 0);
}

/* A lookup's result, where the next hop that it names is the helper's argument already: 6.1 has no stack for both. */
union next_hop_lookup {
	struct bpf_fib_lookup fib;
	struct {
		__u32 before[7];
		struct bpf_redir_neigh hop;
	};
};

_Static_assert(offsetof(union next_hop_lookup, hop.ipv6_nh) == offsetof(union next_hop_lookup, fib.dst), "the next hop is elsewhere");

/*
 * The same for a packet that came through the overlay, where nobody knows the next hop: by a lookup of its own. The packet's outer header is in
 * the place of a route. Without a next hop bpf_redirect_neigh puts a route there and does not give the other back: kernels of before October
 * 2025 lose memory with every such packet.
 */
__noinline int overlay_redirect(struct __sk_buff *skb, const struct flow_key *to, __u32 ifindex)
{
	union next_hop_lookup l = {};
	__u32 family;
	long ret;

	if (!to)
		return -DROP_INVALID_CONFIG;
	l.fib.ifindex = ifindex;
	l.fib.l4_protocol = to->proto;
	fib_addrs(&l.fib, &to->src, &to->dst);
	ret = bpf_fib_lookup(skb, &l.fib, sizeof(l.fib), BPF_FIB_LOOKUP_OUTPUT);
	/* Such as a device without link layer, which may want the route with the packet. */
	if (!fib_leads_out(ret) || l.fib.ifindex != ifindex || (ret != BPF_FIB_LKUP_RET_NO_NEIGH && !fib_has_mac(&l.fib)))
		return bpf_redirect_neigh(ifindex, NULL, 0, 0);
	family = l.fib.family;
	l.hop.nh_family = family;
	return bpf_redirect_neigh(ifindex, &l.hop, sizeof(l.hop), 0);
}

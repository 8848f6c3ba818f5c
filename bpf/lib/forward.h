/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/* Carrying out what a flow entry says. */

#include "nat.h"
#include "nexthop.h"
#include "overlay.h"
#include "toobig.h"

static __always_inline int mac_rewrite(struct __sk_buff *skb, const struct flow *f)
{
	struct ethhdr *eth = pkt_at(skb, 0, sizeof(*eth));

	if (!eth)
		return -DROP_TRUNCATED;
	mac_copy(eth->h_dest, f->dst_mac);
	mac_copy(eth->h_source, f->src_mac);
	return 0;
}

/* One routing hop. The caller has made sure that the packet may take it. */
static __always_inline int ttl_decrement(struct __sk_buff *skb, struct pkt *p, enum hook hook)
{
	struct iphdr *ip4;
	struct ipv6hdr *ip6;

	if (p->l3_proto == ETH_P_IP) {
		ip4 = pkt_at(skb, L3_OFF, sizeof(*ip4));
		if (!ip4)
			return -DROP_TRUNCATED;
		ip4->check = csum_fold(csum_add((__u16)~ip4->check, (__u32)(__u16)~bpf_htons(0x0100)));
		ip4->ttl--;
		return 0;
	}
	ip6 = pkt_at(skb, L3_OFF, sizeof(*ip6));
	if (!ip6)
		return -DROP_TRUNCATED;
	ip6->hop_limit--;
	/*
	 * No header checksum cancels this out in the NIC's sum of the whole packet (CHECKSUM_COMPLETE), which redirect_peer hands on. What
	 * comes from a pod has no such sum: its kernel makes none, and forgets a NIC's when it forwards or bridges the packet.
	 */
	if (hook != HOOK_FROM_POD)
		bpf_csum_update(skb, (__u16)~bpf_htons(0x0001));
	return 0;
}

static __always_inline int to_pod_device(struct __sk_buff *skb, const struct flow *f)
{
	int ret = mac_rewrite(skb, f);

	if (ret)
		return ret;
	/* A pod behind another plugin's bridge may have addressed somebody else's MAC: its stack would refuse the packet. */
	if (skb->pkt_type != PACKET_HOST)
		bpf_skb_change_type(skb, PACKET_HOST);
	return bpf_redirect_peer(f->out_ifindex, 0);
}

/* Into the host's stack, by the device that its route to the packet's source leads to: strict rp_filter holds. */
static __always_inline int to_host_device(struct __sk_buff *skb, const struct flow *f)
{
	int ret = mac_rewrite(skb, f);

	return ret ? ret : bpf_redirect(f->out_ifindex, BPF_F_INGRESS);
}

static __always_inline int to_netdev_device(struct __sk_buff *skb, const struct flow *f, enum hook hook)
{
	int ret;

	if (!(f->flags & FLOW_TO_MAC)) {
		if (hook == HOOK_FROM_OVERLAY && !flow_knows_next_hop(f))
			return overlay_redirect(skb, &f->xlate, f->out_ifindex);
		return next_hop_redirect(f);
	}
	ret = mac_rewrite(skb, f);
	return ret ? ret : bpf_redirect(f->out_ifindex, 0);
}

/*
 * For a backend that is this node itself, from the overlay: the stack's reverse path filter wants the client's packet from where it would
 * send the answer. Nobody else's frame has one address at both ends; by that from_netdev knows it.
 */
static __always_inline int into_netdev(struct __sk_buff *skb, const struct flow *f)
{
	struct ethhdr *eth = pkt_at(skb, 0, sizeof(*eth));

	if (!eth)
		return -DROP_TRUNCATED;
	mac_copy(eth->h_source, eth->h_dest);
	return bpf_redirect(f->out_ifindex, BPF_F_INGRESS);
}

/*
 * The last step of every packet that is allowed: translation, then the way on. A packet without hops left goes to the stack as
 * it is, which answers with "time exceeded" and drops it; at to_pod and to_netdev the stack has taken the hop already, or it sends
 * itself, and nothing is a hop between the host and its services. One that does not fit the way returns -DROP_TOO_BIG, untouched: the hook
 * answers.
 */
static __always_inline int forward(struct __sk_buff *skb, struct pkt *p, const struct flow *f, enum hook hook)
{
	int by_stack = hook == HOOK_TO_POD || hook == HOOK_TO_NETDEV || hook == HOOK_FROM_HOST;
	int ret, to_stack = f->action == FLOW_TO_STACK || f->action == FLOW_TO_HOST;

	if (!to_stack && !by_stack && p->ttl <= 1)
		return TC_ACT_OK;
	if (f->mtu && p->kind != PKT_ICMP_ERROR && pkt_exceeds(skb, p, f->mtu)) {
		p->mtu = f->mtu;
		p->in_node = f->in_node;
		return -DROP_TOO_BIG;
	}
	/* An ICMP error is translated already (icmp.h). */
	if ((f->flags & FLOW_NAT) && p->kind != PKT_ICMP_ERROR) {
		ret = nat_rewrite(skb, p, &f->xlate, f->csum_diff);
		if (ret)
			return ret;
	}
	if (hook == HOOK_TO_POD || f->action == FLOW_TO_STACK)
		return TC_ACT_OK;
	if (f->action == FLOW_TO_HOST)
		return to_host_device(skb, f);
	/* An answer of the node itself that the stack has on its way already. */
	if (hook == HOOK_TO_NETDEV && f->action == FLOW_TO_NETDEV && f->out_ifindex == skb->ifindex)
		return TC_ACT_OK;
	ret = by_stack ? 0 : ttl_decrement(skb, p, hook);
	if (ret)
		return ret;
	if (f->action == FLOW_TO_POD)
		return to_pod_device(skb, f);
	if (f->action == FLOW_TO_NETDEV)
		return to_netdev_device(skb, f, hook);
	if (f->action == FLOW_TO_NODE)
		return overlay_forward(skb, f, hook);
	if (f->action == FLOW_INTO_NETDEV)
		return into_netdev(skb, f);
	return -DROP_INVALID_CONFIG;
}

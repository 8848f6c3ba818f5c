/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/*
 * ICMP errors. An error belongs to the flow whose packet it quotes and takes the way of that flow's other direction, under whose
 * translation the receiver knows the packet: its own addresses, and those of the quoted packet, are translated.
 *
 * The quoted packet's transport checksum is moved by the difference like every other. Where the quoted packet came from this machine,
 * its checksum may never have been computed (CHECKSUM_PARTIAL): then it is as wrong afterwards as it was before. No stack looks at it.
 */

#include "established.h"

/* A checksum field after what it covers has changed by diff (RFC 1624). */
static __always_inline __u16 csum_follow(__u16 check, __u32 diff)
{
	return csum_fold(csum_add((__u16)~check, diff));
}

/*
 * The error goes to who really sent the quoted packet. One by that packet's destination comes from the address that it was sent to, a
 * router's from the router.
 */
static __always_inline int translate_outer_ipv4(struct __sk_buff *skb, const struct pkt *p, const struct flow *f, __u32 *end)
{
	struct iphdr *ip = pkt_at(skb, L3_OFF, sizeof(*ip));
	__be32 src;

	if (!ip)
		return -DROP_TRUNCATED;
	*end = L3_OFF + bpf_ntohs(ip->tot_len);
	src = ip->saddr == p->key.src.w[3] ? f->xlate.src.w[3] : ip->saddr;
	ip->check = csum_follow(ip->check, csum_add(csum_add(src, f->xlate.dst.w[3]), ~csum_add(ip->saddr, ip->daddr)));
	ip->saddr = src;
	ip->daddr = f->xlate.dst.w[3];
	return 0;
}

/* The same. ICMPv6's checksum covers the addresses: *diff is what they change. */
static __always_inline int translate_outer_ipv6(struct __sk_buff *skb, const struct pkt *p, const struct flow *f, __u32 *end, __u32 *diff)
{
	struct ipv6hdr *ip = pkt_at(skb, L3_OFF, sizeof(*ip));
	struct addr src, dst;
	__u32 removed;

	if (!ip)
		return -DROP_TRUNCATED;
	*end = L3_OFF + sizeof(*ip) + bpf_ntohs(ip->payload_len);
	addr_set_v6(&src, ip->saddr);
	addr_set_v6(&dst, ip->daddr);
	removed = csum_add(addr_sum(&src), addr_sum(&dst));
	if (addr_equal(&src, &p->key.src))
		src = f->xlate.src;
	*diff = csum_add(csum_add(addr_sum(&src), addr_sum(&f->xlate.dst)), ~removed);
	for (int i = 0; i < 4; i++) {
		ip->saddr[i] = src.w[i];
		ip->daddr[i] = f->xlate.dst.w[i];
	}
	return 0;
}

/* The quoted packet went the other way: its source is the flow's destination. */
static __always_inline int translate_quoted_addrs(struct __sk_buff *skb, const struct pkt *p, const struct flow *f, __u32 *diff)
{
	__u32 off = p->l4_off + sizeof(struct icmphdr);
	struct iphdr *ip4;
	struct ipv6hdr *ip6;

	if (p->l3_proto == ETH_P_IP) {
		ip4 = pkt_at(skb, off, sizeof(*ip4));
		if (!ip4)
			return -DROP_TRUNCATED;
		/* The header's own checksum takes up the difference: its sum stays. */
		ip4->check = csum_follow(ip4->check, f->csum_diff);
		ip4->saddr = f->xlate.dst.w[3];
		ip4->daddr = f->xlate.src.w[3];
		return 0;
	}
	ip6 = pkt_at(skb, off, sizeof(*ip6));
	if (!ip6)
		return -DROP_TRUNCATED;
	for (int i = 0; i < 4; i++) {
		ip6->saddr[i] = f->xlate.dst.w[i];
		ip6->daddr[i] = f->xlate.src.w[i];
	}
	*diff = csum_add(*diff, f->csum_diff);
	return 0;
}

/* The quoted transport header's checksum, as far as the quote reaches: eight bytes hold UDP's and ICMP's, but not TCP's. */
static __always_inline void translate_quoted_check(struct __sk_buff *skb, const struct pkt *p, const struct flow *f, __u32 end,
						   __u32 port_diff, __u32 *diff)
{
	__u32 off = p->quote_l4_off + l4_csum_off(p->key.proto);
	__u16 *check = pkt_at(skb, off, sizeof(*check)), now;

	if (!check || off + sizeof(*check) > end)
		return;
	if (p->key.proto == IPPROTO_UDP && !*check)
		return; /* it has none */
	now = csum_follow(*check, p->key.proto == IPPROTO_ICMP ? port_diff : csum_add(port_diff, f->csum_diff));
	if (p->key.proto == IPPROTO_UDP && !now)
		now = 0xffff;
	*diff = csum_add(*diff, csum_add(now, (__u16)~*check));
	*check = now;
}

static __always_inline int translate_quoted_ports(struct __sk_buff *skb, const struct pkt *p, const struct flow *f, __u32 end, __u32 *diff)
{
	const struct flow_key *to = &f->xlate;
	__be16 *ports = pkt_at(skb, p->quote_l4_off, 8);
	__u32 port_diff = csum_add(to->dport, (__u16)~p->key.dport);

	if (!ports || p->quote_l4_off + 8 > end)
		return -DROP_TRUNCATED;
	/* Its sum covers no address, and packets whose ports would change are not let pass (nat_rewrite). */
	if (p->key.proto == IPPROTO_SCTP)
		return to->sport == p->key.sport && to->dport == p->key.dport ? 0 : -DROP_NAT;
	if (p->key.proto == IPPROTO_ICMP || p->key.proto == IPPROTO_ICMPV6) {
		ports[2] = to->dport;
	} else {
		port_diff = csum_add(port_diff, csum_add(to->sport, (__u16)~p->key.sport));
		ports[0] = to->dport;
		ports[1] = to->sport;
	}
	*diff = csum_add(*diff, port_diff);
	translate_quoted_check(skb, p, f, end, port_diff, diff);
	return 0;
}

/*
 * Translates an error about a flow whose other direction, that of the error, has the entry f; p->key is that entry's key. All changes
 * are balanced by a checksum within the packet, so that the NIC's sum over all of it (CHECKSUM_COMPLETE) stays right.
 */
__noinline int translate_icmp_error(struct __sk_buff *skb, struct pkt *p, const struct flow *f)
{
	__u32 want = MAX_L4_OFF + sizeof(struct tcphdr), end = 0, diff = 0;
	struct icmphdr *icmp;
	int ret;

	if (!p || !f)
		return -DROP_NAT;
	/* parse needed no more than the quoted ports; TCP's checksum lies behind. */
	if (bpf_skb_pull_data(skb, skb->len < want ? skb->len : want))
		return -DROP_NAT;
	ret = p->l3_proto == ETH_P_IP ? translate_outer_ipv4(skb, p, f, &end) : translate_outer_ipv6(skb, p, f, &end, &diff);
	if (!ret)
		ret = translate_quoted_addrs(skb, p, f, &diff);
	if (!ret)
		ret = translate_quoted_ports(skb, p, f, end, &diff);
	if (ret)
		return ret;
	icmp = pkt_at(skb, p->l4_off, sizeof(*icmp));
	if (!icmp)
		return -DROP_TRUNCATED;
	icmp->checksum = csum_follow(icmp->checksum, diff);
	return 0;
}

/* An ICMP error is sent under its own address, which says nothing of the flow: the source check once more. */
static __always_inline int check_error_source(struct __sk_buff *skb, const struct pkt *p)
{
	struct endpoint *sender;
	struct iphdr *ip4;
	struct ipv6hdr *ip6;
	struct addr src;

	if (p->l3_proto == ETH_P_IP) {
		ip4 = pkt_at(skb, L3_OFF, sizeof(*ip4));
		if (!ip4)
			return -DROP_TRUNCATED;
		addr_set_v4(&src, ip4->saddr);
	} else {
		ip6 = pkt_at(skb, L3_OFF, sizeof(*ip6));
		if (!ip6)
			return -DROP_TRUNCATED;
		addr_set_v6(&src, ip6->saddr);
	}
	sender = endpoint_of(&src);
	if (p->hook == HOOK_FROM_POD)
		return sender && sender->ifindex == skb->ifindex ? 0 : -DROP_SPOOFED_ADDRESS;
	if (p->hook == HOOK_FROM_OVERLAY && sender)
		return -DROP_SOURCE_IS_LOCAL;
	if (p->hook == HOOK_FROM_NETDEV && (sender || (node_addr_flags_of(&src) & NODE_ADDR_LOCAL)))
		return -DROP_SOURCE_IS_LOCAL;
	return 0;
}

/*
 * The node's stack answers a pod's packet that forward left to it, with its hops used up: before translation, so that the quoted tuple
 * is the one that the pod has sent.
 */
static __always_inline int stack_answers_pod(const struct __sk_buff *skb, const struct pkt *p, const struct flow_key *quoted)
{
	struct flow *f;

	if (p->hook != HOOK_TO_POD || skb->ingress_ifindex)
		return 0;
	f = bpf_map_lookup_elem(&flows, quoted);
	return f && (f->flags & (FLOW_NAT | FLOW_DENIED)) == FLOW_NAT && f->in_ifindex == skb->ifindex;
}

/* An error that belongs to no flow, or comes from somebody who has no part in it. What may be about the host's own packets is the host's. */
static __always_inline int error_without_flow(const struct __sk_buff *skb, const struct pkt *p, const struct flow_key *quoted)
{
	if (p->hook == HOOK_FROM_NETDEV || p->hook == HOOK_TO_NETDEV || stack_answers_pod(skb, p, quoted))
		return TC_ACT_OK;
	if (p->hook != HOOK_FROM_OVERLAY)
		return -DROP_NO_FLOW;
	if (!(node_addr_flags_of(&p->outer) & NODE_ADDR_REMOTE))
		return -DROP_OVERLAY_SOURCE;
	return p->vni == VNI_PODS && (node_addr_flags_of(&quoted->src) & NODE_ADDR_LOCAL) ? TC_ACT_OK : -DROP_NO_FLOW;
}

/*
 * Does the error come by the way of the flow's packets? To to_pod the stack also brings what came in by a device and was no flow's there: where
 * the packets come straight from a pod, or through the overlay, an error from outside is a lie.
 */
static __always_inline int error_sender_matches(struct __sk_buff *skb, const struct pkt *p, const struct flow *f)
{
	if (p->hook == HOOK_TO_POD && skb->ingress_ifindex && (f->flags & (FLOW_IN_POD | FLOW_IN_OVERLAY)) && !(f->flags & FLOW_VIA_STACK))
		return 0;
	return flow_sender_matches(skb, p, f, p->hook);
}

/* Returns a tc action or minus a drop reason. It is no packet of the flow: neither life nor state of the entry changes. */
static __always_inline int handle_icmp_error(struct __sk_buff *skb, struct pkt *p)
{
	struct flow_key quoted = p->key;
	struct flow *f;
	int ret;

	key_reverse(&p->key, &quoted);
	f = bpf_map_lookup_elem(&flows, &p->key);
	if (!f || !flow_is_current(f) || !error_sender_matches(skb, p, f))
		return error_without_flow(skb, p, &quoted);
	ret = check_error_source(skb, p);
	if (ret)
		return ret;
	if (f->flags & FLOW_DENIED)
		return denied(p, f);
	if (f->flags & FLOW_NAT) {
		ret = translate_icmp_error(skb, p, f);
		if (ret)
			return ret;
	}
	return forward(skb, p, f, p->hook);
}

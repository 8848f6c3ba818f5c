/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/*
 * ARP and neighbour discovery of pods. Pods have permanent neighbour entries and need neither; a pod that asks anyway gets the MAC
 * of its host-side device for every address, because everything is reached through it (RFC 826, RFC 4861 §7.2.3).
 */

#include "nat.h"
#include "policy.h"

/* The pod of this device that owns the address, or NULL. */
static __always_inline struct endpoint *own_endpoint(const struct __sk_buff *skb, const struct addr *a, const __u8 *mac)
{
	struct endpoint *e = endpoint_of(a);

	return e && e->ifindex == skb->ifindex && mac_equal(e->mac, mac) ? e : NULL;
}

__noinline int answer_arp(struct __sk_buff *skb)
{
	struct ethhdr *eth = pkt_at(skb, 0, sizeof(*eth));
	struct arphdr *arp = pkt_at(skb, L3_OFF, sizeof(*arp));
	struct endpoint *e;
	struct addr sender;
	__be32 spa, tpa;

	if (!eth || !arp)
		return -DROP_TRUNCATED;
	if (arp->hrd != bpf_htons(ARPHRD_ETHER) || arp->pro != bpf_htons(ETH_P_IP) || arp->hln != 6 || arp->pln != 4)
		return -DROP_INVALID_ARP;
	__builtin_memcpy(&spa, arp->spa, 4);
	__builtin_memcpy(&tpa, arp->tpa, 4);
	addr_set_v4(&sender, spa);
	e = own_endpoint(skb, &sender, arp->sha);
	if (!e)
		return -DROP_INVALID_ARP;
	/* An answer to the host, or the business of another plugin's bridge. */
	if (arp->op == bpf_htons(ARPOP_REPLY) || (e->flags & ENDPOINT_ADOPTED))
		return TC_ACT_OK;
	if (arp->op != bpf_htons(ARPOP_REQUEST) || spa == tpa)
		return -DROP_INVALID_ARP;
	arp->op = bpf_htons(ARPOP_REPLY);
	__builtin_memcpy(arp->tha, e->mac, 6);
	__builtin_memcpy(arp->tpa, &spa, 4);
	__builtin_memcpy(arp->sha, e->host_mac, 6);
	__builtin_memcpy(arp->spa, &tpa, 4);
	__builtin_memcpy(eth->h_dest, e->mac, 6);
	__builtin_memcpy(eth->h_source, e->host_mac, 6);
	bpf_skb_change_type(skb, PACKET_HOST);
	return bpf_redirect_peer(skb->ifindex, 0);
}

/* Sum of a neighbour advertisement with its option and pseudo header (RFC 8200 §8.1). */
static __always_inline __u16 nd_checksum(struct ipv6hdr *ip, struct nd_msg *nd)
{
	__u32 len = sizeof(struct nd_msg) + sizeof(struct nd_opt);
	__s64 sum = bpf_csum_diff(NULL, 0, ip->saddr, 32, 0);

	sum = bpf_csum_diff(NULL, 0, (__be32 *)nd, sizeof(struct nd_msg) + sizeof(struct nd_opt), sum);
	return csum_fold(csum_add(csum_add(sum, bpf_htonl(len)), bpf_htonl(IPPROTO_ICMPV6)));
}

static __always_inline int send_advert(struct __sk_buff *skb, const struct endpoint *e)
{
	const __u32 size = sizeof(struct nd_msg) + sizeof(struct nd_opt);
	struct ethhdr *eth;
	struct ipv6hdr *ip;
	struct nd_msg *nd;
	struct nd_opt *opt;

	if (bpf_skb_change_tail(skb, L3_OFF + sizeof(*ip) + size, 0))
		return -DROP_INVALID_ND;
	eth = pkt_at(skb, 0, sizeof(*eth) + sizeof(*ip) + size);
	if (!eth)
		return -DROP_INVALID_ND;
	ip = (void *)(eth + 1);
	nd = (void *)(ip + 1);
	opt = (void *)(nd + 1);
	ip->payload_len = bpf_htons(size);
	ip->hop_limit = 255;
	for (int i = 0; i < 4; i++) {
		ip->daddr[i] = ip->saddr[i];
		ip->saddr[i] = nd->target[i];
	}
	nd->type = ICMPV6_ND_ADVERT;
	nd->code = 0;
	nd->flags = bpf_htonl(ND_ADVERT_ROUTER | ND_ADVERT_SOLICITED | ND_ADVERT_OVERRIDE);
	opt->type = ND_OPT_TARGET_LL;
	opt->len = 1;
	__builtin_memcpy(opt->mac, e->host_mac, 6);
	nd->checksum = 0;
	nd->checksum = nd_checksum(ip, nd);
	__builtin_memcpy(eth->h_dest, e->mac, 6);
	__builtin_memcpy(eth->h_source, e->host_mac, 6);
	bpf_skb_change_type(skb, PACKET_HOST);
	return bpf_redirect_peer(skb->ifindex, 0);
}

/* Would the stack keep the packet? Also true of an address that the node has got since node_addrs was written. */
static __always_inline int stack_keeps(struct __sk_buff *skb, const struct pkt *p)
{
	struct bpf_fib_lookup fib = {.family = AF_INET6, .ifindex = skb->ifindex, .l4_protocol = IPPROTO_ICMPV6};

	__builtin_memcpy(fib.src, p->key.src.w, 16);
	__builtin_memcpy(fib.dst, p->key.dst.w, 16);
	return bpf_fib_lookup(skb, &fib, sizeof(fib), 0) == BPF_FIB_LKUP_RET_NOT_FWDED;
}

/*
 * Where discovery may go: the link, the node, its pods. Anywhere else it would be a packet past policy, whatever it says.
 */
static __always_inline int nd_stays_here(struct __sk_buff *skb, const struct pkt *p)
{
	const struct addr *dst = &p->key.dst;

	if (dst->b[0] == 0xff)
		return (dst->b[1] & 0xf) <= 2;
	if (dst->b[0] == 0xfe && (dst->b[1] & 0xc0) == 0x80)
		return 1;
	return (node_addr_flags_of(dst) & NODE_ADDR_LOCAL) || endpoint_of(dst) != NULL || stack_keeps(skb, p);
}

__noinline int answer_nd(struct __sk_buff *skb, struct pkt *p)
{
	struct ethhdr *eth = pkt_at(skb, 0, sizeof(*eth));
	struct nd_msg *nd;
	struct endpoint *e;
	struct addr target;

	if (!p)
		return -DROP_INVALID_ND;
	nd = pkt_at(skb, p->l4_off, sizeof(*nd));
	/* RFC 4861 §7.1: a packet that was ever forwarded is none. */
	if (!eth || !nd || p->ttl != 255 || !nd_stays_here(skb, p))
		return -DROP_INVALID_ND;
	e = own_endpoint(skb, &p->key.src, eth->h_source);
	if (!e)
		return -DROP_INVALID_ND;
	addr_set_v6(&target, nd->target);
	if (nd->type == ICMPV6_ND_ADVERT)
		return own_endpoint(skb, &target, eth->h_source) ? TC_ACT_OK : -DROP_INVALID_ND;
	if ((e->flags & ENDPOINT_ADOPTED) && nd->type == ICMPV6_ND_SOLICIT)
		return TC_ACT_OK;
	/* With extension headers in front it is not what a stack sends (RFC 6980 asks for none). */
	if (nd->type != ICMPV6_ND_SOLICIT || addr_equal(&target, &p->key.src) || p->l4_off != L3_OFF + sizeof(struct ipv6hdr))
		return -DROP_INVALID_ND;
	return send_advert(skb, e);
}

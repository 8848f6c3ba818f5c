/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/*
 * "Connection refused" for a service without endpoints (contract row V8) or port (V9): a TCP reset, or ICMP port unreachable. The client's
 * packet is turned into the answer, in place, and sent back through the device that it came from (answer in toobig.h).
 */

#include "drop.h"
#include "nat.h"

#define QUOTE_L4 8 /* bytes of the transport header that the ICMP error quotes (RFC 792; RFC 4443 allows more) */

static __always_inline void swap_macs(struct ethhdr *eth)
{
	__u8 mac[6];

	__builtin_memcpy(mac, eth->h_dest, 6);
	__builtin_memcpy(eth->h_dest, eth->h_source, 6);
	__builtin_memcpy(eth->h_source, mac, 6);
}

static __always_inline void ipv4_header(struct iphdr *ip, __be32 src, __be32 dst, __u8 proto, __u16 len)
{
	struct iphdr h = {
		.version_ihl = 0x45,
		.tot_len = bpf_htons(len),
		.frag_off = bpf_htons(0x4000),
		.ttl = 64,
		.protocol = proto,
		.saddr = src,
		.daddr = dst,
	};

	h.check = csum_fold(bpf_csum_diff(NULL, 0, (__be32 *)&h, sizeof(h), 0));
	*ip = h;
}

static __always_inline void ipv6_header(struct ipv6hdr *ip, const struct addr *src, const struct addr *dst, __u8 proto, __u16 len)
{
	struct ipv6hdr h = {.version_class = 0x60, .payload_len = bpf_htons(len), .nexthdr = proto, .hop_limit = 64};

	__builtin_memcpy(h.saddr, src->w, 16);
	__builtin_memcpy(h.daddr, dst->w, 16);
	*ip = h;
}

/* Pseudo header from the service (key.dst) to the client (key.src): the mapped prefixes are no part of it. */
static __always_inline __u32 pseudo_sum(const struct pkt *p, __u8 proto, __u32 len)
{
	__u32 sum = csum_add(bpf_htonl(len), bpf_htonl(proto));

	if (p->l3_proto == ETH_P_IP)
		return csum_add(sum, csum_add(p->key.src.w[3], p->key.dst.w[3]));
	return csum_add(sum, csum_add(addr_sum(&p->key.src), addr_sum(&p->key.dst)));
}

/* Sequence numbers of the reset: RFC 9293 §3.10.7.1, by what the refused segment carries. */
static __always_inline void reset_header(const struct pkt *p, const struct tcphdr *seg, __u32 payload, struct tcphdr *rst)
{
	__u32 next = bpf_ntohl(seg->seq) + payload;

	rst->source = p->key.dport;
	rst->dest = p->key.sport;
	rst->doff = 5 << 4;
	rst->flags = TCP_RST;
	if (seg->flags & TCP_ACK) {
		rst->seq = seg->ack_seq;
	} else {
		rst->flags |= TCP_ACK;
		next += !!(seg->flags & TCP_SYN) + !!(seg->flags & TCP_FIN);
		rst->ack_seq = bpf_htonl(next);
	}
	rst->check = csum_fold(csum_add(pseudo_sum(p, IPPROTO_TCP, sizeof(*rst)), bpf_csum_diff(NULL, 0, (__be32 *)rst, sizeof(*rst), 0)));
}

/* Bytes behind the TCP header, by the IP header: the packet may be padded. */
static __always_inline int tcp_payload(struct __sk_buff *skb, const struct pkt *p, const struct tcphdr *tcp, __u32 *payload)
{
	__u32 headers = p->l4_off - L3_OFF + (tcp->doff >> 4) * 4, total;
	struct iphdr *ip4 = pkt_at(skb, L3_OFF, sizeof(*ip4));
	struct ipv6hdr *ip6;

	if (!ip4)
		return -DROP_TRUNCATED;
	if (p->l3_proto == ETH_P_IP) {
		total = bpf_ntohs(ip4->tot_len);
	} else {
		ip6 = pkt_at(skb, L3_OFF, sizeof(*ip6));
		if (!ip6)
			return -DROP_TRUNCATED;
		total = bpf_ntohs(ip6->payload_len) + sizeof(*ip6);
	}
	*payload = total > headers ? total - headers : 0;
	return 0;
}

__noinline int refuse_tcp(struct __sk_buff *skb, struct pkt *p)
{
	struct tcphdr *tcp, *at, rst = {};
	__u32 l3_len, payload = 0;
	void *l3;

	if (!p)
		return -DROP_TRUNCATED;
	l3_len = p->l3_proto == ETH_P_IP ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
	tcp = pkt_at(skb, p->l4_off, sizeof(*tcp));
	if (!tcp || tcp_payload(skb, p, tcp, &payload))
		return -DROP_TRUNCATED;
	/* A reset is never answered with a reset. */
	if (tcp->flags & TCP_RST)
		return -DROP_SERVICE_NO_BACKEND;
	reset_header(p, tcp, payload, &rst);
	if (bpf_skb_change_tail(skb, L3_OFF + l3_len + sizeof(rst), 0))
		return -DROP_SERVICE_NO_BACKEND;
	if (p->l3_proto == ETH_P_IP) {
		l3 = pkt_at(skb, L3_OFF, sizeof(struct iphdr));
		if (!l3)
			return -DROP_TRUNCATED;
		ipv4_header(l3, p->key.dst.w[3], p->key.src.w[3], IPPROTO_TCP, sizeof(struct iphdr) + sizeof(rst));
	} else {
		l3 = pkt_at(skb, L3_OFF, sizeof(struct ipv6hdr));
		if (!l3)
			return -DROP_TRUNCATED;
		ipv6_header(l3, &p->key.dst, &p->key.src, IPPROTO_TCP, sizeof(rst));
	}
	at = pkt_at(skb, L3_OFF + l3_len, sizeof(*at));
	if (!at)
		return -DROP_TRUNCATED;
	*at = rst;
	return 0;
}

/* Cuts the packet after the quoted part and makes room for new headers between the Ethernet header and it. */
static __always_inline int quote(struct __sk_buff *skb, __u32 quoted, __u32 room)
{
	if (bpf_skb_change_tail(skb, L3_OFF + quoted, 0))
		return -DROP_SERVICE_NO_BACKEND;
	if (bpf_skb_adjust_room(skb, room, BPF_ADJ_ROOM_MAC, 0))
		return -DROP_SERVICE_NO_BACKEND;
	return 0;
}

__noinline int refuse_ipv4(struct __sk_buff *skb, struct pkt *p)
{
	const __u32 quoted = sizeof(struct iphdr) + QUOTE_L4, room = sizeof(struct iphdr) + sizeof(struct icmphdr);
	struct iphdr *ip;
	struct icmphdr *icmp;

	/* With IP options the quote would need another size: nobody sends them. */
	if (!p || p->l4_off != L3_OFF + sizeof(struct iphdr) || quote(skb, quoted, room))
		return -DROP_SERVICE_NO_BACKEND;
	ip = pkt_at(skb, L3_OFF, room + quoted);
	if (!ip)
		return -DROP_SERVICE_NO_BACKEND;
	ipv4_header(ip, p->key.dst.w[3], p->key.src.w[3], IPPROTO_ICMP, room + quoted);
	icmp = (void *)(ip + 1);
	*icmp = (struct icmphdr){.type = ICMP_DEST_UNREACH, .code = ICMP_PORT_UNREACH};
	icmp->checksum = csum_fold(bpf_csum_diff(NULL, 0, (__be32 *)icmp, sizeof(*icmp) + quoted, 0));
	return 0;
}

__noinline int refuse_ipv6(struct __sk_buff *skb, struct pkt *p)
{
	const __u32 quoted = sizeof(struct ipv6hdr) + QUOTE_L4, room = sizeof(struct ipv6hdr) + sizeof(struct icmphdr);
	const __u32 len = sizeof(struct icmphdr) + quoted;
	struct ipv6hdr *ip;
	struct icmphdr *icmp;

	if (!p || p->l4_off != L3_OFF + sizeof(struct ipv6hdr) || quote(skb, quoted, room))
		return -DROP_SERVICE_NO_BACKEND;
	ip = pkt_at(skb, L3_OFF, room + quoted);
	if (!ip)
		return -DROP_SERVICE_NO_BACKEND;
	ipv6_header(ip, &p->key.dst, &p->key.src, IPPROTO_ICMPV6, len);
	icmp = (void *)(ip + 1);
	*icmp = (struct icmphdr){.type = ICMPV6_DEST_UNREACH, .code = ICMPV6_PORT_UNREACH};
	icmp->checksum = csum_fold(csum_add(pseudo_sum(p, IPPROTO_ICMPV6, len), bpf_csum_diff(NULL, 0, (__be32 *)icmp, len, 0)));
	return 0;
}

/* Turns the packet into the answer, but for its MACs. reason is why, and what is returned, negative, for a packet that gets no answer. */
static __always_inline int refuse(struct __sk_buff *skb, struct pkt *p, int reason)
{
	int ret;

	/* A port that is not there says nothing to who pings. */
	if (p->key.proto == IPPROTO_ICMP || p->key.proto == IPPROTO_ICMPV6)
		return -reason;
	if (p->key.proto == IPPROTO_TCP)
		ret = refuse_tcp(skb, p);
	else
		ret = p->l3_proto == ETH_P_IP ? refuse_ipv4(skb, p) : refuse_ipv6(skb, p);
	return ret == -DROP_SERVICE_NO_BACKEND ? -reason : ret;
}

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/*
 * Packets that do not fit the way ahead. A redirect leaves no room for the kernel to find out, so the programs compare with the flow's
 * MTU and tell the sender: "fragmentation needed" (RFC 1191 §4), "packet too big" (RFC 4443 §3.2). The packet is turned into the
 * answer, in place, before any translation: the quote is what the sender sent.
 *
 * The answer's source is the packet's destination, as in refuse.h. A router would name itself; but this address needs no lookup, the
 * sender's reverse path filter and whatever filters between the two take it for what they take the answers of the flow, and senders
 * judge such a message by its quote.
 *
 * An IPv4 packet that may be fragmented (without DF) gets the same answer, other than RFC 1812 §4.2.2.7 wants. The programs cannot
 * fragment, and the host's stack, which can, would bring forwarded packets before netfilter's FORWARD chain, on which Margay does not
 * depend. So IPv4 behaves as IPv6 does: the sender fragments. Linux lowers its path MTU whether the quoted packet had DF or not,
 * and then fragments itself; only a socket that ignores path MTU on purpose (IP_PMTUDISC_INTERFACE, IP_PMTUDISC_OMIT, IP_PMTUDISC_PROBE)
 * goes on sending what is dropped here. The plugin gives pods no larger MTU than the node's own way out, so this is for
 * the exceptions: a second NIC with a smaller MTU, and clients outside whose packets must be encapsulated.
 */

#include "refuse.h"

/* With the ICMP header as much as one bpf_csum_diff takes; the whole message stays below 576 bytes, which every host takes. */
#define TOO_BIG_QUOTE 504

#define JUMBO_OPTION_LEN 8 /* the hop-by-hop header with nothing else in it */
#define GSO_BY_FRAGS 0xffff /* SCTP: the sender has cut the segments already, each at its own length */

/*
 * Beyond 64 KiB (BIG TCP) the kernel says the length of an IPv6 packet in a jumbo option (RFC 2675), which no segment gets. Not all kernels
 * write it.
 */
static __always_inline __u32 jumbo_option_len(struct __sk_buff *skb, const struct pkt *p)
{
	struct ipv6hdr *ip6;

	if (p->l3_proto != ETH_P_IPV6)
		return 0;
	ip6 = pkt_at(skb, L3_OFF, sizeof(*ip6));
	return ip6 && !ip6->payload_len && ip6->nexthdr == IPPROTO_HOPOPTS ? JUMBO_OPTION_LEN : 0;
}

/* A packet that a later step cuts into segments (GSO): how long will they be? Of a tunnel inside the outer headers alone are counted. */
__noinline int segment_exceeds(struct __sk_buff *skb, struct pkt *p, __u32 mtu)
{
	struct tcphdr *tcp;
	__u32 headers;

	if (!p || skb->gso_size == GSO_BY_FRAGS)
		return 0;
	headers = p->l4_off - L3_OFF + sizeof(struct udphdr);
	if (p->key.proto == IPPROTO_TCP) {
		tcp = pkt_at(skb, p->l4_off, sizeof(*tcp));
		if (!tcp)
			return 0;
		headers = p->l4_off - L3_OFF + (tcp->doff >> 4) * 4 - jumbo_option_len(skb, p);
	}
	return headers + skb->gso_size > mtu;
}

/* Is any packet on the wire, from its IP header on, larger than mtu? The frame may be padded, but never to a length that would count. */
static __always_inline int pkt_exceeds(struct __sk_buff *skb, struct pkt *p, __u32 mtu)
{
	if (likely(skb->len - L3_OFF <= mtu))
		return 0;
	return skb->gso_size ? segment_exceeds(skb, p, mtu) : 1;
}

/* Leaves the quoted bytes, whose headers may be of any length, behind room for new ones; all of it linear. */
static __always_inline int quote_much(struct __sk_buff *skb, __u32 room)
{
	if (skb->len < L3_OFF + TOO_BIG_QUOTE)
		return -DROP_TOO_BIG;
	if (quote(skb, TOO_BIG_QUOTE, room) || bpf_skb_pull_data(skb, L3_OFF + room + TOO_BIG_QUOTE))
		return -DROP_TOO_BIG;
	return 0;
}

__noinline int too_big_ipv4(struct __sk_buff *skb, struct pkt *p)
{
	const __u32 room = sizeof(struct iphdr) + sizeof(struct icmphdr);
	struct iphdr *ip = pkt_at(skb, L3_OFF, sizeof(*ip));
	struct icmphdr *icmp;

	/* Never about a fragment but the first (RFC 1812 §4.3.2.7). */
	if (!p || !ip || (ip->frag_off & bpf_htons(IP_OFFSET)) || quote_much(skb, room))
		return -DROP_TOO_BIG;
	ip = pkt_at(skb, L3_OFF, room + TOO_BIG_QUOTE);
	if (!ip)
		return -DROP_TOO_BIG;
	ipv4_header(ip, p->key.dst.w[3], p->key.src.w[3], IPPROTO_ICMP, room + TOO_BIG_QUOTE);
	icmp = (void *)(ip + 1);
	*icmp = (struct icmphdr){.type = ICMP_DEST_UNREACH, .code = ICMP_FRAG_NEEDED, .sequence = bpf_htons(p->mtu)};
	icmp->checksum = csum_fold(bpf_csum_diff(NULL, 0, (__be32 *)icmp, sizeof(*icmp) + TOO_BIG_QUOTE, 0));
	return 0;
}

__noinline int too_big_ipv6(struct __sk_buff *skb, struct pkt *p)
{
	const __u32 room = sizeof(struct ipv6hdr) + sizeof(struct icmphdr), len = sizeof(struct icmphdr) + TOO_BIG_QUOTE;
	struct ipv6hdr *ip;
	struct icmphdr *icmp;

	if (!p || quote_much(skb, room))
		return -DROP_TOO_BIG;
	ip = pkt_at(skb, L3_OFF, room + TOO_BIG_QUOTE);
	if (!ip)
		return -DROP_TOO_BIG;
	ipv6_header(ip, &p->key.dst, &p->key.src, IPPROTO_ICMPV6, len);
	icmp = (void *)(ip + 1);
	*icmp = (struct icmphdr){.type = ICMPV6_PKT_TOOBIG, .sequence = bpf_htons(p->mtu)};
	icmp->checksum = csum_fold(csum_add(pseudo_sum(p, IPPROTO_ICMPV6, len), bpf_csum_diff(NULL, 0, (__be32 *)icmp, len, 0)));
	return 0;
}

/* Does the sender hear of it when its packet is dropped for this reason? */
static __always_inline int has_answer(int ret)
{
	return unlikely(ret == -DROP_SERVICE_NO_BACKEND || ret == -DROP_SERVICE_UNKNOWN_PORT || ret == -DROP_TOO_BIG);
}

/*
 * Turns a packet that is dropped for a reason with has_answer into the answer, its MACs exchanged, and counts the drop. 0: the hook sends
 * it back to where the packet came from; minus a drop reason: there is no answer.
 */
static __always_inline int answer(struct __sk_buff *skb, struct pkt *p, int ret)
{
	struct ethhdr *eth;
	__u32 reason = -ret;

	if (reason != DROP_TOO_BIG)
		ret = refuse(skb, p, reason);
	else
		ret = p->l3_proto == ETH_P_IP ? too_big_ipv4(skb, p) : too_big_ipv6(skb, p);
	if (ret)
		return ret;
	eth = pkt_at(skb, 0, sizeof(*eth));
	if (!eth)
		return -DROP_TRUNCATED;
	swap_macs(eth);
	note_drop(skb, p, reason);
	return 0;
}

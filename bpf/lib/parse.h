/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/*
 * Ethernet, IPv4 and IPv6, TCP, UDP, SCTP, ICMP and ICMPv6 → struct pkt. The only place besides nat.h, neigh.h, icmp.h, refuse.h and
 * toobig.h that knows the address families. Returns 0 or minus a drop reason.
 */

#include "pkt.h"

#define MAX_EXT_HEADERS 4
#define MAX_L4_OFF 255 /* lets the verifier bound the offset */
#define SCTP_HEADER 12
#define SCTP_INIT 1

/* A pointer to len bytes at off, or NULL where the packet is shorter. */
static __always_inline void *pkt_at(const struct __sk_buff *skb, __u32 off, __u32 len)
{
	void *at;

	if (off > MAX_L4_OFF)
		return NULL;
	at = pkt_data(skb) + off;
	if (at + len > pkt_end(skb))
		return NULL;
	return at;
}

static __always_inline int icmp_is_error(__u8 proto, __u8 type)
{
	if (proto == IPPROTO_ICMP)
		return type == ICMP_DEST_UNREACH || type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETERPROB;
	return type >= ICMPV6_DEST_UNREACH && type <= ICMPV6_PARAMPROB;
}

/* Ports, or the ICMP identifier as both ports, at off. All of these protocols keep what is needed in the first eight bytes. */
static __always_inline int parse_ports(struct __sk_buff *skb, __u32 off, struct flow_key *key)
{
	__be16 *ports = pkt_at(skb, off, 8);

	if (!ports)
		return -DROP_TRUNCATED;
	switch (key->proto) {
	case IPPROTO_TCP:
	case IPPROTO_UDP:
	case IPPROTO_SCTP:
		key->sport = ports[0];
		key->dport = ports[1];
		return 0;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		key->sport = ports[2];
		key->dport = ports[2];
		return 0;
	}
	return -DROP_UNKNOWN_PROTOCOL;
}

/* Steps over the quoted packet's extension headers. A first fragment is whole as far as it is quoted. */
static __always_inline int skip_quoted_headers(struct __sk_buff *skb, struct pkt *p)
{
	struct ipv6_frag *opt;

	for (int i = 0; i < MAX_EXT_HEADERS; i++) {
		if (p->key.proto != IPPROTO_HOPOPTS && p->key.proto != IPPROTO_ROUTING && p->key.proto != IPPROTO_DSTOPTS &&
		    p->key.proto != IPPROTO_FRAGMENT)
			return 0;
		opt = pkt_at(skb, p->quote_l4_off, sizeof(*opt));
		if (!opt)
			return -DROP_TRUNCATED;
		if (p->key.proto != IPPROTO_FRAGMENT)
			p->quote_l4_off += (((struct ipv6_opt *)opt)->hdrlen + 1) * 8;
		else if (opt->frag_off & bpf_htons(IP6_OFFSET))
			return -DROP_FRAGMENT;
		else
			p->quote_l4_off += sizeof(*opt);
		p->key.proto = opt->nexthdr;
	}
	return -DROP_EXTENSION_HEADER;
}

/* The packet that an ICMP error is about. Its source is the error's receiver; p->key becomes the key of what it sent. */
__noinline int parse_icmp_error(struct __sk_buff *skb, struct pkt *p)
{
	struct iphdr *ip4;
	struct ipv6hdr *ip6;
	struct addr receiver;
	__u32 off;
	int ret;

	if (!p)
		return -DROP_TRUNCATED;
	receiver = p->key.dst;
	off = p->l4_off + sizeof(struct icmphdr);
	if (p->l3_proto == ETH_P_IP) {
		ip4 = pkt_at(skb, off, sizeof(*ip4));
		if (!ip4)
			return -DROP_TRUNCATED;
		if (ip4->frag_off & bpf_htons(IP_OFFSET))
			return -DROP_FRAGMENT;
		if ((ip4->version_ihl & 0xf) * 4 < sizeof(*ip4))
			return -DROP_TRUNCATED;
		addr_set_v4(&p->key.src, ip4->saddr);
		addr_set_v4(&p->key.dst, ip4->daddr);
		p->key.proto = ip4->protocol;
		p->quote_l4_off = off + (ip4->version_ihl & 0xf) * 4;
	} else {
		ip6 = pkt_at(skb, off, sizeof(*ip6));
		if (!ip6)
			return -DROP_TRUNCATED;
		addr_set_v6(&p->key.src, ip6->saddr);
		addr_set_v6(&p->key.dst, ip6->daddr);
		p->key.proto = ip6->nexthdr;
		p->quote_l4_off = off + sizeof(*ip6);
		ret = skip_quoted_headers(skb, p);
		if (ret)
			return ret;
	}
	p->kind = PKT_ICMP_ERROR;
	/* Else it would travel with a flow that its receiver has no part in. */
	if (!addr_equal(&p->key.src, &receiver))
		return -DROP_NO_FLOW;
	return parse_ports(skb, p->quote_l4_off, &p->key);
}

static __always_inline int parse_icmp(struct __sk_buff *skb, struct pkt *p)
{
	struct icmphdr *icmp = pkt_at(skb, p->l4_off, sizeof(*icmp));

	if (!icmp)
		return -DROP_TRUNCATED;
	p->icmp_type = icmp->type;
	if (p->key.proto == IPPROTO_ICMPV6) {
		if (icmp->type >= ICMPV6_ND_FIRST && icmp->type <= ICMPV6_ND_LAST) {
			p->kind = PKT_ND;
			return 0;
		}
		if (icmp->type == ICMPV6_ECHO_REQUEST || icmp->type == ICMPV6_ECHO_REPLY)
			return parse_ports(skb, p->l4_off, &p->key);
	} else if (icmp->type == ICMP_ECHO || icmp->type == ICMP_ECHOREPLY) {
		return parse_ports(skb, p->l4_off, &p->key);
	}
	if (icmp_is_error(p->key.proto, icmp->type))
		return parse_icmp_error(skb, p);
	return -DROP_ICMP_TYPE;
}

static __always_inline int parse_tcp(struct __sk_buff *skb, struct pkt *p)
{
	struct tcphdr *tcp = pkt_at(skb, p->l4_off, sizeof(*tcp));

	if (!tcp)
		return -DROP_TRUNCATED;
	p->key.sport = tcp->source;
	p->key.dport = tcp->dest;
	p->tcp_flags = tcp->flags;
	return 0;
}

static __always_inline int parse_l4(struct __sk_buff *skb, struct pkt *p)
{
	__u8 *chunk;

	if (p->key.proto == IPPROTO_TCP)
		return parse_tcp(skb, p);
	if (p->key.proto == IPPROTO_ICMP || p->key.proto == IPPROTO_ICMPV6)
		return parse_icmp(skb, p);
	if (p->key.proto == IPPROTO_SCTP) {
		/* The type of the first chunk. */
		chunk = pkt_at(skb, p->l4_off + SCTP_HEADER, 1);
		if (chunk && *chunk == SCTP_INIT)
			p->tcp_flags = TCP_SYN;
	}
	return parse_ports(skb, p->l4_off, &p->key);
}

static __always_inline __u32 l4_header_len(__u8 proto)
{
	return proto == IPPROTO_TCP ? sizeof(struct tcphdr) : 8;
}

/*
 * A first fragment, which ends at end by its IP header: behind that there may be padding. Its transport header must be whole, or nobody
 * could judge the datagram (RFC 1858, RFC 7112). p->frag_at is where the fragmented part begins. Discovery is never fragmented
 * (RFC 6980), ICMP errors are too short to be.
 */
__noinline int parse_first_fragment(struct __sk_buff *skb, struct pkt *p, __u32 end)
{
	__u32 headers;
	int ret;

	if (!p)
		return -DROP_TRUNCATED;
	headers = p->l4_off + l4_header_len(p->key.proto);
	if (headers > end)
		return -DROP_FRAGMENT;
	ret = parse_l4(skb, p);
	if (ret)
		return ret;
	if (p->kind != PKT_FLOW)
		return -DROP_FRAGMENT;
	p->kind = PKT_FRAGMENT;
	p->frag_at = (headers - p->frag_at + 7) / 8;
	return 0;
}

static __always_inline int parse_ipv4_fragment(struct __sk_buff *skb, struct pkt *p, const struct iphdr *ip)
{
	p->frag_id = ip->id;
	p->frag_at = bpf_ntohs(ip->frag_off) & IP_OFFSET;
	if (!p->frag_at) {
		p->frag = FRAG_FIRST;
		p->frag_at = p->l4_off;
		return parse_first_fragment(skb, p, L3_OFF + bpf_ntohs(ip->tot_len));
	}
	p->frag = FRAG_LATER;
	p->kind = PKT_FRAGMENT;
	switch (p->key.proto) {
	case IPPROTO_TCP:
	case IPPROTO_UDP:
	case IPPROTO_SCTP:
	case IPPROTO_ICMP:
		return 0;
	}
	return -DROP_UNKNOWN_PROTOCOL;
}

static __always_inline int parse_ipv4(struct __sk_buff *skb, struct pkt *p)
{
	struct iphdr *ip = pkt_at(skb, L3_OFF, sizeof(*ip));
	__u32 ihl;

	if (!ip)
		return -DROP_TRUNCATED;
	ihl = (ip->version_ihl & 0xf) * 4;
	if (ip->version_ihl >> 4 != 4 || ihl < sizeof(*ip))
		return -DROP_TRUNCATED;
	addr_set_v4(&p->key.src, ip->saddr);
	addr_set_v4(&p->key.dst, ip->daddr);
	p->key.proto = ip->protocol;
	p->ttl = ip->ttl;
	p->l4_off = L3_OFF + ihl;
	if ((ip->daddr & bpf_htonl(0xf0000000)) == bpf_htonl(0xe0000000) || ip->daddr == 0xffffffff)
		return -DROP_MULTICAST;
	if (ip->protocol == IPPROTO_ICMPV6)
		return -DROP_UNKNOWN_PROTOCOL;
	if (ip->frag_off & bpf_htons(IP_MF | IP_OFFSET))
		return parse_ipv4_fragment(skb, p, ip);
	return parse_l4(skb, p);
}

/* A fragment header that says that this is all (RFC 6946) is stepped over. 1: nothing that can be read follows. */
static __always_inline int parse_fragment_header(struct __sk_buff *skb, struct pkt *p)
{
	struct ipv6_frag *frag = pkt_at(skb, p->l4_off, sizeof(*frag));
	__u32 off;

	if (!frag)
		return -DROP_TRUNCATED;
	if (p->frag != FRAG_NONE)
		return -DROP_EXTENSION_HEADER;
	p->key.proto = frag->nexthdr;
	p->l4_off += sizeof(*frag);
	off = bpf_ntohs(frag->frag_off);
	if (!(off & (IP6_OFFSET | IP6_MF)))
		return 0;
	p->frag_id = frag->id;
	if (!(off & IP6_OFFSET)) {
		p->frag = FRAG_FIRST;
		p->frag_at = p->l4_off;
		return 0;
	}
	p->frag = FRAG_LATER;
	p->frag_at = (off & IP6_OFFSET) / 8;
	return 1;
}

/* Steps over extension headers; p->key.proto is the protocol that follows them, and p->frag what a fragment header says. */
__noinline int skip_extension_headers(struct __sk_buff *skb, struct pkt *p)
{
	struct ipv6_opt *opt;
	int ret;

	if (!p)
		return -DROP_TRUNCATED;
	p->frag = FRAG_NONE;
	for (int i = 0; i <= MAX_EXT_HEADERS; i++) {
		switch (p->key.proto) {
		case IPPROTO_HOPOPTS:
		case IPPROTO_ROUTING:
		case IPPROTO_DSTOPTS:
		case IPPROTO_AH:
			break;
		case IPPROTO_FRAGMENT:
			ret = parse_fragment_header(skb, p);
			if (ret)
				return ret < 0 ? ret : 0;
			continue;
		case IPPROTO_TCP:
		case IPPROTO_UDP:
		case IPPROTO_SCTP:
		case IPPROTO_ICMPV6:
			return 0;
		default:
			return -DROP_EXTENSION_HEADER;
		}
		opt = pkt_at(skb, p->l4_off, sizeof(*opt));
		if (!opt)
			return -DROP_TRUNCATED;
		/* The authentication header counts in words (RFC 4302 §2.2). */
		p->l4_off += p->key.proto == IPPROTO_AH ? (opt->hdrlen + 2) * 4 : (opt->hdrlen + 1) * 8;
		p->key.proto = opt->nexthdr;
	}
	return -DROP_EXTENSION_HEADER;
}

static __always_inline int parse_ipv6_fragment(struct __sk_buff *skb, struct pkt *p)
{
	struct ipv6hdr *ip = pkt_at(skb, L3_OFF, sizeof(*ip));

	if (!ip)
		return -DROP_TRUNCATED;
	if (p->key.dst.b[0] == 0xff)
		return -DROP_MULTICAST;
	if (p->frag == FRAG_FIRST)
		return parse_first_fragment(skb, p, L3_OFF + sizeof(*ip) + bpf_ntohs(ip->payload_len));
	p->kind = PKT_FRAGMENT;
	switch (p->key.proto) {
	case IPPROTO_DSTOPTS:
	case IPPROTO_AH:
	case IPPROTO_TCP:
	case IPPROTO_UDP:
	case IPPROTO_SCTP:
	case IPPROTO_ICMPV6:
		return 0;
	}
	return -DROP_EXTENSION_HEADER;
}

static __always_inline int parse_ipv6(struct __sk_buff *skb, struct pkt *p)
{
	struct ipv6hdr *ip = pkt_at(skb, L3_OFF, sizeof(*ip));
	int ret;

	if (!ip)
		return -DROP_TRUNCATED;
	if (ip->version_class >> 4 != 6)
		return -DROP_TRUNCATED;
	addr_set_v6(&p->key.src, ip->saddr);
	addr_set_v6(&p->key.dst, ip->daddr);
	/* An IPv4-mapped address on the wire would be taken for the IPv4 address in the maps (RFC 4942 §2.2). */
	if (addr_is_v4(&p->key.src) || addr_is_v4(&p->key.dst))
		return -DROP_SPOOFED_ADDRESS;
	p->key.proto = ip->nexthdr;
	p->ttl = ip->hop_limit;
	p->l4_off = L3_OFF + sizeof(*ip);
	if (p->key.proto != IPPROTO_TCP && p->key.proto != IPPROTO_UDP && p->key.proto != IPPROTO_ICMPV6) {
		ret = skip_extension_headers(skb, p);
		if (ret)
			return ret;
		if (p->frag != FRAG_NONE)
			return parse_ipv6_fragment(skb, p);
	}
	ret = parse_l4(skb, p);
	if (p->kind != PKT_ND && (p->key.dst.b[0] == 0xff && p->kind != PKT_ICMP_ERROR))
		return -DROP_MULTICAST;
	return ret;
}

static __always_inline int parse_linear(struct __sk_buff *skb, struct pkt *p)
{
	struct ethhdr *eth = pkt_at(skb, 0, sizeof(*eth));

	if (!eth)
		return -DROP_TRUNCATED;
	/* The kernel has moved the tag out of the packet: what lies behind it belongs to another network. */
	if (skb->vlan_present)
		return -DROP_UNKNOWN_ETHERTYPE;
	p->l3_proto = bpf_ntohs(eth->h_proto);
	switch (p->l3_proto) {
	case ETH_P_IP:
		return parse_ipv4(skb, p);
	case ETH_P_IPV6:
		return parse_ipv6(skb, p);
	case ETH_P_ARP:
		p->kind = PKT_ARP;
		return 0;
	}
	return -DROP_UNKNOWN_ETHERTYPE;
}

/*
 * Makes the headers linear, TCP behind the longest header chain that parse accepts, and parses again. Not before it is needed: the
 * call costs more than a whole parse, and on a TCP segment, whose data the sender keeps a clone of, it copies the packet.
 */
__noinline int parse_pulled(struct __sk_buff *skb, struct pkt *p)
{
	__u32 want = MAX_L4_OFF + sizeof(struct tcphdr);

	if (!p)
		return -DROP_TRUNCATED;
	bpf_skb_pull_data(skb, skb->len < want ? skb->len : want);
	return parse_linear(skb, p);
}

static __always_inline int parse(struct __sk_buff *skb, struct pkt *p)
{
	int ret = parse_linear(skb, p);

	return unlikely(ret == -DROP_TRUNCATED) ? parse_pulled(skb, p) : ret;
}

/* The addresses alone, of any IP packet. */
static __always_inline int parse_addrs(struct __sk_buff *skb, struct pkt *p)
{
	struct iphdr *ip4;
	struct ipv6hdr *ip6;

	p->l3_proto = bpf_ntohs(skb->protocol);
	if (p->l3_proto == ETH_P_IP) {
		ip4 = pkt_at(skb, L3_OFF, sizeof(*ip4));
		if (!ip4)
			return -DROP_TRUNCATED;
		addr_set_v4(&p->key.src, ip4->saddr);
		addr_set_v4(&p->key.dst, ip4->daddr);
		return 0;
	}
	if (p->l3_proto != ETH_P_IPV6)
		return -DROP_UNKNOWN_ETHERTYPE;
	ip6 = pkt_at(skb, L3_OFF, sizeof(*ip6));
	if (!ip6)
		return -DROP_TRUNCATED;
	addr_set_v6(&p->key.src, ip6->saddr);
	addr_set_v6(&p->key.dst, ip6->daddr);
	return 0;
}

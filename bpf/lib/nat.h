/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/* Address rewrite of one packet, from the tuple it has to the tuple it shall have. */

#include "sctp.h"

/* From kernel 6.16 on: the checksum of a whole received packet (CHECKSUM_COMPLETE) does not change with an IPv6 address. */
#define BPF_F_IPV6 (1ULL << 7)

static __always_inline __u32 csum_add(__u32 a, __u32 b)
{
	__u32 sum = a + b;

	return sum + (sum < b);
}

static __always_inline __u16 csum_fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (__u16)~sum;
}

static __always_inline __u32 addr_sum(const struct addr *a)
{
	return csum_add(csum_add(a->w[0], a->w[1]), csum_add(a->w[2], a->w[3]));
}

/* What the rewrite from → to adds to a checksum that covers the addresses. Both are of one family, so the mapped prefix cancels. */
static __always_inline __u32 csum_diff_addrs(const struct flow_key *from, const struct flow_key *to)
{
	__u32 removed = csum_add(addr_sum(&from->src), addr_sum(&from->dst));

	return csum_add(csum_add(addr_sum(&to->src), addr_sum(&to->dst)), ~removed);
}

static __always_inline __u32 l4_csum_off(__u8 proto)
{
	switch (proto) {
	case IPPROTO_TCP:
		return offsetof(struct tcphdr, check);
	case IPPROTO_UDP:
		return offsetof(struct udphdr, check);
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		return offsetof(struct icmphdr, checksum);
	}
	return 0;
}

#define CHECKSUM_UNKNOWN 4
#define FIELD_UNKNOWN ~0ULL

/* A bit field of the kernel's own packet; unknown before 6.2 or without BTF. */
#define skb_field(skb, field)                                                                                                              \
	({                                                                                                                                 \
		struct sk_buff *own = NULL;                                                                                                \
		__u64 bits = FIELD_UNKNOWN;                                                                                                \
		if (bpf_cast_to_kern_ctx && __builtin_preserve_field_info(own->field, FIELD_EXISTS)) {                                     \
			own = bpf_cast_to_kern_ctx(skb);                                                                                   \
			bits = *((__u8 *)own + __builtin_preserve_field_info(own->field, FIELD_BYTE_OFFSET));                              \
			bits <<= __builtin_preserve_field_info(own->field, FIELD_LSHIFT_U64);                                              \
			bits >>= __builtin_preserve_field_info(own->field, FIELD_RSHIFT_U64);                                              \
		}                                                                                                                          \
		bits;                                                                                                                      \
	})

/* enum ip_summed, or CHECKSUM_UNKNOWN: struct __sk_buff does not have it. */
static __always_inline __u32 checksum_kind(struct __sk_buff *skb)
{
	__u64 kind = skb_field(skb, ip_summed);

	return kind == FIELD_UNKNOWN ? CHECKSUM_UNKNOWN : kind;
}

/* What the new ports add to a checksum. An echo identifier stands once in the packet, and twice in the tuple. */
static __always_inline __u32 csum_diff_ports(const struct flow_key *from, const struct flow_key *to)
{
	__u32 diff = csum_add(to->sport, (__u16)~from->sport);

	if (from->proto == IPPROTO_TCP || from->proto == IPPROTO_UDP)
		diff = csum_add(diff, csum_add(to->dport, (__u16)~from->dport));
	return diff;
}

/* The kernel does it, in a call for what the pseudo header covers and one for the rest: 22 ns each, where all that is added is two sums. */
static __always_inline int nat_l4_csum_by_kernel(struct __sk_buff *skb, struct pkt *p, const struct flow_key *to, __u32 addr_diff)
{
	__u32 off = p->l4_off + l4_csum_off(p->key.proto);
	__u64 flags = p->key.proto == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
	__u64 pseudo = flags | BPF_F_PSEUDO_HDR;

	if (p->key.proto != IPPROTO_ICMP && addr_diff) {
		/* An older kernel refuses the flag and touches nothing: ask again without it. */
		if (p->l3_proto != ETH_P_IPV6 || bpf_l4_csum_replace(skb, off, 0, addr_diff, pseudo | BPF_F_IPV6))
			if (bpf_l4_csum_replace(skb, off, 0, addr_diff, pseudo))
				return -DROP_NAT;
	}
	if (p->key.sport == to->sport && p->key.dport == to->dport)
		return 0;
	return bpf_l4_csum_replace(skb, off, 0, csum_diff_ports(&p->key, to), flags) ? -DROP_NAT : 0;
}

/* The transport checksum of TCP, UDP and ICMP, before the addresses and ports are changed. */
static __always_inline int nat_l4_csum(struct __sk_buff *skb, struct pkt *p, const struct flow_key *to, __u32 addr_diff)
{
	__u32 kind = checksum_kind(skb), pseudo = p->key.proto == IPPROTO_ICMP ? 0 : addr_diff, sum;
	__u16 *check;

	if (kind == CHECKSUM_UNKNOWN)
		return nat_l4_csum_by_kernel(skb, p, to, addr_diff);
	check = pkt_at(skb, p->l4_off + l4_csum_off(p->key.proto), sizeof(*check));
	if (!check)
		return -DROP_TRUNCATED;
	/* UDP without checksum. */
	if (p->key.proto == IPPROTO_UDP && *check == 0)
		return 0;
	if (kind == CHECKSUM_PARTIAL)
		sum = (__u16)~csum_fold(csum_add(*check, pseudo));
	else
		sum = csum_fold(csum_add((__u16)~*check, csum_add(pseudo, csum_diff_ports(&p->key, to))));
	*check = p->key.proto == IPPROTO_UDP && sum == 0 ? 0xffff : sum;
	/* In the NIC's sum this cancels out the ports and the addresses. The latter an IPv4 header's own checksum does once more. */
	if (kind == CHECKSUM_COMPLETE && p->l3_proto == ETH_P_IP)
		bpf_csum_update(skb, ~pseudo);
	return 0;
}

/* SCTP's checksum covers the ports, but no address. */
static __always_inline int nat_sctp_csum(struct __sk_buff *skb, struct pkt *p, const struct flow_key *to)
{
	__u32 change = (p->key.sport ^ to->sport) | (__u32)(p->key.dport ^ to->dport) << 16;

	return change ? sctp_change_ports(skb, p, change) : 0;
}

static __always_inline int nat_l3(struct __sk_buff *skb, struct pkt *p, const struct flow_key *to, __u32 addr_diff)
{
	struct iphdr *ip4;
	struct ipv6hdr *ip6;

	if (p->l3_proto == ETH_P_IP) {
		ip4 = pkt_at(skb, L3_OFF, sizeof(*ip4));
		if (!ip4)
			return -DROP_TRUNCATED;
		ip4->check = csum_fold(csum_add((__u16)~ip4->check, addr_diff));
		ip4->saddr = to->src.w[3];
		ip4->daddr = to->dst.w[3];
		return 0;
	}
	ip6 = pkt_at(skb, L3_OFF, sizeof(*ip6));
	if (!ip6)
		return -DROP_TRUNCATED;
	for (int i = 0; i < 4; i++) {
		ip6->saddr[i] = to->src.w[i];
		ip6->daddr[i] = to->dst.w[i];
	}
	return 0;
}

/*
 * A later fragment has no transport header; the checksum in the first one covers all of the datagram. IPv6: nothing in the packet cancels
 * the new address out in the NIC's sum of it.
 */
static __always_inline int nat_later_fragment(struct __sk_buff *skb, struct pkt *p, const struct flow_key *to, __u32 diff)
{
	if (p->l3_proto == ETH_P_IPV6)
		bpf_csum_update(skb, diff);
	return nat_l3(skb, p, to, diff);
}

/* Rewrites the packet from p->key to *to; diff is csum_diff_addrs of the two. All checksums stay right. */
__noinline int nat_rewrite(struct __sk_buff *skb, struct pkt *p, const struct flow_key *to, __u32 diff)
{
	__be16 *ports;
	int ret;

	if (!p || !to)
		return -DROP_NAT;
	if (unlikely(p->frag == FRAG_LATER))
		return nat_later_fragment(skb, p, to, diff);
	ret = p->key.proto == IPPROTO_SCTP ? nat_sctp_csum(skb, p, to) : nat_l4_csum(skb, p, to, diff);
	if (ret)
		return ret;
	ret = nat_l3(skb, p, to, diff);
	if (ret)
		return ret;
	/* No checksum that covers the addresses cancels them out in the NIC's sum of the whole packet. */
	if (p->key.proto == IPPROTO_SCTP && p->l3_proto == ETH_P_IPV6)
		bpf_csum_update(skb, diff);
	ports = pkt_at(skb, p->l4_off, 8);
	if (!ports)
		return -DROP_TRUNCATED;
	if (p->key.proto == IPPROTO_ICMP || p->key.proto == IPPROTO_ICMPV6) {
		ports[2] = to->sport;
	} else {
		ports[0] = to->sport;
		ports[1] = to->dport;
	}
	return 0;
}

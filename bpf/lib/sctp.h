/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/*
 * SCTP's checksum is a CRC32c of the whole packet (RFC 9260 §6.8), but no new one is needed where only the ports change. A CRC is linear:
 * the old sum and the new one differ by the CRC, without its start and end values, of what was changed. That is four bytes at the
 * front, and moving their CRC through the bytes behind them is a multiplication by a power of x in GF(2)[x] modulo the CRC's
 * polynomial: a few steps, whatever the packet's length.
 *
 * A packet whose sum is still to be computed, by a NIC or at the segmentation of a large one (CHECKSUM_PARTIAL), has nothing in the field
 * that matters: whoever computes it begins anew and overwrites what we wrote.
 */

#include "parse.h"

#define CRC32C_POLYNOMIAL 0x82f63b78 /* bit 31 is x^0, as in every value here */

/* x^(8 * 2^k): what 2^k bytes of zeros do. */
const __u32 crc32c_zeros[16] = {
	0x00800000, 0x00008000, 0x82f63b78, 0x6ea2d55c, 0x18b8ea18, 0x510ac59a, 0xb82be955, 0xb8fdb1e7,
	0x88e56f72, 0x74c360a4, 0xe4172b16, 0x0d65762a, 0x35d73a62, 0x28461564, 0xbf455269, 0xe2ea32dc,
};

/* a * b modulo the polynomial. Without a branch that depends on the data: nothing for the verifier to walk twice. */
static __always_inline __u32 crc32c_multiply(__u32 a, __u32 b)
{
	__u32 product = 0;

	for (int i = 0; i < 32; i++) {
		product ^= b & -(a >> 31);
		a <<= 1;
		b = (b >> 1) ^ (CRC32C_POLYNOMIAL & -(b & 1));
	}
	return product;
}

/* Bytes of the SCTP packet, by the IP header: the frame may be padded. 0: not told, because this is the first of several fragments. */
static __always_inline __u32 sctp_length(struct __sk_buff *skb, const struct pkt *p)
{
	__u32 headers = p->l4_off - L3_OFF;
	struct iphdr *ip4;
	struct ipv6hdr *ip6;

	if (p->frag != FRAG_NONE)
		return 0;
	if (p->l3_proto == ETH_P_IP) {
		ip4 = pkt_at(skb, L3_OFF, sizeof(*ip4));
		return ip4 ? bpf_ntohs(ip4->tot_len) - headers : 0;
	}
	ip6 = pkt_at(skb, L3_OFF, sizeof(*ip6));
	return ip6 ? bpf_ntohs(ip6->payload_len) + sizeof(*ip6) - headers : 0;
}

/* A NIC's sum of all bytes of the packet (CHECKSUM_COMPLETE) is of another kind: it has to be told of every word. */
static __always_inline void sctp_change_word(struct __sk_buff *skb, __u32 from, __u32 to)
{
	bpf_csum_update(skb, ~from);
	bpf_csum_update(skb, to);
}

/*
 * Corrects the checksum for ports that are about to change; change is the old and the new ones, as they stand in the packet, by exclusive
 * or. Multiplying by x^32 is what reading the four bytes does, and each byte behind them is x^8: together x^(8 * length).
 */
__noinline int sctp_change_ports(struct __sk_buff *skb, struct pkt *p, __u32 change)
{
	__u32 length, crc = change, *at;

	if (!p)
		return -DROP_NAT;
	length = sctp_length(skb, p);
	if (!length)
		return -DROP_FRAGMENT;
	for (int k = 0; k < 16; k++) {
		if (length >> k & 1)
			crc = crc32c_multiply(crc, crc32c_zeros[k]);
	}
	at = pkt_at(skb, p->l4_off, 12);
	if (!at)
		return -DROP_TRUNCATED;
	sctp_change_word(skb, at[0], at[0] ^ change);
	sctp_change_word(skb, at[2], at[2] ^ crc);
	at[2] ^= crc;
	return 0;
}

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/*
 * The packet at hand: what parse.h found out and every later step needs. One per program run, on its stack. It holds no pointer, so
 * that it can be handed to global functions, which the verifier checks once and not again for every call.
 */

#include "../headers/helpers.h"
#include "../maps.h"

struct pkt {
	struct flow_key key;  /* the tuple; for an ICMP error that of the packet it is about, as its receiver sent it */
	__u32 l4_off;	      /* from the Ethernet header; 0 for ARP */
	__u32 rule_id;	      /* for the event of a drop */
	__u16 l3_proto;	      /* host byte order: ETH_P_IP, ETH_P_IPV6, ETH_P_ARP */
	__u8 hook;	      /* enum hook */
	__u8 direction;	      /* enum direction: of the counter and the event */
	__u8 tcp_flags;	      /* 0 unless TCP; of SCTP: TCP_SYN for an INIT, which opens an association as a SYN does a connection */
	__u8 icmp_type;	      /* 0 unless ICMP */
	__u8 kind;	      /* enum pkt_kind */
	__u8 ttl;
	struct addr outer;    /* address that encapsulated it: from_overlay, and what from_netdev decapsulates */
	__u16 in_node;	      /* from_overlay, slow path and DROP_TOO_BIG: node of that address; 0: none */
	__u16 quote_l4_off;   /* PKT_ICMP_ERROR: transport header of the packet it is about, from the Ethernet header */
	__u16 mtu;	      /* with DROP_TOO_BIG: what would fit, bytes from the IP header */
	__u8 vni;	      /* from_overlay: enum overlay_vni */
	__u8 frag;	      /* enum pkt_frag */
	__be32 frag_id;
	__u16 frag_at; /* 8-byte units: FRAG_LATER: its offset; FRAG_FIRST: where a later one may begin at the earliest */
	__u16 pad;
};

enum pkt_frag {
	FRAG_NONE = 0,	/* a whole packet */
	FRAG_FIRST = 1, /* has the transport header */
	FRAG_LATER = 2, /* has none */
};

enum pkt_kind {
	PKT_FLOW = 0,	/* key is complete: look the flow up */
	PKT_ARP = 1,
	PKT_ND = 2,
	PKT_ICMP_ERROR = 3, /* key is of the packet that the error is about */
	PKT_FRAGMENT = 4,   /* see frag: a later one's key has no ports yet, in IPv6 no protocol either */
};

#define L3_OFF ((__u32)sizeof(struct ethhdr))

static __always_inline void *pkt_data(const struct __sk_buff *skb)
{
	return (void *)(unsigned long)skb->data;
}

static __always_inline void *pkt_end(const struct __sk_buff *skb)
{
	return (void *)(unsigned long)skb->data_end;
}

static __always_inline int addr_equal(const struct addr *a, const struct addr *b)
{
	return a->w[3] == b->w[3] && a->w[2] == b->w[2] && a->w[1] == b->w[1] && a->w[0] == b->w[0];
}

static __always_inline int addr_is_v4(const struct addr *a)
{
	return a->w[0] == 0 && a->w[1] == 0 && a->w[2] == bpf_htonl(0xffff);
}

static __always_inline int addr_is_multicast(const struct addr *a)
{
	return addr_is_v4(a) ? (a->b[12] & 0xf0) == 0xe0 : a->b[0] == 0xff;
}

/* ::, or ::ffff:0.0.0.0: no address. */
static __always_inline int addr_is_unspecified(const struct addr *a)
{
	return a->w[3] == 0 && (addr_is_v4(a) || (a->w[2] == 0 && a->w[1] == 0 && a->w[0] == 0));
}

/* 127.0.0.0/8 or ::1. */
static __always_inline int addr_is_loopback(const struct addr *a)
{
	if (addr_is_v4(a))
		return a->b[12] == 127;
	return a->w[0] == 0 && a->w[1] == 0 && a->w[2] == 0 && a->w[3] == bpf_htonl(1);
}

static __always_inline void addr_set_v4(struct addr *a, __be32 v4)
{
	a->w[0] = 0;
	a->w[1] = 0;
	a->w[2] = bpf_htonl(0xffff);
	a->w[3] = v4;
}

static __always_inline void addr_set_v6(struct addr *a, const __be32 *v6)
{
	a->w[0] = v6[0];
	a->w[1] = v6[1];
	a->w[2] = v6[2];
	a->w[3] = v6[3];
}

/*
 * MACs in two words instead of six bytes: clang does not know that BPF may access packets and map values at any address. In our structs
 * they stand at even offsets.
 */
static __always_inline int mac_equal(const __u8 *a, const __u8 *b)
{
	return *(const __u32 *)a == *(const __u32 *)b && *(const __u16 *)(a + 4) == *(const __u16 *)(b + 4);
}

static __always_inline void mac_copy(__u8 *to, const __u8 *from)
{
	*(__u32 *)to = *(const __u32 *)from;
	*(__u16 *)(to + 4) = *(const __u16 *)(from + 4);
}

static __always_inline int mac_is_zero(const __u8 *a)
{
	return *(const __u32 *)a == 0 && *(const __u16 *)(a + 4) == 0;
}

static __always_inline int key_equal(const struct flow_key *a, const struct flow_key *b)
{
	return addr_equal(&a->src, &b->src) && addr_equal(&a->dst, &b->dst) && a->sport == b->sport && a->dport == b->dport &&
	       a->proto == b->proto;
}

/* Is b the tuple of packets that answer a's? */
static __always_inline int key_answers(const struct flow_key *a, const struct flow_key *b)
{
	return addr_equal(&a->src, &b->dst) && addr_equal(&a->dst, &b->src) && a->sport == b->dport && a->dport == b->sport &&
	       a->proto == b->proto;
}

/* The tuple of the answering packets. */
static __always_inline void key_reverse(struct flow_key *to, const struct flow_key *from)
{
	to->src = from->dst;
	to->dst = from->src;
	to->sport = from->dport;
	to->dport = from->sport;
	to->proto = from->proto;
	to->pad[0] = 0;
	to->pad[1] = 0;
	to->pad[2] = 0;
}

static __always_inline struct node_state *node_settings(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&node_state, &zero);
}

static __always_inline __u32 now_seconds(void)
{
	return (__u32)(bpf_ktime_get_coarse_ns() / 1000000000ULL);
}

/*
 * A clock of a few hundred milliseconds to seconds, whose unit only the kernel's configuration knows: good for "the same as before".
 * The verifier turns the call into one load; the clock with a unit costs a call of 13 ns.
 */
static __always_inline __u32 now_tick(void)
{
	return (__u32)(bpf_jiffies64() >> 7);
}

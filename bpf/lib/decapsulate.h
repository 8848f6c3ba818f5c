/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/*
 * Packets of the overlay on the underlay's device. Those of known flows lose their outer headers here and take the fast path at once; all
 * others are the VXLAN device's, as they are: first packets, what only the stack can judge or take apart, whatever is not as our own nodes
 * send it. docs/design/0017-encapsulation.md.
 */

#include "established.h"

#define INNER_OFF (L3_OFF + ENCAPSULATION_LEN)
#define INNER_HEADERS_MIN ((__u32)(sizeof(struct iphdr) + sizeof(struct udphdr)))
#define INNER_HEADERS_MAX ((__u32)(sizeof(struct ipv6hdr) + sizeof(struct tcphdr)))

/* Are the outer headers as `encapsulate` and the device write them, around all of the packet, and without a checksum that must be verified? */
static __always_inline int outer_is_ours(const struct __sk_buff *skb, const struct encapsulation *h, const struct node_state *s)
{
	__u32 vni = bpf_ntohl(h->vxlan.vni) - (s->vni << 8), len = skb->len - L3_OFF;

	return h->ip.version_ihl == 0x45 && h->ip.tot_len == bpf_htons(len) && h->udp.len == bpf_htons(len - sizeof(h->ip)) && !h->udp.check &&
	       (h->vxlan.flags & ~VXLAN_HAS_GBP) == VXLAN_HAS_VNI && !(vni & 0xff) && vni >> 8 <= VNI_DSR;
}

/* TCP's and UDP's ports behind an IP header without options. 0, or something else: they cannot be read. */
static __always_inline int inner_ports(struct __sk_buff *skb, struct pkt *p)
{
	if (p->key.proto == IPPROTO_TCP)
		return parse_tcp(skb, p);
	return p->key.proto != IPPROTO_UDP || parse_ports(skb, p->l4_off, &p->key);
}

/* The inner packet's tuple, into p. 0, or something else: it is none that can be read here. */
static __always_inline int inner_tuple(struct __sk_buff *skb, struct pkt *p)
{
	struct iphdr *ip4;
	struct ipv6hdr *ip6;

	if (p->l3_proto == ETH_P_IP) {
		ip4 = pkt_at(skb, INNER_OFF, sizeof(*ip4));
		if (!ip4 || ip4->version_ihl != 0x45 || (ip4->frag_off & bpf_htons(IP_MF | IP_OFFSET)))
			return 1;
		addr_set_v4(&p->key.src, ip4->saddr);
		addr_set_v4(&p->key.dst, ip4->daddr);
		p->key.proto = ip4->protocol;
		p->ttl = ip4->ttl;
		p->l4_off = INNER_OFF + sizeof(*ip4);
		return inner_ports(skb, p);
	}
	ip6 = pkt_at(skb, INNER_OFF, sizeof(*ip6));
	if (p->l3_proto != ETH_P_IPV6 || !ip6 || ip6->version_class >> 4 != 6)
		return 1;
	addr_set_v6(&p->key.src, ip6->saddr);
	addr_set_v6(&p->key.dst, ip6->daddr);
	if (addr_is_v4(&p->key.src) || addr_is_v4(&p->key.dst))
		return 1;
	p->key.proto = ip6->nexthdr;
	p->ttl = ip6->hop_limit;
	p->l4_off = INNER_OFF + sizeof(*ip6);
	return inner_ports(skb, p);
}

/* The flow's node has sent it, by the device that the programs send there by, and nothing on this node is in the way (struct node). */
static __always_inline int sent_by_device(const struct pkt *p, const struct flow *f, const struct addr *local, __u32 ifindex)
{
	struct node *n = node_by_index(f->in_node);

	return flow_node_matches(p, f) && n && n->ifindex == ifindex && addr_equal(&n->local, local);
}

/*
 * The device has a queue: as long as packets of the flow may stand in it, all others follow them. FLOW_TCP_QUEUED holds for the tick that it
 * names and for the next.
 */
static __always_inline int flow_is_queued(struct flow *f)
{
	if (!(f->tcp & FLOW_TCP_QUEUED))
		return 0;
	if (((now_tick() - f->tcp / FLOW_TCP_QUEUED_TICK) & 7) <= 1)
		return 1;
	f->tcp &= FLOW_TCP_QUEUED - 1;
	return 0;
}

static __always_inline void flow_note_queued(struct flow *f)
{
	__u8 tcp = (f->tcp & (FLOW_TCP_QUEUED - 1)) | FLOW_TCP_QUEUED | (__u8)(now_tick() * FLOW_TCP_QUEUED_TICK);

	if (tcp != f->tcp)
		f->tcp = tcp;
}

/* Somebody on the way has marked the outer packet: the mark must be carried over (RFC 6040 §4.2). */
static __always_inline int is_marked(struct __sk_buff *skb, const struct pkt *p, __u8 tos)
{
	__be16 *inner = pkt_at(skb, INNER_OFF, sizeof(*inner));

	return !inner || (tos & 3) != outer_ecn(p->l3_proto, *inner);
}

/* The fast path, as far as it leads here: to a pod, or out of another device. */
static __always_inline int inner_is_known(struct __sk_buff *skb, const struct pkt *p, const struct flow *f)
{
	if (!flow_is_current(f) || (f->flags & FLOW_DENIED) || p->ttl <= 1 || (f->mtu && skb->len - INNER_OFF > f->mtu))
		return 0;
	return f->action == FLOW_TO_POD || (f->action == FLOW_TO_NETDEV && !next_hop_changed(skb, p, f));
}

/*
 * A packet that no wire has been between: its checksum is still to be computed, and its encapsulation is still noted. The helper does not
 * delete that note, and a NIC would look for inner headers that are gone.
 */
static __always_inline int is_unfinished(struct __sk_buff *skb, __u32 checksum)
{
	return checksum == CHECKSUM_PARTIAL && skb_field(skb, encapsulation);
}

/* Takes the outer headers off. 0, minus a drop reason, or 1: the device must do it, the packet is as it was. */
static __always_inline int take_outer_off(struct __sk_buff *skb, const struct pkt *p, const struct flow *f)
{
	__u32 kind = checksum_kind(skb);
	__u64 flags = p->l3_proto == ETH_P_IPV6 ? BPF_F_ADJ_ROOM_DECAP_L3_IPV6 : 0;
	struct ethhdr *eth;

	if (f->action != FLOW_TO_POD && (kind == CHECKSUM_UNKNOWN || is_unfinished(skb, kind)))
		return 1;
	/* What a NIC has verified, the receiver verifies again where it is not known here. */
	if (kind != CHECKSUM_UNKNOWN)
		flags |= BPF_F_ADJ_ROOM_NO_CSUM_RESET;
	if (bpf_skb_adjust_room(skb, -ENCAPSULATION_LEN, BPF_ADJ_ROOM_MAC, flags))
		return 1;
	/* It was the outermost checksum, that of the outer UDP header first, though it has none. */
	if (kind == CHECKSUM_UNNECESSARY)
		bpf_csum_level(skb, BPF_CSUM_LEVEL_DEC);
	eth = pkt_at(skb, 0, sizeof(*eth));
	if (!eth)
		return -DROP_TRUNCATED;
	eth->h_proto = bpf_htons(p->l3_proto);
	return 0;
}

/* A driver may have left all but the outer headers in the packet's pages. Where the shortest inner ones are there, mostly all are. */
static __always_inline void pull_headers(struct __sk_buff *skb)
{
	__u32 want = INNER_OFF + INNER_HEADERS_MAX;

	if (pkt_data(skb) + INNER_OFF + INNER_HEADERS_MIN > pkt_end(skb))
		bpf_skb_pull_data(skb, skb->len < want ? skb->len : want);
}

/* p is of the outer packet, and becomes the inner one's. Whatever is left to the device is TC_ACT_OK, and as it was. */
__noinline int decapsulate(struct __sk_buff *skb, struct pkt *p)
{
	struct node_state *s = node_settings();
	struct encapsulation *h;
	struct flow_key key; /* 6.1 takes it from the stack only */
	struct addr local;
	struct flow *f;
	__u8 tos;
	int ret;

	pull_headers(skb);
	h = pkt_at(skb, L3_OFF, ENCAPSULATION_LEN);
	if (!p || !s || !h || skb->pkt_type != PACKET_HOST || !outer_is_ours(skb, h, s))
		return TC_ACT_OK;
	p->outer = p->key.src;
	local = p->key.dst;
	p->l3_proto = bpf_ntohs(h->eth.h_proto);
	tos = h->ip.tos;
	if (inner_tuple(skb, p))
		return TC_ACT_OK;
	key = p->key;
	f = bpf_map_lookup_elem(&flows, &key);
	if (!f || pkt_opens_tcp(p) || !sent_by_device(p, f, &local, skb->ifindex))
		return TC_ACT_OK;
	/* Segments that were put together (GRO) keep the marks of their tunnel, which only the device takes off. */
	if (skb->gso_size || is_marked(skb, p, tos) || !inner_is_known(skb, p, f)) {
		flow_note_queued(f);
		return TC_ACT_OK;
	}
	ret = flow_is_queued(f) ? 1 : take_outer_off(skb, p, f);
	if (ret)
		return ret < 0 ? ret : TC_ACT_OK;
	p->l4_off -= ENCAPSULATION_LEN;
	flow_note_packet(f, p);
	ret = forward(skb, p, f, HOOK_FROM_NETDEV);
	/* The entry has become another one meanwhile. A bare inner packet is nothing for the stack. */
	return ret == TC_ACT_OK ? -DROP_INVALID_CONFIG : ret;
}

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/*
 * Packets of the overlay on the underlay's device. Those of known flows lose their outer headers here and take the fast path at once; all
 * others are the VXLAN device's, as they are: first packets, what only the stack can judge or take apart, whatever is not as our own nodes
 * send it. docs/design/0017-encapsulation.md.
 */

#include "established.h"

#define INNER_OFF (L3_OFF + ENCAPSULATION_LEN)
#define IPV4_CE 3

/* Are the outer headers as `encapsulate` and the device write them? Without a checksum, which the stack would have to verify. */
static __always_inline int outer_is_ours(const struct encapsulation *h, const struct node_state *s)
{
	__u32 vni = bpf_ntohl(h->vxlan.vni) - (s->vni << 8);

	return h->ip.version_ihl == 0x45 && !h->udp.check && (h->vxlan.flags & ~VXLAN_HAS_GBP) == VXLAN_HAS_VNI && !(vni & 0xff) &&
	       vni >> 8 <= VNI_DSR;
}

/* TCP's and UDP's ports behind an IP header without options. 0, or 1: something else. */
static __always_inline int inner_ports(struct __sk_buff *skb, struct pkt *p)
{
	struct tcphdr *tcp;

	if (p->key.proto == IPPROTO_UDP)
		return parse_ports(skb, p->l4_off, &p->key) != 0;
	if (p->key.proto != IPPROTO_TCP)
		return 1;
	tcp = pkt_at(skb, p->l4_off, sizeof(*tcp));
	if (!tcp)
		return 1;
	p->key.sport = tcp->source;
	p->key.dport = tcp->dest;
	p->tcp_flags = tcp->flags;
	return 0;
}

/* The inner packet's tuple, into p. 0, or 1: it is none that can be read here. */
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

/* The programs send to that node by this device, so nothing on the node is in the way of what it sends here (struct node). */
static __always_inline int node_by_device(const struct flow *f, const struct addr *local, __u32 ifindex)
{
	struct node *n = node_by_index(f->in_node);

	return n && n->ifindex == ifindex && addr_equal(&n->local, local);
}

/*
 * Segments that were put together (GRO) keep the marks of their tunnel, and a mark of congestion has to be carried over to the inner packet
 * (RFC 6040 §4.2): that is the device's. It has a queue, so for this tick and the next the flow's other packets go there as well, and overtake
 * nothing. Not by the entry's own tick, which is written behind that queue only.
 */
static __always_inline int flow_is_bulk(const struct __sk_buff *skb, const struct encapsulation *h, struct flow *f)
{
	__u8 tcp = f->tcp, tick = now_tick() * FLOW_TCP_BULK_TICK;

	if ((__u8)(tick - (tcp & -FLOW_TCP_BULK_TICK)) > FLOW_TCP_BULK_TICK)
		tcp &= FLOW_TCP_BULK - 1;
	if (skb->gso_size || (h->ip.tos & IPV4_CE) == IPV4_CE)
		tcp = (tcp & (FLOW_TCP_BULK - 1)) | FLOW_TCP_BULK | tick;
	if (tcp != f->tcp)
		f->tcp = tcp;
	return tcp & FLOW_TCP_BULK;
}

/* The fast path, as far as it leads here: to a pod, or out of another device. */
static __always_inline int inner_is_known(struct __sk_buff *skb, const struct pkt *p, const struct flow *f)
{
	if (pkt_opens_tcp(p) || !flow_is_current(f) || !flow_node_matches(p, f) || (f->flags & FLOW_DENIED) || p->ttl <= 1)
		return 0;
	if (f->mtu && skb->len - INNER_OFF > f->mtu)
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

/* Takes the outer headers off. 0, or 1: the device must do it, the packet is as it was. */
static __always_inline int take_outer_off(struct __sk_buff *skb, const struct pkt *p, const struct flow *f)
{
	__u32 kind = checksum_kind(skb);
	__u64 flags = p->l3_proto == ETH_P_IPV6 ? BPF_F_ADJ_ROOM_DECAP_L3_IPV6 : BPF_F_ADJ_ROOM_DECAP_L3_IPV4;
	struct ethhdr *eth;

	if (kind == CHECKSUM_UNKNOWN || (f->action != FLOW_TO_POD && is_unfinished(skb, kind)))
		return 1;
	if (bpf_skb_adjust_room(skb, -ENCAPSULATION_LEN, BPF_ADJ_ROOM_MAC, flags | BPF_F_ADJ_ROOM_NO_CSUM_RESET))
		return 1;
	/* What the NIC has verified was the outermost checksum, that of the outer UDP header first, though it has none. */
	if (kind == CHECKSUM_UNNECESSARY)
		bpf_csum_level(skb, BPF_CSUM_LEVEL_DEC);
	eth = pkt_at(skb, 0, sizeof(*eth));
	if (eth)
		eth->h_proto = bpf_htons(p->l3_proto);
	return 0;
}

/* p is of the outer packet, and becomes the inner one's. */
__noinline int decapsulate(struct __sk_buff *skb, struct pkt *p)
{
	struct node_state *s = node_settings();
	struct encapsulation *h = pkt_at(skb, L3_OFF, ENCAPSULATION_LEN);
	struct flow_key key; /* 6.1 takes it from the stack only */
	struct addr local;
	struct flow *f;

	if (!p || !s || !h || skb->pkt_type != PACKET_HOST || !outer_is_ours(h, s))
		return TC_ACT_OK;
	p->outer = p->key.src;
	local = p->key.dst;
	p->l3_proto = bpf_ntohs(h->eth.h_proto);
	if (inner_tuple(skb, p))
		return TC_ACT_OK;
	key = p->key;
	f = bpf_map_lookup_elem(&flows, &key);
	if (!f || flow_is_bulk(skb, h, f) || !inner_is_known(skb, p, f) || !node_by_device(f, &local, skb->ifindex) || take_outer_off(skb, p, f))
		return TC_ACT_OK;
	p->l4_off -= ENCAPSULATION_LEN;
	flow_note_packet(f, p);
	return forward(skb, p, f, HOOK_FROM_NETDEV);
}

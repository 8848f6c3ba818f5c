/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/*
 * The overlay between nodes. What goes out the programs encapsulate themselves where the agent has found that nothing speaks against it
 * (struct node); the rest they hand to the kernel's VXLAN device, in collect-metadata mode, with outer addresses and network number as
 * metadata. On the wire both are alike. What the device decapsulates has the same metadata; known flows do without (decapsulate.h).
 */

#include "lb.h"

#define VXLAN_TTL 64

static __always_inline struct node *node_by_index(__u32 index)
{
	return bpf_map_lookup_elem(&nodes, &index);
}

/* IPv4 in the byte order that the helpers want. */
static __always_inline __u32 addr_v4_host(const struct addr *a)
{
	return bpf_ntohl(a->w[3]);
}

/*
 * Addresses the packet to a node. The kernel's route chooses no source: the other side believes only the one that it knows. hash is group
 * policy; none is said as well, because the device would send what its stack happens to hold (seen in Linux 6.18).
 */
static __always_inline int set_tunnel_key(struct __sk_buff *skb, const struct node *n, __u32 vni, __u32 hash)
{
	struct bpf_tunnel_key key = {.tunnel_id = vni, .tunnel_ttl = VXLAN_TTL};
	struct vxlan_metadata md = {.gbp = hash};
	__u64 flags = BPF_F_ZERO_CSUM_TX; /* RFC 7348 §4.1; IPv6 has no header checksum and keeps the UDP one (RFC 8200 §8.1) */

	if (addr_is_v4(&n->addr)) {
		key.remote_ipv4 = addr_v4_host(&n->addr);
		key.local_ipv4 = addr_v4_host(&n->local);
	} else {
		flags = BPF_F_TUNINFO_IPV6;
		for (int i = 0; i < 4; i++) {
			key.remote_ipv6[i] = n->addr.w[i];
			key.local_ipv6[i] = n->local.w[i];
		}
	}
	if (bpf_skb_set_tunnel_key(skb, &key, sizeof(key), flags) || bpf_skb_set_tunnel_opt(skb, &md, sizeof(md)))
		return -DROP_REDIRECT;
	return 0;
}

/* Gives the packet the outer header towards a node; the overlay device does the rest. 0, or minus a drop reason. */
static __always_inline int overlay_address(struct __sk_buff *skb, __u32 index, __u32 vni)
{
	struct node_state *s = node_settings();
	struct node *n = node_by_index(index);

	/* A node that has gone left zeroes. */
	if (!s || !s->overlay_ifindex || !n || !n->mtu)
		return -DROP_NO_ROUTE;
	return set_tunnel_key(skb, n, s->vni + vni, 0);
}

#define VXLAN_HAS_VNI 0x08
#define VXLAN_HAS_GBP 0x80

/* What stands between the outer Ethernet header and the inner packet: RFC 7348 §5. */
struct encapsulation {
	struct iphdr ip;
	struct udphdr udp;
	struct vxlanhdr vxlan;
	struct ethhdr eth;
	__u16 pad; /* not on the wire */
};

#define ENCAPSULATION_LEN 50

/*
 * The kernel notes where the inner headers are and that segments are to be cut inside the tunnel, to the size that they have (it refuses what
 * it could not cut so).
 */
#define ENCAPSULATION_ROOM                                                                                                                 \
	(BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP | BPF_F_ADJ_ROOM_ENCAP_L2_ETH |               \
	 BPF_F_ADJ_ROOM_ENCAP_L2(sizeof(struct ethhdr)))

/* The inner packet's ECN, but for a mark of congestion only that ECN is in use (RFC 3168 §9.1.1): it stays inside, as the device has it. */
static __always_inline __u8 outer_ecn(__u16 l3_proto, __be16 first)
{
	__u8 ecn = (l3_proto == ETH_P_IP ? bpf_ntohs(first) : bpf_ntohs(first) >> 4) & 3;

	return ecn == 3 ? 2 : ecn;
}

/*
 * The outer packet may be fragmented on its way, as the device's may, so it needs an identification (RFC 6864 §4). In a row, as segments are
 * numbered: receivers aggregate only those.
 */
static __always_inline __be16 outer_id(struct __sk_buff *skb)
{
	__u32 zero = 0, *id = bpf_map_lookup_elem(&outer_ids, &zero);

	if (!id)
		return 0;
	*id += skb->gso_segs ? skb->gso_segs : 1;
	return bpf_htons(*id - (skb->gso_segs ? skb->gso_segs : 1));
}

static __always_inline void outer_ipv4(struct iphdr *ip, const struct node *n, __u8 tos, __be16 id, __u16 len)
{
	__be32 *w = (__be32 *)ip;

	ip->version_ihl = 0x45;
	ip->tos = tos;
	ip->tot_len = bpf_htons(len);
	ip->id = id;
	ip->ttl = VXLAN_TTL;
	ip->protocol = IPPROTO_UDP;
	ip->saddr = n->local.w[3];
	ip->daddr = n->addr.w[3];
	ip->check = csum_fold(csum_add(csum_add(csum_add(w[0], w[1]), csum_add(w[2], w[3])), w[4]));
}

/*
 * Writes the outer headers, for a node with ifindex. 0, minus a drop reason, or 1: the device must do it, the packet is as it was. That is of
 * segments that are neither TCP's nor UDP's, of a packet that is encapsulated already, of a frame to many, which bpf_redirect_neigh refuses, and
 * of what does not fit: an ICMP error, which no MTU was compared with, or more than 64 KiB (BIG TCP).
 */
static __always_inline int encapsulate(struct __sk_buff *skb, const struct node *n, const struct node_state *s, __u32 vni, __u32 hash)
{
	__u32 len = skb->len - L3_OFF + ENCAPSULATION_LEN, flow = bpf_get_hash_recalc(skb);
	struct ethhdr *eth = pkt_at(skb, 0, sizeof(*eth) + sizeof(__be16));
	struct encapsulation h = {};

	if (!eth || (eth->h_dest[0] & 1) || len > 0xffff || (!skb->gso_size && skb->len - L3_OFF > n->mtu))
		return 1;
	outer_ipv4(&h.ip, n, outer_ecn(bpf_ntohs(skb->protocol), *(__be16 *)(eth + 1)), outer_id(skb), len);
	/* The flow's own, of those that nobody else uses: RFC 7348 §5. Without a checksum: §4.1. */
	h.udp.source = bpf_htons(0xc000 | flow >> 18);
	h.udp.dest = s->overlay_port;
	h.udp.len = bpf_htons(len - sizeof(struct iphdr));
	h.vxlan.flags = hash ? VXLAN_HAS_VNI | VXLAN_HAS_GBP : VXLAN_HAS_VNI;
	h.vxlan.gbp = bpf_htons(hash);
	h.vxlan.vni = bpf_htonl((s->vni + vni) << 8);
	h.eth = *eth;
	if (bpf_skb_adjust_room(skb, ENCAPSULATION_LEN, BPF_ADJ_ROOM_MAC, ENCAPSULATION_ROOM))
		return 1;
	/* What the NIC has summed of the packet now begins further in front. */
	return bpf_skb_store_bytes(skb, L3_OFF, &h, ENCAPSULATION_LEN, BPF_F_RECOMPUTE_CSUM) ? -DROP_REDIRECT : 0;
}

static __always_inline int outer_redirect(const struct node *n)
{
	struct bpf_redir_neigh nh = {.nh_family = AF_INET, .ipv4_nh = n->addr.w[3]};

	if (n->flags & NODE_ON_LINK)
		return bpf_redirect_neigh(n->ifindex, &nh, sizeof(nh), 0);
	return bpf_redirect_neigh(n->ifindex, NULL, 0, 0);
}

/*
 * Sends the packet to another node. hash names a backend to the node that translates (0: none): it travels in the group policy field,
 * because nothing in the packet itself may change. hook is where the packet is: what the host's stack sends has a route already, what came
 * through the overlay has its outer header as one, and kernels forget to give that back when bpf_redirect_neigh puts another in its place.
 */
__noinline int overlay_send(struct __sk_buff *skb, __u32 hook, __u32 index, __u32 vni, __u32 hash)
{
	struct node_state *s = node_settings();
	struct node *n = node_by_index(index);
	int ret;

	/* A node that has gone left zeroes. */
	if (!s || !s->overlay_ifindex || !n || !n->mtu)
		return -DROP_NO_ROUTE;
	if (n->ifindex && hook != HOOK_FROM_OVERLAY && hook != HOOK_TO_NETDEV) {
		ret = encapsulate(skb, n, s, vni, hash);
		if (ret <= 0)
			return ret ? ret : outer_redirect(n);
	}
	ret = set_tunnel_key(skb, n, s->vni + vni, hash);
	return ret ? ret : bpf_redirect(s->overlay_ifindex, 0);
}

/* What an entry with FLOW_TO_NODE says. */
static __always_inline int overlay_forward(struct __sk_buff *skb, const struct flow *f, enum hook hook)
{
	__u32 hash = 0;

	if (!(f->flags & FLOW_FORWARDED))
		return overlay_send(skb, hook, f->out_node, VNI_PODS, 0);
	if (f->backend_port)
		hash = backend_hash(&f->backend, f->backend_port);
	return overlay_send(skb, hook, f->out_node, f->flags & FLOW_DSR ? VNI_DSR : VNI_FORWARDED, hash);
}

/* The backend that the forwarding node has chosen, by its hash; 0: it did not say. */
static __always_inline __u32 overlay_backend_hash(struct __sk_buff *skb)
{
	struct vxlan_metadata md = {};

	return bpf_skb_get_tunnel_opt(skb, &md, sizeof(md)) < 0 ? 0 : md.gbp & 0xffff;
}

/* Reads who sent the packet, and under which network number. Whether that is a node is asked by who looks at the packet's flow. */
__noinline int overlay_receive(struct __sk_buff *skb, struct pkt *p)
{
	struct node_state *s = node_settings();
	struct bpf_tunnel_key key = {};
	__u32 vni;

	if (!p || !s)
		return -DROP_INVALID_CONFIG;
	if (bpf_skb_get_tunnel_key(skb, &key, sizeof(key), 0) == 0) {
		addr_set_v4(&p->outer, bpf_htonl(key.remote_ipv4));
	} else {
		/* Another family is an error for the helper, and no metadata, too. */
		if (bpf_skb_get_tunnel_key(skb, &key, sizeof(key), BPF_F_TUNINFO_IPV6))
			return -DROP_OVERLAY_SOURCE;
		addr_set_v6(&p->outer, key.remote_ipv6);
	}
	vni = key.tunnel_id - s->vni;
	if (vni > VNI_DSR)
		return -DROP_OVERLAY_VNI;
	p->vni = vni;
	return 0;
}

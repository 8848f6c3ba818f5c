/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/*
 * The overlay between nodes: the kernel's VXLAN device in collect-metadata mode does the encapsulation, we tell it each packet's outer
 * addresses and network number, and read those of what comes in.
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

/* Addresses the packet to a node. The kernel's route chooses no source: the other side believes only the one that it knows. */
static __always_inline int set_tunnel_key(struct __sk_buff *skb, const struct node *n, __u32 vni)
{
	struct bpf_tunnel_key key = {.tunnel_id = vni, .tunnel_ttl = VXLAN_TTL};
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
	return bpf_skb_set_tunnel_key(skb, &key, sizeof(key), flags) ? -DROP_REDIRECT : 0;
}

/* Gives the packet the outer header towards a node; the overlay device does the rest. 0, or minus a drop reason. */
static __always_inline int overlay_address(struct __sk_buff *skb, __u32 index, __u32 vni)
{
	struct node_state *s = node_settings();
	struct node *n = node_by_index(index);

	/* A node that has gone left zeroes. */
	if (!s || !s->overlay_ifindex || !n || !n->mtu)
		return -DROP_NO_ROUTE;
	return set_tunnel_key(skb, n, s->vni + vni);
}

/*
 * Sends the packet to another node. hash names a backend to the node that translates (0: none): it travels in the group policy field,
 * because nothing in the packet itself may change.
 */
__noinline int overlay_send(struct __sk_buff *skb, __u32 index, __u32 vni, __u32 hash)
{
	struct node_state *s = node_settings();
	struct vxlan_metadata md = {.gbp = hash};
	int ret = overlay_address(skb, index, vni);

	if (ret || !s)
		return ret;
	if (hash && bpf_skb_set_tunnel_opt(skb, &md, sizeof(md)))
		return -DROP_REDIRECT;
	return bpf_redirect(s->overlay_ifindex, 0);
}

/* What an entry with FLOW_TO_NODE says. */
static __always_inline int overlay_forward(struct __sk_buff *skb, const struct flow *f)
{
	__u32 hash = 0;

	if (!(f->flags & FLOW_FORWARDED))
		return overlay_send(skb, f->out_node, VNI_PODS, 0);
	if (f->backend_port)
		hash = backend_hash(&f->backend, f->backend_port);
	return overlay_send(skb, f->out_node, f->flags & FLOW_DSR ? VNI_DSR : VNI_FORWARDED, hash);
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

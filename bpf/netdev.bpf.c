// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

/* The two programs on each of the node's network devices. */

#include "lib/icmp.h"

const char gpl_compatible[] SEC("license") = "Dual BSD/GPL";

/* An outer header of the overlay: the kernel's device takes it, and from_overlay judges what is in it. */
static __always_inline int is_overlay(const struct pkt *p)
{
	struct node_state *s = node_settings();

	return p->key.proto == IPPROTO_UDP && s && p->key.dport == s->overlay_port && s->overlay_ifindex &&
	       (node_addr_flags_of(&p->key.dst) & NODE_ADDR_LOCAL);
}

/*
 * What is for no pod and no service is the host's, unread: a packet that does not parse, ARP, ND. If it is for a pod after all,
 * the host's stack routes it to the pod's device, where to_pod drops it by name.
 */
static __always_inline int handle_from_netdev(struct __sk_buff *skb, struct pkt *p)
{
	int ret;

	if (parse(skb, p))
		return TC_ACT_OK;
	if (p->kind == PKT_ICMP_ERROR)
		return handle_icmp_error(skb, p);
	if (p->kind == PKT_FRAGMENT)
		ret = handle_fragment(skb, p);
	else if (p->kind == PKT_FLOW && !is_overlay(p))
		ret = handle_flow(skb, p);
	else
		return TC_ACT_OK;
	/* Nobody is told about a later fragment (RFC 1122 §3.2.2). */
	if (!has_answer(ret) || p->frag == FRAG_LATER)
		return ret;
	ret = answer(skb, p, ret);
	return ret ? ret : bpf_redirect(skb->ifindex, 0);
}

/* tc ingress of a node's network device: everything from outside. */
SEC("tc")
int from_netdev(struct __sk_buff *skb)
{
	struct pkt p = {.hook = HOOK_FROM_NETDEV, .direction = INGRESS};

	return finish(skb, &p, handle_from_netdev(skb, &p));
}

/*
 * Gives a packet from a device without link layer (WireGuard, IPIP, tun) an Ethernet header, as everything behind expects one. The
 * stack does not see it: it begins at the network header, which stays where it is. A redirect to such a device takes it off again.
 */
static __always_inline int push_ethernet(struct __sk_buff *skb)
{
	struct ethhdr *eth;

	if (bpf_skb_change_head(skb, sizeof(*eth), 0))
		return -DROP_NAT;
	eth = pkt_at(skb, 0, sizeof(*eth));
	if (!eth)
		return -DROP_TRUNCATED;
	eth->h_proto = skb->protocol;
	return 0;
}

/* tc ingress of a node's network device that has no link layer. */
SEC("tc")
int from_l3_netdev(struct __sk_buff *skb)
{
	struct pkt p = {.hook = HOOK_FROM_NETDEV, .direction = INGRESS};
	int ret = push_ethernet(skb);

	return finish(skb, &p, ret ? ret : handle_from_netdev(skb, &p));
}

/* tc egress of it: what leaves the node. */
SEC("tc")
int to_netdev(struct __sk_buff *skb)
{
	(void)skb;
	return TC_ACT_OK;
}

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

/* The two programs on each of the node's network devices. */

#include "lib/decapsulate.h"
#include "lib/icmp.h"

const char gpl_compatible[] SEC("license") = "Dual BSD/GPL";

/* An outer header of the overlay. */
static __always_inline int is_overlay(const struct pkt *p)
{
	struct node_state *s = node_settings();

	return p->key.proto == IPPROTO_UDP && s && p->key.dport == s->overlay_port && s->overlay_ifindex;
}

/*
 * into_netdev has sent it: translated already, for the host's stack. The overlay's MACs meant nothing. Anybody on the link can send such a
 * frame, so it must be one that may go to the host unread: for an address of its own.
 */
static __always_inline int is_translated(struct __sk_buff *skb, struct pkt *p)
{
	struct ethhdr *eth = pkt_at(skb, 0, sizeof(*eth));

	if (likely(!eth || !mac_equal(eth->h_source, eth->h_dest)))
		return 0;
	if (parse_addrs(skb, p) || !(node_addr_flags_of(&p->key.dst) & NODE_ADDR_LOCAL))
		return 0;
	/* Nor did it come from here: the source check is for whoever says so. */
	if ((node_addr_flags_of(&p->key.src) & NODE_ADDR_LOCAL) || endpoint_of(&p->key.src))
		return 0;
	bpf_skb_change_type(skb, PACKET_HOST);
	return 1;
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
		ret = handle_fragment(skb, p, HOOK_FROM_NETDEV);
	else if (p->kind != PKT_FLOW)
		return TC_ACT_OK;
	else if (is_overlay(p) && (node_addr_flags_of(&p->key.dst) & NODE_ADDR_LOCAL))
		return decapsulate(skb, p);
	else
		ret = handle_flow(skb, p, HOOK_FROM_NETDEV);
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

	if (unlikely(is_translated(skb, &p)))
		return TC_ACT_OK;
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

/* May this packet be the first of a flow? Every datagram may, an echo reply may not. */
static __always_inline int may_open(const struct pkt *p)
{
	if (p->key.proto == IPPROTO_TCP)
		return pkt_opens_tcp(p);
	return !is_icmp(p->key.proto) || p->icmp_type == ICMP_ECHO || p->icmp_type == ICMPV6_ECHO_REQUEST;
}

/* Nothing is known of the packet, which is the rule. The slow path only where a pod has the port already. */
static __always_inline int open_from_host(struct __sk_buff *skb, struct pkt *p)
{
	struct flow_key answers;

	key_reverse(&answers, &p->key);
	return bpf_map_lookup_elem(&flows, &answers) ? connect(skb, p, NULL) : TC_ACT_OK;
}

/*
 * The host's own traffic, which Margay touches in two cases only. The node answers in a service's name: the entry of the answers says how.
 * Or it opens a connection from a port that a masqueraded pod has towards the same place: then the host's port moves, because its
 * socket can be told apart by nobody but us, and the pod was first. In between, a segment costs one hash lookup.
 */
static __always_inline int handle_host_flow(struct __sk_buff *skb, struct pkt *p)
{
	struct flow *f = bpf_map_lookup_elem(&flows, &p->key);

	if (!f)
		return may_open(p) ? open_from_host(skb, p) : TC_ACT_OK;
	if (!flow_sender_matches(skb, p, f, HOOK_TO_NETDEV))
		return TC_ACT_OK;
	if (unlikely(pkt_opens_tcp(p) || !flow_is_current(f) || next_hop_changed(skb, p, f)))
		return connect(skb, p, f);
	flow_note_packet(f, p);
	return forward(skb, p, f, HOOK_TO_NETDEV);
}

/* The stack sends the fragments of a datagram in order; where a later one comes alone it is not held up (fragment_hold). */
static __always_inline int handle_host_fragment(struct __sk_buff *skb, struct pkt *p)
{
	int ret = fragment_begin(skb, p);

	if (ret != FRAGMENT_JOINED)
		return ret;
	ret = handle_host_flow(skb, p);
	return p->frag == FRAG_FIRST ? fragment_end(skb, p, ret) : ret;
}

static __always_inline int handle_to_netdev(struct __sk_buff *skb, struct pkt *p)
{
	int ret;

	if (parse(skb, p))
		return TC_ACT_OK;
	if (p->kind == PKT_ICMP_ERROR)
		return handle_icmp_error(skb, p);
	if (p->kind == PKT_FRAGMENT)
		ret = handle_host_fragment(skb, p);
	else if (p->kind == PKT_FLOW && !is_overlay(p))
		ret = handle_host_flow(skb, p);
	else
		return TC_ACT_OK;
	/* An answer in a service's name that must be encapsulated may be too big for that: the node's own socket hears of it. */
	if (ret != -DROP_TOO_BIG || p->frag == FRAG_LATER)
		return ret;
	ret = answer(skb, p, ret);
	return ret ? ret : bpf_redirect(skb->ifindex, BPF_F_INGRESS);
}

/*
 * tc egress of it: what leaves the node. What was forwarded, by the stack or redirected by our own programs, has come in on a device and
 * is done: one load and a branch. test/dataplane holds bpf_redirect_neigh to that.
 */
SEC("tc")
int to_netdev(struct __sk_buff *skb)
{
	struct pkt p = {.hook = HOOK_TO_NETDEV, .direction = EGRESS};

	if (skb->ingress_ifindex)
		return TC_ACT_OK;
	return finish(skb, &p, handle_to_netdev(skb, &p));
}

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

/*
 * The two programs between the host's own sockets and services. A veth pair whose two ends are the node's is to the host what a pod's is to
 * a pod: routes to service addresses lead into the one end, and from_host sees at the other what from_pod sees of a pod.
 * docs/design/0006-host-to-service.md
 */

#include "lib/icmp.h"

const char gpl_compatible[] SEC("license") = "Dual BSD/GPL";

/* The packet becomes the answer, with its MACs exchanged: back by the device that it was sent by. */
static __always_inline int answer_host(struct __sk_buff *skb, struct pkt *p, int ret)
{
	struct node_state *s = node_settings();
	struct ethhdr *eth;

	ret = answer(skb, p, ret);
	if (ret || !s)
		return ret;
	eth = pkt_at(skb, 0, sizeof(*eth));
	if (!eth)
		return -DROP_TRUNCATED;
	return bpf_redirect(mac_is_zero(eth->h_dest) ? LOOPBACK_IFINDEX : s->host_ifindex, BPF_F_INGRESS);
}

/* Nothing but what this node answers for comes here: there is no packet that the stack could take instead. */
static __always_inline int handle_from_host(struct __sk_buff *skb, struct pkt *p)
{
	int ret = parse(skb, p);

	if (ret)
		return ret;
	switch (p->kind) {
	case PKT_ARP:
		return -DROP_INVALID_ARP; /* the device resolves nothing */
	case PKT_ND:
		return -DROP_INVALID_ND;
	case PKT_ICMP_ERROR:
		return handle_icmp_error(skb, p);
	case PKT_FRAGMENT:
		ret = handle_fragment(skb, p, HOOK_FROM_HOST);
		break;
	default:
		ret = handle_flow(skb, p, HOOK_FROM_HOST);
	}
	/* Nobody is told about a later fragment (RFC 1122 §3.2.2). */
	return has_answer(ret) && p->frag != FRAG_LATER ? answer_host(skb, p, ret) : ret;
}

/* tc ingress of the pair's other end: what the host's stack sends to services. */
SEC("tc")
int from_host(struct __sk_buff *skb)
{
	struct pkt p = {.hook = HOOK_FROM_HOST, .direction = EGRESS};

	return finish(skb, &p, handle_from_host(skb, &p));
}

/* May the packet be the first of a flow that is translated? */
static __always_inline int may_open(const struct pkt *p)
{
	return p->key.proto == IPPROTO_TCP ? pkt_opens_tcp(p) : p->key.proto == IPPROTO_UDP || p->key.proto == IPPROTO_SCTP;
}

/*
 * The host talks to itself: does from_host have a word in it? It knows the flow, or that of an ICMP error; or a service has the address and
 * port; or the answers would be taken for those to a flow that was translated to this tuple.
 */
static __always_inline int is_for_services(const struct pkt *p)
{
	struct flow_key answers;
	struct flow *f;

	key_reverse(&answers, &p->key);
	f = bpf_map_lookup_elem(&flows, p->kind == PKT_ICMP_ERROR ? &answers : &p->key);
	if (f || p->kind == PKT_ICMP_ERROR)
		return f && (f->flags & FLOW_VIA_HOST);
	if (!may_open(p))
		return 0;
	if (service_find(&p->key, HOOK_FROM_HOST, 0, 0))
		return 1;
	/* Nothing is translated to a loopback address. */
	if (addr_is_loopback(&p->key.dst))
		return 0;
	f = bpf_map_lookup_elem(&flows, &answers);
	return f && (f->flags & (FLOW_VIA_HOST | FLOW_REPLY | FLOW_NAT)) == (FLOW_VIA_HOST | FLOW_REPLY | FLOW_NAT);
}

/*
 * A fragment, of which there are some on the loopback device only after a "too big" of ours. The later ones go where the first went: it leaves
 * an entry, which from_host then fills in. The stack sends them in order.
 */
static __always_inline int fragment_is_for_services(const struct pkt *p)
{
	struct fragment_key key;

	if (p->frag == FRAG_FIRST)
		return is_for_services(p) && datagram_make(p);
	fragment_key_of(p, &key);
	return bpf_map_lookup_elem(&fragments, &key) != NULL;
}

static __always_inline int handle_to_loopback(struct __sk_buff *skb, struct pkt *p)
{
	if (parse(skb, p))
		return 0;
	switch (p->kind) {
	case PKT_FLOW:
	case PKT_ICMP_ERROR:
		return is_for_services(p);
	case PKT_FRAGMENT:
		return fragment_is_for_services(p);
	}
	return 0;
}

/*
 * tc egress of the loopback device: what the host sends to addresses of its own, NodePorts among them. Everything but that is left alone,
 * unread where it does not parse.
 */
SEC("tc")
int to_loopback(struct __sk_buff *skb)
{
	struct pkt p = {.hook = HOOK_TO_LOOPBACK, .direction = EGRESS};
	struct node_state *s = node_settings();

	if (!s || !s->host_ifindex || !handle_to_loopback(skb, &p))
		return TC_ACT_OK;
	return bpf_redirect(s->host_ifindex, 0);
}

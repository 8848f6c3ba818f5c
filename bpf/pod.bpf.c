// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

/* The two programs on the host-side device of every pod. One copy serves all pods: what differs between them is in the maps. */

#include "lib/icmp.h"
#include "lib/neigh.h"

const char gpl_compatible[] SEC("license") = "Dual BSD/GPL";

static __always_inline int handle_from_pod(struct __sk_buff *skb, struct pkt *p)
{
	int ret = parse(skb, p);

	if (ret)
		return ret;
	switch (p->kind) {
	case PKT_ARP:
		return answer_arp(skb);
	case PKT_ND:
		return answer_nd(skb, p);
	case PKT_ICMP_ERROR:
		return handle_icmp_error(skb, p);
	case PKT_FRAGMENT:
		ret = handle_fragment(skb, p, HOOK_FROM_POD);
		break;
	default:
		ret = handle_flow(skb, p, HOOK_FROM_POD);
	}
	/* Nobody is told about a later fragment (RFC 1122 §3.2.2). */
	if (!has_answer(ret) || p->frag == FRAG_LATER)
		return ret;
	ret = answer(skb, p, ret);
	return ret ? ret : bpf_redirect_peer(skb->ifindex, 0);
}

static __always_inline int handle_to_pod(struct __sk_buff *skb, struct pkt *p)
{
	int ret = parse(skb, p);

	if (ret)
		return ret;
	switch (p->kind) {
	case PKT_ARP:
		return TC_ACT_OK;
	case PKT_ND:
		/* Contract row N14: never filtered. What the stack forwarded is none (RFC 4861 §7.1), but a packet past policy. */
		return p->ttl == 255 ? TC_ACT_OK : -DROP_INVALID_ND;
	case PKT_ICMP_ERROR:
		return handle_icmp_error(skb, p);
	case PKT_FRAGMENT:
		return handle_fragment(skb, p, HOOK_TO_POD);
	}
	return handle_flow(skb, p, HOOK_TO_POD);
}

/* tc ingress of the pod's host-side device: everything that the pod sends. */
SEC("tc")
int from_pod(struct __sk_buff *skb)
{
	struct pkt p = {.hook = HOOK_FROM_POD, .direction = EGRESS};

	return finish(skb, &p, handle_from_pod(skb, &p));
}

/* tc egress of it: what the host's own stack sends to the pod. */
SEC("tc")
int to_pod(struct __sk_buff *skb)
{
	struct pkt p = {.hook = HOOK_TO_POD, .direction = INGRESS};

	return finish(skb, &p, handle_to_pod(skb, &p));
}

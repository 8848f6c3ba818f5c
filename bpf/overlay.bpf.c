// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

/* The two programs on the overlay device, a VXLAN device in collect-metadata mode: the outer header is skb metadata on both ways. */

#include "lib/icmp.h"

const char gpl_compatible[] SEC("license") = "Dual BSD/GPL";

/* A refusal that the forwarding node has no entry for (direct server return): straight to the client, as the backend's answers go. */
static __always_inline int answer_client(struct __sk_buff *skb, const struct pkt *p)
{
	struct bpf_fib_lookup fib = {.ifindex = skb->ifindex, .l4_protocol = p->key.proto};

	fib_addrs(&fib, &p->key.dst, &p->key.src);
	if (!fib_leads_out(bpf_fib_lookup(skb, &fib, sizeof(fib), 0)))
		return -DROP_NO_ROUTE;
	return bpf_redirect_neigh(fib.ifindex, NULL, 0, 0);
}

/* An answer on the spot goes back through the node that the packet came from. */
static __always_inline int answer_node(struct __sk_buff *skb, struct pkt *p, int ret)
{
	int refused = ret == -DROP_SERVICE_NO_BACKEND;

	ret = answer(skb, p, ret);
	if (ret)
		return ret;
	return refused && p->vni == VNI_DSR ? answer_client(skb, p) : overlay_send(skb, HOOK_FROM_OVERLAY, p->in_node, p->vni, 0);
}

static __always_inline int handle_from_overlay(struct __sk_buff *skb, struct pkt *p)
{
	int ret = overlay_receive(skb, p);

	if (ret == -DROP_OVERLAY_SOURCE)
		ret = fragment_overlay(skb, p);
	if (!ret)
		ret = parse(skb, p);
	if (ret)
		return ret;
	switch (p->kind) {
	case PKT_ARP:
		return -DROP_INVALID_ARP; /* the device resolves nothing */
	case PKT_ND:
		return -DROP_INVALID_ND;
	case PKT_ICMP_ERROR:
		ret = handle_icmp_error(skb, p);
		break;
	case PKT_FRAGMENT:
		ret = handle_fragment(skb, p, HOOK_FROM_OVERLAY);
		break;
	default:
		ret = handle_flow(skb, p, HOOK_FROM_OVERLAY);
	}
	/* Nobody is told about a later fragment (RFC 1122 §3.2.2). */
	if (has_answer(ret) && p->in_node && p->frag != FRAG_LATER)
		return answer_node(skb, p, ret);
	/* The inner MACs mean nothing between nodes; the stack would take the frame for somebody else's. */
	if (ret == TC_ACT_OK && skb->pkt_type != PACKET_HOST)
		bpf_skb_change_type(skb, PACKET_HOST);
	return ret;
}

/*
 * What our programs redirect here has its tunnel key. What is left comes from the host's stack, whose routes to other nodes' pods lead
 * to this device: its own traffic, which is not ours to judge, and that of pods whose interface another plugin made, which from_pod has
 * judged. The destination says which node; the other side checks the source.
 */
static __always_inline int handle_to_overlay(struct __sk_buff *skb, struct pkt *p)
{
	struct bpf_tunnel_key key;
	__u32 index;
	int ret;

	if (bpf_skb_get_tunnel_key(skb, &key, sizeof(key), 0) == 0 ||
	    bpf_skb_get_tunnel_key(skb, &key, sizeof(key), BPF_F_TUNINFO_IPV6) == 0)
		return TC_ACT_OK;
	ret = parse_addrs(skb, p);
	if (ret)
		return ret;
	if (addr_is_multicast(&p->key.dst))
		return -DROP_MULTICAST;
	index = node_of(&p->key.dst);
	if (!index)
		return -DROP_NO_ROUTE;
	return overlay_address(skb, index, VNI_PODS);
}

/* tc ingress of the overlay device: what other nodes send, decapsulated. */
SEC("tc")
int from_overlay(struct __sk_buff *skb)
{
	struct pkt p = {.hook = HOOK_FROM_OVERLAY, .direction = INGRESS};

	return finish(skb, &p, handle_from_overlay(skb, &p));
}

/* tc egress of it: what this node's own stack sends to other nodes' pods, and what our programs redirect there. */
SEC("tc")
int to_overlay(struct __sk_buff *skb)
{
	struct pkt p = {.hook = HOOK_TO_OVERLAY, .direction = EGRESS};

	return finish(skb, &p, handle_to_overlay(skb, &p));
}
